"""Safetensors files, read one tensor at a time and written as a stream.

safetensors' own reader keeps every page that it has read mapped, and its writer wants every tensor
of a file at once in RAM: a full fine-tune's state is larger than what many computers have to spare.
So no more than one tensor, one expert of a stack, or one piece of a tensor that is written, is in
RAM at any time. Names of any release of transformers become those in memory here.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import UserError
from engine.plan.trainer import PIECE_BYTES
from engine.visible import visible

BytesProgress: TypeAlias = Callable[[int, int], None]
"""Called with the bytes that are done and the bytes in all."""
SHARD_BYTES = 5_000_000_000
"""Largest file, as transformers splits models; one tensor that is larger has a file of its own."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""What safetensors calls the types that weights and states have."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
OFFSETS = "DCP_SHARDING_INFO"
"""Where a file of one rank says which rows it holds, as torch.distributed.checkpoint's own
safetensors storage has it: its reader reads ours."""
_WEIGHT_TYPES = ("F8_E4M3", "BF16", "F16", "F32")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PREFIXES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
"""Order of a Mistral 3 model's names on disk -> in memory; a file may have either."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file, not read yet."""

    file: Path
    name: str
    """On disk."""
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it: BF16, F8_E4M3."""

    @property
    def size_bytes(self) -> int:
        """On disk; 0 for a type that no weight has."""
        return prod(self.shape) * (DTYPES[self.dtype].itemsize if self.is_weight else 0)

    @property
    def is_fp8(self) -> bool:
        """Whether its numbers mean nothing without a scale."""
        return self.dtype == "F8_E4M3"

    @property
    def is_weight(self) -> bool:
        """Whether it holds plain numbers or FP8: packed formats hold integers."""
        return self.dtype in _WEIGHT_TYPES

    def read(self, index: int | slice | None = None) -> Tensor:
        """All of it, or entry or entries `index` of its first dimension, still mapped from its
        file: copy it, and the mapping ends with it."""
        # Opened anew for each: pages that were read stay mapped, and counted, until the file is
        # closed.
        try:
            with safe_open(self.file, framework="pt") as file:
                if index is None:
                    found: Tensor = file.get_tensor(self.name)
                else:
                    found = file.get_slice(self.name)[index]
        except (OSError, SafetensorError) as error:
            raise _unreadable(self.file.parent, error) from error
        return found


def contents(path: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and safetensors' type of each tensor of a file, in the order of its bytes."""
    with safe_open(path, framework="np") as file:  # "pt" takes the whole file's size from torch
        for name in file.offset_keys():
            part = file.get_slice(name)
            yield name, tuple(part.get_shape()), part.get_dtype()


def list_tensors(folder: Path) -> Mapping[str, StoredTensor]:
    """Every tensor of the folder's model by its name in memory, in the order of the files.

    Raises UserError where a file is missing, cut off or no safetensors file, and where two tensors
    have the same name in memory.
    """
    found: dict[str, StoredTensor] = {}
    try:
        for path in _files(folder):
            for name, shape, dtype in contents(path):
                tensor = StoredTensor(path, name, shape, dtype)
                if found.setdefault(_name_in_memory(name), tensor) is not tensor:
                    raise UserError(
                        f"The folder {folder} holds {visible(name, one_line=True)} twice.",
                        "Nothing says which of the two the model was trained with.",
                        "Download it again.",
                    )
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder, error) from error
    return found


def _files(folder: Path) -> Iterator[Path]:
    if (folder / _SINGLE).exists() or not (folder / _INDEX).exists():
        yield folder / _SINGLE
        return
    try:
        listed = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted(set(listed))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"{_INDEX} is damaged") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise OSError(f"{_INDEX} names files outside the folder")
        yield folder / name


def _name_in_memory(name: str) -> str:
    for on_disk, in_memory in _PREFIXES.items():
        if name.startswith(on_disk):
            return in_memory + name.removeprefix(on_disk)
    return name


