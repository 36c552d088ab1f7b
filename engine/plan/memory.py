"""How much memory a run needs, by part, before anything is loaded or downloaded.

A closed formula over the module table, cheap enough to run at every keystroke. Each part follows
what the trainer does; the peak is that of the fullest moment, and saying which one that is says
what would help.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from engine.config import SHARDED_OPTIMIZERS, RunConfig
from engine.plan.attention import needs_mask
from engine.plan.device import Device, Place
from engine.plan.layers import (
    expert_bytes,
    inference_bytes,
    kept_bytes,
    recomputed_layers,
    tower_bytes,
    tower_works,
    transient_bytes,
)
from engine.plan.layout import Layout, is_sharded, layout_on
from engine.plan.measured import corrected, find_measured
from engine.plan.savers import Waiting, list_waiting
from engine.plan.sharding import share_moments, trained_share
from engine.plan.step import (
    DIFFERENCES,
    EIGHT_BIT,
    WINDTUNNEL,
    Sizes,
    Stack,
    Step,
    make_step,
    sizes_of,
)
from engine.plan.targets import (
    count_targets,
    expert_adapter_parameters,
    is_tied,
    largest_trainable,
    trains_embedding,
    trains_head,
)
from engine.plan.trainer import (
    ANSWER_TOKENS,
    CHUNK_BYTES,
    PIECE_BYTES,
    PROCESS_BYTES,
    SMALLEST_CHUNK_BYTES,
    WIDENED_NUMBERS,
    kept_modules,
    names_cut_loss,
)
from engine.plan.verdict import Estimate, judge
from engine.units import GIB

LEARNED_AT_LOSS = 2
"""The learned states and their gradient, beside which the gradient of all states comes to lie."""

# What the optimizer's step makes follows from code of other libraries, and from how our own step
# moves bfloat16 weights; tests/train/test_plan_sizes.py holds these figures against what torch's
# allocator was asked for.
CPU_BYTES: Final[Mapping[str, int]] = MappingProxyType(
    {
        # Its root, the quotient of that, and the quotient of the tensor before, which may be as
        # large (torch.optim.adam, _single_tensor_adam).
        "adamw_torch": 12,
        # Both moments in float32, the scaled gradient, a root and its quotient; and for 32 bits
        # the last three alone (bitsandbytes/backends/cpu/ops.py).
        **dict.fromkeys(EIGHT_BIT, 20),
        "paged_adamw_32bit": 12,
        "adamw_torch_fused": 0,
    }
)
"""For each number of the tensor that is moved, one after another."""
FOREACH_BYTES: Final = 4
"""On a GPU `adamw_torch` takes the root of all second moments at once (torch.optim.adam,
_multi_tensor_adam). The other optimizers are kernels that work in place."""
SPLIT_BYTES: Final = 4
"""One number of `engine.train.optim.split`: an int32 beside the float32 that is cut in two."""
JOIN_BYTES: Final = 8
"""On a CPU `engine.train.optim.join` adds the cut-off bits by way of a copy in int32."""
ROUND_BYTES: Final = 12
"""Of `engine.train.optim.round_at_random`: the random bits, the sum with them, and that shifted."""


@dataclass(frozen=True, slots=True)
class Frozen:
    """Bytes of a model's own weights."""

    device: Mapping[str, float]
    """By part, on the device for the length of a run."""
    waiting: Mapping[str, Waiting]
    """By part, what is in this computer's RAM instead, of the activations too."""
    in_flight: float
    """Largest tensor that is on the device in the base precision while the model is loaded."""

    def moved(self, part: str) -> float:
        """What its waiting adds to a part on the device; negative."""
        found = self.waiting.get(part)
        return found.at_once - found.held if found else 0.0


