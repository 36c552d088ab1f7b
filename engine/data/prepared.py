"""The prepared arrays, opened: what training and preview read, and what they decide at load.

The folder is written once by `prepare` and never changed. Everything that depends on a switch
(labels, length limit, validation split, order, bins) is decided here from the stored ids and kinds,
so that turning the switch tokenizes nothing.
"""

import json
import os
import shutil
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from msgspec import convert
from numpy.typing import NDArray

from engine.chat.images import ImageSpec
from engine.chat.render import (
    WITHHELD,
    Kind,
    LabelRule,
    Rendered,
    RenderedImage,
    count_learned,
    learned,
    truncate,
)
from engine.data.facts import Facts
from engine.data.statistics import (
    BadRow,
    LeftOut,
    count_held_out,
    no_row_left,
    nothing_learned,
    rows_too_long,
)
from engine.errors import UserError, WorkError
from engine.files import SUMS, partial_name
from engine.visible import visible

META = "meta.json"
# File name -> little-endian element type. `offsets` and `row_images` have one entry more than there
# are rows, `image_offsets` one more than there are different images. `images` holds their bytes,
# `image_grids` (number, rows, columns) of each image in each row, `image_names` what rows called
# them, a JSON list a line.
ARRAYS = {
    "ids": "<u4",
    "kinds": "|u1",
    "sources": "<i4",
    "offsets": "<i8",
    "lines": "<i8",
    "numbers": "<i8",
    "files": "<i4",
    "datasets": "<i4",
    "hashes": "<u8",
    "images": "|u1",
    "image_offsets": "<i8",
    "row_images": "<i8",
    "image_grids": "<i4",
    "image_names": "|u1",
}
_SCAN_TOKENS = 2**22

Indices = NDArray[np.int64]
LengthStrategy = Literal["drop", "truncate", "raise"]


@dataclass(slots=True)
class Counts:
    """What is in the arrays, and how many rows of the source it took."""

    source_rows: int = 0
    rows: int = 0
    tokens: int = 0
    bad_rows: int = 0
    problems: list[BadRow] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    kind_counts: dict[int, int] = field(default_factory=dict)
    images: int = 0
    image_bytes: int = 0
    placed_images: int = 0
    image_name_bytes: int = 0
    facts: Facts = field(default_factory=Facts)
    """What a checkup says of the rows besides their tokens."""


@dataclass(slots=True)
class Meta(Counts):
    """meta.json: the counts, the key of the arrays, and how their images are brought to grids."""

    key: str = ""
    image: tuple[Any, ...] | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """The rows that training uses under one label rule and one length limit.

    `rows` are indices into the arrays, `lengths` their tokens after truncation.
    """

    rows: Indices
    lengths: Indices
    too_long: int
    truncated: int
    nothing_learned: int


@dataclass(frozen=True, slots=True)
class StoredImage(RenderedImage):
    """An image of a row; `number` is the same wherever the same image stands."""

    number: int


