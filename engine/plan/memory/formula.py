"""How much memory a run needs, by part, before anything is loaded or downloaded.

A closed formula over the module table, cheap enough to run at every keystroke. Each part follows
what the trainer does; the peak is that of the fullest moment.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from engine.catalog import Architecture, ModuleTable
from engine.config import RunConfig
from engine.data.statistics import Statistics
from engine.plan.device import Device
from engine.plan.measured import corrected, find_measured
from engine.plan.memory.frozen import Frozen, frozen_bytes, sizes_of
from engine.plan.memory.host import disk_bytes, host_bytes
from engine.plan.memory.moments import Step, cuts_loss, kept_states, list_moments
from engine.plan.memory.ranks import cards_of_a_copy, divide
from engine.plan.memory.stack import DIFFERENCES, WINDTUNNEL, Stack
from engine.plan.memory.trainable import trainable_numbers, trained_bytes
from engine.plan.targets import count_targets
from engine.plan.trainer import (
    CHUNK_BYTES,
    PROCESS_BYTES,
    SMALLEST_CHUNK_BYTES,
    base_bytes_of,
    kept_modules,
)
from engine.plan.verdict import Estimate, judge
from engine.plan.vision import image_tokens_at_once, tokens_of_one_image
from engine.units import GIB

# Peak allocated -> what the card has to hold: CUDA's context, and what the allocator keeps beyond.
CONTEXT_BYTES, ALLOCATOR_SLACK = int(0.55 * GIB), 0.03
HEAP_SLACK = 0.10
"""The same for a CPU, beside PROCESS_BYTES."""

PACKED_SPREAD, OTHER_SPREAD, WIDE_SPREAD = 0.06, 0.10, 0.15
"""How far a measured peak may lie from the formula: packed text of dense models is closest; then
other text; furthest off are images, experts, and batches of rows whose lengths differ."""
UNEVEN = 1.5
"""Rows are of different lengths where the longest has so many times the tokens of the mean."""


def estimate(
    config: RunConfig,
    architecture: Architecture,
    device: Device,
    statistics: Statistics | None = None,
    *,
    stack: Stack = WINDTUNNEL,
) -> Estimate:
    """The memory of `config` on `device`; rows of unknown data have `sequence_len` tokens.

    For a config that is laid out for several cards the sizes are those of one of them. Raises
    UserError where an entry of the adapter's targets matches no module. A measurement of the very
    same run on the same device beats the formula.
    """
    step = _step(config, architecture, device, statistics, stack)
    frozen = _frozen(step, statistics)
    cards = cards_of_a_copy(config) or device.count
    step, moments = _roomiest(step, frozen, cards)
    sums = {name: int(sum(parts.values())) for name, parts in moments.items()}
    fullest = max(sums, key=lambda name: sums[name])
    parts = {name: int(size) for name, size in moments[fullest].items() if size >= 1}
    peak = sum(parts.values())
    needed = on_device(peak, device)
    spread = _spread(config, step, statistics)
    sizes = sizes_of(step.table, kept_modules(config))
    found = Estimate(
        parts=parts,
        peak_allocated_bytes=peak,
        device_bytes=needed,
        range_bytes=(int(peak * (1 - spread)), int(peak * (1 + spread))),
        can_give_bytes=device.can_give_bytes,
        host_bytes=needed if device.kind == "cpu" else host_bytes(step, frozen, sizes),
        disk_bytes=disk_bytes(step, architecture, sizes, statistics),
        trainable_parameters=step.trainable.all,
        total_parameters=sizes.all,
        targets=count_targets(step.table, config) if config.adapter else {},
        tokens_at_once=step.tokens,
        verdict=judge(needed, device.can_give_bytes),
        moment=fullest,
        moments=sums,
        decided_by=_decided_by(step, statistics),
        cards=cards,
        loss_chunk_bytes=step.chunk_bytes,
    )
    if stack is not WINDTUNNEL or cards > 1:
        return found
    measured = find_measured(config, architecture, device, step.tokens, step.of_images)
    return corrected(found, measured) if measured else found


@dataclass(frozen=True, slots=True)
class Peer:
    """The peak of the same config in another trainer, counted by the same formula."""

    name: str
    peak_allocated_bytes: int
    differences: Mapping[str, int]
    """Bytes that its peak has more than ours by what it does otherwise, in words; they add up to
    the whole difference."""


def compare_peer(
    peer: Stack,
    config: RunConfig,
    architecture: Architecture,
    device: Device,
    statistics: Statistics | None = None,
) -> Peer:
    """What `peer` would hold at its peak, and where that differs from ours.

    A published figure of another trainer is compared with this one, not with ours. Raises UserError
    where an entry of the adapter's targets matches no module.
    """
    stack = replace(WINDTUNNEL, name=peer.name)  # another object: by the formula, never measured
    peak = estimate(config, architecture, device, statistics, stack=stack).peak_allocated_bytes
    differences = {}
    for name, words in DIFFERENCES.items():
        if getattr(stack, name) == getattr(peer, name):
            continue
        stack = replace(stack, **{name: getattr(peer, name)})
        found = estimate(config, architecture, device, statistics, stack=stack)
        if found.peak_allocated_bytes != peak:
            differences[words] = found.peak_allocated_bytes - peak
        peak = found.peak_allocated_bytes
    return Peer(peer.name, peak, differences)


def moment_parts(
    config: RunConfig,
    architecture: Architecture,
    device: Device,
    moment: str,
    *,
    stack: Stack = WINDTUNNEL,
) -> dict[str, int]:
    """What one moment holds by part, in bytes; its name is one of `Estimate.moments`."""
    step = _step(config, architecture, device, None, stack)
    cards = cards_of_a_copy(config) or device.count
    parts = _roomiest(step, _frozen(step, None), cards)[1][moment]
    return {name: int(size) for name, size in parts.items() if size >= 1}


def frozen_of(
    config: RunConfig, architecture: Architecture, device: Device, statistics: Statistics | None
) -> Frozen:
    """Where the weights of a run lie."""
    return _frozen(_step(config, architecture, device, statistics, WINDTUNNEL), statistics)


def kept_in_ram(
    config: RunConfig, architecture: Architecture, device: Device, statistics: Statistics | None
) -> float:
    """Bytes that the layers of one forward pass keep in this computer's memory."""
    return kept_states(_step(config, architecture, device, statistics, WINDTUNNEL))[1]


