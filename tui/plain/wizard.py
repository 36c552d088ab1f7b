"""The questions of the wizard in their order, as numbered lines, to a run or a saved config."""

from pathlib import Path

from engine.errors import UserError
from engine.runs import RunFolder
from engine.wizard.draft import Draft
from engine.wizard.flow import Wizard, live_runs
from tui.plain.asking import ask
from tui.plain.dialogue import Back, Dialogue, Leave
from tui.plain.following import follow_run


def run_plain(
    draft: Draft,
    dialogue: Dialogue,
    *,
    home: Path | None = None,
    new: bool = False,
    out: Path | None = None,
) -> None:
    """Ask the questions, then start the run and follow it, or save the config.

    A draft of an opened config is asked at Review; `new` and `out` are ReviewStep's. Raises
    UserError for a run that failed.
    """
    wizard = Wizard(draft, home=home, new=new, out=out)
    dialogue.say(
        "Windtunnel. Enter takes the answer marked *, a number chooses, ? explains,"
        " b goes back, q leaves.",
        *(str(line) for line in live_runs(home)),
    )
    try:
        while (outcome := wizard.review.outcome) is None:
            _ask_step(wizard, dialogue)
        if isinstance(outcome, RunFolder):
            follow_run(outcome, dialogue)
        elif not new:  # who asks for a new config has read it
            dialogue.say(*(f"  {line}" for line in outcome.lines()))
    except Leave as left:
        dialogue.say(str(left))


def _ask_step(wizard: Wizard, dialogue: Dialogue) -> None:
    place, of = wizard.at + 1, len(wizard.steps)
    dialogue.say("", f"{place} of {of}  {wizard.step.title}")
    try:
        ask(dialogue, wizard.step)
        wizard.forward()
    except Back:
        wizard.back()
    except UserError as error:
        dialogue.refuse(error)
        wizard.back()