class Prepared:
    """A folder of prepared arrays, memory-mapped. `reused` says that nothing was tokenized for it,
    `damaged` which file of an earlier one was not as it was written.

    Raises `WorkError` when the folder's files do not agree with its meta.json.
    """

    def __init__(self, folder: Path, *, reused: bool = True, damaged: str = "") -> None:
        self.folder = folder
        self.reused, self.damaged = reused, damaged
        self.meta = read_meta(folder)
        self._arrays: dict[str, NDArray[Any]] = {
            name: _map(folder / name, dtype) for name, dtype in ARRAYS.items()
        }
        self.offsets: Indices = np.asarray(self._arrays["offsets"])
        self.lengths: Indices = np.diff(self.offsets)

    def __len__(self) -> int:
        return self.meta.rows

    def _row(self, name: str, index: int) -> NDArray[Any]:
        return self._arrays[name][self.offsets[index] : self.offsets[index + 1]]

    def ids(self, index: int) -> NDArray[np.uint32]:
        """Token ids of one row, uint32 [tokens]."""
        return self._row("ids", index)

    def kinds(self, index: int) -> NDArray[np.uint8]:
        """Kind of each token, with the WITHHELD bit, uint8 [tokens]."""
        return self._row("kinds", index)

    def sources(self, index: int) -> NDArray[np.int32]:
        """Index of each token's message in the row as given, int32 [tokens]; -1 for none."""
        return self._row("sources", index)

    def images(self, index: int) -> tuple[StoredImage, ...]:
        """The images of one row, in the order of their tokens."""
        first, last = self._arrays["row_images"][index : index + 2].tolist()
        grids = self._arrays["image_grids"][3 * first : 3 * last].reshape(-1, 3).tolist()
        found = []
        for number, rows, columns in grids:
            start, end = self._arrays["image_offsets"][number : number + 2].tolist()
            content = self._arrays["images"][start:end].data
            found.append(StoredImage(content, rows, columns, number))
        return tuple(found)

    @property
    def image_spec(self) -> ImageSpec | None:
        """How the images are brought to their grids; None where no row has an image."""
        return ImageSpec(*self.meta.image) if self.meta.image else None

    def rendered(self, index: int) -> Rendered:
        """The row as the renderer made it."""
        return Rendered(
            self.ids(index),
            self.kinds(index),
            self.sources(index),
            self.images(index),
        )

    def line(self, index: int) -> int:
        """The line of `file(index)` on which the row starts, from 1."""
        return int(self._arrays["lines"][index])

    @property
    def lines(self) -> Indices:
        """The line of each row in its file, from 1, int64 [rows]."""
        return self._arrays["lines"]

    @property
    def numbers(self) -> Indices:
        """The number of each row among all that were read, bad ones too, from 1, int64 [rows]."""
        return self._arrays["numbers"]

    def file(self, index: int) -> str:
        """The name of the file that the row comes from."""
        return self.meta.files[int(self._arrays["files"][index])]

    @property
    def datasets(self) -> NDArray[np.int32]:
        """For each row, which of the datasets it comes from, int32 [rows]."""
        return self._arrays["datasets"]

    @cached_property
    def hashes(self) -> NDArray[np.uint64]:
        """A hash of each row's ids and images, uint64 [rows]: equal for duplicates."""
        return np.asarray(self._arrays["hashes"])

    def learned_lengths(self, rule: LabelRule) -> Indices:
        """Learned tokens of each row under `rule`, int64 [rows]; reads the kinds in pieces."""
        counts = np.zeros(len(self), dtype=np.int64)
        for start, end in self.pieces():
            flags = learned(self.read_piece("kinds", start, end), rule)
            starts = self.offsets[start:end] - self.offsets[start]
            counts[start:end] = np.add.reduceat(flags, starts, dtype=np.int64)
        return counts

    def pieces(self) -> Iterator[tuple[int, int]]:
        """All rows as (first, behind the last) of pieces that memory is for."""
        start = 0
        while start < len(self):
            limit = self.offsets[start] + _SCAN_TOKENS
            end = max(start + 1, int(np.searchsorted(self.offsets, limit, side="right")) - 1)
            yield start, end
            start = end

    def read_piece(self, name: str, start: int, end: int) -> NDArray[Any]:
        """What an array has for each token of some rows, in memory of its own.

        By the map, all that was looked at would stay in this process's memory.
        """
        kind = np.dtype(ARRAYS[name])
        first, last = self.offsets[start], self.offsets[end]
        return np.fromfile(self.folder / name, kind, last - first, offset=first * kind.itemsize)

    def tokens_by_kind(self) -> dict[str, int]:
        """How many tokens of each kind, by its word, withheld ones among them."""
        counts: dict[str, int] = {}
        for value, count in self.meta.kind_counts.items():
            word = Kind(value & ~WITHHELD).word
            counts[word] = counts.get(word, 0) + count
        return counts

    def learned_tokens(self, rule: LabelRule) -> int:
        """Learned tokens of all rows under `rule`, from the stored counts alone."""
        return count_learned(self.meta.kind_counts, rule)

    def repair(self) -> str:
        """What was done where the arrays were damaged, as a sentence; else empty."""
        if not self.damaged:
            return ""
        name = visible(self.damaged, one_line=True)
        return f"the prepared rows were damaged ({name} was not as it was written): prepared again"

    def refuse_if_nothing_learned(self, rule: LabelRule) -> None:
        """Raises `UserError` when no token of any row carries the loss."""
        if self.learned_tokens(rule):
            return
        only_thinking = not rule.thinking and self.tokens_by_kind().get("think")
        raise nothing_learned(len(self), bool(only_thinking))

    def select(
        self, rule: LabelRule, sequence_len: int, strategy: LengthStrategy = "drop"
    ) -> Selection:
        """Apply the length limit and leave out rows that teach nothing.

        Raises `UserError` when no row is left, or on the first row too long with `raise`.
        """
        lengths, counts = self.lengths.copy(), self.learned_lengths(rule)
        over = np.flatnonzero(lengths > sequence_len)
        if len(over) and strategy == "raise":
            raise self._too_long(over, sequence_len)
        keep = counts > 0
        nothing, cut = int((~keep).sum()), 0
        for index in over.tolist() if strategy == "truncate" else ():
            shorter = truncate(self.rendered(index), sequence_len, rule)
            nothing += bool(keep[index]) and shorter is None
            keep[index] = shorter is not None
            if shorter is not None:
                lengths[index] = len(shorter)
                cut += 1
        if strategy == "drop":
            nothing -= int((~keep[over]).sum())
            keep[over] = False
        if not keep.any():
            raise self._nothing_left(rule, len(over), sequence_len)
        rows = np.flatnonzero(keep).astype(np.int64)
        return Selection(rows, lengths[rows], len(over), cut, nothing)

    def left_out(self, selection: Selection, strategy: LengthStrategy = "drop") -> LeftOut:
        """What a selection of these rows leaves out, those that could not be used among it."""
        has_images = np.diff(self._arrays["row_images"]) > 0
        return LeftOut(
            len(self) + self.meta.bad_rows,
            bad=self.meta.bad_rows,
            judged=self.meta.facts.judged,
            too_long=selection.too_long if strategy == "drop" else 0,
            nothing_learned=selection.nothing_learned,
            cut=selection.truncated,
            image_rows=int(has_images.sum()),
            images_left_out=int(has_images.sum() - has_images[selection.rows].sum()),
        )

    def _too_long(self, over: Indices, sequence_len: int) -> UserError:
        longest = int(over[np.argmax(self.lengths[over])])
        where = f"line {self.line(longest)} of {self.file(longest)}"
        return rows_too_long(len(over), len(self), sequence_len, where, int(self.lengths[longest]))

    def _nothing_left(self, rule: LabelRule, over: int, sequence_len: int) -> UserError:
        self.refuse_if_nothing_learned(rule)
        return no_row_left(over, len(self), sequence_len, int(self.lengths.max()))

    def split(
        self, val_set_size: float, seed: int, rows: Indices | None = None
    ) -> tuple[Indices, Indices]:
        """`rows` (all by default) as (training, validation), each in ascending order.

        Below 1 `val_set_size` is a share, from 1 on a count, as in scikit-learn and Axolotl. The
        choice follows from content and seed alone, and equal conversations stay on one side; at
        least one row is held out where two different ones exist.
        """
        chosen = np.arange(len(self), dtype=np.int64) if rows is None else rows
        if val_set_size <= 0 or len(chosen) < 2:
            return chosen, chosen[:0]
        target = count_held_out(val_set_size, len(chosen))
        unique, group, sizes = np.unique(
            self.hashes[chosen], return_inverse=True, return_counts=True
        )
        if len(unique) < 2:
            return chosen, chosen[:0]
        held_out = np.zeros(len(unique), dtype=bool)
        room = target
        for index in np.argsort(mix(unique, seed), kind="stable").tolist():
            if sizes[index] <= room:
                held_out[index] = True
                room -= int(sizes[index])
        if not held_out.any():
            held_out[np.argmin(sizes)] = True
        flags = held_out[group]
        return chosen[~flags], chosen[flags]

    def link_into(self, run_data_folder: Path) -> None:
        """Hard links of all files in `run_data_folder`; copies where the file system differs.

        An interrupted call can be repeated. Raises `WorkError` when the disk is full.
        """
        run_data_folder.mkdir(parents=True, exist_ok=True)
        for name in (*ARRAYS, META, SUMS):
            target = run_data_folder / name
            waiting = partial_name(target)
            try:
                _link_or_copy(self.folder / name, waiting)
                waiting.replace(target)
            except OSError as error:
                raise WorkError(
                    f"The prepared arrays cannot be placed in {run_data_folder}.",
                    f"{error.strerror or error}.",
                    "Free space or choose another output_dir.",
                ) from error
            finally:
                # rename(2) between two links of one file does nothing and leaves both.
                waiting.unlink(missing_ok=True)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        with target.open("rb+") as copy:
            os.fsync(copy.fileno())


