"""The status of a run, and the line that a list shows for it.

Decided by the lock and the end of the events alone, so that every screen and every machine that
sees the folder says the same, and a run of a million steps costs no more than one of ten.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from engine.events import Ack, Ended, Eval, Recorded, Saved, Started, Step, parse_line
from engine.runs.folder import LineReader, RunFolder, lines_backwards
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


def status(run: RunFolder) -> Status:
    """What a run does now, or how it ended.

    waiting: no process has taken the lock yet. running, paused: one holds it. stopped, finished,
    failed: the last event says so. lost: the lock is free, and whoever took it last wrote no end.
    Raises WorkError where the folder cannot be read.
    """
    # The lock first: a run that ends between the two looks has written its end before.
    if is_locked(run):
        return "paused" if _is_paused(run) else "running"
    since = read_claim(run).since
    last = next(_newest_first(run), None)
    if last and last.time >= since and isinstance(last.event, Ended):
        return last.event.outcome
    if is_locked(run):  # a launch has begun between the two looks
        return "running"
    return "lost" if last or since else "waiting"


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
    if total is None:
        total = _first_total(run)
    return Summary(
        name=run.name,
        status=now,
        step=step or 0,
        total_steps=total,
        loss=last.loss if last else None,
        step_seconds=last.seconds if last else None,
    )


def _is_paused(run: RunFolder) -> bool:
    """Whether the last answer of this launch to pause or resume is a pause, with no step after."""
    since = read_claim(run).since
    for recorded in _newest_first(run):
        event = recorded.event
        if recorded.time < since or isinstance(event, Step | Started):
            return False
        if isinstance(event, Ack) and event.outcome == "done":
            if event.command == "pause":
                return True
            if event.command in ("resume", "stop"):
                return False
    return False


def _newest_first(run: RunFolder) -> Iterator[Recorded]:
    try:
        for line in lines_backwards(run.events, _TAIL_BYTES):
            with contextlib.suppress(ValueError):
                if recorded := parse_line(line):
                    yield recorded
    except OSError as error:
        raise unreadable(run, error) from error


def _first_total(run: RunFolder) -> int | None:
    """`total_steps` of the first launch, for a file whose steps do not carry it."""
    for line in LineReader(run.events).read(_HEAD_BYTES):
        with contextlib.suppress(ValueError):
            recorded = parse_line(line)
            if recorded and isinstance(recorded.event, Started):
                return recorded.event.total_steps
    return None
