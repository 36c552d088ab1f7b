"""Appends rendered rows to the array files so that a kill at any moment costs little.

Everything since the last durable point may be lost, nothing before it, and a second writer goes on
from there to byte-identical files.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from msgspec import convert, to_builtins

from engine.chat.images import ImageSpec
from engine.chat.render import Rendered
from engine.data.images import ImageName, image_digest
from engine.data.prepared import ARRAYS, META, Counts, count_elements
from engine.data.rows import RenderedRow
from engine.data.statistics import BadRow
from engine.files import sweep, sync, write_whole

_STATE = "progress.json"
_LISTED_PROBLEMS = 100


@dataclass(frozen=True, slots=True)
class Interval:
    """How much is written between two durable points, each of which costs one fsync a file.

    The tokens bound the memory too: 9 bytes a token wait here.
    """

    rows: int = 10_000
    tokens: int = 2_000_000


def content_hash(rendered: Rendered) -> int:
    """64 bits that are equal for rows with the same ids and the same images."""
    ids = np.ascontiguousarray(rendered.input_ids, dtype="<u4")
    content = hashlib.blake2b(ids.tobytes(), digest_size=8)
    for image in rendered.images:
        content.update(image_digest(image.content).encode())
    return int.from_bytes(content.digest(), "little")


class ArrayWriter:
    """The array files in `folder`, at the end of what is durable there.

    `source_rows` is how many rows of the source the caller has to skip.
    """

    def __init__(self, folder: Path, interval: Interval) -> None:
        folder.mkdir(exist_ok=True)
        sweep(folder)
        self._folder = folder
        self._interval = interval
        self._state = _read_state(folder)
        self._pending: dict[str, list[Any]] = {name: [] for name in ARRAYS}
        self._pending_tokens = self._since = 0
        self._files = {name: self._open(name) for name in ARRAYS}
        self._images = _read_images(folder, self._state)
        self._names = set(read_image_names(folder, self._state.image_name_bytes))
        if self._state.rows == 0:
            for name in ("offsets", "row_images", "image_offsets"):
                self._pending[name].append(0)

    @property
    def source_rows(self) -> int:
        return self._state.source_rows

    @property
    def usable_rows(self) -> int:
        return self._state.rows

    @property
    def first_problem(self) -> BadRow:
        return self._state.problems[0]

    def _open(self, name: str) -> IO[bytes]:
        path = self._folder / name
        path.touch()
        file = path.open("rb+")
        file.truncate(_durable_bytes(name, self._state))
        file.seek(0, os.SEEK_END)
        return file

    def add(self, row: RenderedRow) -> None:
        """One row; a bad one is counted and the first hundred are kept."""
        state = self._state
        state.source_rows += 1
        self._since += 1
        self._add_names(row.image_names)
        if row.problem is not None:
            state.bad_rows += 1
            if len(state.problems) < _LISTED_PROBLEMS:
                state.problems.append(row.bad_row(row.problem))
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
        for image in rendered.images:
            number = self._store(image.content)
            pending["image_grids"] += (number, image.rows, image.columns)
        state.placed_images += len(rendered.images)
        pending["row_images"].append(state.placed_images)

    def _store(self, content: bytes | memoryview) -> int:
        """The number of an image; its bytes are written where they are new."""
        digest, state = image_digest(content), self._state
        number = self._images.setdefault(digest, state.images)
        if number == state.images:
            # Written at once, as images are too large to wait in memory.
            self._files["images"].write(content)
            state.images += 1
            state.image_bytes += len(content)
            self._pending["image_offsets"].append(state.image_bytes)
        return number

    def _add_names(self, names: Sequence[ImageName]) -> None:
        for name in names:
            if name not in self._names:
                self._names.add(name)
                line = json.dumps(astuple(name)).encode() + b"\n"
                self._pending["image_names"].append(np.frombuffer(line, np.uint8))
                self._state.image_name_bytes += len(line)

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
            elif name != "images":
                continue
            self._files[name].flush()
            os.fsync(self._files[name].fileno())
        self._write_json(_STATE, asdict(self._state))
        self._pending_tokens = self._since = 0

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        text = json.dumps(to_builtins(value, str_keys=True), indent=1, sort_keys=True)
        write_whole(self._folder / name, text.encode())

    def _count(self, kinds: Any) -> None:
        counts = Counter(self._state.kind_counts)
        counts.update({kind: int(count) for kind, count in enumerate(np.bincount(kinds)) if count})
        self._state.kind_counts = dict(counts)

    def finish(self, key: str, image_spec: ImageSpec | None = None) -> None:
        """Commits and writes meta.json: `key` and the counts, nothing of when or how fast.

        `image_spec` is how the images, where there are any, are brought to their grids.
        """
        self.commit()
        self.close()
        spec = astuple(image_spec) if image_spec and self._state.images else None
        self._write_json(META, {"key": key, "image": spec, **asdict(self._state)})
        (self._folder / _STATE).unlink()
        sync(self._folder)

    def close(self) -> None:
        """Closes the files; what is not committed is dropped by the next writer."""
        for file in self._files.values():
            file.close()


def _durable_bytes(name: str, state: Counts) -> int:
    if name in ("offsets", "row_images", "image_offsets") and not state.rows:
        return 0
    return np.dtype(ARRAYS[name]).itemsize * count_elements(name, state)


def _read_images(folder: Path, state: Counts) -> dict[str, int]:
    """Digest -> number of the images that are durable."""
    numbers: dict[str, int] = {}
    if state.images:
        ends = np.fromfile(folder / "image_offsets", ARRAYS["image_offsets"], state.images + 1)
        with (folder / "images").open("rb") as file:
            for size in np.diff(ends).tolist():
                numbers[image_digest(file.read(size))] = len(numbers)
    return numbers


def read_image_names(folder: Path, size_bytes: int | None = None) -> list[ImageName]:
    """What the rows behind these arrays called their images; a line cut by a kill is left out."""
    try:
        with (folder / "image_names").open("rb") as file:
            lines = file.read() if size_bytes is None else file.read(size_bytes)
    except FileNotFoundError:
        return []
    whole = lines[: lines.rfind(b"\n") + 1].splitlines()
    return [ImageName(*json.loads(line)) for line in whole]


def _read_state(folder: Path) -> Counts:
    """The last durable point, or the beginning where there is none that can be trusted."""
    try:
        state = convert(json.loads((folder / _STATE).read_text("utf-8")), Counts, str_keys=True)
        sizes: Sequence[tuple[int, int]] = [
            ((folder / name).stat().st_size, _durable_bytes(name, state)) for name in ARRAYS
        ]
    except (OSError, ValueError, TypeError):
        return Counts()
    return state if all(present >= durable for present, durable in sizes) else Counts()
