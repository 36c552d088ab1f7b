"""What makes any config fit: the cheapest sequence of changes, each with what it saves and costs.

A rung is a function of the config as it is by then, and something that the trainer does. The ladder
goes from what changes no result, over what costs time, exactness and capacity, to what costs data.
Rungs that the later ones make needless are left out again, the dearest first.
"""

from bisect import bisect_left
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any, TypeAlias

from pydantic import ValidationError

from engine.catalog import Architecture
from engine.config import SHARDED_OPTIMIZERS, RunConfig, assignment
from engine.plan.device import Place
from engine.plan.duration import pace_of, speedup
from engine.plan.layers import recomputed_layers, tower_works, widths
from engine.plan.memory import estimate
from engine.plan.step import SLOTS, is_sharded
from engine.plan.targets import linear_endings
from engine.plan.trainer import PLUGIN, PRICE, names_cut_loss
from engine.plan.verdict import Estimate
from engine.units import GIB, gib

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
    before = pace_of(config, place)
    try:
        after = pace_of(changed(config, changes), place)
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
    small = [n for n in range(1, isqrt(micro) + 1) if micro % n == 0]
    for size in sorted({*small, *(micro // n for n in small)} - {micro}, reverse=True):
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
    sizes = widths(place.table)
    now, layers = recomputed_layers(config, sizes), sizes.layers
    if now == layers:
        return
    if is_sharded(config):  # Axolotl, which would run it, knows all or none
        count = layers
    elif estimate(config, place).verdict == "fits":  # and yet memory ran out: half of those kept
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
    layers = widths(place.table).layers

    def fits(count: int) -> bool:
        return (
            estimate(changed(config, recomputing(config, layers, count)), place).verdict == "fits"
        )

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
    works = tower_works(config, place.table, place.statistics)
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
    layers = widths(place.table).layers
    now = (config.offloaded_layers or layers) if config.layer_offloading else 0
    if not can or now >= layers:
        return

    def keys(count: int) -> dict[str, object]:
        return {"layer_offloading": True, "offloaded_layers": count if count < layers else None}

    def fits(count: int) -> bool:
        return estimate(changed(config, keys(count)), place).verdict == "fits"

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
            keys["lora_target_modules"] = linear_endings(place.table)
        yield "experts off", keys, "the experts learn nothing, attention and shared experts do"


def fewer_targets(config: RunConfig, place: Place) -> Iterator[Change]:
    """An adapter on attention alone."""
    endings = linear_endings(place.table, group="attention")
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


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another plan: what changes, what it needs, and what it costs."""

    name: str
    changes: Mapping[str, object]
    """By key of the config."""
    estimate: Estimate
    trade: str
    saves_bytes: int = 0
    """On the device, beside the plan before it."""


_Taken = list[tuple[Rung, Alternative]]


def make_fit(
    config: RunConfig,
    place: Place,
    *,
    keep: Container[str] = (),
    only: Container[str] | None = None,
) -> tuple[Alternative, ...]:
    """The rungs from the top to the first that fits; all of them where none does.

    Each stands on those above it: its changes hold theirs too. Empty where the config fits already.
    No rung changes a key of `keep`, nor, with `only`, any other than those.
    """
    ladder = _Ladder(config, place, keep, only)
    found = ladder.climb(RUNGS)
    if _fits(found):
        needed = [rung for rung in RUNGS if any(rung is taken for taken, _ in found)]
        for rung in needed[-2::-1]:
            fewer = [each for each in needed if each is not rung]
            shorter = ladder.climb(fewer)
            if _fits(shorter) and _names(shorter) <= _names(found):
                found, needed = shorter, fewer
    return tuple(alternative for _, alternative in found)


def _fits(taken: _Taken) -> bool:
    return bool(taken) and taken[-1][1].estimate.verdict == "fits"


def _names(taken: _Taken) -> set[str]:
    """A rung that would have to give more without another has another name."""
    return {alternative.name for _, alternative in taken}


def next_rung(
    config: RunConfig,
    place: Place,
    *,
    only: Container[str] | None = None,
) -> Alternative | None:
    """The cheapest change that saves anything, whether or not the formula calls the config fitting.

    For a run that has shown that it does not fit; None where nothing is left. Of a kind that can
    give more or less, such as smaller batches, it is the least.
    """
    needed = estimate(config, place)
    ladder = _Ladder(config, place, (), only)
    for rung in RUNGS:
        for change in rung(config, place):
            if found := ladder.try_change(change, {}, needed):
                return found
    return None


def make_faster(
    config: RunConfig,
    place: Place,
    *,
    sizes: Sequence[int] = (),
) -> Alternative | None:
    """What a config that fits could make of the room that is left: layers computed once, all of
    them or as many as there is room for; None where that would hardly be faster.

    `sizes` are micro-batches to choose from, the smaller ones first, which divide the config's own.
    """
    layers = widths(place.table).layers
    now, needed = recomputed_layers(config, widths(place.table)), estimate(config, place)
    if not now or needed.verdict != "fits" or is_sharded(config):
        return None
    best, most = None, SLOWER_SHARE
    for size in sizes or (config.micro_batch_size,):
        batch = batch_of(config, size)
        start = changed(config, batch)
        count = fewest_recomputed(start, place)
        keys = recomputing(start, layers, count)
        trial = changed(start, keys)
        gain = speedup(config, trial, place)
        if count < now and gain >= most:
            left = f"{layers - count} of {layers} layers" if count else "every layer"
            name = " ".join(assignment(*change) for change in keys.items())
            trade, needs = (
                f"{left} computed once: about {gain - 1:.0%} faster",
                estimate(trial, place),
            )
            saved = needed.device_bytes - needs.device_bytes
            best, most = Alternative(name, {**batch, **keys}, needs, trade, saved), gain
    return best


def describe_faster(faster: Alternative) -> str:
    """That change, what it needs and what it gains, in one sentence."""
    needs = faster.estimate
    size = f"{needs.device_bytes / GIB:.1f} of {gib(needs.can_give_bytes)}"
    return f"{faster.name} would fit: {size}, {faster.trade}"


@dataclass(frozen=True, slots=True)
class _Ladder:
    """One config that is made to fit."""

    config: RunConfig
    place: Place
    keep: Container[str]
    only: Container[str] | None

    def climb(self, rungs: Sequence[Rung]) -> _Taken:
        """Take rungs, the cheapest first, until the plan fits or none saves any more."""
        taken: Mapping[str, object] = {}
        found: _Taken = []
        needed = estimate(self.config, self.place)
        while needed.verdict != "fits":
            step = self._next(rungs, taken, needed)
            if step is None:
                break
            taken, needed = step[1].changes, step[1].estimate
            found.append(step)
        return found

    def _next(
        self, rungs: Sequence[Rung], taken: Mapping[str, object], needed: Estimate
    ) -> tuple[Rung, Alternative] | None:
        """The first rung beyond `taken` that saves something."""
        config = changed(self.config, taken)
        for rung in rungs:
            found = None
            for change in rung(config, self.place):
                found = self.try_change(change, taken, needed) or found
                if found and found.estimate.verdict == "fits":
                    break
            if found:
                return rung, found
        return None

    def try_change(
        self, change: Change, taken: Mapping[str, object], needed: Estimate
    ) -> Alternative | None:
        """`change` on top of `taken`; None where it saves nothing or may not be made."""
        name, keys, trade = change
        if any(
            key in self.keep or (self.only is not None and key not in self.only) for key in keys
        ):
            return None
        trial = {**taken, **keys}
        now = estimate(changed(self.config, trial), self.place)
        saved = needed.device_bytes - now.device_bytes
        ram = self.place.device.ram_bytes
        too_much = ram is not None and now.host_bytes > max(ram, needed.host_bytes)
        return None if saved <= 0 or too_much else Alternative(name, trial, now, trade, saved)


def list_alternatives(
    config: RunConfig,
    place: Place,
) -> tuple[Alternative, ...]:
    """The same plan with another method, and with half or twice the rank; layers are computed a
    second time where that is what each takes."""
    here = estimate(config, place)
    found = []
    for name, changes, trade in _others(config, place.architecture):
        trial = changed(config, changes)
        needs = estimate(trial, place)
        if needs.verdict != "fits" and (again := next(checkpointing(trial, place), None)):
            changes, trade = {**changes, **again[1]}, f"{trade}; with {again[0]}"
            needs = estimate(changed(config, changes), place)
        saved = here.device_bytes - needs.device_bytes
        found.append(Alternative(name, changes, needs, trade, saved))
    return tuple(found)


def _others(config: RunConfig, architecture: Architecture) -> Iterator[Change]:
    # What goes with a full fine-tune and with no adapter, and what only an adapter can have.
    back: dict[str, object] = {"unfrozen_parameters": None} if config.unfrozen_parameters else {}
    if not (config.lora_target_linear or config.lora_target_modules):
        back["lora_target_linear"] = True
    if config.adapter != "qlora":
        four_bit = back | in_4_bits(config, architecture)
        yield "qlora", four_bit, "least memory; 4-bit weights are a little less exact"
    if config.adapter != "lora" and not config.quantize_moe_experts:
        plain = {"adapter": "lora", "load_in_4bit": False, **back}
        yield "lora", plain, "exact weights, an adapter beside them"
    if config.adapter is not None and not config.quantize_moe_experts:
        whole = {
            "adapter": None,
            "load_in_4bit": False,
            "load_in_8bit": False,
            "lora_target_linear": False,
            "learning_rate": learning_rate(architecture.table.total_parameters, whole=True)[0],
            **{key: value for key, value in _FROZEN_ONLY.items() if getattr(config, key)},
        }
        if config.peft_autocast_adapter_dtype is False:
            whole["peft_autocast_adapter_dtype"] = None
        yield "full", whole, "every weight is trained: most capacity, most forgetting"
    if config.adapter:
        for rank in (config.lora_r // 2, config.lora_r * 2):
            if rank:
                trade = "less room to learn" if rank < config.lora_r else "more room to learn"
                yield f"lora_r {rank}", with_rank(config, rank), trade


_FROZEN_ONLY: Mapping[str, object] = {
    "layer_offloading": None,
    "offloaded_layers": None,
    "offload_embeddings": False,
    "bnb_config_kwargs": None,
}
"""Keys that belong to frozen weights, and their values without."""


def alternative_document(other: Alternative) -> dict[str, Any]:
    """Another plan, or a rung of the ladder; sizes in bytes."""
    return {
        "name": other.name,
        "changes": dict(other.changes),
        "device_bytes": other.estimate.device_bytes,
        "saves_bytes": other.saves_bytes,
        "verdict": other.estimate.verdict,
        "trade": other.trade,
    }