def read_meta(folder: Path) -> Meta:
    """meta.json of a folder whose arrays have the sizes that it states; `WorkError` otherwise."""
    try:
        meta = convert(json.loads((folder / META).read_text("utf-8")), Meta, str_keys=True)
        sizes = {name: (folder / name).stat().st_size for name in ARRAYS}
        expected = {
            name: np.dtype(dtype).itemsize * count_elements(name, meta)
            for name, dtype in ARRAYS.items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _not_prepared(folder, f"{type(error).__name__}: {error}.") from error
    if sizes != expected:
        wrong = ", ".join(name for name in ARRAYS if sizes[name] != expected[name])
        raise _not_prepared(folder, f"The size of {wrong} is not what meta.json states.")
    return meta


def count_elements(name: str, counts: Counts) -> int:
    """How many elements the file `name` of ARRAYS has, by the counts."""
    match name:
        case "ids" | "kinds" | "sources":
            return counts.tokens
        case "offsets" | "row_images":
            return counts.rows + 1
        case "images":
            return counts.image_bytes
        case "image_offsets":
            return counts.images + 1
        case "image_grids":
            return 3 * counts.placed_images
        case "image_names":
            return counts.image_name_bytes
        case _:
            return counts.rows


def _map(path: Path, dtype: str) -> NDArray[Any]:
    # An empty file cannot be mapped.
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def _not_prepared(folder: Path, why: str) -> WorkError:
    return WorkError(
        f"{folder} does not hold whole prepared arrays.",
        why,
        "Delete that folder and prepare again.",
    )


# Rows that are sorted against each other. On 200,000 rows of three length mixtures this fills
# within 0.7 points of one window over everything, and in a third of its time on the worst mixture;
# a window below the dataset's size is also what makes the bins differ from epoch to epoch.
WINDOW_ROWS = 4096

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def mix(values: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Pseudo-random 64 bits for each value, under `seed` (splitmix64: Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        state = values + _GOLDEN * np.uint64((2 * seed + 1) & 0xFFFFFFFFFFFFFFFF)
        state = (state ^ (state >> np.uint64(30))) * _MIX_1
        state = (state ^ (state >> np.uint64(27))) * _MIX_2
        return state ^ (state >> np.uint64(31))


def shuffle_order(count: int, seed: int, epoch: int) -> Indices:
    """A permutation of `range(count)`, the same for the same (count, seed, epoch) everywhere."""
    epoch_key = mix(np.array([epoch], np.uint64), seed)
    keys = mix(np.arange(count, dtype=np.uint64) ^ epoch_key, seed)
    return np.argsort(keys, kind="stable").astype(np.int64)


def pack(
    lengths: Sequence[int] | NDArray[np.integer], capacity: int, seed: int, epoch: int
) -> list[Indices]:
    """Whole rows in bins of at most `capacity` tokens: one array of row indices a bin.

    Best-fit decreasing (Johnson 1973: at most 11/9 of the optimum) inside windows of a shuffled
    order; the bins are then shuffled too. `ValueError` when a row is longer than `capacity`.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and int(sizes.max()) > capacity:
        raise ValueError(f"a row of {int(sizes.max())} tokens cannot enter a bin of {capacity}")
    order = shuffle_order(len(sizes), seed, epoch)
    bins: list[list[int]] = []
    for start in range(0, len(order), WINDOW_ROWS):
        bins += _best_fit(order[start : start + WINDOW_ROWS], sizes, capacity)
    positions = shuffle_order(len(bins), seed + 1, epoch)
    return [np.array(bins[position], dtype=np.int64) for position in positions]


def _best_fit(window: Indices, sizes: NDArray[np.int64], capacity: int) -> list[list[int]]:
    longest_first = window[np.argsort(-sizes[window], kind="stable")]
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for row in longest_first.tolist():
        size = int(sizes[row])
        slot = bisect_left(rooms, (size, -1))
        if slot == len(rooms):
            bins.append([row])
            free, chosen = capacity, len(bins) - 1
        else:
            free, chosen = rooms.pop(slot)
            bins[chosen].append(row)
        if free > size:
            insort(rooms, (free - size, chosen))
    return bins


def efficiency(
    bins: Sequence[Indices], lengths: Sequence[int] | NDArray[np.integer], capacity: int
) -> float:
    """Share of all bin places that hold a token, 0 to 1 (1 when there are no bins)."""
    if not bins:
        return 1.0
    sizes = np.asarray(lengths, dtype=np.int64)
    return float(sum(int(sizes[rows].sum()) for rows in bins) / (len(bins) * capacity))
