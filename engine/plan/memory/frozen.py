"""What a model's own weights take, by part, and where they lie: on the device or in RAM.

The parts follow the module table's groups, each in the form in which a run holds it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from engine.catalog import ModuleTable
from engine.config import RunConfig
from engine.plan.layers import tower_works
from engine.plan.memory.step import Step
from engine.plan.trainer import is_kept, kept_modules

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight in NF4 with double quantization: 4 bits, an 8-bit scale for 64 weights, a float32 scale
for 256 of those (QLoRA, arXiv 2305.14314)."""
INT8_ROW_BYTES = 4
"""The float32 maximum that the bytes of a row are scaled by (LLM.int8(), arXiv 2208.07339)."""
SLOTS = 2
"""Offloaded layers that are on the device at once: one at work, the next one on its way."""

WEIGHTS = ("linear", "experts", "embeddings", "norms", "router", "vision", "projector")
"""The parts of an estimate that are the model's own weights."""
_PARTS = {
    "attention": "linear",
    "mlp": "linear",
    "experts": "experts",
    "embedding": "embeddings",
    "head": "embeddings",
    "norm": "norms",
    "router": "router",
    "vision": "vision",
    "projector": "projector",
}
_LAYER = re.compile(r"\blayers\.(\d+)\.")


class Held(NamedTuple):
    """Numbers of one part of a model by how a quantized run holds them."""

    plain: int = 0
    packed: int = 0
    """Of linears that are quantized."""
    rows: int = 0
    """Their outputs."""

    def __add__(self, other: "Held") -> "Held":  # type: ignore[override]
        return Held(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True, slots=True)
class Frozen:
    """Bytes of a model's own weights."""

    device: Mapping[str, float]
    """By part, on the device for the length of a run."""
    host: Mapping[str, float]
    """By part, in this computer's RAM instead."""
    head: float
    """Of them, what the loss brings to the device."""
    in_flight: float
    """Largest tensor that is on the device in the base precision while the model is loaded."""


@dataclass(frozen=True, slots=True, eq=False)
class Sizes:
    """Numbers of a model, by part and by layer."""

    parts: Mapping[str, Held]
    layers: tuple[Mapping[str, Held], ...]
    """The linears and the experts of each layer of the language model."""
    head: int
    """Numbers of the head, or of the embedding that it shares."""
    all: int
    largest: int
    """Numbers of the largest tensor."""
    largest_packed: int
    largest_expert: int
    """Numbers of the larger matrix of one expert."""


@lru_cache(maxsize=32)
def sizes_of(table: ModuleTable, kept: tuple[str, ...]) -> Sizes:
    """Count `table`; `kept` are the modules that no quantized run quantizes."""
    parts = dict.fromkeys(WEIGHTS, Held())
    layers: dict[int, dict[str, Held]] = {}
    head = largest_packed = largest_expert = 0
    for row in table.parameters:
        part = _PARTS[row.group]
        packed = row.quantizable and not is_kept(row.module, kept)
        found = Held(0, row.count, row.shape[0]) if packed else Held(row.count)
        parts[part] += found
        if packed:
            largest_packed = max(largest_packed, row.count)
        if part == "experts":
            largest_expert = max(largest_expert, row.count // row.shape[0])
        if row.group == "head" or (row.group == "embedding" and not head):
            head = row.count or head
        number = _LAYER.search(row.name)
        if number and part in ("linear", "experts"):
            layer = layers.setdefault(int(number[1]), {})
            layer[part] = layer.get(part, Held()) + found
    return Sizes(
        parts=parts,
        layers=tuple(layers[number] for number in sorted(layers)),
        head=head,
        all=table.total_parameters,
        largest=max(row.count for row in table.parameters),
        largest_packed=largest_packed,
        largest_expert=largest_expert,
    )


def frozen_bytes(step: Step) -> Frozen:
    """The weights of a run; where nothing can be offloaded, as on a CPU, all on the device."""
    config, table, base_bytes, stack = step.config, step.table, step.base_bytes, step.stack
    quantized = config.load_in_4bit or config.load_in_8bit
    kept = ("lm_head",) if stack.tower == "quantized" and quantized else kept_modules(config)
    counts = sizes_of(table, kept)

    def take(part: str, held: Held) -> float:
        return _bytes(part, held, config, base_bytes)

    device = {part: take(part, held) for part, held in counts.parts.items()}
    host: dict[str, float] = {}
    if step.offloads and config.layer_offloading:
        moved = counts.layers[: config.offloaded_layers or len(counts.layers)]
        for part in ("linear", "experts"):
            each = [take(part, layer[part]) for layer in moved if part in layer]
            slots = SLOTS * max(each, default=0)
            if slots < sum(each):
                host[part] = sum(each)
                device[part] += slots - sum(each)
    if step.offloads and config.offload_embeddings:
        host["embeddings"], device["embeddings"] = device["embeddings"], 0.0
    if (
        step.offloads
        and stack.tower == "idle in RAM"
        and not tower_works(config, table, step.statistics)
    ):
        for part in ("vision", "projector"):
            host[part], device[part] = device[part], 0.0
    expert = counts.largest_expert if config.quantize_moe_experts else 0
    packed = counts.largest_packed if quantized else 0
    return Frozen(
        device=device,
        host=host,
        head=float(counts.head * base_bytes) if "embeddings" in host else 0.0,
        in_flight=float(max(expert, packed) * base_bytes * (2 if config.load_in_8bit else 1)),
    )


def _bytes(part: str, held: Held, config: RunConfig, base_bytes: int) -> float:
    if part == "experts":
        return held.plain * (NF4_BYTES if config.quantize_moe_experts else base_bytes)
    if config.load_in_4bit:
        return held.plain * base_bytes + held.packed * NF4_BYTES
    if config.load_in_8bit:
        return held.plain * base_bytes + held.packed + held.rows * INT8_ROW_BYTES
    return float((held.plain + held.packed) * base_bytes)


def packed_numbers(config: RunConfig, table: ModuleTable) -> int:
    """Weights that a run holds in 4 bits."""
    sizes = sizes_of(table, kept_modules(config))
    linears = sum(held.packed for held in sizes.parts.values()) if config.load_in_4bit else 0
    return linears + (sizes.parts["experts"].plain if config.quantize_moe_experts else 0)
