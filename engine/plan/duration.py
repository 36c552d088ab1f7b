"""How long a run takes and what it costs, before its first step.

A config is counted in floating-point operations and in bytes that move, against what the card's
maker says of it (presets/gpus.yml). What a card reaches of that is known from published runs only,
so the answer is a rough one until a measurement replaces it: `windtunnel fit`, or the run's own
first steps.

Operations a token: 2 a weight forward, 2 again where checkpointing computes the layer a second
time, 2 for the gradient of its input, and 2 for its own where it is trained (PaLM, arXiv
2204.02311, appendix B). Attention inside a row of n tokens: 2 n a number of the queries forward,
half of what it takes without its mask, and 2.5 times that backward (FlashAttention-2, arXiv
2307.08691). A vision tower has the same for each patch, without a mask to halve it.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from engine.catalog import ModuleTable
from engine.config import RunConfig
from engine.data.statistics import Statistics, count_held_out
from engine.hardware import speed_of
from engine.plan.device import Place
from engine.plan.layers import (
    image_share,
    patches_of,
    recomputed_layers,
    tokens_of_one_image,
    tower_of,
    widths,
)
from engine.plan.layout import layout_on
from engine.plan.savers import list_waiting
from engine.plan.step import make_step, packed_numbers
from engine.plan.targets import trainable_parameters, trains_vision
from engine.plan.traffic import step_seconds
from engine.plan.trainer import PATCHES_AT_ONCE

REACHED = 0.40
"""Share of a card's products that training reaches: 0.41 on an H100 (NeMo AutoModel's performance
page, Llama 3 8B LoRA), 0.47 to 0.60 on an RTX 4090 and 0.57 on an A100 (torchtune's README)."""
MOVED = 0.80
"""The same of the bytes that move, in the card and to it. Taken, not measured."""
FP32_SHARE = 1 / 8
"""Speed of float32 products beside 16-bit ones, on a card that has no bfloat16 (T4: 8 of 65)."""
UNPACKED_BYTES = 0.5 + 2 + 2
"""A 4-bit weight that is read, written in 16 bits and read again by the product."""


@dataclass(frozen=True, slots=True)
class Duration:
    """How long a run is expected to take."""

    steps: int
    """Optimizer steps."""
    seconds: float
    """Of all steps; loading, evaluations and saves come on top."""
    tokens_per_second: float
    usd: float | None
    """At the card's usual price; None where none is known."""
    source: str
    """`formula` or `measured`."""


def expected_duration(
    config: RunConfig, place: Place, measured_tokens_per_second: float | None = None
) -> Duration | None:
    """The duration of `config` at `place`, at a measured pace where one is given.

    None where neither the pace nor the card is known, and where the number of steps is not.
    """
    readers = layout_on(config, place.device).readers
    steps = count_steps(config, place.statistics, readers)
    pace = measured_tokens_per_second or pace_of(config, place)
    if steps is None or pace is None:
        return None
    seconds = _run_tokens(config, place.statistics, steps, readers) / pace
    speed = speed_of(place.device.card)
    hours = seconds / 3600 * layout_on(config, place.device).cards
    usd = speed.usd_an_hour * hours if speed and speed.usd_an_hour else None
    source = "measured" if measured_tokens_per_second else "formula"
    return Duration(steps, seconds, pace, usd, source)


def count_steps(config: RunConfig, statistics: Statistics | None, readers: int = 1) -> int | None:
    """Optimizer steps of a run of which so many ranks read rows; None for rows that are not known
    yet."""
    if config.max_steps is not None:
        return config.max_steps
    if statistics is None:
        return None
    rows = _trained_rows(config, statistics)
    sequences: float = rows
    if config.sample_packing:
        share = rows / max(1, statistics.usable_rows)
        sequences = statistics.total_tokens * share / config.sequence_len
    a_step = config.micro_batch_size * config.gradient_accumulation_steps * readers
    return max(1, ceil(ceil(sequences / a_step) * config.num_epochs))


def _trained_rows(config: RunConfig, statistics: Statistics) -> int:
    """Rows that are not held out."""
    rows = statistics.usable_rows
    return rows - count_held_out(config.val_set_size, rows)


def _run_tokens(
    config: RunConfig, statistics: Statistics | None, steps: int, readers: int
) -> float:
    """Tokens of all steps, padding left out: a step never has more than a whole pass."""
    a_step = config.micro_batch_size * config.gradient_accumulation_steps * readers
    if statistics is None:
        return steps * a_step * config.sequence_len
    a_row = min(config.sequence_len, statistics.mean_tokens)
    a_pass = max(1.0, _trained_rows(config, statistics) * a_row)
    a_sequence = config.sequence_len if config.sample_packing else a_row
    tokens = steps * min(a_step * a_sequence, a_pass)
    return tokens if config.max_steps else min(tokens, config.num_epochs * a_pass)


def pace_of(config: RunConfig, place: Place) -> float | None:
    """Tokens a second of training by the card's data sheet, of all ranks together; None for a card
    without one, and for several computers without a known network."""
    found = paces_of(config, place)
    return found[0] if found else None


def paces_of(config: RunConfig, place: Place) -> tuple[float, float] | None:
    """The same where ranks send while they compute, as they do, and where they would wait for all
    that is sent: between the two lies what links really cost."""
    device, table = place.device, place.table
    speed = speed_of(device.card) if device.kind == "cuda" else None
    if speed is None:
        return None
    step = make_step(config, place)
    tokens = step.tokens
    rate = speed.bf16_flops * REACHED * (1 if device.computes_bf16 else FP32_SHARE)
    row = min(_usual_row(config, place), config.sequence_len)
    operations = _operations(config, table, row) * tokens + tower_operations(config, place, tokens)
    computing = operations / rate
    passes = 2 + _again(config, table)
    unpacked = packed_numbers(config, table) * UNPACKED_BYTES * passes
    computing += unpacked / (speed.memory_bytes * MOVED)
    copied = sum(each.copied for each in list_waiting(step).values())
    copying = copied / (speed.link_bytes * MOVED)
    layout = layout_on(config, device)
    micro = max(computing / layout.tensor, copying)
    if layout.cards == 1:
        return tokens / micro, tokens / micro
    seconds = step_seconds(step, layout, micro, speed, MOVED)
    if seconds is None:
        return None
    a_step = tokens * config.gradient_accumulation_steps * layout.readers
    return a_step / seconds[0], a_step / seconds[1]


def speedup(before: RunConfig, after: RunConfig, place: Place) -> float:
    """How many times as fast `after` is, by the card's data sheet; without one by the operations of
    a token alone."""
    paces = [pace_of(config, place) for config in (before, after)]
    if paces[0] and paces[1]:
        return paces[1] / paces[0]
    row = _usual_row(before, place)
    work = [_operations(config, place.table, row) for config in (before, after)]
    return work[0] / work[1]


def _usual_row(config: RunConfig, place: Place) -> float:
    return place.statistics.mean_tokens if place.statistics else config.sequence_len


def _operations(config: RunConfig, table: ModuleTable, row_tokens: float) -> float:
    """Floating-point operations a token of a forward and backward pass; the head's products are
    computed once at any rate."""
    again, sizes = _again(config, table), widths(table)
    numbers = passed_numbers(table) * 2 * (2 + again) - 2 * again * sizes.head
    trained = trainable_parameters(table, config)
    numbers += 2 * trained * (3 + again if config.adapter else 1)
    attention = 2 * row_tokens * sizes.queries * sizes.layers
    return numbers + attention * (1 + again + 2.5)


def _again(config: RunConfig, table: ModuleTable) -> float:
    """Share of the layers that are computed a second time."""
    sizes = widths(table)
    return recomputed_layers(config, sizes) / sizes.layers


def tower_operations(config: RunConfig, place: Place, tokens: int) -> float:
    """Floating-point operations of the vision tower and projector for `tokens` of usual rows.

    Frozen, images are seen once, and nothing goes back. The tower's attention is of all patches
    that it sees together to all, under a mask.
    """
    table = place.table
    tower = tower_of(table)
    share = image_share(config, place.statistics)
    if tower is None or not share:
        return 0
    sizes = table.counts_by_group()
    one = tokens_of_one_image(place, ceil(tokens * share))
    lone = patches_of(one, tower)
    seen = tokens * share * lone / one
    together = min(seen, max(PATCHES_AT_ONCE, lone))
    patch = 2 * sizes["vision"] + 4 * together * tower.hidden * tower.layers
    forward = seen * (patch + 2 * sizes["projector"] / tower.merged)
    again = 1 if config.gradient_checkpointing else 0
    return forward * (3 + again) if trains_vision(table, config) else forward


@lru_cache(maxsize=32)
def passed_numbers(table: ModuleTable) -> int:
    """Weights that a token's products pass: its own experts, and the head, tied or not."""
    passed = sum(
        row.count * (table.routed_share if row.group == "experts" else 1)
        for row in table.parameters
        if row.group in ("attention", "mlp", "experts", "router")
    )
    return int(passed) + widths(table).head
