"""The single changes that make a plan smaller, from the cheapest to the dearest.

Each is a function of the config as it is by then, and says what it changes and what that costs.
Every one of them is something that the trainer does.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from pydantic import ValidationError

from engine.catalog import Architecture
from engine.config import SHARDED_OPTIMIZERS, RunConfig
from engine.data.statistics import Statistics
from engine.plan.device import Device
from engine.plan.duration import pace_of
from engine.plan.layers import recomputed_layers, widths
from engine.plan.memory import estimate, is_sharded
from engine.plan.memory.frozen import SLOTS
from engine.plan.targets import linear_endings
from engine.plan.trainer import PLUGIN, PRICE, names_cut_loss
from engine.plan.verdict import Estimate
from engine.plan.vision import tower_works

ADAPTER_RATE, LARGE_MODEL = 2e-4, 70 * 10**9
SMALLEST_RANK, SMALLEST_LENGTH = 8, 512
SLOWER_SHARE = 1.05
"""A change that costs less of the pace is called hardly slower."""
BUSY_TOKENS = 4096
"""So many at once keep a GPU's products busy: fewer would make it slower, more hardly faster."""

SAME_RESULT = frozenset(
    {
        *("micro_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"),
        "checkpointed_layers",
        *("offload_embeddings", "activation_offloading", "layer_offloading", "offloaded_layers"),
    }
)
"""Keys that a run can change on its way: the steps to come compute what they would have."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a change is judged on."""

    architecture: Architecture
    device: Device
    statistics: Statistics | None

    def needs(self, config: RunConfig) -> Estimate:
        """The estimate of `config` here."""
        return estimate(config, self.architecture, self.device, self.statistics)

    def pace(self, config: RunConfig) -> float | None:
        """Tokens a second of `config` here, where the card is known."""
        return pace_of(config, self.architecture, self.device, self.statistics)


Change: TypeAlias = tuple[str, Mapping[str, object], str]
"""Its name, the values by key, and what it costs."""
Rung: TypeAlias = Callable[[RunConfig, Place], Iterator[Change]]
"""The changes of one kind, the smaller ones first; none where it does not apply."""


def changed(config: RunConfig, changes: Mapping[str, object]) -> RunConfig:
    """`config` with other values; a default that follows from a changed key follows.

    Raises pydantic's ValidationError where they contradict the rest.
    """
    given = {key: getattr(config, key) for key in config.model_fields_set}
    return RunConfig.model_validate({**given, **changes})


def same_result(place: Place, config: RunConfig, changes: Mapping[str, object]) -> str:
    """What a change costs that alters no result: how much longer a run takes, where known."""
    before = place.pace(config)
    try:
        after = place.pace(changed(config, changes))
    except ValidationError:
        after = None
    if before is None or after is None:
        return "the same result, slower"
    longer = before / after
    if longer <= SLOWER_SHARE:
        return "the same result, hardly slower"
    return f"the same result, takes {longer:.1f} times as long"


def busy_batches(config: RunConfig, place: Place) -> Iterator[Change]:
    """Fewer sequences at once that still keep the device busy."""
    least = BUSY_TOKENS if place.device.kind == "cuda" else 1
    for change in smaller_batches(config, place):
        size = change[1]["micro_batch_size"]
        assert isinstance(size, int)
        if size * config.sequence_len >= least:
            yield change


def smaller_batches(config: RunConfig, place: Place) -> Iterator[Change]:
    """Fewer sequences at once, and as many more of them before a step."""
    micro = config.micro_batch_size
    for size in sorted((n for n in range(1, micro) if micro % n == 0), reverse=True):
        keys = batch_of(config, size)
        name = f"micro_batch_size {size}, accumulation {keys['gradient_accumulation_steps']}"
        yield name, keys, "the same result, slower"


def batch_of(config: RunConfig, size: int) -> dict[str, object]:
    """The changes to `size` sequences at once, and as many in a step as there are."""
    if size == config.micro_batch_size:
        return {}
    steps = config.gradient_accumulation_steps * config.micro_batch_size // size
    return {"micro_batch_size": size, "gradient_accumulation_steps": steps}


def checkpointing(config: RunConfig, place: Place) -> Iterator[Change]:
    """Layers are computed a second time instead of being kept: as few as will do, all where that
    is not enough."""
    sizes = widths(place.architecture.table)
    now, layers = recomputed_layers(config, sizes), sizes.layers
    if now == layers:
        return
    if is_sharded(config):  # Axolotl, which would run it, knows all or none
        count = layers
    elif place.needs(config).verdict == "fits":  # and yet memory ran out: half of those kept
        count = (now + layers + 1) // 2
    else:
        count = fewest_recomputed(config, place, least=now + 1)
    for each in sorted({count, layers}):
        keys = recomputing(config, layers, each)
        some = "" if each == layers else f", {each} of {layers} layers"
        yield f"gradient_checkpointing{some}", keys, same_result(place, config, keys)


