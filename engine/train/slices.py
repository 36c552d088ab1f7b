"""Tensors that several ranks write and read together, each its own rows.

Every rank writes one file, at the same time as the others, in the format of
torch.distributed.checkpoint's safetensors storage (DCP). Its writer is not used: it lays a rank's
whole state out in RAM twice before the first byte is written (measured: 1.03 GB for 0.51), ends the
process on a Python number, and gives no digest of what was to be written. Files are read by any
number of ranks, row by row, whoever wrote them: a tensor in one file is one that has one part.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from engine.train.ranks import Ranks
from engine.train.shard import is_spread, local_part
from engine.train.weight_files import (
    OFFSETS,
    Entry,
    bytes_of,
    cut,
    in_pieces,
    list_entries,
    write_tensors,
)


@dataclass(frozen=True, slots=True)
class Slice:
    """What one rank writes of a tensor."""

    tensor: Tensor
    """Its rows, or all of them."""
    start: int = 0
    """The first one's place in the whole."""
    shared: bool = True
    """Whether every rank has the same, so that one writes it."""


def place_of(tensor: Tensor, ranks: Ranks, rank: int | None = None) -> int:
    """The place of this or another rank's rows among those of a sharded tensor."""
    rank = ranks.rank if rank is None else rank
    return ranks.of_experts(rank) if is_spread(tensor) else rank % ranks.shards