def frozen_bytes(step: Step) -> Frozen:
    """The weights of a run; where nothing can be offloaded, as on a CPU, all on the device."""
    config, counts, waiting = step.config, step.counts, list_waiting(step)
    whole = {part: step.bytes_of(part, held) for part, held in counts.parts.items()}
    idle = step.offloads and step.stack.tower == "idle in RAM" and not is_sharded(config)
    if idle and not tower_works(config, step.table, step.statistics):
        waiting |= {part: Waiting(whole[part]) for part in ("vision", "projector")}
    expert = counts.largest_expert if config.quantize_moe_experts else 0
    packed = counts.largest_packed if step.quantizes else 0
    in_flight = max(expert, packed) * step.base_bytes * (2 if config.load_in_8bit else 1)
    frozen = Frozen(whole, waiting, float(in_flight))
    return replace(frozen, device={part: size + frozen.moved(part) for part, size in whole.items()})


def list_moments(step: Step, frozen: Frozen) -> dict[str, dict[str, float]]:
    """What each moment holds on the device by part, the weights included, by the moment's name."""
    resting = {**frozen.device, **step.trained_bytes()}
    idle = {**resting, "gradients": 0.0}
    kept = _kept_states(step) + frozen.moved("activations")
    head = sum(each.for_loss for each in frozen.waiting.values())
    seen, seeing = tower_bytes(
        step.config, step.table, step.of_images, step.largest_image, step.base_bytes
    )
    masks_kept, mask = _mask_bytes(step)
    backward = _gradients(step, resting)
    saved = 4 * largest_trainable(step.table, step.config)  # at once, by a save and a resume
    return {
        "loading": {**frozen.device, "loading": frozen.in_flight},
        "backward pass": {
            **backward,
            "activations": kept + seen,
            # The tower runs before anything is kept, and back through it when nothing is any more.
            "layer": _table_bytes(step, max(_layer_bytes(step), seeing - kept), kept),
            "mask": max(mask, masks_kept),
        },
        "loss": {
            **(backward if _adds_up(step) else idle),
            "activations": kept + seen,
            "loss": _loss_bytes(step) + head,
            "mask": masks_kept,
        },
        "optimizer step": {**resting, "update": update_bytes(step)},
        "save": {**idle, "piece": 0 if step.offloads else min(PIECE_BYTES, saved)},
        "evaluation": {
            **idle,
            "activations": seen,
            "layer": inference_bytes(step.config, step.widths, step.tokens, step.base_bytes),
            "loss": _scored_bytes(step) + head,
            "mask": mask,
        },
        "generation": {
            **idle,
            "cache": cache_bytes(step),
            "loss": head,
            "layer": inference_bytes(
                step.config, step.widths, step.config.sequence_len, step.base_bytes
            ),
        },
    }


def _adds_up(step: Step) -> bool:
    """Whether a backward pass finds gradients of an earlier one."""
    return step.config.gradient_accumulation_steps > 1


def _gradients(step: Step, resting: Mapping[str, float]) -> Mapping[str, float]:
    """Gradients before the last one of a backward pass is formed, that of the embedding.

    Where weights move in the backward pass, only the largest one is there at once.
    """
    if step.stack.steps_in_backward:
        largest = max(row.count for row in step.table.parameters)
        return {**resting, "gradients": largest * step.base_bytes}
    if _adds_up(step) or not _forms_table(step):
        return resting
    return {**resting, "gradients": resting["gradients"] - _embedding_bytes(step)}


def _forms_table(step: Step) -> bool:
    return trains_embedding(step.table, step.config) and step.stack.keeps_rest


def _embedding_bytes(step: Step) -> int:
    return step.widths.head * step.base_bytes


def _kept_states(step: Step) -> float:
    """What the layers keep from the forward to the backward pass, wherever it lies."""
    again = recomputed_layers(step.config, step.widths)
    state = step.tokens * step.widths.hidden * step.base_bytes
    return again * state + (step.widths.layers - again) * (_one_kept(step) + _experts(step)[0])


def _layer_bytes(step: Step) -> float:
    """What the one layer holds whose backward pass is running, beside what was kept for it.

    Of the layers that were kept where there are some: they come first, and make more room as they
    go than a layer takes that is computed again.
    """
    config, sizes = step.config, step.widths
    layer = transient_bytes(config, sizes, step.tokens, step.base_bytes) + _repeated_bytes(step)
    resting, held = _experts(step)
    if recomputed_layers(config, sizes) < sizes.layers:
        return max(0, layer - _one_kept(step)) + held - resting
    return layer + held


