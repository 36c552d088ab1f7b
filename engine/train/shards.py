"""safetensors files written as a stream: a shard never lies in memory, only one matrix of it.

Apart from `merge` because it knows nothing of adapters. safetensors' own writer wants every tensor
of a file at once, and a shard of 5 GB is more than many computers have to spare.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

SHARD_BYTES = 5_000_000_000
"""Largest file, as transformers splits models; one tensor that is larger has a file of its own."""
_WORDS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Planned:
    """One tensor of the written model."""

    name: str
    """On disk."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_shards(
    folder: Path,
    tensors: Sequence[Planned],
    pieces: Callable[[Planned], Iterator[Tensor]],
    tell: Callable[[int, int], None] = lambda done, total: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `tensors` as model.safetensors, or as numbered shards with their index.

    `pieces` gives a tensor's numbers in their order, in any number of parts, in its dtype. `tell`
    hears of bytes written and bytes in all.
    """
    shards = _split(tensors, shard_bytes)
    total, done = sum(tensor.size_bytes for tensor in tensors), 0
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else _SINGLE
        with (folder / name).open("wb") as file:
            file.write(_header(shard))
            for tensor in shard:
                weight_map[tensor.name] = name
                for piece in pieces(tensor):
                    file.write(piece.contiguous().view(torch.uint8).numpy().data)
                    done += piece.nbytes
                    tell(done, total)
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _split(tensors: Sequence[Planned], shard_bytes: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.size_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.size_bytes
    # Wide numbers first, so that every tensor begins at a multiple of its own width.
    return [sorted(shard, key=lambda each: -each.dtype.itemsize) for shard in shards]


def _header(shard: Sequence[Planned]) -> bytes:
    """A length of 8 bytes, then JSON that is padded to a multiple of 8: safetensors' own format."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in shard:
        end = start + tensor.size_bytes
        entries[tensor.name] = {
            "dtype": _WORDS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
