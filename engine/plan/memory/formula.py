"""How much memory a run needs, by part, before anything is loaded or downloaded.

A closed formula over the module table, cheap enough to run at every keystroke. Each part follows
what the trainer does; the peak is that of the fullest moment.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace

from engine.catalog import Architecture
from engine.config import SHARDED_OPTIMIZERS, RunConfig
from engine.data.statistics import Statistics
from engine.plan.device import Device
from engine.plan.measured import corrected, find_measured
from engine.plan.memory.moments import cuts_loss, kept_states, list_moments
from engine.plan.memory.step import (
    DIFFERENCES,
    WINDTUNNEL,
    Frozen,
    Sizes,
    Stack,
    Step,
    cards_of_a_copy,
    divide,
    frozen_bytes,
    make_step,
    sizes_of,
)
from engine.plan.targets import count_targets
from engine.plan.trainer import (
    CHUNK_BYTES,
    PIECE_BYTES,
    PROCESS_BYTES,
    SMALLEST_CHUNK_BYTES,
    kept_modules,
)
from engine.plan.verdict import Estimate, judge
from engine.units import GIB

# Peak allocated -> what the card has to hold: CUDA's context, and what the allocator keeps beyond.
CONTEXT_BYTES, ALLOCATOR_SLACK = int(0.55 * GIB), 0.03
HEAP_SLACK = 0.10
"""The same for a CPU, beside PROCESS_BYTES."""
CUDA_PROCESS_BYTES = 3 * GIB
"""A process with torch, transformers, peft and a CUDA context, beside the tensors it loads."""
TOKEN_BYTES = 7
"""Of a prepared row, a token: its id in 4 bytes, its kind in 1, its source in 2."""

PACKED_SPREAD, OTHER_SPREAD, WIDE_SPREAD = 0.06, 0.10, 0.15
"""How far a measured peak may lie from the formula: packed text of dense models is closest; then
other text; furthest off are images, experts, and batches of rows whose lengths differ."""
MOST_CARDS = 1024
"""That are tried for a run that one cannot hold."""
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
    step = make_step(config, architecture, device, statistics, stack)
    frozen, cards = frozen_bytes(step), _cards(step)
    step, moments = _roomiest(step, frozen)
    sums = {name: int(sum(parts.values())) for name, parts in moments.items()}
    fullest = max(sums, key=lambda name: sums[name])
    parts = {name: int(size) for name, size in moments[fullest].items() if size >= 1}
    peak = sum(parts.values())
    needed = on_device(peak, device)
    spread = _spread(step)
    sizes = sizes_of(step.table, kept_modules(config))
    found = Estimate(
        parts=parts,
        peak_allocated_bytes=peak,
        device_bytes=needed,
        range_bytes=(int(peak * (1 - spread)), int(peak * (1 + spread))),
        can_give_bytes=device.can_give_bytes,
        host_bytes=needed if device.kind == "cpu" else host_bytes(step, frozen, sizes),
        disk_bytes=disk_bytes(step, sizes),
        trainable_parameters=step.trainable,
        total_parameters=sizes.all,
        targets=count_targets(step.table, config) if config.adapter else {},
        tokens_at_once=step.tokens,
        verdict=judge(needed, device.can_give_bytes),
        moment=fullest,
        moments=sums,
        decided_by=_decided_by(step),
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
    """Bytes that its peak has more than ours by what it does otherwise; they add up to the whole
    difference."""


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
    for name, difference in DIFFERENCES.items():
        if getattr(stack, name) == getattr(peer, name):
            continue
        stack = replace(stack, **{name: getattr(peer, name)})
        found = estimate(config, architecture, device, statistics, stack=stack)
        if found.peak_allocated_bytes != peak:
            differences[difference] = found.peak_allocated_bytes - peak
        peak = found.peak_allocated_bytes
    return Peer(peer.name, peak, differences)


def cards_needed(
    config: RunConfig,
    architecture: Architecture,
    device: Device,
    statistics: Statistics | None = None,
) -> int | None:
    """The fewest cards like `device` that hold the run sharded over them; None: none would.

    One card where the run fits it as it is.
    """
    sharded = {
        "fsdp_config": config.fsdp_config or {},
        "optimizer": SHARDED_OPTIMIZERS.get(config.optimizer, config.optimizer),
    }

    def fits(cards: int) -> bool:
        keys = {**sharded, "dp_shard_size": cards} if cards > 1 else {"fsdp_config": None}
        laid_out = config.model_copy(update=keys)
        found = estimate(laid_out, architecture, replace(device, count=1), statistics)
        return found.device_bytes <= device.can_give_bytes

    if not fits(MOST_CARDS):
        return None
    return bisect_left(range(MOST_CARDS), True, lo=1, key=fits)


def moment_parts(
    config: RunConfig,
    architecture: Architecture,
    device: Device,
    moment: str,
    *,
    stack: Stack = WINDTUNNEL,
) -> dict[str, int]:
    """What one moment holds by part, in bytes; its name is one of `Estimate.moments`."""
    step = make_step(config, architecture, device, stack=stack)
    parts = _roomiest(step, frozen_bytes(step))[1][moment]
    return {name: int(size) for name, size in parts.items() if size >= 1}


def _cards(step: Step) -> int:
    """Over how many cards a run is divided."""
    return cards_of_a_copy(step.config) or step.device.count


def _roomiest(step: Step, frozen: Frozen) -> tuple[Step, dict[str, dict[str, float]]]:
    """`step` with the largest chunk of logits with which it fits, and its moments.

    Where it does not fit with any, the largest that makes its peak no higher.
    """
    cards = _cards(step)
    cut = step.device.kind == "cpu" or cuts_loss(step)
    tried = []
    for chunk in (SMALLEST_CHUNK_BYTES,) if cut else CHUNK_BYTES:
        step = replace(step, chunk_bytes=chunk)
        moments = list_moments(step, frozen)
        if cards > 1:
            moments = {name: divide(parts, step, cards) for name, parts in moments.items()}
        peak = max(int(sum(parts.values())) for parts in moments.values())
        if judge(on_device(peak, step.device), step.device.can_give_bytes) == "fits":
            return step, moments
        tried.append((peak, step, moments))
    return next((step, moments) for least, step, moments in tried if least == peak)


def on_device(peak_bytes: int, device: Device) -> int:
    """What has to be free for `peak_bytes` of tensors."""
    if device.kind == "cpu":
        return int(peak_bytes * (1 + HEAP_SLACK)) + PROCESS_BYTES
    return int(peak_bytes * (1 + ALLOCATOR_SLACK)) + CONTEXT_BYTES


def host_bytes(step: Step, frozen: Frozen, sizes: Sizes) -> int:
    """The process, what is kept here for the device, and what loading or a save passes on.

    A tensor that is loaded is here twice: as it is in its file, and in the base precision.
    """
    paged = step.state_bytes if step.pages_state else 0
    loaded = 2 * sizes.largest * step.base_bytes
    kept = sum(frozen.host.values()) + kept_states(step)[1]
    return int(CUDA_PROCESS_BYTES + kept + paged + max(loaded, PIECE_BYTES))


def disk_bytes(step: Step, sizes: Sizes) -> int:
    """The download, the prepared rows, the checkpoints that are kept, and the result."""
    config, architecture, statistics = step.config, step.architecture, step.statistics
    made_here = architecture.card is not None and not architecture.card.repositories
    stored = {"fp8": 1, "fp32": 4}.get(architecture.checkpoint, 2)
    download = 0 if made_here or architecture.folder else sizes.all * stored
    rows = TOKEN_BYTES * statistics.total_tokens if statistics else 0
    width = step.adapter_bytes if config.adapter else step.base_bytes
    held = width * step.trainable
    save = held + step.state_bytes + step.rest_bytes
    result = held if config.adapter else sizes.all * step.base_bytes
    return int(download + rows + config.save_total_limit * save + result)


def _decided_by(step: Step) -> str:
    """Whose length the tokens of a forward pass follow from."""
    config, statistics = step.config, step.statistics
    if statistics is None:
        return f"rows are taken to have sequence_len: {config.sequence_len:,} tokens"
    if config.sample_packing and step.tokens < statistics.total_tokens:
        return f"packed sequences are full: {config.sequence_len:,} tokens each"
    if config.sample_packing:
        return f"all rows together: {statistics.total_tokens:,} tokens"
    longest = statistics.longest_kept(config)
    named = statistics.longest_row is not None and longest == statistics.longest_tokens
    row = f"row {statistics.longest_row:,}" if named else "the longest row that is kept"
    length = f"{row} has {longest:,} tokens"
    if statistics.most_images_row is None:
        return length
    images = f"row {statistics.most_images_row:,} has {statistics.most_image_tokens:,} of images"
    return f"{length}; {images}"


def _spread(step: Step) -> float:
    config, statistics = step.config, step.statistics
    uneven = (
        statistics is not None
        and not config.sample_packing
        and statistics.longest_kept(config) > UNEVEN * statistics.mean_tokens
    )
    if step.widths.expert_rows or step.of_images or uneven:
        return WIDE_SPREAD
    return PACKED_SPREAD if config.sample_packing else OTHER_SPREAD