def _one_kept(step: Step) -> int:
    """What one layer keeps that is not computed again, its experts not counted."""
    config, device = step.config, step.device
    flash = step.base_bytes == 2 and not needs_mask(config.attn_implementation, device)
    one = kept_bytes(config, step.widths, step.tokens, step.base_bytes, flash=flash)
    return one + _repeated_bytes(step)


def _repeated_bytes(step: Step) -> int:
    """What a layer's attention keeps of keys and values that were repeated for every head.

    In float32 a card has one kernel that keeps no scores, and it takes no grouped heads.
    """
    if step.device.kind != "cuda" or step.base_bytes != 4:
        return 0
    return step.tokens * step.widths.repeated * step.base_bytes


def _experts(step: Step) -> tuple[float, float]:
    """(kept by a layer of experts, held in its backward pass); nothing without experts."""
    config, sizes, stack = step.config, step.widths, step.stack
    if not sizes.expert_rows:
        return 0, 0
    adapter = expert_adapter_parameters(step.table, config) // sizes.layers
    kept, held = expert_bytes(config, sizes, step.tokens, step.base_bytes, adapter)
    formed = stack.stacks_formed if adapter else stack.stacks_at_once
    return kept, held + formed * sizes.expert_stack * step.base_bytes / 2


def _loss_bytes(step: Step) -> float:
    """The learned states, their gradient, and logits: a chunk of them where no kernel cuts them.

    After the last chunk, the gradient of all states. A head that is trained adds up its gradient in
    float32, beside which the one in its own type comes to lie.
    """
    sizes, stack = step.widths, step.stack
    learned = LEARNED_AT_LOSS * step.learned * sizes.hidden * step.base_bytes
    every = step.tokens * sizes.hidden * step.base_bytes
    if stack.logits_bytes:
        return learned + every + stack.logits_bytes * step.tokens * sizes.vocabulary
    if cuts_loss(step):
        return learned + every
    logits = _logits_bytes(step, step.chunk_bytes)
    # Beside a chunk in half precision: its gradient in the head's type, and the product of the two
    # in float32. In float32 the gradient is the chunk, and the targets' rows of the head come
    # beside.
    share = sizes.hidden / sizes.vocabulary
    chunk = logits * (1.5 + share if step.base_bytes == 2 else 1 + 2 * share)
    if not (trains_head(step.table, step.config) and stack.keeps_rest):
        return learned + max(every, chunk)
    head = 4 * sizes.head
    # Sharded, the head's own copy has gone before its gradient is narrowed: no more than a chunk.
    whole = not is_sharded(step.config)
    narrow = head / 2 if step.base_bytes == 2 and whole else 0
    return learned + head + max(every, narrow, chunk)


def _scored_bytes(step: Step) -> float:
    """A chunk of logits; a CPU's product of half precision is widened beside itself."""
    widened = step.device.kind == "cpu" and step.base_bytes == 2
    return _logits_bytes(step, SMALLEST_CHUNK_BYTES) * (1.5 if widened else 1)


def cuts_loss(step: Step) -> bool:
    """Whether cut-cross-entropy computes the loss: where asked for, for a frozen head."""
    asked = step.stack.cuts_loss or names_cut_loss(step.config)
    half = step.device.computes_bf16 and step.base_bytes == 2
    return asked and half and not trains_head(step.table, step.config)


def _logits_bytes(step: Step, chunk_bytes: int) -> int:
    return min(chunk_bytes, 4 * step.learned * step.widths.vocabulary)


def _table_bytes(step: Step, layer: float, kept: float) -> float:
    """What the layers' part of a backward pass holds where the embedding is trained.

    Its gradient is a whole table, at the end, when nothing is kept any more. Of a tied one that of
    the head stays through the whole pass to be added to it.
    """
    if not _forms_table(step):
        return layer
    table = _embedding_bytes(step)
    of_head = table if is_tied(step.table) else 0
    return max(layer + of_head, table + of_head - kept)


