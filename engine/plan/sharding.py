"""One rank's share of what a run holds.

FSDP2 divides every number that it knows of over the cards of a copy: weights, gradients, the
optimizer's state. It does not know of the scales of 4-bit linears, which every rank keeps. A unit
(a layer, the embedding, the head, the vision tower) is whole while it works: what is gathered
arrives in one buffer and is copied out of it, and the buffer of the unit before is let go only when
that is done. Backward the next unit is on its way meanwhile. Gradients are added up in float32: a
unit's are whole in their own type and once more in the buffer that is scattered, which is let go
when the next unit has its own. Activations are each rank's own. Tensor parallelism cuts matrices
and what a layer makes of them. Expert parallelism leaves each rank a part of the experts, which
ranks with the same part alone gather, and rows come and go.

tests/research/rank_memory.py counts the same on the real model, really sharded among ranks that are
not there.
"""

from collections.abc import Mapping
from math import ceil
from typing import NamedTuple

from engine.plan.layers import tower_bytes
from engine.plan.layout import Layout
from engine.plan.step import WEIGHTS, Step
from engine.plan.targets import (
    adapter_inputs,
    is_tied,
    largest_trainable,
    trains_embedding,
    trains_head,
)
from engine.plan.trainer import BUCKET_NUMBERS

FORWARD_COPIES, BACKWARD_COPIES, LONE_COPIES, TIED_COPIES = 3, 2, 2, 2
"""Of a unit, whole: forward the buffer of the one before, its own, and what is copied out of it;
backward what is copied out and the buffer of the next one; of what comes first or last, the tower
and the head, its buffer and the copy."""
SUM_BYTES = 4
"""Of a gradient while ranks add theirs up: float32."""
TRAINED = ("adapter", "gradients", "optimizer")


class Units(NamedTuple):
    """Bytes of the units of a model as they are sent to every rank, in the types in which they are
    held."""

    layer: float
    embedding: float
    head: float
    """Of a tied pair both are this one, and one unit."""
    tower: float
    projector: float


def tensor_share(part: str, step: Step, layout: Layout) -> float:
    """What tensor parallelism leaves a rank of a part: matrices of the MLP, of experts and of plain
    attention are cut, as transformers' plans have it; latent attention and the rest are not."""
    if layout.tensor == 1:
        return 1.0
    counts = step.table.counts_by_group()
    cut, whole = 0, 1
    if part == "experts":
        return 1 / layout.tensor
    if part == "embeddings":
        cut, whole = counts["head"], counts["embedding"] + counts["head"]
    elif part == "linear":
        cut = counts["mlp"] + (0 if step.widths.latent else counts["attention"])
        whole = counts["mlp"] + counts["attention"]
    return (cut / layout.tensor + whole - cut) / whole


def trained_share(step: Step, layout: Layout) -> float:
    """A rank's share of all trained numbers.

    Matrices are cut by rows, and the rank that has most counts: of an adapter's A, which has as
    many rows as its rank, 64 cards have one row or none.
    """
    if step.config.adapter:
        rows = step.config.lora_r
        of_a = rows * adapter_inputs(step.table, step.config)
        mine = of_a * ceil(rows / layout.shard) / rows + (step.trainable - of_a) / layout.shard
        return mine / max(1, step.trainable)
    parts = step.counts.parts
    numbers = {part: held.plain + held.packed for part, held in parts.items()}
    mine = sum(count * tensor_share(part, step, layout) for part, count in numbers.items())
    return mine / sum(numbers.values()) / layout.shard


