"""What a loaded base model is made of, in numbers and in a sentence."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import nn

from engine.catalog import ModuleTable
from engine.train.quantize import statistics
from engine.units import gib


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The weights of a loaded model."""

    weights: Mapping[tuple[str, str], int]
    """Numbers by the module table's group and by how they are held: NF4, int8, bfloat16."""
    from_fp8: int
    """Of them, converted from FP8 on the way."""
    held_bytes: int
    """On the device, with the statistics of what is quantized."""
    offloaded_bytes: int
    """In RAM, of what comes to the device for a while or not at all."""
    device: torch.device

    def sentence(self) -> str:
        """For the person: numbers by format, bytes, and what was converted."""
        formats = Counter[str]()
        for (_, held), count in self.weights.items():
            formats[held] += count
        parts = ", ".join(f"{_count(n)} in {held}" for held, n in formats.most_common())
        places = f"{gib(self.held_bytes)} on the GPU"
        if self.device.type == "cpu":
            places = f"{gib(self.held_bytes + self.offloaded_bytes)} in memory"
        elif self.offloaded_bytes:
            places += f", {gib(self.offloaded_bytes)} in RAM"
        text = f"{_count(sum(formats.values()))} weights: {parts}; {places}."
        if self.from_fp8:
            text += f" {_count(self.from_fp8)} of them were FP8 on the disk and were converted."
        return text


def describe_load(
    model: nn.Module, table: ModuleTable, from_fp8: int, device: torch.device
) -> LoadReport:
    """Count what `model`, of `table`'s architecture, holds."""
    weights = Counter[tuple[str, str]]()
    for row in table.parameters:
        if row.count:
            weights[row.group, _held_as(model, row.name)] += row.count
    tensors = {id(t): t for t in chain(model.parameters(), model.buffers())}
    quantized = [m for m in model.modules() if isinstance(m, Linear4bit | Linear8bitLt)]
    held = offloaded = 0
    for tensor in chain(tensors.values(), *map(statistics, quantized)):
        if tensor.device == device and tensor.untyped_storage().nbytes():
            held += tensor.nbytes
        else:
            offloaded += tensor.nbytes
    return LoadReport(weights, from_fp8, held, offloaded, device)


def _held_as(model: nn.Module, name: str) -> str:
    module = model.get_submodule(name.rpartition(".")[0])
    if name.endswith(".weight") and isinstance(module, Linear4bit | Linear8bitLt):
        return "NF4" if isinstance(module, Linear4bit) else "int8"
    held = getattr(module, name.rpartition(".")[2])
    if isinstance(held, nn.Module):  # a stack of experts as a module of its own
        kinds = {t.dtype for t in chain(held.parameters(), held.buffers())}
        return "NF4" if torch.uint8 in kinds else _dtype_name(next(iter(kinds)))
    return _dtype_name(held.dtype)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(numbers: int) -> str:
    """24.0B, 3.4M, 12.5K."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if numbers >= size:
            return f"{numbers / size:,.1f}{letter}"
    return str(numbers)
