"""Reads a run while it is written, in a thread, so that no disk can hold the screen up."""

import time
from collections.abc import Callable
from typing import Final

from textual.message import Message

from engine.errors import UserError, WorkError
from engine.runs import Follower, Request, RunFolder, Status, send, status
from engine.visible import visible
from tui.messages import EventsRead, RunAsked, RunUnreadable, WorkRefused

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
