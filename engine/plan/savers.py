"""Every way to make a run need less memory: what it changes, what it costs, what waits in RAM.

The table stands in the order in which the ladder tries it: from what changes no result, over what
costs time, exactness and capacity, to what costs data. A new saver is a key of the config, an entry
here, and the code of the trainer that acts on it: ladder, recommendation, formula and wizard read
the table.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import NamedTuple, TypeAlias

from engine.catalog import ModuleTable
from engine.config import SHARDED_OPTIMIZERS, RunConfig
from engine.plan.device import Place
from engine.plan.layers import recomputed_layers, tower_works, widths
from engine.plan.layout import is_sharded
from engine.plan.step import SLOTS, Step
from engine.plan.targets import linear_endings
from engine.plan.trainer import PLUGIN, PRICE, names_cut_loss

SMALLEST_RANK, SMALLEST_LENGTH = 8, 512
BUSY_TOKENS = 4096
"""So many at once keep a GPU's products busy: fewer would make it slower, more hardly faster."""
OFFLOADED_STATES = 2
"""Layer inputs that are on the device at once where they are kept in RAM: that of the layer at work
and that of the next one."""

Keys: TypeAlias = Mapping[str, object]
"""Values by key of the config."""
Change: TypeAlias = tuple[str, Keys, str]
"""Its name, the values, and what is given up; empty where that is only time."""
Fits: TypeAlias = Callable[[Keys], bool]
"""Whether the plan fits with these values in place of the config's."""


class Waiting(NamedTuple):
    """A part of a run that waits in RAM, in bytes."""

    held: float
    at_once: float = 0
    """Of it, on the device all the same."""
    copied: float = 0
    """What a micro-batch brings to the device and takes back."""
    for_loss: float = 0
    """What is brought to the device for the loss alone."""


@dataclass(frozen=True, slots=True)
class Saver:
    """One way to need less memory, which the trainer knows."""

    changes: Callable[[RunConfig, Place, Fits], Iterator[Change]]
    """The smaller ones first; none where it does not apply."""
    keys: tuple[str, ...] = ()
    """Those of the config that are its own; the first one says whether it is in use."""
    same_result: bool = False
    """Whether a run can change it on its way: the steps to come compute what they would have."""
    frozen: bool = False
    """Whether it is for frozen weights alone."""
    waits: Callable[[Step], Mapping[str, Waiting]] | None = None
    """By part of the estimate, what then waits in RAM."""
    label: str = ""
    """Of what waits there."""
    subject: str = "they"
    """The same in a sentence."""
    slow: bool = False
    """Whether it can take many times as long: only for what cannot do without."""


