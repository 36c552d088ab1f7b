"""Files of one JSON object a line that somebody else is writing at the same time.

Events, commands and the index of runs share the one reader that keeps a torn line back and notices
a file that was cut or replaced.
"""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

CHUNK_BYTES: Final = 1 << 22
"""At most this much is read at once: a run of a million steps does not arrive in one list."""

_BLOCK_BYTES: Final = 1 << 16
_MEMORY_BYTES: Final = 256  # about one `step` event: its time makes it unlike any other


def append_line(path: Path, record: Mapping[str, object]) -> None:
    """Add one line with one write, on a line of its own even after a torn one.

    Raises OSError where the file cannot be made or the disk is full.
    """
    line = json.dumps(record).encode("ascii") + b"\n"
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


class LineReader:
    """Reads the lines that were added to a file since the last time.

    Only whole lines come out; a torn last line waits until its line feed is there. The reader
    remembers the last bytes that it gave out: where the file no longer holds them at that place
    (it was cut, emptied or replaced, even by one with the same inode number) it begins again at
    the start.
    """

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self._path = path
        self._position = 0
        self._before = b""
        if from_end:
            self._skip_whole_lines()

    def read(self, limit_bytes: int = CHUNK_BYTES) -> list[bytes]:
        """Whole lines without their line feeds, blank ones left out; empty when nothing is new.

        About `limit_bytes` are read, more where one line is longer. A file that is not there has
        no lines; any other OSError is the caller's.
        """
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return []
        try:
            start = self._position - len(self._before)
            if os.pread(descriptor, len(self._before), start) != self._before:
                self._position, self._before = 0, b""
            while True:
                data = os.pread(descriptor, limit_bytes, self._position)
                end = data.rfind(b"\n") + 1
                whole = data[:end]
                lines = [line for line in whole.split(b"\n") if line.strip()]
                self._position += end
                self._before = (self._before + whole)[-_MEMORY_BYTES:]
                if lines or len(data) < limit_bytes:
                    return lines
                if not end:  # one line is longer than what was read
                    limit_bytes *= 4
        finally:
            os.close(descriptor)

    def _skip_whole_lines(self) -> None:
        position = os.path.getsize(self._path) if self._path.exists() else 0
        if not position:
            return
        with self._path.open("rb") as file:
            while position:
                start = max(0, position - _BLOCK_BYTES)
                file.seek(start)
                found = file.read(position - start).rfind(b"\n")
                if found >= 0:
                    self._position = start + found + 1
                    break
                position = start
            kept = min(self._position, _MEMORY_BYTES)
            file.seek(self._position - kept)
            self._before = file.read(kept)


def lines_backwards(path: Path, limit_bytes: int) -> Iterator[bytes]:
    """Whole lines of the last `limit_bytes` of a file, the newest first, a torn last one left out.

    Blocks are read as they are asked for: the newest line of a file of any size costs one read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        position = os.fstat(descriptor).st_size
        stop = max(0, position - limit_bytes)
        rest = b""
        torn = True
        while position > stop:
            start = max(stop, position - _BLOCK_BYTES)
            pieces = (os.pread(descriptor, position - start, start) + rest).split(b"\n")
            position = start
            rest = pieces.pop(0)
            if pieces and torn:
                pieces.pop()
                torn = False
            yield from reversed(pieces)
        if position == 0 and not torn:
            yield rest
    finally:
        os.close(descriptor)