def share_moments(
    step: Step, layout: Layout, moments: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """`moments` as the fullest rank of a layout holds them, with that of a forward pass, which is
    never the fullest on one card."""
    found = {name: _divide(parts, step, layout) for name, parts in moments.items()}
    if layout.shard == 1:
        largest = largest_trainable(step.table, step.config)
        moving = found["optimizer step"]
        bucket = SUM_BYTES * min(step.trainable, max(BUCKET_NUMBERS, largest))
        moving["update"] = max(moving["update"], bucket)
        return found
    unit = units(step, layout)
    # A tied pair is one unit, and whole from one pass to the next; forward twice.
    tied = TIED_COPIES * unit.embedding if is_tied(step.table) else 0.0
    kept = found["loss"].get("activations", 0.0)
    forward = {name: size for name, size in found["loss"].items() if name != "loss"}
    # Inside autocast an adapter's matrices are kept in half precision until the pass is over.
    cast = 2 * step.adapter if step.adapter_bytes == 4 and step.base_bytes == 2 else 0
    images = step.of_images, step.largest_image
    seeing = tower_bytes(step.config, step.table, *images, step.base_bytes)[1]
    # Before anything is kept.
    begin = LONE_COPIES * unit.embedding
    if step.of_images:
        begin = max(begin, LONE_COPIES * unit.tower + seeing)
    layers = FORWARD_COPIES * unit.layer + tied
    found["forward pass"] = forward | {"layer": cast, "gathered": max(layers, begin - kept)}
    found["loss"]["gathered"] = LONE_COPIES * unit.head
    found["optimizer step"]["gathered"] = found["save"]["gathered"] = tied / TIED_COPIES
    backward = found["backward pass"]
    backward["gathered"] = BACKWARD_COPIES * unit.layer + tied / TIED_COPIES
    backward["reduced"] = _reduced(step, layout, unit, kept, backward)
    found["evaluation"]["gathered"] = max(layers, LONE_COPIES * unit.head)
    found["generation"]["gathered"] = max(layers, LONE_COPIES * unit.head)
    return found


def _divide(parts: Mapping[str, float], step: Step, layout: Layout) -> dict[str, float]:
    """`parts` of a moment, what rests among them by a rank's share."""
    shares = {**parts}
    for part in WEIGHTS:
        held = step.counts.parts[part]
        whole = step.bytes_of(part, held)
        if whole and part in parts:
            stays = 0.0 if part == "experts" else step.statistics_bytes(part, held)
            mine = tensor_share(part, step, layout) * ((whole - stays) / layout.shard + stays)
            shares[part] *= mine / whole
    mine = trained_share(step, layout)
    for part in TRAINED:
        if part in parts:
            shares[part] *= mine
    if shares.get("gradients") and defers(step) and layout.shard > 1:
        shares["gradients"] = float(SUM_BYTES * step.trainable)
    if "loading" in parts:
        shares["loading"] /= layout.shard
    return shares


def defers(step: Step) -> bool:
    """Whether ranks add gradients up once a step and not after each micro-batch; until then each
    keeps an adapter's whole. The trainer does so too where a full fine-tune's have room."""
    return bool(step.config.adapter) and step.config.gradient_accumulation_steps > 1


def units(step: Step, layout: Layout) -> Units:
    """What is gathered, by unit."""

    def sent(part: str) -> float:
        held = step.counts.parts[part]
        stays = 0.0 if part == "experts" else step.statistics_bytes(part, held)
        return (step.bytes_of(part, held) - stays) * tensor_share(part, step, layout)

    layer = sent("linear") + sent("norms") + sent("router")
    if layout.shard > layout.expert:
        layer += sent("experts") / layout.expert
    layer += step.adapter * step.adapter_bytes
    head = float(step.counts.head * step.base_bytes)
    return Units(
        layer / step.widths.layers, head, head / layout.tensor, sent("vision"), sent("projector")
    )


def own_numbers(step: Step, layout: Layout) -> float:
    """Trained numbers of experts whose gradients no other rank of a copy has."""
    held = step.counts.parts["experts"]
    if step.config.adapter or layout.expert == 1:
        return 0.0
    gathered = held.plain / layout.expert if layout.shard > layout.expert else 0.0
    return held.plain - gathered


def _reduced(
    step: Step, layout: Layout, unit: Units, kept: float, backward: Mapping[str, float]
) -> float:
    """Gradients of a layer while they are whole, and the buffer of those of the one before.

    A head of its own goes first, and its buffer stays while layers go. At the end of the pass, when
    nothing is kept any more, the embedding's.
    """
    if step.config.adapter:
        numbers = step.adapter / step.widths.layers
        found = numbers * (SUM_BYTES + step.adapter_bytes)
    else:
        numbers = unit.layer / step.base_bytes
        found = numbers * SUM_BYTES + _first_gradients(step)
    if layout.replicate > 1:
        # What replicas have to add up stays until the pass is over.
        found += SUM_BYTES * step.trainable / layout.shard
    if trains_head(step.table, step.config) and not is_tied(step.table):
        found += SUM_BYTES * step.counts.head
    if trains_embedding(step.table, step.config):
        tables = 2 if is_tied(step.table) else 1
        table = float(step.counts.head * (tables * step.base_bytes + SUM_BYTES))
        table += SUM_BYTES * numbers
        beside = BACKWARD_COPIES * unit.layer + backward["layer"]
        found = max(found, table - kept - beside)
    return found


def _first_gradients(step: Step) -> float:
    """Of a layer's gradients, those that are there when its backward pass holds most: that of the
    matrix which works last, beside the one that is being formed."""
    sizes = step.widths
    matrix = sizes.expert_stack / 2 if sizes.expert_rows else sizes.hidden * sizes.intermediate
    return matrix * step.base_bytes
