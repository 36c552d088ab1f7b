"""Question 6: start the run or save its config; then the run in lines.

The run is detached before its first line is shown, so that leaving never stops it.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, TypeAlias

from engine.errors import UserError, WorkError
from engine.events import Ended, Event, Phase, Step
from engine.report.events import event_line
from engine.report.run import state_lines, way_back
from engine.runs import RunFolder, follow, status
from engine.visible import visible
from engine.wizard.draft import Draft
from engine.wizard.start import free_config_path, save_config, start_run, why_not
from tui.plain.dialogue import Answer, Dialogue, Leave
from tui.plain.setup import Setup, ask_text

_LINE_STEPS: Final = 10
_LINE_SECONDS: Final = 60.0

Outcome: TypeAlias = RunFolder | Literal["saved"] | None
"""Of an action; None asks again."""


def ask_review(setup: Setup) -> RunFolder | None:
    """Question 6. Gives the run that was started, None where the config was saved."""
    while True:
        actions = _list_actions(setup)
        action = actions[setup.dialogue.choose([choice for choice, _ in actions])][1]
        try:
            outcome = action(setup)
        except UserError as error:
            setup.dialogue.refuse(error)
        else:
            if outcome is not None:
                return outcome if isinstance(outcome, RunFolder) else None


def _list_actions(setup: Setup) -> list[tuple[Answer, Callable[[Setup], Outcome]]]:
    """What can be done now, the likeliest first; says why a run cannot start."""
    draft = setup.draft
    actions: list[tuple[Answer, Callable[[Setup], Outcome]]] = [
        (Answer("save only", "A config, to run later with `windtunnel train`."), _save),
        (Answer("show the config", "The file with a reason beside each value."), _show),
        (Answer(f"another name than {draft.run_name()}", "Of the run and its folder."), _rename),
    ]
    if problem := why_not(draft):
        setup.dialogue.say("  It cannot start here.")
        setup.dialogue.refuse(problem)
    else:
        start = Answer(_start_words(draft), "The run goes on if this window closes.")
        actions.insert(0, (start, _start))
    return actions


def _start_words(draft: Draft) -> str:
    architecture = draft.architecture()
    made_here = architecture.card is not None and not architecture.card.repositories
    if made_here or architecture.folder:
        return "start now"
    return "start now; weights that are not here are downloaded from huggingface.co first"


def _start(setup: Setup) -> Outcome:
    return start_run(setup.draft, home=setup.home)


def _save(setup: Setup) -> Outcome:
    """Write the config where the person says."""
    draft, dialogue = setup.draft, setup.dialogue
    usual = free_config_path(draft)
    named: list[str] = []
    if not ask_text(dialogue, f"  Path, Enter for {usual}: ", named.append):
        return None
    path = Path(named[0] or usual).expanduser()
    if os.path.exists(path):
        dialogue.say(f"  {path} is there already.")
        if dialogue.choose([Answer("take another name"), Answer("replace it")]) == 0:
            return None
    saved = save_config(draft, path)
    dialogue.say(f"  Saved to {saved}.")
    if draft.device is not None and draft.device.planned:
        there = f"windtunnel train {path.name}"
        dialogue.say(f"  Copy {path.name} to the machine and run: {there}")
    else:
        dialogue.say(f"  Train it with: windtunnel train {path}")
    return "saved"


def _show(setup: Setup) -> Outcome:
    setup.dialogue.say(*(f"  {line}" for line in setup.draft.config_text().splitlines()))
    return None


def _rename(setup: Setup) -> Outcome:
    draft = setup.draft

    def take(name: str) -> None:
        draft.name = name or draft.name

    ask_text(setup.dialogue, f"  Name of the run, now {draft.run_name()}: ", take)
    return None


def follow_run(
    run: RunFolder, dialogue: Dialogue, clock: Callable[[], float] = time.monotonic
) -> None:
    """The run in lines, one for 10 steps or a minute, to its end or until ctrl+c.

    Raises Leave at ctrl+c, and the sentence of a run that failed (exit status 1).
    """
    name = visible(run.name, one_line=True)
    dialogue.say(f"Started {name}. ctrl+c leaves it running; back to it: windtunnel watch {name}")
    shown_at, last = clock(), None
    try:
        for recorded in follow(run):
            event = recorded.event
            line = event_line(event)
            if line and _is_due(event, last, clock() - shown_at):
                dialogue.say(str(line))
                shown_at = clock()
            last = event
    except KeyboardInterrupt:
        raise Leave(f"{name} is {way_back(run, status(run)) or 'done'}") from None
    if isinstance(last, Ended) and last.outcome == "failed":
        raise UserError(last.what, last.why, last.fix, exit_status=1)
    if not isinstance(last, Ended):
        raise WorkError(
            f"The run {name} is lost.",
            "Its trainer ended without a word.",
            f"Read {visible(str(run.log), one_line=True)}, then: windtunnel resume {name}",
        )
    dialogue.say(*map(str, state_lines(run)))


def _is_due(event: Event, last: Event | None, silent_seconds: float) -> bool:
    if isinstance(event, Phase):
        # A download tells its progress several times a second.
        return not isinstance(last, Phase) or last.name != event.name or _is_long(silent_seconds)
    if isinstance(event, Step):
        at_end = event.step == event.total_steps
        return at_end or event.step % _LINE_STEPS == 0 or _is_long(silent_seconds)
    return not isinstance(event, Ended)  # what came of it is said below


def _is_long(seconds: float) -> bool:
    return seconds >= _LINE_SECONDS