def _smaller_batches(
    config: RunConfig, place: Place, fits: Fits, *, busy: bool = False
) -> Iterator[Change]:
    """Fewer sequences at once, and as many more of them before a step; so many at least that they
    keep the device `busy`."""
    micro, length = config.micro_batch_size, config.sequence_len
    least = BUSY_TOKENS if busy and place.device.kind == "cuda" else 1
    small = [n for n in range(1, isqrt(micro) + 1) if micro % n == 0]
    sizes = (n for n in {*small, *(micro // n for n in small)} - {micro} if n * length >= least)
    for size in sorted(sizes, reverse=True):
        keys = batch_of(config, size)
        name = f"micro_batch_size {size}, accumulation {keys['gradient_accumulation_steps']}"
        yield name, keys, "the same result, slower"


def batch_of(config: RunConfig, size: int) -> dict[str, int]:
    """The changes to `size` sequences at once, and as many in a step as there are."""
    if size == config.micro_batch_size:
        return {}
    steps = config.gradient_accumulation_steps * config.micro_batch_size // size
    return {"micro_batch_size": size, "gradient_accumulation_steps": steps}


def checkpointing(config: RunConfig, place: Place, fits: Fits) -> Iterator[Change]:
    """Layers are computed a second time instead of being kept: as few as will do, all where that
    is not enough."""
    sizes = widths(place.table)
    now, layers = recomputed_layers(config, sizes), sizes.layers
    if now == layers:
        return
    if is_sharded(config):  # Axolotl, which would run it, knows all or none
        count = layers
    elif fits({}):  # and yet memory ran out: half of those kept
        count = (now + layers + 1) // 2
    else:
        count = fewest_recomputed(config, place, fits, least=now + 1)
    for each in sorted({count, layers}):
        some = "" if each == layers else f", {each} of {layers} layers"
        yield f"gradient_checkpointing{some}", recomputing(config, layers, each), ""


def fewest_recomputed(config: RunConfig, place: Place, fits: Fits, *, least: int = 0) -> int:
    """The fewest layers, from `least` on, that have to be computed a second time for `config` to
    fit; all of them where it does not either way."""
    layers = widths(place.table).layers
    return _fewest(layers, least, lambda count: fits(recomputing(config, layers, count)))


def _fewest(layers: int, least: int, fits: Callable[[int], bool]) -> int:
    return min(layers, bisect_left(range(layers), True, lo=least, key=fits))


def recomputing(config: RunConfig, layers: int, count: int) -> Keys:
    """What changes for `count` of the `layers` to be computed a second time."""
    keys: dict[str, object] = {
        "gradient_checkpointing": count > 0,
        "checkpointed_layers": count if 0 < count < layers else None,
    }
    if count == 0 and config.activation_offloading:
        keys["activation_offloading"] = None
    return {key: value for key, value in keys.items() if getattr(config, key) != value}


def _embeddings_in_ram(config: RunConfig, place: Place, fits: Fits) -> Iterator[Change]:
    frozen = config.adapter and not config.lora_modules_to_save
    beside = place.device.has_ram_beside and not is_sharded(config)
    if beside and frozen and not config.offload_embeddings:
        yield "offload_embeddings", {"offload_embeddings": True}, ""


def _embeddings(step: Step) -> Mapping[str, Waiting]:
    """Rows are looked up in RAM; the head is brought for the loss."""
    head = step.counts.head * step.base_bytes
    held = step.bytes_of("embeddings", step.counts.parts["embeddings"])
    return {"embeddings": Waiting(held, copied=head, for_loss=head)}


def _states_in_ram(config: RunConfig, place: Place, fits: Fits) -> Iterator[Change]:
    kept = config.gradient_checkpointing and not config.activation_offloading
    if place.device.has_ram_beside and kept:
        yield "activation_offloading", {"activation_offloading": True}, ""


def _states(step: Step) -> Mapping[str, Waiting]:
    """What checkpointing keeps: the inputs of the layers that are computed again."""
    again = recomputed_layers(step.config, step.widths)
    state = step.tokens * step.widths.hidden * step.base_bytes
    at_once = min(OFFLOADED_STATES, again) * state
    return {"activations": Waiting(again * state, at_once, copied=2 * again * state)}


def _small_states(config: RunConfig, place: Place, fits: Fits) -> Iterator[Change]:
    if place.device.kind == "cuda" and config.optimizer in ("adamw_torch", "adamw_torch_fused"):
        small = "adamw_bnb_8bit"
        keys = {"optimizer": SHARDED_OPTIMIZERS[small] if is_sharded(config) else small}
        yield "8-bit optimizer", keys, "its states are rounded"


def _four_bits(config: RunConfig, place: Place, fits: Fits) -> Iterator[Change]:
    if config.adapter == "lora":
        yield "qlora", in_4_bits(config, place.table), "4-bit weights are a little less exact"


def in_4_bits(config: RunConfig, table: ModuleTable) -> dict[str, object]:
    """The changes to QLoRA; experts are quantized too, being most of their model."""
    changes: dict[str, object] = {"adapter": "qlora", "load_in_4bit": True, "load_in_8bit": False}
    if table.counts_by_group()["experts"]:
        changes["quantize_moe_experts"] = True
        if config.lora_target_linear or not config.lora_target_modules:
            changes |= {"lora_target_linear": False, "lora_target_modules": linear_endings(table)}
    return changes


def _small_tower(config: RunConfig, place: Place, fits: Fits) -> Iterator[Change]:
    """The vision tower in the format of the other frozen weights."""
    quantized = config.load_in_4bit or config.load_in_8bit
    works = tower_works(config, place.table, place.statistics)
    if quantized and works and not config.bnb_config_kwargs:
        keys: Keys = {"bnb_config_kwargs": {"llm_int8_skip_modules": []}}
        bits = 4 if config.load_in_4bit else 8
        yield f"vision tower in {bits} bits", keys, "images are seen a little less exactly"


def _paged_states(config: RunConfig, place: Place, fits: Fits) -> Iterator[Change]:
    pages = place.device.has_ram_beside and not is_sharded(config)
    if pages and not config.optimizer.startswith("paged"):
        keys = {"optimizer": "paged_adamw_8bit"}
        yield "paged optimizer", keys, "its states move to RAM when the card is full: slower"


def _narrow_adapter(config: RunConfig, place: Place, fits: Fits) -> Iterator[Change]:
    if config.adapter and config.peft_autocast_adapter_dtype is not False:
        keys = {"peft_autocast_adapter_dtype": False}
        yield "bf16 adapter", keys, "its steps are rounded, at random so that none is lost"


def _layers_in_ram(config: RunConfig, place: Place, fits: Fits) -> Iterator[Change]:
    """As few of the frozen layers as will do are offloaded; all where that is not enough."""
    can = place.device.has_ram_beside and config.adapter and config.gradient_checkpointing
    can = can and not is_sharded(config)
    layers = widths(place.table).layers
    now = (config.offloaded_layers or layers) if config.layer_offloading else 0
    if not can or now >= layers:
        return

    def keys(count: int) -> Keys:
        return {"layer_offloading": True, "offloaded_layers": count if count < layers else None}

    # Where some were not enough: twice as many.
    enough = 2 * now or _fewest(layers, SLOTS + 1, lambda count: fits(keys(count)))
    enough = min(layers, enough)
    yield f"layer_offloading, {enough} of {layers} layers", keys(enough), ""


def _layers(step: Step) -> Mapping[str, Waiting]:
    moved = step.counts.layers[: step.config.offloaded_layers]
    found = {}
    for part in ("linear", "experts"):
        each = [step.bytes_of(part, layer[part]) for layer in moved if part in layer]
        held, slots = sum(each), SLOTS * max(each, default=0)
        if slots < held:
            found[part] = Waiting(held, slots, copied=2 * held)
    return found


def _cut_loss(config: RunConfig, place: Place, fits: Fits) -> Iterator[Change]:
    """The loss by a kernel that forms no logits at all."""
    device, stack = place.device, place.device.stack
    here = stack is None or device.planned or stack.get("cut-cross-entropy")
    if not here or not device.computes_bf16 or config.cut_cross_entropy is not None:
        return
    if not names_cut_loss(config):
        plugins = [*(config.plugins or ()), PLUGIN]
        yield "cut cross-entropy", {"plugins": plugins, "cut_cross_entropy": True}, PRICE


def _lower_rank(config: RunConfig, place: Place, fits: Fits) -> Iterator[Change]:
    if config.adapter and config.lora_r > SMALLEST_RANK:
        rank = max(SMALLEST_RANK, config.lora_r // 2)
        yield f"lora_r {rank}", with_rank(config, rank), "less room to learn"


def with_rank(config: RunConfig, rank: int) -> Keys:
    """Another rank at the same scale, which is lora_alpha over lora_r."""
    alpha = max(1, round(config.lora_alpha * rank / config.lora_r))
    return {"lora_r": rank, "lora_alpha": alpha}


def _no_experts(config: RunConfig, place: Place, fits: Fits) -> Iterator[Change]:
    if config.lora_target_parameters:
        keys: dict[str, object] = {"lora_target_parameters": None}
        if not config.lora_target_modules and not config.lora_target_linear:
            keys["lora_target_modules"] = linear_endings(place.table)
        yield "experts off", keys, "the experts learn nothing, attention and shared experts do"


def _fewer_targets(config: RunConfig, place: Place, fits: Fits) -> Iterator[Change]:
    endings = linear_endings(place.table, group="attention")
    own = config.lora_target_modules
    if config.adapter and not isinstance(own, str) and set(own or ()) != set(endings):
        keys: Keys = {"lora_target_modules": endings, "lora_target_linear": False}
        yield "adapter on attention alone", keys, "learns less, even at an equal size"


def _shorter_rows(config: RunConfig, place: Place, fits: Fits) -> Iterator[Change]:
    if config.sequence_len <= SMALLEST_LENGTH:
        return
    length = max(SMALLEST_LENGTH, config.sequence_len // 2)
    cost = "longer rows are left out"
    if place.statistics:
        over, more = place.statistics.rows_over(length)
        cost = f"{over:,}{' or more' if more else ''} longer rows are left out"
    yield f"sequence_len {length}", {"sequence_len": length}, cost


_BATCH = ("micro_batch_size", "gradient_accumulation_steps")
_LAYERS = ("gradient_checkpointing", "checkpointed_layers")
SAVERS = (
    Saver(partial(_smaller_batches, busy=True), _BATCH, same_result=True),
    Saver(checkpointing, _LAYERS, same_result=True),
    Saver(_smaller_batches, _BATCH, same_result=True),
    Saver(
        _embeddings_in_ram,
        ("offload_embeddings",),
        same_result=True,
        frozen=True,
        waits=_embeddings,
        label="embedding",
        subject="embedding and head",
    ),
    Saver(
        _states_in_ram, ("activation_offloading",), same_result=True, waits=_states, label="states"
    ),
    Saver(_small_states),
    Saver(_four_bits),
    Saver(_small_tower, ("bnb_config_kwargs",), frozen=True),
    Saver(_paged_states),
    Saver(_narrow_adapter, ("peft_autocast_adapter_dtype",), frozen=True),
    Saver(
        _layers_in_ram,
        ("layer_offloading", "offloaded_layers"),
        same_result=True,
        frozen=True,
        waits=_layers,
        label="layers",
        slow=True,
    ),
    Saver(_cut_loss),
    Saver(_lower_rank),
    Saver(_no_experts),
    Saver(_fewer_targets),
    Saver(_shorter_rows),
)
IN_RAM = tuple(saver for saver in SAVERS if saver.waits)
SLOW = frozenset(saver.keys[0] for saver in SAVERS if saver.slow)
SAME_RESULT = frozenset(key for saver in SAVERS if saver.same_result for key in saver.keys)
"""Keys that a run can change on its way."""


def in_use(config: RunConfig) -> tuple[Saver, ...]:
    """Those savers of a config by which something waits in RAM."""
    return tuple(saver for saver in IN_RAM if getattr(config, saver.keys[0]))


def list_waiting(step: Step) -> dict[str, Waiting]:
    """By part of the estimate, what waits in RAM; nothing where that is the device's own memory."""
    savers = in_use(step.config) if step.offloads else ()
    return {part: found for s in savers if s.waits for part, found in s.waits(step).items()}
