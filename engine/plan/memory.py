"""How much memory a run needs, by part, before anything is loaded or downloaded.

A closed formula over the module table, cheap enough to run at every keystroke. Each part follows
what the trainer does: frozen weights by how they are held, what moves with its gradients and
optimizer state, what the forward pass keeps, and one layer's share of the backward pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from engine.catalog import Architecture, ModuleTable
from engine.config import RunConfig
from engine.plan.attention import needs_mask
from engine.plan.device import Device
from engine.plan.layers import Widths, expert_bytes, kept_bytes, transient_bytes, widths
from engine.plan.quantized import is_kept, kept_modules
from engine.plan.statistics import Statistics
from engine.plan.targets import (
    adapter_parameters,
    count_targets,
    expert_adapter_parameters,
    trained_parameters,
    trains_head,
)
from engine.plan.vision import image_tokens_at_once, tower_bytes
from engine.units import GIB

Verdict = Literal["fits", "tight", "does not fit"]

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight in NF4 with double quantization: 4 bits, an 8-bit scale for 64 weights, a float32 scale
for 256 of those (QLoRA, arXiv 2305.14314)."""
INT8_ROW_BYTES = 4
"""The float32 maximum that the bytes of a row are scaled by (LLM.int8(), arXiv 2208.07339)."""
LOSS_CHUNK_BYTES = 64 * 2**20
"""One chunk of float32 logits where no fused kernel computes the loss: 128 rows at 131,072. On two
cores 8 MiB chunks took 1.5 times as long and 128 MiB ones 0.92 times (336 learned tokens, width
128)."""
TIGHT_BYTES = GIB
"""A plan with less to spare is called tight."""

# Peak allocated -> what the card has to hold: CUDA's context, and what the allocator keeps beyond.
CONTEXT_BYTES, ALLOCATOR_SLACK = int(0.55 * GIB), 0.03
# The same for a CPU: a process with torch, transformers and peft before it loads a model.
PROCESS_BYTES, HEAP_SLACK = int(0.75 * GIB), 0.10
# What a GPU run's process takes of this computer's memory beside the loaded tensors.
HOST_PROCESS_BYTES = 3 * GIB

_STATE_BYTES = dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit"), 2 + 8 / 256)
"""Optimizer state a trained number: two 8-bit moments, each with a float32 scale for 256. The other
optimizers have two float32 moments."""
_REST_BYTES = 2
"""What bfloat16 cuts off of a trained float32 number, which the trainer keeps beside it."""
_PAGED = ("paged_adamw_8bit", "paged_adamw_32bit")


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run needs, and whether its device can give it. All sizes in bytes."""

    parts: Mapping[str, int]
    """By name, of what torch allocates at the peak; they add up to it."""
    peak_allocated_bytes: int
    device_bytes: int
    """With the driver's context and the allocator's slack: what has to be free."""
    range_bytes: tuple[int, int]
    """Where the peak allocated is expected to lie."""
    can_give_bytes: int
    host_bytes: int
    disk_bytes: int
    trainable_parameters: int
    total_parameters: int
    targets: Mapping[str, int]
    """Modules that each entry of the adapter's targets matches."""
    tokens_at_once: int
    verdict: Verdict
    source: Literal["formula", "measured"] = "formula"

    @property
    def spare_bytes(self) -> int:
        """What the device could give beyond; negative where it does not fit."""
        return self.can_give_bytes - self.device_bytes

    @property
    def uncertainty(self) -> float:
        """Half the width of the range, as a share of the peak."""
        return self.range_bytes[1] / max(1, self.peak_allocated_bytes) - 1


def estimate(
    config: RunConfig,
    architecture: Architecture,
    device: Device,
    statistics: Statistics | None = None,
) -> Estimate:
    """The memory of `config` on `device`; rows of unknown data have `sequence_len` tokens.

    Raises UserError where an entry of the adapter's targets matches no module.
    """
    table = architecture.table
    base_bytes = _base_bytes(config, device)
    tokens = tokens_at_once(config, statistics)
    of_images = image_tokens_at_once(config, table, tokens, statistics)
    trained = trained_parameters(table, config)
    exact = {
        **_weights(table, config, base_bytes),
        **_trained(table, config, base_bytes),
        **_step(config, table, device, base_bytes, tokens, of_images),
    }
    parts = {name: int(size) for name, size in exact.items() if size}
    peak = sum(parts.values())
    spread = _spread(config, table, of_images)
    return Estimate(
        parts=parts,
        peak_allocated_bytes=peak,
        device_bytes=on_device(peak, device),
        range_bytes=(int(peak * (1 - spread)), int(peak * (1 + spread))),
        can_give_bytes=device.can_give_bytes,
        host_bytes=_host_bytes(config, table, trained, peak, device),
        disk_bytes=_disk_bytes(config, architecture, trained, base_bytes, statistics),
        trainable_parameters=trained,
        total_parameters=_counts(table)["all"],
        targets=count_targets(table, config) if config.adapter else {},
        tokens_at_once=tokens,
        verdict=judge(on_device(peak, device), device.can_give_bytes),
    )


