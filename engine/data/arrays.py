"""The array files while they are written: blocks of rows, and the points that survive a kill.

A block is some rows in a row as the files hold them; it is made where the rows are rendered, be it
in another process, and appended here. What stands in the files between two durable points is cut
off by the next writer.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from msgspec import convert, to_builtins

from engine.chat.images import ImageSpec
from engine.chat.render import Rendered
from engine.data.facts import Facts
from engine.data.prepared import ARRAYS, META, Counts, count_elements
from engine.data.rows import ImageName, RenderedRow, image_digest
from engine.files import PRIVATE, sweep, sync, write_sums, write_whole

STATE = "progress.json"
"""The last durable point; gone where the arrays are whole."""
_LISTED_PROBLEMS = 100


@dataclass(frozen=True, slots=True)
class Interval:
    """How much is written between two durable points, each of which costs one fsync a file.

    The tokens bound the memory too: 9 bytes a token wait here.
    """

    rows: int = 10_000
    tokens: int = 2_000_000


@dataclass(slots=True)
class Block:
    """Consecutive rows, with the bad ones among them.

    `arrays` has the bytes of the array files that begin anew in every row, and of `lengths` and
    `image_counts`, int64, the tokens and the images of a row. `files` are (name, rows) of usable
    rows in their order, `images` (content, rows, columns).
    """

    source_rows: int
    arrays: dict[str, bytes] = field(default_factory=dict)
    files: list[tuple[str, int]] = field(default_factory=list)
    images: list[tuple[bytes, int, int]] = field(default_factory=list)
    image_names: list[ImageName] = field(default_factory=list)
    facts: Facts = field(default_factory=Facts)


def block_of(rows: Sequence[RenderedRow]) -> Block:
    """Rendered rows as the files hold them."""
    block, usable, all_rendered = Block(len(rows)), list[RenderedRow](), list[Rendered]()
    block.facts.take(rows)
    for row in rows:
        block.image_names += row.image_names
        if row.rendered is None:
            continue
        usable.append(row)
        all_rendered.append(row.rendered)
        if block.files and block.files[-1][0] == row.file:
            block.files[-1] = (row.file, block.files[-1][1] + 1)
        else:
            block.files.append((row.file, 1))
        block.images += [(bytes(i.content), i.rows, i.columns) for i in row.rendered.images]
    if usable:
        columns: dict[str, Any] = {
            "ids": np.concatenate([each.input_ids for each in all_rendered]),
            "kinds": np.concatenate([each.kinds for each in all_rendered]),
            "sources": np.concatenate([each.sources for each in all_rendered]),
            "lines": [row.line for row in usable],
            "numbers": [row.number for row in usable],
            "datasets": [row.dataset for row in usable],
            "hashes": [content_hash(each) for each in all_rendered],
            "lengths": [len(each) for each in all_rendered],
            "image_counts": [len(each.images) for each in all_rendered],
        }
        block.arrays = {
            name: np.asarray(values, ARRAYS.get(name, "<i8")).tobytes()
            for name, values in columns.items()
        }
    return block


def content_hash(rendered: Rendered) -> int:
    """64 bits that are equal for rows with the same ids and the same images."""
    ids = np.ascontiguousarray(rendered.input_ids, dtype="<u4")
    content = hashlib.blake2b(ids.tobytes(), digest_size=8)
    for image in rendered.images:
        content.update(image_digest(image.content).encode())
    return int.from_bytes(content.digest(), "little")


class ArrayWriter:
    """The array files in `folder`, at the end of what is durable there.

    `state.source_rows` is how many rows of the source the caller has to skip.
    """

    def __init__(self, folder: Path, interval: Interval) -> None:
        folder.mkdir(PRIVATE, exist_ok=True)
        sweep(folder)
        self._folder = folder
        self._interval = interval
        self.state = _read_state(folder)
        self._pending: dict[str, list[Any]] = {name: [] for name in ARRAYS}
        self._pending_tokens = self._since = 0
        self._files = {name: self._open(name) for name in ARRAYS}
        self._images = _read_images(folder, self.state)
        self._names = set(read_image_names(folder, self.state.image_name_bytes))
        if self.state.rows == 0:
            for name in ("offsets", "row_images", "image_offsets"):
                self._pending[name].append(np.zeros(1, np.int64))

    def _open(self, name: str) -> IO[bytes]:
        path = self._folder / name
        path.touch()
        file = path.open("rb+")
        file.truncate(_durable_bytes(name, self.state))
        file.seek(0, os.SEEK_END)
        return file

    def add(self, block: Block) -> None:
        """The next rows; bad ones are counted and the first hundred are kept."""
        state = self.state
        state.source_rows += block.source_rows
        self._since += block.source_rows
        self._add_names(block.image_names)
        problems = block.facts.problems
        state.bad_rows += len(problems)
        state.problems += problems[: _LISTED_PROBLEMS - len(state.problems)]
        state.facts.add(block.facts, listed=0)
        if block.arrays:
            self._append(block)
        if self._since >= self._interval.rows or self._pending_tokens >= self._interval.tokens:
            self.commit()

    def _append(self, block: Block) -> None:
        state, pending = self.state, self._pending
        arrays = {
            name: np.frombuffer(content, ARRAYS.get(name, "<i8"))
            for name, content in block.arrays.items()
        }
        ends = np.cumsum(arrays.pop("lengths"))
        shown = np.cumsum(arrays.pop("image_counts"))
        for name, values in arrays.items():
            pending[name].append(values)
        pending["offsets"].append(state.tokens + ends)
        pending["row_images"].append(state.placed_images + shown)
        for file, rows in block.files:
            if state.files[-1:] != [file]:
                state.files.append(file)
            pending["files"].append(np.full(rows, len(state.files) - 1))
        for content, grid_rows, grid_columns in block.images:
            grid = (self._store(content), grid_rows, grid_columns)
            pending["image_grids"].append(np.array(grid))
        state.rows += len(ends)
        state.tokens += int(ends[-1])
        state.placed_images += int(shown[-1])
        self._pending_tokens += int(ends[-1])

    def _store(self, content: bytes) -> int:
        """The number of an image; its bytes are written where they are new."""
        digest, state = image_digest(content), self.state
        number = self._images.setdefault(digest, state.images)
        if number == state.images:
            # Written at once, as images are too large to wait in memory.
            self._files["images"].write(content)
            state.images += 1
            state.image_bytes += len(content)
            self._pending["image_offsets"].append(np.array([state.image_bytes]))
        return number

    def _add_names(self, names: Sequence[ImageName]) -> None:
        for name in names:
            if name not in self._names:
                self._names.add(name)
                line = json.dumps(astuple(name)).encode() + b"\n"
                self._pending["image_names"].append(np.frombuffer(line, np.uint8))
                self.state.image_name_bytes += len(line)

    def commit(self) -> None:
        """A durable point: what was added until now survives."""
        for name, dtype in ARRAYS.items():
            waiting = self._pending[name]
            if waiting:
                block = np.concatenate(waiting).astype(dtype, copy=False)
                if name == "kinds":
                    self._count(block)
                self._files[name].write(block.data)
                waiting.clear()
            elif name != "images":
                continue
            self._files[name].flush()
            os.fsync(self._files[name].fileno())
        self._write_json(STATE, asdict(self.state))
        self._pending_tokens = self._since = 0

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        # In the order in which things were found: that of the rows, wherever a kill came.
        text = json.dumps(to_builtins(value, str_keys=True), indent=1)
        write_whole(self._folder / name, text.encode())

    def _count(self, kinds: Any) -> None:
        counts = Counter(self.state.kind_counts)
        counts.update({kind: int(count) for kind, count in enumerate(np.bincount(kinds)) if count})
        self.state.kind_counts = dict(sorted(counts.items()))

    def finish(self, key: str, image_spec: ImageSpec | None = None) -> None:
        """Commits, writes meta.json (`key` and the counts, nothing of when or how fast) and the
        digest of every file.

        `image_spec` is how the images, where there are any, are brought to their grids.
        """
        self.commit()
        self.close()
        spec = astuple(image_spec) if image_spec and self.state.images else None
        self._write_json(META, {"key": key, "image": spec, **asdict(self.state)})
        write_sums(self._folder, {}, unlisted=(STATE,))
        (self._folder / STATE).unlink()
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
        state = convert(json.loads((folder / STATE).read_text("utf-8")), Counts, str_keys=True)
        sizes: Sequence[tuple[int, int]] = [
            ((folder / name).stat().st_size, _durable_bytes(name, state)) for name in ARRAYS
        ]
    except (OSError, ValueError, TypeError):
        return Counts()
    return state if all(present >= durable for present, durable in sizes) else Counts()
