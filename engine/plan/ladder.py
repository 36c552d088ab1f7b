"""What makes any config fit: the cheapest sequence of changes, each with what it saves and costs.

A rung is what one saver changes of the config as it is by then. Rungs that the later ones make
needless are left out again, the dearest first.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.catalog import ModuleTable
from engine.config import RunConfig, assignment
from engine.plan.device import Place
from engine.plan.duration import pace_of, speedup
from engine.plan.layers import recomputed_layers, widths
from engine.plan.layout import is_sharded
from engine.plan.memory import estimate
from engine.plan.savers import (
    SAVERS,
    Change,
    Fits,
    Keys,
    Saver,
    batch_of,
    checkpointing,
    fewest_recomputed,
    in_4_bits,
    recomputing,
    with_rank,
)
from engine.plan.verdict import Estimate
from engine.units import GIB, gib

ADAPTER_RATE, LARGE_MODEL = 2e-4, 70 * 10**9
SLOWER_SHARE = 1.05
"""A change that costs less of the pace is called hardly slower."""


def changed(config: RunConfig, changes: Keys) -> RunConfig:
    """`config` with other values; a default that follows from a changed key follows.

    Raises pydantic's ValidationError where they contradict the rest.
    """
    given = {key: getattr(config, key) for key in config.model_fields_set}
    return RunConfig.model_validate({**given, **changes})


def _fits(config: RunConfig, place: Place) -> Fits:
    return lambda keys: estimate(changed(config, keys), place).verdict == "fits"


def _same_result(before: RunConfig, after: RunConfig, place: Place) -> str:
    """How much longer a run takes, where known, with a change that alters no result."""
    paces = pace_of(before, place), pace_of(after, place)
    if paces[0] is None or paces[1] is None:
        return "the same result, slower"
    longer = paces[0] / paces[1]
    if longer <= SLOWER_SHARE:
        return "the same result, hardly slower"
    return f"the same result, takes {longer:.1f} times as long"


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


_Taken = list[tuple[Saver, Alternative]]


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
    found = ladder.climb(SAVERS)
    if _ends(found):
        needed = [saver for saver in SAVERS if any(saver is taken for taken, _ in found)]
        for saver in needed[-2::-1]:
            fewer = [each for each in needed if each is not saver]
            shorter = ladder.climb(fewer)
            if _ends(shorter) and _names(shorter) <= _names(found):
                found, needed = shorter, fewer
    return tuple(alternative for _, alternative in found)


def _ends(taken: _Taken) -> bool:
    return bool(taken) and taken[-1][1].estimate.verdict == "fits"


def _names(taken: _Taken) -> set[str]:
    """A rung that would have to give more without another has another name."""
    return {alternative.name for _, alternative in taken}


def next_rung(
    config: RunConfig, place: Place, *, only: Container[str] | None = None
) -> Alternative | None:
    """The cheapest change that saves anything, whether or not the formula calls the config fitting.

    For a run that has shown that it does not fit; None where nothing is left. Of a kind that can
    give more or less, such as smaller batches, it is the least.
    """
    needed = estimate(config, place)
    ladder = _Ladder(config, place, (), only)
    for saver in SAVERS:
        for change in saver.changes(config, place, _fits(config, place)):
            if found := ladder.try_change(saver, change, {}, needed):
                return found
    return None


def make_faster(
    config: RunConfig, place: Place, *, sizes: Sequence[int] = ()
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
        count = fewest_recomputed(start, place, _fits(start, place))
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

    def climb(self, savers: Sequence[Saver]) -> _Taken:
        """Take savers, the cheapest first, until the plan fits or none saves any more."""
        taken: Mapping[str, object] = {}
        found: _Taken = []
        needed = estimate(self.config, self.place)
        while needed.verdict != "fits":
            step = self._next(savers, taken, needed)
            if step is None:
                break
            taken, needed = step[1].changes, step[1].estimate
            found.append(step)
        return found

    def _next(
        self, savers: Sequence[Saver], taken: Keys, needed: Estimate
    ) -> tuple[Saver, Alternative] | None:
        """The first saver beyond `taken` that saves something."""
        config = changed(self.config, taken)
        for saver in savers:
            found = None
            for change in saver.changes(config, self.place, _fits(config, self.place)):
                found = self.try_change(saver, change, taken, needed) or found
                if found and found.estimate.verdict == "fits":
                    break
            if found:
                return saver, found
        return None

    def try_change(
        self, saver: Saver, change: Change, taken: Keys, needed: Estimate
    ) -> Alternative | None:
        """`change` on top of `taken`; None where it saves nothing or may not be made."""
        name, keys, trade = change
        if any(
            key in self.keep or (self.only is not None and key not in self.only) for key in keys
        ):
            return None
        trial = {**taken, **keys}
        config = changed(self.config, trial)
        now = estimate(config, self.place)
        saved = needed.device_bytes - now.device_bytes
        ram = self.place.device.ram_bytes
        if saved <= 0 or (ram is not None and now.host_bytes > max(ram, needed.host_bytes)):
            return None
        if not trade:
            trade = _same_result(changed(self.config, taken), config, self.place)
            trade += f"; {saver.subject} wait in RAM" if saver.waits else ""
        return Alternative(name, trial, now, trade, saved)


def list_alternatives(config: RunConfig, place: Place) -> tuple[Alternative, ...]:
    """The same plan with another method, and with half or twice the rank; layers are computed a
    second time where that is what each takes."""
    here = estimate(config, place)
    found = []
    for name, changes, trade in _others(config, place.table):
        trial = changed(config, changes)
        needs, fits = estimate(trial, place), _fits(trial, place)
        if needs.verdict != "fits" and (again := next(checkpointing(trial, place, fits), None)):
            changes, trade = {**changes, **again[1]}, f"{trade}; with {again[0]}"
            needs = estimate(changed(config, changes), place)
        saved = here.device_bytes - needs.device_bytes
        found.append(Alternative(name, changes, needs, trade, saved))
    return tuple(found)


def _others(config: RunConfig, table: ModuleTable) -> Iterator[Change]:
    # What goes with a full fine-tune and with no adapter, and what only an adapter can have.
    back: dict[str, object] = {"unfrozen_parameters": None} if config.unfrozen_parameters else {}
    if not (config.lora_target_linear or config.lora_target_modules):
        back["lora_target_linear"] = True
    if config.adapter != "qlora":
        four_bit = back | in_4_bits(config, table)
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
            "learning_rate": learning_rate(table.total_parameters, whole=True)[0],
            **dict(_without_frozen(config)),
        }
        yield "full", whole, "every weight is trained: most capacity, most forgetting"
    if config.adapter:
        for rank in (config.lora_r // 2, config.lora_r * 2):
            if rank:
                trade = "less room to learn" if rank < config.lora_r else "more room to learn"
                yield f"lora_r {rank}", with_rank(config, rank), trade


def _without_frozen(config: RunConfig) -> Iterator[tuple[str, object]]:
    """The defaults of the keys that belong to frozen weights, where the config has other values."""
    for key in (key for saver in SAVERS if saver.frozen for key in saver.keys):
        default = RunConfig.model_fields[key].default
        if getattr(config, key) != default:
            yield key, default


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
