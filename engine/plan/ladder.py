"""What makes any config fit: the cheapest sequence of changes, each with what it saves and costs.

It goes from what changes no result, over what costs time, exactness and capacity, to what costs
data. Rungs that the later ones make needless are left out again, the dearest first.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.catalog import Architecture
from engine.config import RunConfig, assignment
from engine.data.statistics import Statistics
from engine.plan.device import Device
from engine.plan.duration import speedup
from engine.plan.layers import recomputed_layers, widths
from engine.plan.memory import is_sharded
from engine.plan.rungs import (
    RUNGS,
    SLOWER_SHARE,
    Change,
    Place,
    Rung,
    batch_of,
    changed,
    checkpointing,
    fewest_recomputed,
    in_4_bits,
    learning_rate,
    recomputing,
    with_rank,
)
from engine.plan.verdict import Estimate
from engine.units import GIB, gib


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
    architecture: Architecture,
    device: Device,
    statistics: Statistics | None = None,
    *,
    keep: Container[str] = (),
    only: Container[str] | None = None,
) -> tuple[Alternative, ...]:
    """The rungs from the top to the first that fits; all of them where none does.

    Each stands on those above it: its changes hold theirs too. Empty where the config fits already.
    No rung changes a key of `keep`, nor, with `only`, any other than those.
    """
    ladder = _Ladder(config, Place(architecture, device, statistics), keep, only)
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
    architecture: Architecture,
    device: Device,
    statistics: Statistics | None = None,
    *,
    only: Container[str] | None = None,
) -> Alternative | None:
    """The cheapest change that saves anything, whether or not the formula calls the config fitting.

    For a run that has shown that it does not fit; None where nothing is left. Of a kind that can
    give more or less, such as smaller batches, it is the least.
    """
    place = Place(architecture, device, statistics)
    needed = place.needs(config)
    ladder = _Ladder(config, place, (), only)
    for rung in RUNGS:
        for change in rung(config, place):
            if found := ladder.try_change(change, {}, needed):
                return found
    return None


def make_faster(
    config: RunConfig,
    architecture: Architecture,
    device: Device,
    statistics: Statistics | None = None,
    *,
    sizes: Sequence[int] = (),
) -> Alternative | None:
    """What a config that fits could make of the room that is left: layers computed once, all of
    them or as many as there is room for; None where that would hardly be faster.

    `sizes` are micro-batches to choose from, the smaller ones first, which divide the config's own.
    """
    place = Place(architecture, device, statistics)
    layers = widths(architecture.table).layers
    now, needed = recomputed_layers(config, widths(architecture.table)), place.needs(config)
    if not now or needed.verdict != "fits" or is_sharded(config):
        return None
    best, most = None, SLOWER_SHARE
    for size in sizes or (config.micro_batch_size,):
        batch = batch_of(config, size)
        start = changed(config, batch)
        count = fewest_recomputed(start, place)
        keys = recomputing(start, layers, count)
        trial = changed(start, keys)
        gain = speedup(config, trial, architecture, device, statistics)
        if count < now and gain >= most:
            left = f"{layers - count} of {layers} layers" if count else "every layer"
            name = " ".join(assignment(*change) for change in keys.items())
            trade, needs = f"{left} computed once: about {gain - 1:.0%} faster", place.needs(trial)
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
        needed = self.place.needs(self.config)
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
        now = self.place.needs(changed(self.config, trial))
        saved = needed.device_bytes - now.device_bytes
        ram = self.place.device.ram_bytes
        too_much = ram is not None and now.host_bytes > max(ram, needed.host_bytes)
        return None if saved <= 0 or too_much else Alternative(name, trial, now, trade, saved)


def list_alternatives(
    config: RunConfig,
    architecture: Architecture,
    device: Device,
    statistics: Statistics | None = None,
) -> tuple[Alternative, ...]:
    """The same plan with another method, and with half or twice the rank; layers are computed a
    second time where that is what each takes."""
    place = Place(architecture, device, statistics)
    here = place.needs(config)
    found = []
    for name, changes, trade in _others(config, architecture):
        trial = changed(config, changes)
        needs = place.needs(trial)
        if needs.verdict != "fits" and (again := next(checkpointing(trial, place), None)):
            changes, trade = {**changes, **again[1]}, f"{trade}; with {again[0]}"
            needs = place.needs(changed(config, changes))
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