def judge(needed_bytes: int, can_give_bytes: int) -> Verdict:
    """Whether `needed_bytes` fit, with how little to spare they are called tight."""
    if needed_bytes > can_give_bytes:
        return "does not fit"
    return "tight" if can_give_bytes - needed_bytes < TIGHT_BYTES else "fits"


def on_device(peak_bytes: int, device: Device) -> int:
    """What has to be free for `peak_bytes` of tensors."""
    if device.kind == "cpu":
        return int(peak_bytes * (1 + HEAP_SLACK)) + PROCESS_BYTES
    return int(peak_bytes * (1 + ALLOCATOR_SLACK)) + CONTEXT_BYTES


def tokens_at_once(config: RunConfig, statistics: Statistics | None) -> int:
    """Tokens of one forward pass: full sequences when packed, else the longest row that is kept."""
    row = config.sequence_len
    if statistics and not config.sample_packing:
        row = min(row, statistics.longest_tokens)
    tokens = config.micro_batch_size * row
    return min(tokens, max(1, statistics.total_tokens)) if statistics else tokens


def _base_bytes(config: RunConfig, device: Device) -> int:
    """Of one weight that is not quantized; `bf16: auto` is float32 where bfloat16 is emulated."""
    bf16 = device.computes_bf16 if config.bf16 == "auto" else config.bf16
    return 2 if bf16 else 4


def _weights(table: ModuleTable, config: RunConfig, base_bytes: int) -> dict[str, float]:
    counts = _counts(table)
    sizes = {name: float(counts[name] * base_bytes) for name in ("embeddings", "vision")}
    sizes["weights"] = counts["other"] * base_bytes
    sizes["experts"] = counts["experts"] * (
        NF4_BYTES if config.quantize_moe_experts else base_bytes
    )
    if config.load_in_4bit or config.load_in_8bit:
        for part, (numbers, rows) in _quantized(table, kept_modules(config)).items():
            held = numbers * NF4_BYTES if config.load_in_4bit else numbers + rows * INT8_ROW_BYTES
            sizes[part] += held - numbers * base_bytes
    return {name: sizes[name] for name in ("weights", "experts", "embeddings", "vision")}


@lru_cache(maxsize=32)
def _quantized(table: ModuleTable, kept: tuple[str, ...]) -> Mapping[str, tuple[int, int]]:
    """Numbers and rows of the linears that a quantized run quantizes, by part of the model."""
    found = {"weights": (0, 0), "vision": (0, 0)}
    for row in table.parameters:
        if row.quantizable and not is_kept(row.module, kept):
            part = "vision" if row.group in ("vision", "projector") else "weights"
            numbers, rows = found[part]
            found[part] = (numbers + row.count, rows + row.shape[0])
    return found


@lru_cache(maxsize=32)
def _counts(table: ModuleTable) -> Mapping[str, int]:
    """Numbers of the model by how a run holds them, of all, and of the largest tensor."""
    counts = dict.fromkeys(("other", "experts", "embeddings", "vision"), 0)
    counts |= {"all": table.total_parameters, "largest": max(r.count for r in table.parameters)}
    for row in table.parameters:
        if row.group == "experts":
            counts["experts"] += row.count
        elif row.group in ("embedding", "head"):
            counts["embeddings"] += row.count
        elif row.group in ("vision", "projector"):
            counts["vision"] += row.count
        else:
            counts["other"] += row.count
    return counts


def _trained(table: ModuleTable, config: RunConfig, base_bytes: int) -> dict[str, float]:
    """Adapter, gradients and optimizer state.

    An adapter is float32; weights that are trained whole keep their type, and beside an adapter
    they are a copy.
    """
    wide, whole = _moving(table, config)
    return {
        "adapter": wide * 4 + whole * base_bytes if config.adapter else 0,
        "gradients": wide * 4 + whole * base_bytes,
        "optimizer": wide * _state_bytes(config, 4) + whole * _state_bytes(config, base_bytes),
    }


def _moving(table: ModuleTable, config: RunConfig) -> tuple[int, int]:
    """Trained numbers of the adapter, and of weights that are trained whole."""
    wide = adapter_parameters(table, config) if config.adapter else 0
    return wide, trained_parameters(table, config) - wide


