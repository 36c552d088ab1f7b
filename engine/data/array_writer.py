"""Appends rendered rows to the array files so that a kill at any moment costs little.

Everything since the last durable point may be lost, nothing before it, and a second writer goes on
from there to byte-identical files. It is apart from `prepare`, which decides what is written where.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from engine.chat.messages import RowProblem
from engine.chat.render import Rendered
from engine.data.prepared import ARRAYS, META
from engine.data.rows import RenderedRow

_STATE = "progress.json"
_LISTED_PROBLEMS = 100


@dataclass(frozen=True, slots=True)
class Interval:
    """How much is written between two durable points, each of which costs one fsync a file.

    The tokens bound the memory too: 9 bytes a token wait here.
    """

    rows: int = 10_000
    tokens: int = 2_000_000


@dataclass(slots=True)
class _State:
    """What is durable: the rows taken from the source, and the counts that go into meta.json."""

    source_rows: int = 0
    rows: int = 0
    tokens: int = 0
    bad_rows: int = 0
    problems: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    kind_counts: dict[str, int] = field(default_factory=dict)


def sync_folder(folder: Path) -> None:
    """Makes the folder's own entries (new names, renames) durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, value: Any) -> None:
    """`value` as JSON in `path`, whole or not at all, on disk when this returns."""
    waiting = path.with_name(f"{path.name}.writing")
    with waiting.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    waiting.replace(path)
    sync_folder(path.parent)


def problem_entry(row: RenderedRow, problem: RowProblem) -> dict[str, Any]:
    """A bad row as `check`, meta.json and the worker report it."""
    return {
        "file": row.file,
        "row": row.number,
        "line": row.line,
        "message": problem.message,
        "what": problem.what,
        "why": problem.why,
        "fix": problem.fix,
    }


def content_hash(rendered: Rendered) -> int:
    """64 bits that are equal for rows with the same ids."""
    ids = np.ascontiguousarray(rendered.input_ids, dtype="<u4")
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")


class ArrayWriter:
    """The array files in `folder`, at the end of what is durable there.

    `source_rows` is how many rows of the source the caller has to skip.
    """

    def __init__(self, folder: Path, interval: Interval) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._interval = interval
        self._state = _read_state(folder)
        self._pending: dict[str, list[Any]] = {name: [] for name in ARRAYS}
        self._pending_tokens = self._since = 0
        self._files = {name: self._open(name) for name in ARRAYS}
        if self._state.rows == 0:
            self._pending["offsets"].append(0)

    @property
    def source_rows(self) -> int:
        return self._state.source_rows

    @property
    def usable_rows(self) -> int:
        return self._state.rows

    @property
    def first_problem(self) -> dict[str, Any]:
        return self._state.problems[0]

    def _open(self, name: str) -> IO[bytes]:
        path = self._folder / name
        path.touch()
        file = path.open("rb+")
        file.truncate(_durable_bytes(name, self._state))
        file.seek(0, os.SEEK_END)
        return file

    def add(self, row: RenderedRow) -> None:
        """One row; a bad one is counted and the first hundred are kept word for word."""
        state = self._state
        state.source_rows += 1
        self._since += 1
        if row.problem is not None:
            state.bad_rows += 1
            if len(state.problems) < _LISTED_PROBLEMS:
                state.problems.append(problem_entry(row, row.problem))
        else:
            assert row.rendered is not None
            assert row.conversation is not None
            for note in row.conversation.notes:
                state.notes[note.id] = state.notes.get(note.id, 0) + 1
            self._append(row, row.rendered)
        if self._since >= self._interval.rows or self._pending_tokens >= self._interval.tokens:
            self.commit()

    def _append(self, row: RenderedRow, rendered: Rendered) -> None:
        state, pending = self._state, self._pending
        if state.files[-1:] != [row.file]:
            state.files.append(row.file)
        state.rows += 1
        state.tokens += len(rendered.input_ids)
        self._pending_tokens += len(rendered.input_ids)
        pending["ids"].append(rendered.input_ids)
        pending["kinds"].append(rendered.kinds)
        pending["sources"].append(rendered.sources)
        pending["offsets"].append(state.tokens)
        pending["lines"].append(row.line)
        pending["files"].append(len(state.files) - 1)
        pending["datasets"].append(row.dataset)
        pending["hashes"].append(content_hash(rendered))

    def commit(self) -> None:
        """A durable point: what was added until now survives."""
        for name, dtype in ARRAYS.items():
            waiting = self._pending[name]
            if waiting:
                block = (
                    np.concatenate(waiting).astype(dtype, copy=False)
                    if isinstance(waiting[0], np.ndarray)
                    else np.array(waiting, dtype=dtype)
                )
                if name == "kinds":
                    self._count(block)
                self._files[name].write(block.data)
                waiting.clear()
            self._files[name].flush()
            os.fsync(self._files[name].fileno())
        write_durably(self._folder / _STATE, asdict(self._state))
        self._pending_tokens = self._since = 0

    def _count(self, kinds: Any) -> None:
        counts = Counter(self._state.kind_counts)
        counts.update(
            {str(kind): int(count) for kind, count in enumerate(np.bincount(kinds)) if count}
        )
        self._state.kind_counts = dict(counts)

    def finish(self, key: str) -> None:
        """Commits and writes meta.json: `key` and the counts, nothing of when or how fast."""
        self.commit()
        self.close()
        write_durably(self._folder / META, {"key": key, **asdict(self._state)})
        (self._folder / _STATE).unlink()
        sync_folder(self._folder)

    def close(self) -> None:
        """Closes the files; what is not committed is dropped by the next writer."""
        for file in self._files.values():
            file.close()


def _durable_bytes(name: str, state: _State) -> int:
    size = np.dtype(ARRAYS[name]).itemsize
    if name in ("ids", "kinds", "sources"):
        return size * state.tokens
    if name == "offsets":
        return size * (state.rows + 1) if state.rows else 0
    return size * state.rows


def _read_state(folder: Path) -> _State:
    """The last durable point, or the beginning where there is none that can be trusted."""
    try:
        state = _State(**json.loads((folder / _STATE).read_text("utf-8")))
        sizes: Sequence[tuple[int, int]] = [
            ((folder / name).stat().st_size, _durable_bytes(name, state)) for name in ARRAYS
        ]
    except (OSError, ValueError, TypeError):
        return _State()
    return state if all(present >= durable for present, durable in sizes) else _State()
