"""One rank's share of what a run holds.

FSDP2 divides every number that it knows of over the cards of a copy: weights, gradients, the
optimizer's state. It does not know of the scales of 4-bit weights, which every rank keeps. A unit
(a layer, the embedding, the head, the vision tower) is whole while it works, with the buffer into
which the next one is being gathered; its gradients are whole before they are scattered, beside the
buffer of the unit before. Activations are each rank's own. Tensor parallelism cuts matrices and
what a layer makes of them, expert parallelism leaves each rank experts of its own, which are never
gathered. Further copies change nothing on a card but the gradients' buffers.

tests/research/ranks.py counts the same on the real model, really sharded among ranks that are not
there.
"""

from collections.abc import Mapping
from typing import NamedTuple

from engine.plan.layout import Layout
from engine.plan.step import WEIGHTS, Step

GATHERED_LAYERS = 2
"""The one at work, and the buffer of the next one on its way or of the last one."""
REDUCE_BYTES = 4
"""Of a gradient on its way to its card: float32, in which all ranks' are added up."""
TRAINED = ("adapter", "gradients", "optimizer")


class Gathered(NamedTuple):
    """Bytes of the units of a model as they are sent to every rank, in the types in which they are
    held."""

    layer: float
    embedding: float
    """With the head it is tied to."""
    head: float
    tower: float
    """Tower and projector."""


def tensor_share(part: str, step: Step, layout: Layout) -> float:
    """What tensor parallelism leaves a rank of a part: matrices of the MLP, of experts and of plain
    attention are cut, as transformers' plans have it; latent attention and the rest are not."""
    if layout.tensor == 1:
        return 1.0
    counts = step.table.counts_by_group()
    if part == "experts":
        return 1 / layout.tensor
    if part == "embeddings":
        whole = counts["embedding"] + counts["head"]
        return (counts["embedding"] + counts["head"] / layout.tensor) / whole
    if part != "linear":
        return 1.0
    cut = counts["mlp"] + (0 if step.widths.latent else counts["attention"])
    whole = counts["mlp"] + counts["attention"]
    return (cut / layout.tensor + whole - cut) / whole


def trained_share(step: Step, layout: Layout) -> float:
    """A rank's share of all trained numbers."""
    if step.config.adapter or layout.tensor == 1:
        return 1 / layout.shard
    parts = step.counts.parts
    numbers = {part: held.plain + held.packed for part, held in parts.items()}
    mine = sum(count * tensor_share(part, step, layout) for part, count in numbers.items())
    return mine / sum(numbers.values()) / layout.shard


def divide(moment: str, parts: Mapping[str, float], step: Step, layout: Layout) -> dict[str, float]:
    """`parts` of a moment as each rank holds them."""
    trained = trained_share(step, layout)
    shares = {**parts}
    for part in WEIGHTS:
        held = step.counts.parts[part]
        numbers, whole = step.numbers_bytes(part, held), step.bytes_of(part, held)
        if whole and part in parts:
            rest = tensor_share(part, step, layout)
            mine = rest * (numbers / layout.shard + whole - numbers)
            shares[part] = parts[part] * mine / whole
    for part in TRAINED:
        if part in parts:
            shares[part] = parts[part] * trained
    if "loading" in parts:
        shares["loading"] = parts["loading"] / layout.shard
    if layout.shard > 1:
        shares["gathered"] = _gathered_bytes(moment, step, layout)
    shares["reduced"] = _reduced_bytes(moment, step, layout)
    return shares


def units(step: Step, layout: Layout) -> Gathered:
    """What is gathered, by unit."""

    def sent(part: str) -> float:
        numbers = step.numbers_bytes(part, step.counts.parts[part])
        return numbers * tensor_share(part, step, layout)

    layer = sent("linear") + sent("norms") + sent("router")
    if layout.expert == 1:
        layer += sent("experts")
    layer += step.adapter * step.adapter_bytes
    head = step.counts.head * step.base_bytes
    tied = not step.table.counts_by_group()["head"]
    return Gathered(
        layer / step.widths.layers,
        head,
        0.0 if tied else head / layout.tensor,
        sent("vision") + sent("projector"),
    )


def _gathered_bytes(moment: str, step: Step, layout: Layout) -> float:
    unit = units(step, layout)
    layers = GATHERED_LAYERS * unit.layer
    head = unit.head or unit.embedding
    if moment in ("backward pass", "generation"):
        return layers
    if moment == "evaluation":
        return max(layers, head)
    return head if moment == "loss" else 0.0


def _reduced_bytes(moment: str, step: Step, layout: Layout) -> float:
    """Gradients of a unit while they are whole, and the buffer of those of the one before."""
    if moment != "backward pass":
        return 0.0
    numbers = step.trainable * trained_share(step, layout) * layout.shard / step.widths.layers
    held = step.adapter_bytes if step.config.adapter else step.base_bytes
    return numbers * (held + REDUCE_BYTES)
