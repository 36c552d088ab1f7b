"""The questions of the wizard in their order, as numbered lines, to a run or a saved config."""

from pathlib import Path

from engine.errors import UserError
from engine.wizard.draft import Draft
from engine.wizard.flow import Wizard, live_runs
from engine.wizard.review import Saved
from tui.plain.asking import ask
from tui.plain.dialogue import Back, Dialogue, Leave
from tui.plain.following import follow_run


def run_plain(draft: Draft, dialogue: Dialogue, *, home: Path | None = None) -> None:
    """Ask the questions, then start the run and follow it, or save the config.

    A draft of an opened config is asked at Review. Raises UserError for a run that failed.
    """
    wizard = Wizard(draft, home=home)
    dialogue.say(
        "Windtunnel. Enter takes the answer marked *, a number chooses, ? explains,"
        " b goes back, q leaves.",
        *(str(line) for line in live_runs(home)),
    )
    try:
        while (outcome := wizard.review.outcome) is None:
            _ask_step(wizard, dialogue)
        if isinstance(outcome, Saved):
            dialogue.say(*(f"  {line}" for line in outcome.lines()))
        else:
            follow_run(outcome, dialogue)
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
