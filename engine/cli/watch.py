"""A run in the foreground: what a person sees of it, and how its end becomes an exit status.

The drawing is behind a protocol, so that the terminal's own progress display can take the place of
plain lines without the engine knowing how to draw.
"""

import sys
import time
from collections.abc import Callable
from subprocess import Popen
from typing import Protocol, TextIO

from engine.errors import UserError, WorkError
from engine.events import Ended, Phase, Recorded, Step
from engine.interrupt import INTERRUPTED
from engine.launch import forwarded_signals
from engine.report.events import event_line
from engine.runs import Follower, RunFolder, follow
from engine.visible import visible


class Watch(Protocol):
    """Something that shows the events of a run as they come."""

    def show(self, recorded: Recorded) -> None:
        """Take in one event."""

    def close(self) -> None:
        """The run has ended, or nobody watches any more."""


class PlainWatch:
    """Lines on stderr, steps and phases thinned out in time; for pipes, logs, screen readers."""

    LINE_SECONDS = 5.0

    def __init__(
        self, out: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._out = out or sys.stderr
        self._clock = clock
        self._next = 0.0

    def show(self, recorded: Recorded) -> None:
        line = event_line(recorded.event)
        if line is None or isinstance(recorded.event, Ended):  # whoever waits for the end tells it
            return
        last = isinstance(recorded.event, Step) and (
            recorded.event.step == recorded.event.total_steps
        )
        if isinstance(recorded.event, Step | Phase) and not last:
            if self._clock() < self._next:
                return
            self._next = self._clock() + self.LINE_SECONDS
        print(visible(str(line), one_line=True), file=self._out, flush=True)

    def close(self) -> None:
        self._out.flush()


def watch_to_end(run: RunFolder, process: "Popen[bytes]", follower: Follower, watch: Watch) -> int:
    """Show a foreground trainer's events until it is gone; returns 0, or 130 when interrupted.

    Raises the sentence of a run that failed, and WorkError for one that ended without a word.
    """
    end: Ended | None = None
    with forwarded_signals(process) as received:
        try:
            for recorded in follow(run, lambda: process.poll() is not None, follower=follower):
                if isinstance(recorded.event, Ended):
                    end = recorded.event
                watch.show(recorded)
        finally:
            watch.close()
    if end and end.outcome == "failed":
        raise UserError(end.what, end.why, end.fix, exit_status=process.returncode or 1)
    if end is None and not received:
        raise WorkError(
            f"The run {visible(run.name, one_line=True)} is lost.",
            f"Its trainer ended without a word (exit status {process.returncode}).",
            f"Read {visible(str(run.log), one_line=True)}, then resume it.",
        )
    return INTERRUPTED if received else 0
