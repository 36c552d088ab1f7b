"""Reads a run while it is written, in a thread, so that no disk can hold the screen up.

Apart from the page that draws: it decides how often is looked, and what is told in one message.
"""

import time
from collections.abc import Callable
from typing import Final

from textual.message import Message

from engine.errors import UserError, WorkError
from engine.runs import Follower, RunFolder, Status, Word, send, status
from engine.visible import visible
from tui.messages import RunAsked, RunTold, RunUnreadable, WorkRefused

POLL_SECONDS: Final = 0.25
_EVENTS_AT_ONCE: Final = 500
"""A long file arrives in pieces of some 10 ms of work, so that keys are answered in between."""


def follow_run(
    run: RunFolder, post: Callable[[Message], object], stopped: Callable[[], bool]
) -> None:
    """Post what a run tells from its first event on, until `stopped()`; for a thread.

    Posts RunTold at most four times a second once what was there is told, and only when there is
    something new; RunUnreadable once if the folder cannot be read, and ends.
    """
    follower = Follower(run.events)
    before: Status | None = None
    while not stopped():
        try:
            word = status(run)  # first: what was written before a run ended is not lost
            events = follower.read()
        except UserError as error:
            post(RunUnreadable(error))
            return
        except OSError as error:
            post(RunUnreadable(_unreadable(run, error)))
            return
        more = len(events) > _EVENTS_AT_ONCE
        for start in range(0, len(events), _EVENTS_AT_ONCE):
            # A word is for all that was written, so it waits until all is read.
            told = events[start : start + _EVENTS_AT_ONCE]
            post(RunTold(told, before if more else word))
        if not events and word != before:
            post(RunTold((), word))
        if not more:
            before = word
            time.sleep(POLL_SECONDS)


def send_command(run: RunFolder, command: Word, post: Callable[[Message], object]) -> None:
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
