"""Weights that are drawn instead of read: the architecture is real, its numbers are not.

Each tensor stands in for one of a model's files: it is drawn, quantized and dropped before the
next, by the code that loads a run.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.catalog import Architecture
from engine.train.weight_files import StoredTensor

_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}
"""As a safetensors file would call them."""


@dataclass(frozen=True, slots=True)
class DrawnTensor(StoredTensor):
    """One tensor of no file, drawn anew each time, with the same numbers."""

    kind: torch.dtype
    device: torch.device
    seed: int

    def read(self, index: int | None = None) -> Tensor:
        """All of it, or entry `index` of its first dimension, on the device.

        A matrix keeps its input's length: normal numbers with a deviation of 1 / sqrt(inputs). What
        scales a norm is one, and a bias zero.
        """
        shape = self.shape if index is None else self.shape[1:]
        if len(self.shape) == 1:
            make = torch.zeros if self.name.endswith("bias") else torch.ones
            return make(shape, dtype=self.kind, device=self.device)
        # A convolution's inputs are its channels and its window; each expert has its own.
        stack = len(self.shape) == 3
        inputs = self.shape[-1] if stack else torch.Size(self.shape[1:]).numel()
        generator = torch.Generator(self.device).manual_seed(self._seed_of(index))
        drawn = torch.empty(shape, dtype=self.kind, device=self.device)
        return drawn.normal_(0.0, inputs**-0.5, generator=generator)

    def _seed_of(self, index: int | None) -> int:
        return zlib.crc32(f"{self.seed} {self.name} {index}".encode())


def draw_weights(
    architecture: Architecture, dtype: torch.dtype, device: torch.device, seed: int
) -> Mapping[str, StoredTensor]:
    """Every parameter of the model that has memory of its own, by its name."""
    return {
        row.name: DrawnTensor(
            Path("drawn"), row.name, row.shape, _NAMES[dtype], dtype, device, seed
        )
        for row in architecture.table.parameters
        if not row.tied
    }