def _unreadable(folder: Path, error: Exception) -> UserError:
    said = getattr(error, "strerror", None) or (str(error).splitlines() or ["no reason given"])[0]
    return UserError(
        f"The weights in {folder} cannot be read.",
        f"{visible(str(said), one_line=True).rstrip('.')}.",
        "Download the model again, as safetensors files.",
    )


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def entries_of(tensors: Mapping[str, Tensor]) -> list[Entry]:
    """The entries that a file of `tensors` has."""
    return [Entry(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]


def in_pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The numbers of `tensor` in their order, on the CPU, at most `PIECE_BYTES` at a time."""
    for part in cut(tensor.detach(), tensor.dtype.itemsize):
        yield part.cpu().contiguous()


def cut(tensor: Tensor, itemsize: int) -> Iterator[Tensor]:
    """Views of at most `PIECE_BYTES` each, in the order of the numbers, of `itemsize` bytes."""
    return _parts(tensor, PIECE_BYTES // itemsize)


def _parts(tensor: Tensor, numbers: int) -> Iterator[Tensor]:
    """Views that hold at most so many numbers, in the order of the numbers."""
    if tensor.numel() <= numbers:
        yield tensor
        return
    rows = numbers * len(tensor) // tensor.numel()
    for part in tensor.split(rows) if rows else tensor:
        yield from _parts(part, numbers)


def bytes_of(piece: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return piece.view(-1).view(torch.uint8).numpy().data


def write_tensors(
    file: Path, tensors: Mapping[str, Tensor], starts: Mapping[str, int] | None = None
) -> str:
    """Write `tensors`, on whatever device they are, as one file; all as `write_file`."""
    entries = entries_of(tensors)
    return write_file(file, entries, lambda entry: in_pieces(tensors[entry.name]), starts)


def write_file(
    path: Path,
    entries: Iterable[Entry],
    pieces: Callable[[Entry], Iterator[Tensor]],
    starts: Mapping[str, int] | None = None,
) -> str:
    """Write a file, sync it, and see that safetensors' own reader finds `entries` in it; returns
    its digest, which is of what was to be written: a file read back has its faults in it already.

    `pieces` gives a tensor's numbers in their order, in any number of parts, in its dtype. `starts`
    says of a file that holds some rows of each tensor which row of the whole is its first. Raises
    OSError where there is no room, and where the file does not read back.
    """
    # Wide numbers first, so that every tensor begins at a multiple of its own width.
    ordered = sorted(entries, key=lambda each: -each.dtype.itemsize)
    header = _header(ordered, starts)
    hashed = hashlib.sha256(header)
    with path.open("wb") as file:
        file.write(header)
        for entry in ordered:
            for piece in pieces(entry):
                content = bytes_of(piece.contiguous())
                hashed.update(content)
                file.write(content)
                del piece, content  # or it lies beside the next one
        file.flush()
        os.fsync(file.fileno())
    try:
        same = set(list_entries(path)) == set(ordered)
    except SafetensorError:
        same = False
    if not same:
        raise OSError(f"{path.name} does not read back as it was written")
    return hashed.hexdigest()


def list_entries(path: Path) -> list[Entry]:
    """What a file holds, in the order of its bytes.

    Raises SafetensorError where it is damaged, or holds numbers of a type that is not in `DTYPES`.
    """
    entries = []
    for name, shape, dtype in contents(path):
        if dtype not in DTYPES:
            raise SafetensorError(f"{path.name} holds numbers of the type {dtype}")
        entries.append(Entry(name, shape, DTYPES[dtype]))
    return entries


def write_shards(
    folder: Path,
    entries: Sequence[Entry],
    pieces: Callable[[Entry], Iterator[Tensor]],
    progress: BytesProgress = lambda done, total: None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Write `entries` as model.safetensors, or as numbered shards with their index; returns the
    digests of the files with weights, by name.

    `pieces` and what is raised are as in `write_file`.
    """
    total, done = sum(entry.size_bytes for entry in entries), 0

    def counted(entry: Entry) -> Iterator[Tensor]:
        nonlocal done
        for piece in pieces(entry):
            done += piece.nbytes
            yield piece
            del piece
            progress(done, total)

    shards = _split(entries, shard_bytes)
    weight_map, digests = {}, {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else _SINGLE
        digests[name] = write_file(folder / name, shard, counted)
        weight_map.update({entry.name: name for entry in shard})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return digests


def _split(entries: Sequence[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    room = shard_bytes
    for entry in entries:
        if shards[-1] and entry.size_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= entry.size_bytes
    return shards


def _header(entries: Sequence[Entry], starts: Mapping[str, int] | None = None) -> bytes:
    """A length of 8 bytes, then JSON that is padded to a multiple of 8: safetensors' own format."""
    metadata = {"format": "pt"}
    if starts is not None:
        offsets = {
            e.name: [starts[e.name], *[0] * len(e.shape[1:])][: len(e.shape)] for e in entries
        }
        said = {name: {"saved_offsets": offset} for name, offset in offsets.items()}
        metadata |= {OFFSETS: json.dumps(said), "DCP_VERSION": "1.0"}
    content: dict[str, object] = {"__metadata__": metadata}
    start = 0
    for entry in entries:
        end = start + entry.size_bytes
        content[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
