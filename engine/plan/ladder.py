"""What else a plan could be: the rungs that make it fit, and the alternatives around it.

Separate from `recommend` because both are asked of any config, a person's own above all. Rungs go
from what changes no result, over what costs time and capacity, to what costs data; every one of
them is something that the trainer does.
"""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

from engine.catalog import Architecture
from engine.config import RunConfig
from engine.plan.device import Device
from engine.plan.memory import Estimate, estimate
from engine.plan.rates import learning_rate
from engine.plan.statistics import Statistics
from engine.plan.targets import linear_endings

_SMALLEST_RANK, _SMALLEST_LENGTH = 8, 512


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another plan: what changes, what it needs, and what it costs."""

    name: str
    changes: Mapping[str, object]
    """By key of the config."""
    estimate: Estimate
    trade: str


def make_fit(
    config: RunConfig,
    architecture: Architecture,
    device: Device,
    statistics: Statistics | None = None,
    *,
    keep: Container[str] = (),
) -> tuple[Alternative, ...]:
    """The rungs from the top to the first that fits; all of them where none does.

    Each stands on those above it: its changes hold theirs too. Empty where the config fits already.
    No rung changes a key of `keep`.
    """
    taken: Mapping[str, object] = {}
    found: list[Alternative] = []
    needed = estimate(config, architecture, device, statistics)
    while needed.verdict != "fits":
        rung = _next_rung(config, taken, needed, architecture, device, statistics, keep)
        if rung is None:
            break
        taken, needed = rung.changes, rung.estimate
        found.append(rung)
    return tuple(found)


def _next_rung(
    config: RunConfig,
    taken: Mapping[str, object],
    needed: Estimate,
    architecture: Architecture,
    device: Device,
    statistics: Statistics | None,
    keep: Container[str],
) -> Alternative | None:
    """The first change beyond `taken` that saves anything."""
    for name, changes, trade in _rungs(changed(config, taken), architecture, device, statistics):
        if any(key in keep for key in changes):
            continue
        trial = {**taken, **changes}
        now = estimate(changed(config, trial), architecture, device, statistics)
        if now.device_bytes < needed.device_bytes:
            return Alternative(name, trial, now, trade)
    return None


def list_alternatives(
    config: RunConfig,
    architecture: Architecture,
    device: Device,
    statistics: Statistics | None = None,
) -> tuple[Alternative, ...]:
    """The same plan with another method, and with half or twice the rank."""
    return tuple(
        Alternative(
            name,
            changes,
            estimate(changed(config, changes), architecture, device, statistics),
            trade,
        )
        for name, changes, trade in _others(config, architecture)
    )


def changed(config: RunConfig, changes: Mapping[str, object]) -> RunConfig:
    """`config` with other values; a default that follows from a changed key follows.

    Raises pydantic's ValidationError where they contradict the rest.
    """
    given = {key: getattr(config, key) for key in config.model_fields_set}
    return RunConfig.model_validate({**given, **changes})


_Change = tuple[str, Mapping[str, object], str]


def _rungs(
    config: RunConfig,
    architecture: Architecture,
    device: Device,
    statistics: Statistics | None,
) -> Iterator[_Change]:
    micro, steps = config.micro_batch_size, config.gradient_accumulation_steps
    if micro > 1:
        both = {"micro_batch_size": 1, "gradient_accumulation_steps": steps * micro}
        yield f"micro_batch_size 1, accumulation {steps * micro}", both, "the same result, slower"
    if not config.gradient_checkpointing:
        yield (
            "gradient_checkpointing",
            {"gradient_checkpointing": True},
            "the same result, a third slower",
        )
    if device.kind == "cuda" and config.optimizer.startswith("adamw_torch"):
        yield "8-bit optimizer", {"optimizer": "adamw_bnb_8bit"}, "its states are rounded"
    if config.adapter == "lora":
        yield "qlora", _in_4_bits(config, architecture), "4-bit weights are a little less exact"
    if device.kind == "cuda" and not config.optimizer.startswith("paged"):
        paged = {"optimizer": "paged_adamw_8bit"}
        yield "paged optimizer", paged, "its states move to RAM when the card is full: slower"
    if config.adapter and config.lora_r > _SMALLEST_RANK:
        rank = max(_SMALLEST_RANK, config.lora_r // 2)
        yield f"lora_r {rank}", {"lora_r": rank, "lora_alpha": rank}, "less room to learn"
    if config.sequence_len > _SMALLEST_LENGTH:
        length = max(_SMALLEST_LENGTH, config.sequence_len // 2)
        cost = "longer rows are left out"
        if statistics:
            over, more = statistics.rows_over(length)
            cost = f"{over:,}{' or more' if more else ''} longer rows are left out"
        yield f"sequence_len {length}", {"sequence_len": length}, cost


def _in_4_bits(config: RunConfig, architecture: Architecture) -> dict[str, object]:
    """The changes to QLoRA; experts are quantized too, being most of their model."""
    changes: dict[str, object] = {"adapter": "qlora", "load_in_4bit": True}
    if architecture.table.counts_by_group()["experts"]:
        changes["quantize_moe_experts"] = True
        if config.lora_target_linear or not config.lora_target_modules:
            endings = linear_endings(architecture.table)
            changes |= {"lora_target_linear": False, "lora_target_modules": endings}
    return changes


def _others(config: RunConfig, architecture: Architecture) -> Iterator[_Change]:
    # What goes with a full fine-tune and with no adapter.
    back: dict[str, object] = {"unfrozen_parameters": None} if config.unfrozen_parameters else {}
    if not (config.lora_target_linear or config.lora_target_modules):
        back["lora_target_linear"] = True
    if config.adapter != "qlora":
        four_bit = back | _in_4_bits(config, architecture)
        yield "qlora", four_bit, "least memory; 4-bit weights are a little less exact"
    if config.adapter != "lora" and not config.quantize_moe_experts:
        plain = {"adapter": "lora", "load_in_4bit": False, **back}
        yield "lora", plain, "exact weights, an adapter beside them"
    if config.adapter is not None and not config.quantize_moe_experts:
        whole = {
            "adapter": None,
            "load_in_4bit": False,
            "lora_target_linear": False,
            "learning_rate": learning_rate(architecture.table.total_parameters, whole=True)[0],
        }
        yield "full", whole, "every weight moves: most capacity, most forgetting"
    if config.adapter:
        for rank in (config.lora_r // 2, config.lora_r * 2):
            if rank:
                trade = "less room to learn" if rank < config.lora_r else "more room to learn"
                yield f"lora_r {rank}", {"lora_r": rank, "lora_alpha": rank}, trade