def fewest_recomputed(config: RunConfig, place: Place, *, least: int = 0) -> int:
    """The fewest layers, from `least` on, that have to be computed a second time for `config` to
    fit; all of them where it does not either way."""
    layers = widths(place.architecture.table).layers

    def fits(count: int) -> bool:
        return place.needs(changed(config, recomputing(config, layers, count))).verdict == "fits"

    return bisect_left(range(layers), True, lo=least, key=fits)


def recomputing(config: RunConfig, layers: int, count: int) -> dict[str, object]:
    """What changes for `count` of the `layers` to be computed a second time."""
    keys: dict[str, object] = {
        "gradient_checkpointing": count > 0,
        "checkpointed_layers": count if 0 < count < layers else None,
    }
    if count == 0 and config.activation_offloading:
        keys["activation_offloading"] = None
    return {key: value for key, value in keys.items() if getattr(config, key) != value}


def embeddings_in_ram(config: RunConfig, place: Place) -> Iterator[Change]:
    """Embedding and head are offloaded to RAM."""
    frozen = config.adapter and not config.lora_modules_to_save
    if place.device.has_ram_beside and frozen and not config.offload_embeddings:
        keys = {"offload_embeddings": True}
        trade = f"{same_result(place, config, keys)}; embedding and head wait in RAM"
        yield "offload_embeddings", keys, trade


def states_in_ram(config: RunConfig, place: Place) -> Iterator[Change]:
    """What checkpointing keeps is offloaded to RAM."""
    kept = config.gradient_checkpointing and not config.activation_offloading
    if place.device.has_ram_beside and kept:
        keys = {"activation_offloading": True}
        trade = f"{same_result(place, config, keys)}; they wait in RAM"
        yield "activation_offloading", keys, trade


def small_states(config: RunConfig, place: Place) -> Iterator[Change]:
    """The optimizer's state in 8 bits."""
    if place.device.kind == "cuda" and config.optimizer in ("adamw_torch", "adamw_torch_fused"):
        small = "adamw_bnb_8bit"
        keys = {"optimizer": SHARDED_OPTIMIZERS[small] if is_sharded(config) else small}
        yield "8-bit optimizer", keys, "its states are rounded"


def four_bits(config: RunConfig, place: Place) -> Iterator[Change]:
    """Frozen weights in 4 bits."""
    if config.adapter == "lora":
        keys = in_4_bits(config, place.architecture)
        yield "qlora", keys, "4-bit weights are a little less exact"


def small_tower(config: RunConfig, place: Place) -> Iterator[Change]:
    """The vision tower in the format of the other frozen weights."""
    quantized = config.load_in_4bit or config.load_in_8bit
    works = tower_works(config, place.architecture.table, place.statistics)
    if quantized and works and not config.bnb_config_kwargs:
        keys: dict[str, object] = {"bnb_config_kwargs": {"llm_int8_skip_modules": []}}
        bits = 4 if config.load_in_4bit else 8
        yield f"vision tower in {bits} bits", keys, "images are seen a little less exactly"


def paged_states(config: RunConfig, place: Place) -> Iterator[Change]:
    """The optimizer's state gives way to RAM."""
    pages = place.device.has_ram_beside and not is_sharded(config)
    if pages and not config.optimizer.startswith("paged"):
        keys = {"optimizer": "paged_adamw_8bit"}
        yield "paged optimizer", keys, "its states move to RAM when the card is full: slower"


def narrow_adapter(config: RunConfig, place: Place) -> Iterator[Change]:
    """The adapter in bfloat16."""
    if config.adapter and config.peft_autocast_adapter_dtype is not False:
        keys = {"peft_autocast_adapter_dtype": False}
        yield "bf16 adapter", keys, "its steps are rounded, at random so that none is lost"


def layers_in_ram(config: RunConfig, place: Place) -> Iterator[Change]:
    """As few of the frozen layers as will do are offloaded; all where that is not enough."""
    can = place.device.has_ram_beside and config.adapter and config.gradient_checkpointing
    layers = widths(place.architecture.table).layers
    now = (config.offloaded_layers or layers) if config.layer_offloading else 0
    if not can or now >= layers:
        return

    def keys(count: int) -> dict[str, object]:
        return {"layer_offloading": True, "offloaded_layers": count if count < layers else None}

    def fits(count: int) -> bool:
        return place.needs(changed(config, keys(count))).verdict == "fits"

    enough = layers
    if now:  # some were not enough: twice as many
        enough = min(layers, 2 * now)
    elif layers > SLOTS and fits(layers):
        enough = bisect_left(range(layers), True, lo=SLOTS + 1, key=fits)
    name = f"layer_offloading, {enough} of {layers} layers"
    yield name, keys(enough), f"{same_result(place, config, keys(enough))}; they wait in RAM"