def packed_numbers(config: RunConfig, table: ModuleTable) -> int:
    """Weights that a run holds in 4 bits."""
    sizes = sizes_of(table, kept_modules(config))
    linears = sum(held.packed for held in sizes.parts.values()) if config.load_in_4bit else 0
    return linears + (sizes.parts["experts"].plain if config.quantize_moe_experts else 0)


def _step(
    config: RunConfig,
    architecture: Architecture,
    device: Device,
    statistics: Statistics | None,
    stack: Stack,
) -> Step:
    table, tokens = architecture.table, tokens_at_once(config, statistics)
    of_images = image_tokens_at_once(config, table, tokens, statistics)
    return Step(
        config,
        table,
        device,
        base_bytes_of(config, device),
        tokens,
        _learned_at_once(config, tokens, statistics),
        of_images,
        tokens_of_one_image(architecture, of_images, statistics),
        trainable_numbers(table, config),
        stack,
    )


def _frozen(step: Step, statistics: Statistics | None) -> Frozen:
    return frozen_bytes(
        step.config,
        step.table,
        step.base_bytes,
        statistics,
        offloads=step.offloads,
        stack=step.stack,
    )


def _roomiest(step: Step, frozen: Frozen, cards: int) -> tuple[Step, dict[str, dict[str, float]]]:
    """`step` with the largest chunk of logits with which it fits, and its moments.

    Where it does not fit with any, the largest that makes its peak no higher.
    """
    cut = step.device.kind == "cpu" or cuts_loss(step)
    tried = []
    for chunk in (SMALLEST_CHUNK_BYTES,) if cut else CHUNK_BYTES:
        step = replace(step, chunk_bytes=chunk)
        moments = _moments(step, frozen, cards)
        peak = max(int(sum(parts.values())) for parts in moments.values())
        if judge(on_device(peak, step.device), step.device.can_give_bytes) == "fits":
            return step, moments
        tried.append((peak, step, moments))
    return next((step, moments) for least, step, moments in tried if least == peak)


def _moments(step: Step, frozen: Frozen, cards: int) -> dict[str, dict[str, float]]:
    trained = trained_bytes(
        step.config, step.trainable, step.base_bytes, step.stack, pages=step.offloads
    )
    moments = list_moments(step, frozen, trained)
    if cards == 1:
        return moments
    return {name: divide(parts, step, cards) for name, parts in moments.items()}


def on_device(peak_bytes: int, device: Device) -> int:
    """What has to be free for `peak_bytes` of tensors."""
    if device.kind == "cpu":
        return int(peak_bytes * (1 + HEAP_SLACK)) + PROCESS_BYTES
    return int(peak_bytes * (1 + ALLOCATOR_SLACK)) + CONTEXT_BYTES


def tokens_at_once(config: RunConfig, statistics: Statistics | None) -> int:
    """Tokens of one forward pass: full sequences when packed, else the longest row that is kept."""
    row = config.sequence_len
    if statistics and not config.sample_packing:
        row = min(row, statistics.longest_kept(config))
    tokens = config.micro_batch_size * row
    return min(tokens, max(1, statistics.total_tokens)) if statistics else tokens


def _learned_at_once(config: RunConfig, tokens: int, statistics: Statistics | None) -> int:
    """Of the tokens of a forward pass, those that the loss can see; a packed sequence may be made
    of nothing else. Rows may have been counted before `train_on_inputs` was set."""
    most = statistics.most_learned_tokens if statistics else None
    if most is None or config.sample_packing or config.train_on_inputs:
        return tokens
    return min(tokens, config.micro_batch_size * most)


def _decided_by(step: Step, statistics: Statistics | None) -> str:
    """Whose length the tokens of a forward pass follow from."""
    config = step.config
    if statistics is None:
        return f"rows are taken to have sequence_len: {config.sequence_len:,} tokens"
    if config.sample_packing and step.tokens < statistics.total_tokens:
        return f"packed sequences are full: {config.sequence_len:,} tokens each"
    if config.sample_packing:
        return f"all rows together: {statistics.total_tokens:,} tokens"
    longest = statistics.longest_kept(config)
    named = statistics.longest_row is not None and longest == statistics.longest_tokens
    row = f"row {statistics.longest_row:,}" if named else "the longest row that is kept"
    words = f"{row} has {longest:,} tokens"
    if statistics.most_images_row is not None:
        words += f"; row {statistics.most_images_row:,} has {statistics.most_image_tokens:,} of"
        words += " images"
    return words


def _spread(config: RunConfig, step: Step, statistics: Statistics | None) -> float:
    uneven = (
        statistics is not None
        and not config.sample_packing
        and statistics.longest_kept(config) > UNEVEN * statistics.mean_tokens
    )
    if step.widths.expert_rows or step.of_images or uneven:
        return WIDE_SPREAD
    return PACKED_SPREAD if config.sample_packing else OTHER_SPREAD
