"""SIGTERM and SIGINT as a request to save: the one way a scheduler or a keyboard has to ask.

The loop looks at a flag between two steps.
"""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

_LEAVING: Final = 130

# `kill -- -GROUP` reaches the trainer once itself and once through a launcher that passes it on.
_SAME_REQUEST_SECONDS: Final = 0.25


class StopSignals:
    """Inside `with StopSignals() as signals`, the first SIGTERM or SIGINT sets `requested`.

    The trainer then saves at the next step boundary and ends "stopped". A second one leaves at once
    with exit status 130 and saves nothing. A hangup asks to stop as well where a terminal owns the
    process, and means nothing to a detached one. Only for the main thread.
    """

    def __init__(self) -> None:
        self.requested = False
        """Whether the run was asked to save and end."""
        self.name = ""
        """The signal that asked, such as SIGTERM."""
        self._first = 0.0
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> "StopSignals":
        for each in (signal.SIGTERM, signal.SIGINT):
            self._before[each] = signal.signal(each, self._receive)
        leads_a_session = os.getsid(0) == os.getpid()
        under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        if leads_a_session or under_nohup:
            self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        else:
            self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._receive)
        self._before[signal.SIGPIPE] = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self.name, self._first = True, signal.Signals(number).name, now
        elif number != signal.SIGHUP and now - self._first > _SAME_REQUEST_SECONDS:
            os._exit(_LEAVING)