def _mask_bytes(step: Step) -> tuple[int, int]:
    """Of the mask (tokens, tokens) that keeps packed rows apart where the backend cannot cut them:
    (kept from the forward to the backward pass, held while a layer is computed).

    One byte a pair as transformers makes it for all layers; PyTorch turns it into a number of the
    queries' type in every layer, which is kept for the layer's backward pass unless that computes
    the layer again (convert_boolean_attn_mask in sdp_utils).
    """
    config, sizes = step.config, step.widths
    if not config.sample_packing or not needs_mask(config.attn_implementation, step.device):
        return 0, 0
    pairs = step.tokens * min(config.sequence_len, step.tokens)
    again = recomputed_layers(config, sizes)
    kept = (1 if again else 0) + (sizes.layers - again) * step.base_bytes
    return pairs * kept, pairs * (1 + step.base_bytes)


def cache_bytes(step: Step) -> float:
    """Keys and values of one answer behind the longest prompt, in every layer."""
    tokens = step.config.sequence_len + max(ANSWER_TOKENS, step.config.eval_max_new_tokens)
    return step.widths.cached * step.widths.layers * tokens * step.base_bytes


def update_bytes(step: Step, share: float = 1.0) -> float:
    """The most that the step takes, in bytes, of a rank that moves `share` of each tensor.

    Weights in bfloat16 are moved in float32, a few at a time or the largest alone, each with its
    gradient: 4 bytes more, or 2 of a weight whose cut-off bits lie beside it meanwhile.
    """
    cpu = step.device.kind == "cpu"
    largest = share * largest_trainable(step.table, step.config)
    whole = share * step.whole if step.rest_bytes else 0
    factors = share * step.adapter if step.adapter_bytes == 2 else 0
    widened = min(whole + factors, max(WIDENED_NUMBERS, largest))
    cut = max(ROUND_BYTES * bool(factors), (JOIN_BYTES if cpu else SPLIT_BYTES) * bool(whole))
    at_once = share * step.trainable - whole - factors + widened
    return (4 if factors else 2) * widened + max(cut * largest, _working(step, largest, at_once))


def _working(step: Step, largest: float, at_once: float) -> float:
    """What the optimizer makes for itself."""
    optimizer = step.config.optimizer
    if step.stack.steps_in_backward:
        return 0
    if step.device.kind == "cpu":
        return CPU_BYTES[optimizer] * largest
    return FOREACH_BYTES * at_once if optimizer == "adamw_torch" else 0


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


def estimate(config: RunConfig, place: Place, *, stack: Stack = WINDTUNNEL) -> Estimate:
    """The memory of `config` at `place`.

    For a config that is laid out for several cards the sizes are those of one of them. Raises
    UserError where an entry of the adapter's targets matches no module. A measurement of the very
    same run on the same device beats the formula.
    """
    layout = layout_on(config, place.device)
    device = place.device.among(layout.cards)
    step = make_step(config, replace(place, device=device), stack)
    frozen = frozen_bytes(step)
    step, moments = _roomiest(step, frozen, layout)
    sums = {name: int(sum(parts.values())) for name, parts in moments.items()}
    fullest = max(sums, key=lambda name: sums[name])
    parts = {name: int(size) for name, size in moments[fullest].items() if size >= 1}
    peak = sum(parts.values())
    needed = on_device(peak, device)
    spread = _spread(step)
    sizes = sizes_of(step.table, kept_modules(config))
    host = needed if device.kind == "cpu" else host_bytes(step, frozen, sizes)
    found = Estimate(
        parts=parts,
        peak_allocated_bytes=peak,
        device_bytes=needed,
        range_bytes=(int(peak * (1 - spread)), int(peak * (1 + spread))),
        can_give_bytes=device.can_give_bytes,
        host_bytes=host * min(layout.cards, device.count),
        disk_bytes=disk_bytes(step, sizes),
        trainable_parameters=step.trainable,
        total_parameters=sizes.all,
        targets=count_targets(step.table, config) if config.adapter else {},
        tokens_at_once=step.tokens,
        verdict=judge(needed, device.can_give_bytes),
        moment=fullest,
        moments=sums,
        decided_by=_decided_by(step),
        cards=layout.cards,
        loss_chunk_bytes=step.chunk_bytes,
    )
    if stack is not WINDTUNNEL or layout.cards > 1:
        return found
    measured = find_measured(step)
    return corrected(found, measured) if measured else found


