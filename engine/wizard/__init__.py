"""What a person decides before a run, and what follows from it, without a screen.

    flow        Wizard: the six steps over one draft, what is worked out, where an answer leads
    question    what is asked, as values: Question, Choice, Confirm, Work; Step is one of the six
    machine     step 1, MachineStep: a device that is here, or one that is planned for
    model       step 2, ModelStep: every model with what it comes to on that device
    data        step 3, DataStep: which rows, read whole before they are taken
    preview     step 4, PreviewStep: rows as training reads them, what of them is learned
    plan        step 5, PlanStep: every value with its reason, what would make it fit
    review      step 6, ReviewStep: start, save, name, edit; its outcome is the run or the file
    reading     rows that a step asks for: read in this process, or by the worker of a screen
    draft       the answers so far, the config that follows from them, its rows in the plan
    start       what is asked for in words or by a file; why a run cannot start, its start

A printer (full screen, inline questions, plain lines) holds no question of its own. It goes around:

    wizard = Wizard(draft, home=home)
    while work := wizard.work():              # a value: print work.waiting while it is done
        wizard.receive(work, perform(work, progress))   # in a thread or here; late ones are dropped
                                              # work.request is the same for DataWorker.ask
    question = wizard.question()              # headline, facts, choices, which one is recommended
    ...                                       # a choice with `asks` wants a text, see `completes`
    asked = wizard.confirm(key, text)         # None, or what is asked again: title, text, yes, no
    wizard.take(key, text)                    # UserError(what, why, fix): all is as it was
    wizard.back()
    wizard.review.outcome                     # a RunFolder or a Saved once it has ended

and follows `wizard.step.title` or `wizard.at`. A page of the full screen uses its own step instead,
`wizard.machine`, `wizard.model` and so on, which have the same methods and more: the verdict of a
line under the cursor, a survey of another device. What strangers wrote is in these values as it is:
whoever prints makes it visible. This package imports none of its modules, so that a first frame
waits for no other.
"""
