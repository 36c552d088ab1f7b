"""What the list of runs shows of each, read again and again in a thread and handed over frozen.

A file system can be slow and a run's events long: each look reads only what was written since the
last one, and at most one piece of each run.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import UserError
from engine.runs.folder import RunFolder, list_runs
from engine.runs.history import MEMORY, SPEED, Figures, History, Point, best_of
from engine.runs.summary import Follower, Status, status


@dataclass(frozen=True, slots=True)
class RunFacts:
    """One run at one moment."""

    folder: RunFolder
    status: Status | None
    """None where the folder cannot be read; `problem` says why."""
    problem: str = ""
    written_time: float = 0.0
    """Unix seconds of the newest event; 0 before the first."""
    model: str = ""
    step: int = 0
    total_steps: int | None = None
    seconds_left: float = 0.0
    loss: tuple[Point, ...] = ()
    """By step, smoothed; nan is a gap."""
    held_out: tuple[tuple[int, float], ...] = ()
    tokens_per_second: tuple[Point, ...] = ()
    memory_gib: tuple[Point, ...] = ()
    saved: tuple[str, ...] = ()
    """Paths inside the folder, the newest last."""
    ended_what: str = ""
    figures: Figures = field(default_factory=Figures)

    @property
    def best(self) -> tuple[int, float] | None:
        """The evaluation with the lowest loss: its step and its loss."""
        return best_of(self.held_out)

    @property
    def is_alive(self) -> bool:
        return self.status in ("running", "paused")


class RunsReader:
    """Looks at every run under a home; for one thread."""

    def __init__(self, home: Path | None = None) -> None:
        self._home = home
        self._read: dict[Path, tuple[Follower, History]] = {}

    def look(self) -> tuple[list[RunFacts], bool]:
        """Every run, the latest written first, and whether there is more to read at once.

        Never raises: a run that cannot be read says so in its own line.
        """
        found, more = [], False
        for folder in list_runs(self._home):
            follower, history = self._read.setdefault(
                folder.path, (Follower(folder.events), History())
            )
            try:
                now = status(folder)
                events = follower.read()
            except (UserError, OSError) as error:
                found.append(RunFacts(folder, None, problem=str(error)))
                continue
            history.add(events)
            more = more or bool(events)
            found.append(_facts(folder, now, history))
        return found, more


def _facts(folder: RunFolder, now: Status, history: History) -> RunFacts:
    model = history.started.model if history.started else ""
    smooth = history.loss.smooth.points() or history.loss.raw.points()
    return RunFacts(
        folder,
        now,
        written_time=0.0 if math.isnan(history.last_time) else history.last_time,
        model=model.rstrip("/").rsplit("/", 1)[-1],
        step=history.steps_done,
        total_steps=history.total_steps,
        seconds_left=history.seconds_left,
        loss=tuple(smooth),
        held_out=tuple(history.held_out),
        tokens_per_second=tuple(history.series[SPEED].raw.points()),
        memory_gib=tuple(history.series[MEMORY].raw.points()),
        saved=tuple(each.path for each in history.saved),
        ended_what=history.ended.what if history.ended else "",
        figures=history.figures,
    )
