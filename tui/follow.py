"""Reads a run while it is written, in a thread, so that no disk can hold the screen up."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from textual.message import Message

from engine.errors import UserError, WorkError
from engine.events import Recorded
from engine.runs import Follower, Request, RunFolder, Status, send, status
from engine.runs.history import RunFacts
from engine.runs.lock import Contents
from engine.visible import visible

if TYPE_CHECKING:
    from engine.runs.comparison import ConfigDifferences


@dataclass
class EventsRead(Message):
    """A run wrote events, or has another status."""

    events: Sequence[Recorded]
    status: Status | None
    """None while what was written before is still being read."""


@dataclass
class RunUnreadable(Message):
    """The folder of a run cannot be read any more."""

    error: UserError


@dataclass
class RunAsked(Message):
    """A command was written for a run; its answer will carry `identity`."""

    identity: str
    command: Request


@dataclass
class WorkRefused(Message):
    """What a page asked a thread for could not be done."""

    error: UserError


class RunResumed(Message):
    """A run goes on: its pause was lifted, or its trainer has begun again."""


@dataclass
class RunsSeen(Message):
    """Every run that is known, as it was a moment ago."""

    runs: Sequence[RunFacts]


@dataclass
class RemovalMeasured(Message):
    """What taking a run away would take."""

    run: RunFolder
    contents: Contents


@dataclass
class RunRemoved(Message):
    """A run is gone; its config lies at `kept`, if it had one."""

    run: RunFolder
    kept: Path | None


@dataclass
class RunsCompared(Message):
    """The configs of two runs were read, or could not be."""

    differences: "ConfigDifferences | UserError"


class RowsCounted(Message):
    """The plan has the rows of its config now, or the reason why it has not."""


@dataclass
class PlanMeasured(Message):
    """A plan was measured on this computer; its figures are kept, and the estimate has them."""

    sentence: str


POLL_SECONDS: Final = 0.25
_EVENTS_AT_ONCE: Final = 500
"""A long file arrives in pieces of some 10 ms of work, so that keys are answered in between."""


def follow_run(
    run: RunFolder, post: Callable[[Message], object], stopped: Callable[[], bool]
) -> None:
    """Post the events of a run from its first one on, until `stopped()`; for a thread.

    Posts EventsRead at most four times a second once what was there is read, and only when there is
    something new; RunUnreadable once if the folder cannot be read, and ends.
    """
    follower = Follower(run.events)
    before: Status | None = None
    while not stopped():
        try:
            now = status(run)  # first: what was written before a run ended is not lost
            events = follower.read()
        except UserError as error:
            post(RunUnreadable(error))
            return
        except OSError as error:
            post(RunUnreadable(_unreadable(run, error)))
            return
        more = len(events) > _EVENTS_AT_ONCE
        for start in range(0, len(events), _EVENTS_AT_ONCE):
            # A status is for all that was written, so it comes when all is read.
            part = events[start : start + _EVENTS_AT_ONCE]
            post(EventsRead(part, before if more else now))
        if not events and now != before:
            post(EventsRead((), now))
        if not more:
            before = now
            time.sleep(POLL_SECONDS)


def send_command(run: RunFolder, command: Request, post: Callable[[Message], object]) -> None:
    """Ask a run for something and post RunAsked, or WorkRefused with the reason; for a thread."""
    try:
        post(RunAsked(send(run, command), command))
    except UserError as error:
        post(WorkRefused(error))


def _unreadable(run: RunFolder, error: OSError) -> WorkError:
    return WorkError(
        f"The events of {visible(run.name, one_line=True)} cannot be read.",
        f"The system says: {error}.",
        "See that its disk is there, then open the run again.",
    )