@dataclass(frozen=True, slots=True)
class Peer:
    """The peak of the same config in another trainer, counted by the same formula."""

    name: str
    peak_allocated_bytes: int
    differences: Mapping[str, int]
    """Bytes that its peak has more than ours by what it does otherwise; they add up to the whole
    difference."""


def compare_peer(peer: Stack, config: RunConfig, place: Place) -> Peer:
    """What `peer` would hold at its peak, and where that differs from ours.

    A published figure of another trainer is compared with this one, not with ours. Raises UserError
    where an entry of the adapter's targets matches no module.
    """
    stack = replace(WINDTUNNEL, name=peer.name)  # another object: by the formula, never measured
    peak = estimate(config, place, stack=stack).peak_allocated_bytes
    differences = {}
    for name, difference in DIFFERENCES.items():
        if getattr(stack, name) == getattr(peer, name):
            continue
        stack = replace(stack, **{name: getattr(peer, name)})
        found = estimate(config, place, stack=stack)
        if found.peak_allocated_bytes != peak:
            differences[difference] = found.peak_allocated_bytes - peak
        peak = found.peak_allocated_bytes
    return Peer(peer.name, peak, differences)


def cards_needed(config: RunConfig, place: Place) -> int | None:
    """The fewest cards like that of `place` that hold the run sharded over them; None: none would.

    One card where the run fits it as it is.
    """
    one = replace(place, device=replace(place.device, others=(), nodes=1))
    sharded = {
        "fsdp_config": config.fsdp_config or {},
        "optimizer": SHARDED_OPTIMIZERS.get(config.optimizer, config.optimizer),
    }

    def fits(cards: int) -> bool:
        keys = {**sharded, "dp_shard_size": cards} if cards > 1 else {"fsdp_config": None}
        found = estimate(config.model_copy(update=keys), one)
        return found.device_bytes <= found.can_give_bytes

    if not fits(MOST_CARDS):
        return None
    return bisect_left(range(MOST_CARDS), True, lo=1, key=fits)


def moment_parts(
    config: RunConfig, place: Place, moment: str, *, stack: Stack = WINDTUNNEL
) -> dict[str, int]:
    """What one moment holds by part, in bytes; its name is one of `Estimate.moments`."""
    step = make_step(config, place, stack)
    parts = _roomiest(step, frozen_bytes(step), layout_on(config, place.device))[1][moment]
    return {name: int(size) for name, size in parts.items() if size >= 1}


def _roomiest(
    step: Step, frozen: Frozen, layout: Layout
) -> tuple[Step, dict[str, dict[str, float]]]:
    """`step` with the largest chunk of logits with which it fits, and its moments.

    Where it does not fit with any, the largest that makes its peak no higher.
    """
    cut = step.device.kind == "cpu" or cuts_loss(step)
    tried = []
    for chunk in (SMALLEST_CHUNK_BYTES,) if cut else CHUNK_BYTES:
        step = replace(step, chunk_bytes=chunk)
        moments = list_moments(step, frozen)
        if layout.cards > 1:
            moving = update_bytes(step, trained_share(step, layout))
            moments["optimizer step"]["update"] = moving
            moments = share_moments(step, layout, moments)
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
    kept = sum(each.held for each in frozen.waiting.values())
    return int(CUDA_PROCESS_BYTES + kept + paged + max(loaded, PIECE_BYTES))


def disk_bytes(step: Step, sizes: Sizes) -> int:
    """The download, the prepared rows, the checkpoints that are kept, and the result."""
    config, architecture, statistics = step.config, step.place.architecture, step.statistics
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
