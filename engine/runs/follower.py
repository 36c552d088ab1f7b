"""Reading the events of a run while it writes them.

Polling, because it works on every file system and a chart is redrawn a few times a second at most.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from engine.events import Recorded, parse_line
from engine.runs.folder import LineReader, RunFolder
from engine.runs.lock import is_locked


class Follower:
    """Gives every event of a file once, in the order of the file.

    A file that was cut or replaced is read again from its start; an event that was given already
    (not later in number and not later in time than the last one) is left out.
    """

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self._lines = LineReader(path, from_end=from_end)
        self._seq = -1
        self._time = float("-inf")
        self.garbage = 0
        """Whole lines that are no events, such as what a killed writer left."""
        self.unknown = 0
        """Events of a type that only a newer Windtunnel knows."""

    def read(self) -> list[Recorded]:
        """Events that came since the last call, at most some thousands at once; empty when
        there are no more for now. Raises OSError where the file is there and cannot be read."""
        while lines := self._lines.read():
            if found := [each for line in lines if (each := self._accept(line))]:
                return found
        return []

    def _accept(self, line: bytes) -> Recorded | None:
        try:
            recorded = parse_line(line)
        except ValueError:
            self.garbage += 1
            return None
        if recorded is None:
            self.unknown += 1
            return None
        if recorded.seq <= self._seq and recorded.time <= self._time:
            return None
        self._seq, self._time = recorded.seq, recorded.time
        return recorded


def follow(
    run: RunFolder,
    stop: Callable[[], bool] | None = None,
    *,
    follower: Follower | None = None,
    poll_seconds: float = 0.25,
) -> Iterator[Recorded]:
    """Every event of a run from its first (or those that `follower` has not given yet), waiting
    for more.

    Ends once `stop()` is true and all that was written before is given; without `stop`, once no
    process holds the run's lock.
    """
    done = stop or (lambda: not is_locked(run))
    follower = follower or Follower(run.events)
    while True:
        last = done()  # asked before reading: what a run wrote before it ended is not lost
        while events := follower.read():
            yield from events
        if last:
            return
        time.sleep(poll_seconds)