def cut_loss(config: RunConfig, place: Place) -> Iterator[Change]:
    """The loss by a kernel that forms no logits at all."""
    device, stack = place.device, place.device.stack
    here = stack is None or device.planned or stack.get("cut-cross-entropy")
    if not here or not device.computes_bf16 or config.cut_cross_entropy is not None:
        return
    plugins = [*(config.plugins or ()), PLUGIN]
    if not names_cut_loss(config):
        yield "cut cross-entropy", {"plugins": plugins, "cut_cross_entropy": True}, PRICE


def lower_rank(config: RunConfig, place: Place) -> Iterator[Change]:
    """Half the adapter."""
    if config.adapter and config.lora_r > SMALLEST_RANK:
        rank = max(SMALLEST_RANK, config.lora_r // 2)
        yield f"lora_r {rank}", with_rank(config, rank), "less room to learn"


def no_experts(config: RunConfig, place: Place) -> Iterator[Change]:
    """No adapter on the experts."""
    if config.lora_target_parameters:
        keys: dict[str, object] = {"lora_target_parameters": None}
        if not config.lora_target_modules and not config.lora_target_linear:
            keys["lora_target_modules"] = linear_endings(place.architecture.table)
        yield "experts off", keys, "the experts learn nothing, attention and shared experts do"


def fewer_targets(config: RunConfig, place: Place) -> Iterator[Change]:
    """An adapter on attention alone."""
    endings = linear_endings(place.architecture.table, group="attention")
    own = config.lora_target_modules
    if config.adapter and not isinstance(own, str) and set(own or ()) != set(endings):
        keys: dict[str, object] = {"lora_target_modules": endings, "lora_target_linear": False}
        yield "adapter on attention alone", keys, "learns less, even at an equal size"


def shorter_rows(config: RunConfig, place: Place) -> Iterator[Change]:
    """Half the length."""
    if config.sequence_len <= SMALLEST_LENGTH:
        return
    length = max(SMALLEST_LENGTH, config.sequence_len // 2)
    cost = "longer rows are left out"
    if place.statistics:
        over, more = place.statistics.rows_over(length)
        cost = f"{over:,}{' or more' if more else ''} longer rows are left out"
    yield f"sequence_len {length}", {"sequence_len": length}, cost


RUNGS: tuple[Rung, ...] = (
    busy_batches,
    checkpointing,
    smaller_batches,
    embeddings_in_ram,
    states_in_ram,
    small_states,
    four_bits,
    small_tower,
    paged_states,
    narrow_adapter,
    layers_in_ram,
    cut_loss,
    lower_rank,
    no_experts,
    fewer_targets,
    shorter_rows,
)


def in_4_bits(config: RunConfig, architecture: Architecture) -> dict[str, object]:
    """The changes to QLoRA; experts are quantized too, being most of their model."""
    changes: dict[str, object] = {"adapter": "qlora", "load_in_4bit": True, "load_in_8bit": False}
    if architecture.table.counts_by_group()["experts"]:
        changes["quantize_moe_experts"] = True
        if config.lora_target_linear or not config.lora_target_modules:
            endings = linear_endings(architecture.table)
            changes |= {"lora_target_linear": False, "lora_target_modules": endings}
    return changes


def with_rank(config: RunConfig, rank: int) -> dict[str, object]:
    """Another rank at the same scale, which is lora_alpha over lora_r."""
    alpha = max(1, round(config.lora_alpha * rank / config.lora_r))
    return {"lora_r": rank, "lora_alpha": alpha}


def learning_rate(total_parameters: int, *, whole: bool) -> tuple[float, str]:
    """The rate for a model of this size, and its reason.

    Whole weights take a tenth of what adapters take (Thinking Machines, "LoRA without regret");
    from 70B on both are halved (NeMo AutoModel's recipe for 128B).
    """
    large = total_parameters >= LARGE_MODEL
    rate = ADAPTER_RATE / (10 if whole else 1) / (2 if large else 1)
    reason = "a tenth of what adapters take: whole weights move" if whole else "usual for adapters"
    if large:
        reason += "; half of the usual: models above 70B need less"
    # 2e-4 / 10 is 1.9999999999999998e-05.
    return float(f"{rate:.2g}"), reason if whole or large else "usual for adapters, at any rank"