def first_row(tensor: Tensor, ranks: Ranks, place: int | None = None) -> int:
    """Where this rank's rows of a sharded tensor begin, or those in a place: as torch.chunk cuts
    it, and FSDP."""
    place = place_of(tensor, ranks) if place is None else place
    return min(len(tensor), -(-len(tensor) // ranks.shards) * place)


def slice_of(tensor: Tensor, ranks: Ranks) -> Slice:
    """This rank's rows of a sharded tensor, or a tensor that each has whole."""
    if not isinstance(tensor, DTensor):
        return Slice(tensor)
    return Slice(local_part(tensor), first_row(tensor, ranks), shared=False)


def file_of(name: str, place: int, count: int) -> str:
    """The file `name` of one rank among `count`: trained-00001-of-00002.safetensors; of a lone rank
    `name` itself."""
    stem, end = name.rsplit(".", 1)
    return f"{stem}-{place + 1:05}-of-{count:05}.{end}" if count > 1 else name


def write_slices(
    folder: Path, name: str, slices: Mapping[str, Slice], ranks: Ranks
) -> dict[str, str]:
    """Write what is this rank's to write of `slices` as its file `name`; returns its digest by the
    file's name, nothing for a rank of another copy. All as `write_file`."""
    if ranks.rank >= ranks.shards:
        return {}
    path = folder / file_of(name, ranks.shard, ranks.shards)
    if ranks.shards == 1:
        return {path.name: write_tensors(path, {k: s.tensor for k, s in slices.items()})}
    own = {k: s for k, s in slices.items() if (len(s.tensor) if not s.shared else ranks.is_first)}
    starts = {k: s.start for k, s in own.items()}
    return {path.name: write_tensors(path, {k: s.tensor for k, s in own.items()}, starts)}


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a tensor in one file."""

    file: Path
    entry: Entry
    begins: int
    """Of its bytes, in the file."""
    start: int
    """Its first row's place in the whole."""

    @property
    def stop(self) -> int:
        """The row behind its last; 1 for a single number."""
        return self.start + (self.entry.shape[0] if self.entry.shape else 1)

    @torch.no_grad()
    def read(self, start: int, out: Tensor) -> None:
        """Fill `out`, on whatever device it is, with its rows from row `start` of the whole on.

        Raises OSError where the file cannot be read, or ends before.
        """
        row_bytes = prod(self.entry.shape[1:]) * self.entry.dtype.itemsize
        with self.file.open("rb") as file:
            file.seek(self.begins + (start - self.start) * row_bytes)
            for part in cut(out, self.entry.dtype.itemsize):
                piece = torch.empty(part.shape, dtype=self.entry.dtype)
                if file.readinto(bytes_of(piece)) != piece.nbytes:
                    raise OSError(f"{self.file.name} ends before its last tensor")
                part.copy_(piece)
                del piece  # or it lies beside the next one


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor on the disk, in as many parts as ranks wrote it."""

    name: str
    parts: tuple[Part, ...]
    """In the order of their rows."""

    @property
    def shape(self) -> tuple[int, ...]:
        rows = (self.parts[-1].stop,) if self.parts[0].entry.shape else ()
        return (*rows, *self.parts[0].entry.shape[1:])

    def within(self, start: int, stop: int) -> Iterator[tuple[Part, int, int]]:
        """The parts with some of the rows from `start` to `stop`, and which of these each has."""
        for part in self.parts:
            first, last = max(start, part.start), min(stop, part.stop)
            if first < last:
                yield part, first, last

    @property
    def dtype(self) -> torch.dtype:
        """Of its first part: a moment of an optimizer may have others."""
        return self.parts[0].entry.dtype

    def load(self) -> Tensor:
        """All of it, on the CPU. Raises OSError as `read`."""
        whole = torch.empty(self.shape, dtype=self.dtype)
        self.read(whole)
        return whole

    def read(self, out: Tensor, start: int = 0) -> None:
        """Fill `out` with the rows from `start` on, as many as it has. Raises OSError where they
        are not all there."""
        stop, found = start + (len(out) if out.ndim else 1), 0
        for part, first, last in self.within(start, stop):
            part.read(first, out[first - start : last - start] if out.ndim else out)
            found += last - first
        if found < stop - start:
            raise OSError(f"{self.name} is not there whole")


def list_wholes(folder: Path, name: str) -> dict[str, Whole]:
    """What the file `name` holds, or the files of several ranks that stand for it; nothing where
    there is none. Raises SafetensorError where one is damaged."""
    stem, end = name.rsplit(".", 1)
    own = re.compile(rf"{re.escape(stem)}(-\d+-of-\d+)?\.{re.escape(end)}")
    found: dict[str, list[Part]] = {}
    for path in sorted(each for each in folder.glob(f"{stem}*") if own.fullmatch(each.name)):
        for part in _parts_of(path):
            found.setdefault(part.entry.name, []).append(part)
    ordered = {key: tuple(sorted(parts, key=lambda p: p.start)) for key, parts in found.items()}
    return {key: Whole(key, parts) for key, parts in ordered.items()}


def _parts_of(path: Path) -> Iterator[Part]:
    with safe_open(path, framework="np") as opened:
        said = json.loads((opened.metadata() or {}).get(OFFSETS, "{}"))
    with path.open("rb") as file:
        begins = 8 + int.from_bytes(file.read(8), "little")
    for entry in list_entries(path):  # in the order of their bytes, without gaps
        offsets = said.get(entry.name, {}).get("saved_offsets")
        yield Part(path, entry, begins, offsets[0] if offsets else 0)
        begins += entry.size_bytes


Pieces = Callable[[Entry], Iterator[Tensor]]


@contextmanager
def gathered(tensors: Mapping[str, Tensor], ranks: Ranks) -> Iterator[Pieces | None]:
    """What gives a whole tensor's numbers in pieces, for `write_file`, on the first rank.

    The other ranks of its copy send theirs when they are asked, and get None when all is done: no
    more than a piece of one tensor is gathered at any time. All have the same `tensors`.
    """
    others, names = range(1, ranks.shards), list(tensors)

    def pieces(entry: Entry) -> Iterator[Tensor]:
        tensor = tensors[entry.name]
        yield from in_pieces(local_part(tensor))
        in_order = sorted(others, key=lambda other: place_of(tensor, ranks, other))
        for place, other in enumerate(in_order if isinstance(tensor, DTensor) else (), start=1):
            rows = first_row(tensor, ranks, place + 1) - first_row(tensor, ranks, place)
            dist.send(torch.tensor([names.index(entry.name)]), other)
            room = torch.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype, device="meta")
            for part in cut(room, tensor.dtype.itemsize):
                piece = torch.empty(part.shape, dtype=tensor.dtype)
                dist.recv(piece.view(-1).view(torch.uint8), other)
                yield piece

    if not ranks.is_first:
        if ranks.rank < ranks.shards:
            _send_asked([local_part(tensor) for tensor in tensors.values()])
        yield None
        return
    try:
        yield pieces
    finally:
        for other in others:
            dist.send(torch.tensor([-1]), other)


def _send_asked(tensors: list[Tensor]) -> None:
    """Send the first rank each tensor whose place it asks for, until it asks for none."""
    asked = torch.zeros(1, dtype=torch.int64)
    while dist.recv(asked, 0) == 0 and asked >= 0:
        for piece in in_pieces(tensors[int(asked)]):
            dist.send(piece.view(-1).view(torch.uint8), 0)
