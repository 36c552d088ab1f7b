"""A run in lines, from its start to its end or until the person leaves it."""

import time
from collections.abc import Callable
from typing import Final

from engine import events
from engine.errors import UserError, WorkError
from engine.report.run import event_line, state_lines, way_back
from engine.runs import RunFolder, follow, status
from engine.visible import visible
from tui.plain.dialogue import Dialogue, Leave

_LINE_STEPS: Final = 10
_LINE_SECONDS: Final = 60.0


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
    if isinstance(last, events.Ended) and last.outcome == "failed":
        raise UserError(last.what, last.why, last.fix, exit_status=1)
    if not isinstance(last, events.Ended):
        raise WorkError(
            f"The run {name} is lost.",
            "Its trainer ended without a word.",
            f"Read {visible(str(run.log), one_line=True)}, then: windtunnel resume {name}",
        )
    dialogue.say(*map(str, state_lines(run)))


def _is_due(event: events.Event, last: events.Event | None, silent_seconds: float) -> bool:
    if isinstance(event, events.Phase):
        # A download tells its progress several times a second.
        return (
            not isinstance(last, events.Phase)
            or last.name != event.name
            or _is_long(silent_seconds)
        )
    if isinstance(event, events.Step):
        at_end = event.step == event.total_steps
        return at_end or event.step % _LINE_STEPS == 0 or _is_long(silent_seconds)
    return not isinstance(event, events.Ended)  # what came of it is said below


def _is_long(seconds: float) -> bool:
    return seconds >= _LINE_SECONDS
