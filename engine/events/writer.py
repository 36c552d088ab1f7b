"""The writing end of `events.jsonl`, which must never be the reason that a training ends."""

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from engine.events.lines import format_line
from engine.events.vocabulary import Event, Recorded

_TAIL_BYTES: Final = 1 << 16
"""First look at the end of a file: some 250 steps, or one long sample."""


def _last_seq(descriptor: int) -> tuple[int, bool]:
    """The highest `seq` near the end of the file (-1 in an empty one), and whether it ends torn.

    A torn line counts too: where only its line feed is missing, a reader will take it for whole
    once the next writer has added one, and must not take the next event for a repetition.
    """
    size = os.fstat(descriptor).st_size
    if size == 0:
        return -1, False
    span = _TAIL_BYTES
    while True:
        start = max(0, size - span)
        data = os.pread(descriptor, size - start, start)
        lines = data.split(b"\n")
        found = [_seq_of(line) for line in (lines if start == 0 else lines[1:])]
        if max(found, default=-1) >= 0 or start == 0:
            return max(found), not data.endswith(b"\n")
        span *= 8


def _seq_of(line: bytes) -> int:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return -1
    seq = record.get("seq") if isinstance(record, dict) else None
    return seq if type(seq) is int else -1


class EventWriter:
    """Appends events to `events.jsonl`; for one thread of the process that holds the run's lock.

    Every event is one `write` of one line in append mode, so a reader sees whole lines and at most
    one torn one at the end. Telemetry never ends a training: where the disk is full (or the quota,
    or the file size limit) the event is counted in `dropped`, its number stays unused, and the
    next event begins on a line of its own.

        with EventWriter(run.events) as events:
            events.emit(Phase("load"))

    Opening raises OSError where the file cannot be made. A file with history is continued: `seq`
    goes on, and after a torn last line the first event begins with a line feed.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.dropped = 0
        """Events that could not be written, whole or in part."""
        self._clock = clock
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o644)
        last, self._torn = _last_seq(self._descriptor)
        self._next_seq = last + 1

    def emit(self, event: Event) -> None:
        """Write one event. Never raises for a disk that does not take it."""
        if self._descriptor < 0:
            raise ValueError("the event writer is closed")
        line = format_line(Recorded(self._next_seq, self._clock(), event))
        self._next_seq += 1
        if self._torn:
            line = b"\n" + line
        try:
            written = os.write(self._descriptor, line)
        except OSError as error:
            if error.errno == errno.EBADF:  # our own bug, no full disk
                raise
            self.dropped += 1
            return
        self._torn = written < len(line)
        self.dropped += self._torn

    def close(self) -> None:
        """Give the file back; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "EventWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
