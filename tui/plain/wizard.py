"""The six questions in their order, from the first or from Review, to a run or a saved config."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from engine.errors import UserError, WorkError
from engine.report.run import way_back
from engine.runs import RunFolder, list_runs, status
from engine.wizard.draft import Draft
from engine.wizard.flow import Wizard
from engine.wizard.review import Saved
from tui.plain.asking import ask
from tui.plain.data import ask_data, count, is_local
from tui.plain.dialogue import Back, Dialogue, Leave
from tui.plain.following import follow_run
from tui.plain.preview import ask_preview
from tui.plain.setup import Setup

_QUESTIONS: Final[tuple[tuple[str, Callable[[Setup], None]], ...]] = (
    ("Machine", lambda setup: ask(setup.dialogue, setup.wizard.machine)),
    ("Model", lambda setup: ask(setup.dialogue, setup.wizard.model)),
    ("Data", ask_data),
    ("Preview", ask_preview),
    ("Plan", lambda setup: ask(setup.dialogue, setup.wizard.plan)),
)


def run_plain(draft: Draft, dialogue: Dialogue, *, home: Path | None = None) -> None:
    """Ask the questions, then start the run and follow it, or save the config.

    A draft of an opened config is asked at Review. Raises UserError for a run that failed.
    """
    setup = Setup(draft, dialogue, Wizard(draft, home=home), home)
    dialogue.say(
        "Windtunnel. Enter takes the answer marked *, a number chooses, ? explains,"
        " b goes back, q leaves."
    )
    _mention_live_run(dialogue, home)
    try:
        outcome = _ask_all(setup, first=len(_QUESTIONS) if draft.opened else 0)
        if isinstance(outcome, Saved):
            dialogue.say(*(f"  {line}" for line in outcome.lines()))
        elif outcome is not None:
            follow_run(outcome, dialogue)
    except Leave as left:
        dialogue.say(str(left))


def _ask_all(setup: Setup, first: int) -> RunFolder | Saved | None:
    """The run that was started, or the config that was saved."""
    at = first
    while True:
        try:
            if at == len(_QUESTIONS):
                _head(setup.dialogue, at, "Review", setup.draft.run_name())
                if setup.found is not None or is_local(setup.draft):
                    count(setup)  # a hub is asked on Data alone, where the person agrees
                ask(setup.dialogue, setup.wizard.review)
                return setup.wizard.review.outcome
            title, ask_it = _QUESTIONS[at]
            _head(setup.dialogue, at, title)
            ask_it(setup)
        except Back:
            at = max(0, at - 1)
        except UserError as error:
            setup.dialogue.refuse(error)
            at = max(0, at - 1)
        else:
            at += 1


def _head(dialogue: Dialogue, at: int, title: str, more: str = "") -> None:
    dialogue.say("", f"{at + 1} of {len(_QUESTIONS) + 1}  {title}{': ' if more else ''}{more}")


def _mention_live_run(dialogue: Dialogue, home: Path | None) -> None:
    for run in list_runs(home):
        with suppress(WorkError):  # a folder that cannot be read is no reason to ask nothing
            word = status(run)
            if word != "waiting" and (way := way_back(run, word)):
                dialogue.say(f"{run.name} is {way}")
