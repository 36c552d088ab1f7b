"""The status of a run, and the line that a list shows for it.

Decided by the lock and the end of the events alone, so that every screen and every machine that
sees the folder says the same, and a run of a million steps costs no more than one of ten.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple

from engine.events import Ack, Ended, Eval, Recorded, Saved, Started, Step, parse_line
from engine.runs.folder import LineReader, Place, RunFolder, lines_backwards
from engine.runs.lock import is_locked, read_claim, unreadable

Status = Literal["waiting", "running", "paused", "stopped", "finished", "failed", "lost"]

_TAIL_BYTES: Final = 1 << 23  # samples of a whole eval fit in between two steps
_HEAD_BYTES: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class Summary:
    """One run in a list."""

    name: str
    status: Status
    step: int = 0
    """Optimizer steps done."""
    total_steps: int | None = None
    loss: float | None = None
    """Of the last step, in nats a token; None before the first, nan where it diverged."""
    step_seconds: float | None = None
    """Wall time of the last step."""
    rows: int | None = None
    """Of the datasets, bad ones too; None before the model is loaded. The next are of these."""
    rows_left_out: int | None = None


def status(run: RunFolder) -> Status:
    """What a run does now, or how it ended.

    waiting: no process has taken the lock yet. running, paused: one holds it. stopped, finished,
    failed: the last event says so. lost: the lock is free, and whoever took it last wrote no end.
    Raises WorkError where the folder cannot be read.
    """
    # The lock first: a run that ends between the two looks has written its end before.
    if is_locked(run):
        return "paused" if _is_paused(run) else "running"
    claim = read_claim(run)
    last = next(_newest_first(run), None)
    if last and isinstance(last.event, Ended) and run.events_bytes > claim.events_bytes:
        return last.event.outcome
    if is_locked(run):  # a launch has begun between the two looks
        return "running"
    return "lost" if last or claim.since else "waiting"


def summarize(run: RunFolder) -> Summary:
    """A run's status, and how far it is by the end of its events. Raises as `status`."""
    now = status(run)
    step: int | None = None
    total: int | None = None
    last: Step | None = None
    for recorded in _newest_first(run):
        event = recorded.event
        if step is None and isinstance(event, Step | Saved | Eval | Ended):
            step = event.step
        if total is None and isinstance(event, Started | Step):
            total = event.total_steps
        if isinstance(event, Step):
            last = event
            break
    started = _first_started(run)
    if total is None and started:
        total = started.total_steps
    return Summary(
        name=run.name,
        status=now,
        step=step or 0,
        total_steps=total,
        loss=last.loss if last else None,
        step_seconds=last.seconds if last else None,
        rows=started.rows if started else None,
        rows_left_out=started.rows_left_out if started else None,
    )


def _is_paused(run: RunFolder) -> bool:
    """Whether the last answer of this launch to pause or resume is a pause, with no step after."""
    # One more, the line feed before it: a cut line is left out.
    written_bytes = 1 + run.events_bytes - read_claim(run).events_bytes
    for recorded in _newest_first(run, min(written_bytes, _TAIL_BYTES)):
        event = recorded.event
        if isinstance(event, Step | Started):
            return False
        if isinstance(event, Ack) and event.outcome == "done":
            if event.command == "pause":
                return True
            if event.command in ("resume", "stop"):
                return False
    return False


def _newest_first(run: RunFolder, limit_bytes: int = _TAIL_BYTES) -> Iterator[Recorded]:
    try:
        for line in lines_backwards(run.events, limit_bytes):
            with contextlib.suppress(ValueError):
                if recorded := parse_line(line):
                    yield recorded
    except OSError as error:
        raise unreadable(run, error) from error


def _first_started(run: RunFolder) -> Started | None:
    """What the first launch began with, unless more than the head of the file comes before it."""
    for line in LineReader(run.events).read(_HEAD_BYTES):
        with contextlib.suppress(ValueError):
            recorded = parse_line(line)
            if recorded and isinstance(recorded.event, Started):
                return recorded.event
    return None


class Newest(NamedTuple):
    """The newest event that was read: its number, its time in Unix seconds, the place behind it."""

    seq: int = -1
    time: float = -math.inf
    place: Place = Place()


class Follower:
    """Gives every event of a file once, in the order of the file.

    A file that was cut or replaced is read again from its start; an event that was given already
    (not later in number and not later in time than the last one) is left out.
    """

    def __init__(self, path: Path, newest: Newest | None = None, *, from_end: bool = False) -> None:
        self._newest = newest or Newest()
        self._lines = LineReader(path, self._newest.place, from_end=from_end)
        self.garbage = 0
        """Whole lines that are no events, such as what a killed writer left."""
        self.unknown = 0
        """Events of a type that only a newer Windtunnel knows."""

    @property
    def newest(self) -> Newest:
        return self._newest._replace(place=self._lines.place)

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
        if recorded.seq <= self._newest.seq and recorded.time <= self._newest.time:
            return None
        self._newest = Newest(recorded.seq, recorded.time)
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
