"""Many runs and long ones, shown without reading them all again.

Beside a run's events lies what they add up to; beside the runs lies an index with the line of each
that has ended. Both are made anew from the events where they are missing or do not fit them.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from engine.errors import UserError, WorkError
from engine.files import write_whole
from engine.runs.folder import RunFolder, Stamp, append_line, run_home, stamp_of, stamped_runs
from engine.runs.history import History
from engine.runs.lock import unreadable
from engine.runs.summary import Follower, Newest, Status, Summary, status, summarize

_VERSION: Final = 1
_KEPT_EVERY_BYTES: Final = 1 << 20
"""Of events that were read beyond the kept history, until it is kept again: about 3,000 steps."""

_INDEX: Final = "ended.jsonl"
_SUMMED: Final = ("step", "total_steps", "loss", "rows", "rows_left_out")
"""What a line of the index and a summary both say."""

AT_ONCE: Final = 50
"""Runs that are read before the list is shown for the first time, and between two looks."""


class _Kept(msgspec.Struct):
    version: int
    newest: Newest
    """Of the events that `history` is made of."""
    history: History


class OpenRun:
    """The history of one run, read on from where it was kept; for one thread."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        kept = _read_kept(run)
        self.history = kept.history if kept else History()
        self.follower = Follower(run.events, kept.newest if kept else None)
        self._kept_bytes = kept.newest.place.position if kept else 0

    def read(self) -> bool:
        """Take in the next events, at most some thousands; whether there were any. Raises
        WorkError where they cannot be read."""
        try:
            events = self.follower.read()
        except OSError as error:
            raise unreadable(self._run, error) from error
        self.history.add(events)
        return bool(events)

    def read_all(self) -> History:
        """Every event that is there by now. Raises as `read`."""
        while self.read():
            pass
        self.keep()
        return self.history

    def keep(self) -> None:
        """Write the history beside the events once there is much that it saves reading."""
        newest = self.follower.newest
        if newest.place.position - self._kept_bytes < _KEPT_EVERY_BYTES:
            return
        with contextlib.suppress(OSError):  # somebody else's run: it is read from its events
            content = msgspec.msgpack.encode(_Kept(_VERSION, newest, self.history))
            write_whole(self._run.history, content)
            self._kept_bytes = newest.place.position


def _read_kept(run: RunFolder) -> _Kept | None:
    """The kept history; None where there is none or the events are not those that it is made of."""
    try:
        kept = msgspec.msgpack.decode(run.history.read_bytes(), type=_Kept)
        position, before = kept.newest.place
        with run.events.open("rb") as events:
            is_same = os.pread(events.fileno(), len(before), position - len(before)) == before
    except (OSError, ValueError):  # msgspec's errors are ValueErrors, and so is a negative place
        return None
    return kept if is_same and kept.version == _VERSION else None


@dataclass(frozen=True, slots=True)
class RunFacts:
    """One run in a list."""

    folder: RunFolder
    status: Status | None
    """None where the folder cannot be read; `problem` says why."""
    problem: str = ""
    written_time: float = 0.0
    """Unix seconds of the newest event; 0 before the first."""
    model: str = ""
    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    """Of the last step, in nats a token; None before the first, nan where it diverged."""
    best: tuple[int, float] | None = None
    """The evaluation with the lowest loss: its step and its loss."""
    rows: int | None = None
    """Of the datasets, bad ones too; the next are of these."""
    rows_left_out: int | None = None

    @property
    def is_alive(self) -> bool:
        return self.status in ("running", "paused")


def facts_of(folder: RunFolder, now: Status, history: History) -> RunFacts:
    """The line of a run in a list, by its history."""
    started = history.started
    model = started.model if started else ""
    return RunFacts(
        folder,
        now,
        written_time=0.0 if math.isnan(history.last_time) else history.last_time,
        model=model.rstrip("/").rsplit("/", 1)[-1],
        step=history.steps_done,
        total_steps=history.total_steps,
        loss=history.step.loss if history.step else None,
        best=history.best,
        rows=started.rows if started else None,
        rows_left_out=started.rows_left_out if started else None,
    )