def _state_bytes(config: RunConfig, width: int) -> float:
    """Optimizer state of one trained number on the device; a paged one makes room when it must."""
    rest = _REST_BYTES if width == 2 else 0
    return rest + (0 if config.optimizer in _PAGED else _STATE_BYTES.get(config.optimizer, 8))


def _step(
    config: RunConfig,
    table: ModuleTable,
    device: Device,
    base_bytes: int,
    tokens: int,
    of_images: int,
) -> dict[str, float]:
    """What a forward and backward pass holds at its peak, or the optimizer's step behind it."""
    sizes = widths(table)
    seen, seeing = tower_bytes(config, table, of_images, base_bytes)
    if config.gradient_checkpointing:
        kept = sizes.layers * tokens * sizes.hidden * base_bytes
        layer = transient_bytes(config, sizes, tokens, base_bytes)
    else:
        one = kept_bytes(config, sizes, tokens, base_bytes)
        kept = sizes.layers * one
        layer = max(0, transient_bytes(config, sizes, tokens, base_bytes) - one)
    if sizes.expert_rows:
        adapter = expert_adapter_parameters(table, config) // sizes.layers
        resting, held = expert_bytes(config, sizes, tokens, base_bytes, adapter)
        if not config.gradient_checkpointing:
            kept, held = kept + sizes.layers * resting, held - resting
        layer += held
    head = trains_head(table, config)
    loss = _loss_bytes(sizes, device, base_bytes, tokens, head)
    # bfloat16 gradients are float32 ones while the weights move; nothing is kept by then.
    widening = (4 - base_bytes) * _moving(table, config)[1] - kept
    mask = _mask_bytes(config, device, tokens)
    layer = max(layer, loss, widening, seeing)
    return {"activations": kept + seen, "layer": layer, "mask": mask}


def _loss_bytes(
    sizes: Widths, device: Device, base_bytes: int, tokens: int, trains_head: bool
) -> int:
    """The learned states, their gradient, and chunks of logits where no kernel fuses the loss.

    A head that is trained is never left to that kernel, and adds up its gradient in float32.
    """
    states = 3 * tokens * sizes.hidden * base_bytes
    if device.kind == "cuda" and base_bytes == 2 and not trains_head:
        return states
    head = 4 * sizes.hidden * sizes.vocabulary if trains_head else 0
    return states + head + 2 * min(LOSS_CHUNK_BYTES, 4 * tokens * sizes.vocabulary)


def _mask_bytes(config: RunConfig, device: Device, tokens: int) -> int:
    """Packed rows are kept apart by a mask of (tokens, tokens) where the backend cannot cut them.

    One byte a pair as transformers makes it, two more as PyTorch's kernel reads it.
    """
    if not config.sample_packing or not needs_mask(config.attn_implementation, device):
        return 0
    return 3 * tokens * min(config.sequence_len, tokens)


def _spread(config: RunConfig, table: ModuleTable, of_images: int) -> float:
    """How far a measured peak may lie from the formula.

    Packed text of dense models is closest; lengths that vary, experts and images are further off.
    Tests hold it against the published figures of other tools for the same models.
    """
    if _counts(table)["experts"] or of_images:
        return 0.15
    return 0.06 if config.sample_packing else 0.10


def _host_bytes(
    config: RunConfig, table: ModuleTable, trained: int, peak: int, device: Device
) -> int:
    """This computer's memory: on a CPU everything, else the process and what a save gathers."""
    if device.kind == "cpu":
        return on_device(peak, device)
    largest = 2 * _counts(table)["largest"]
    state = _STATE_BYTES.get(config.optimizer, 8)
    return HOST_PROCESS_BYTES + 2 * largest + int(trained * (4 + state))


def _disk_bytes(
    config: RunConfig,
    architecture: Architecture,
    trained: int,
    base_bytes: int,
    statistics: Statistics | None,
) -> int:
    """The download, the prepared rows, the checkpoints that are kept, and the result."""
    table = architecture.table
    made_here = architecture.card is not None and not architecture.card.repositories
    stored = {"fp8": 1, "fp32": 4}.get(architecture.checkpoint, 2)
    everything = _counts(table)["all"]
    download = 0 if made_here or architecture.folder else everything * stored
    # Prepared rows: a token's id in 4 bytes, its kind in 1, its source in 2.
    rows = 7 * statistics.total_tokens if statistics else 0
    width = 4 if config.adapter else base_bytes
    rest = _REST_BYTES if width == 2 else 0
    save = trained * (width + rest + _STATE_BYTES.get(config.optimizer, 8))
    result = trained * 4 if config.adapter else everything * base_bytes
    return int(download + rows + config.save_total_limit * save + result)