class _Entry(msgspec.Struct):
    """One line of the index; the last one of a path counts."""

    path: str
    stamp: Stamp
    """Of the events that it was read from: other events, and the line is of no use."""
    status: Status
    written_time: float
    model: str
    step: int
    total_steps: int | None
    loss: float | None
    best: tuple[int, float] | None
    rows: int | None = None
    rows_left_out: int | None = None

    def facts(self) -> RunFacts:
        values = {name: getattr(self, name) for name in self.__struct_fields__[2:]}
        return RunFacts(RunFolder(Path(self.path)), **values)


class _Index:
    """The lines of runs that have ended, by their paths, with the stamps of their events."""

    def __init__(self, home: Path) -> None:
        self._file = home / _INDEX
        self._lines: dict[Path, tuple[Stamp, RunFacts]] = {}
        with contextlib.suppress(OSError):
            for line in self._file.read_bytes().splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    entry = msgspec.convert(json.loads(line), _Entry)
                    facts = entry.facts()
                    self._lines[facts.folder.path] = (entry.stamp, facts)

    def find(self, run: RunFolder, stamp: Stamp) -> RunFacts | None:
        """What is known of a run whose events are those of the stamp."""
        known = self._lines.get(run.path)
        return known[1] if known and known[0] == stamp else None

    def add(self, stamp: Stamp, facts: RunFacts) -> None:
        """Remember a run that has ended."""
        self._lines[facts.folder.path] = (stamp, facts)
        _enter(self._file, stamp, facts)


def _enter(index: Path, stamp: Stamp, facts: RunFacts) -> None:
    values = {name: getattr(facts, name) for name in _Entry.__struct_fields__[2:]}
    with contextlib.suppress(OSError):  # somebody else's home: the run is read again next time
        append_line(index, {"path": str(facts.folder.path), "stamp": stamp} | values)


def keep_history(run: RunFolder) -> None:
    """Bring what is kept up to the newest event: the history, and after the last event the index.

    For the process that writes the events.
    """
    with contextlib.suppress(OSError, WorkError):
        opened = OpenRun(run)
        opened.read_all()
        if ended := opened.history.ended:
            facts = facts_of(run, ended.outcome, opened.history)
            _enter(run_home() / _INDEX, stamp_of(run), facts)


class RunsReader:
    """Looks at every run under a home; for one thread."""

    def __init__(self, home: Path | None = None) -> None:
        self._home = home
        self._index = _Index(run_home(home))
        self._open: dict[Path, OpenRun] = {}
        self._listed: list[tuple[RunFolder, Stamp]] = []
        """Not asked for anew while some of them still wait."""

    def look(self) -> tuple[list[RunFacts], int]:
        """The runs that were read so far, the latest written first, and how many wait: at most
        AT_ONCE are read in one look, the latest first.

        Never raises: a run that cannot be read says so in its own line.
        """
        found, read, waiting = [], 0, 0
        self._listed = self._listed or stamped_runs(self._home)
        for run, stamp in self._listed:
            facts = self._index.find(run, stamp)
            if not facts and read < AT_ONCE:
                read += 1
                facts, whole = self._read(run, stamp)
                waiting += not whole
            elif not facts:
                waiting += 1
            if facts:
                found.append(facts)
        if not waiting:
            self._listed = []
        return found, waiting

    def _read(self, run: RunFolder, stamp: Stamp) -> tuple[RunFacts, bool]:
        """The next part of a run, and whether it was the last."""
        try:
            now = status(run)  # first: no event before an end is lost
            opened = self._open.get(run.path) or OpenRun(run)
            more = opened.read() and opened.read()
        except UserError as error:
            return RunFacts(run, None, problem=str(error)), True
        facts = facts_of(run, now, opened.history)
        self._open[run.path] = opened
        if not more:
            opened.keep()
            if not facts.is_alive and now != "waiting":
                del self._open[run.path]
                self._index.add(stamp, facts)
        return facts, not more


def summaries(home: Path | None = None) -> Iterator[tuple[RunFolder, Summary | UserError]]:
    """Every run, the latest written first, each once it is read; the index saves most of it."""
    index = _Index(run_home(home))
    for run, stamp in stamped_runs(home):
        if facts := index.find(run, stamp):
            assert facts.status
            said = {key: getattr(facts, key) for key in _SUMMED}
            yield run, Summary(run.name, facts.status, **said)
            continue
        try:
            yield run, summarize(run)
        except UserError as error:
            yield run, error
