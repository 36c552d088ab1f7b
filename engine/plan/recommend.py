"""From a model, a device and a dataset to a whole config, with a reason for every value.

The rules themselves are in `choice`; here is what is kept of the person's own values, what is said
of them, and a plan of every model of the catalog on a device. A sequence has to fit on one card:
spreading one row over several (context parallelism) is not done.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import inf
from typing import Any

from pydantic import ValidationError

from engine.catalog import ModelCard, list_models, read_architecture
from engine.config import DatasetConfig, RunConfig, spell, unsupported
from engine.errors import UserError
from engine.plan.attention import Attention, choose_attention, task_of
from engine.plan.choice import RANKS, UPDATES_AN_EPOCH, Choice, find_recipe
from engine.plan.device import Device, Place, device_document
from engine.plan.duration import Duration, expected_duration, pace_of
from engine.plan.ladder import (
    Alternative,
    alternative_document,
    changed,
    list_alternatives,
    make_fit,
)
from engine.plan.layout import Layout, layout_on
from engine.plan.memory import estimate
from engine.plan.remarks import Goal, refuse_goal, why_not_trained
from engine.plan.savers import SAME_RESULT, SLOW, in_use
from engine.plan.verdict import Estimate, Verdict, estimate_document


@dataclass(frozen=True, slots=True)
class Recommendation:
    """A config that can be saved as it is, and what speaks for it."""

    config: RunConfig
    reasons: Mapping[str, str]
    """By key of the config, for every value that was chosen."""
    estimate: Estimate
    alternatives: tuple[Alternative, ...]
    attention: Attention
    not_trained: str | None
    """Why this version plans the model and cannot train it; None where it can."""
    duration: Duration | None = None
    """How long it takes; None for a card or rows that are not known."""
    tokens_per_second: float | None = None
    """Of training; None for a card that is not known."""

    @property
    def offloads(self) -> bool:
        return bool(in_use(self.config))

    @property
    def is_slow(self) -> bool:
        """Whether what is offloaded can make the run many times as long."""
        return any(saver.slow for saver in in_use(self.config))


def recommend(
    place: Place,
    *,
    dataset: DatasetConfig | None = None,
    goal: Goal = "text",
    fixed: Mapping[str, object] | None = None,
) -> Recommendation:
    """The config for training at `place`.

    `fixed` holds values that the person chose: they are kept, and the rest is chosen around them.
    Raises UserError where the goal cannot be met or where fixed values contradict each other.
    """
    refuse_goal(goal, place.architecture)
    rows = place.statistics
    images = goal == "vision" or bool(rows and rows.image_tokens)
    asked = Choice(place, dataset, images=images, goal=goal)
    try:
        free = choice = _choose(asked)
        if fixed:
            # A value that a person changes makes no plan slow by itself: that is asked for.
            offloaded = not SLOW.isdisjoint(free.values)
            own = _with_method(dict(fixed))
            choice = _choose(replace(asked, fixed=own, may_offload_layers=offloaded))
        config = choice.config()
    except ValidationError as error:
        raise _contradiction(error) from None
    reasons = {key: _own_reason(free, key, value) for key, value in choice.fixed.items()}
    return _advise(
        config,
        place,
        reasons={**choice.reasons, **reasons},
        attention=choice.attention,
    )


def assess(
    config: RunConfig, place: Place, *, changes: Mapping[str, object] | None = None
) -> Recommendation:
    """A person's own config with `changes`: nothing is advised, it is only looked at.

    Raises UserError where the changes contradict the rest.
    """
    try:
        kept = changed(config, changes or {})
    except ValidationError as error:
        raise _contradiction(error) from None
    return _advise(
        kept,
        place,
        reasons=dict.fromkeys(changes or {}, "yours"),
        attention=choose_attention(place.device, task_of(kept, place.architecture, place.device)),
    )


def _advise(
    config: RunConfig,
    place: Place,
    *,
    reasons: Mapping[str, str],
    attention: Attention,
) -> Recommendation:
    needs = estimate(config, place)
    return Recommendation(
        config,
        reasons,
        needs,
        list_alternatives(config, place),
        attention,
        why_not_trained(place.architecture),
        expected_duration(config, place, needs.tokens_per_second),
        needs.tokens_per_second or pace_of(config, place),
    )


def _contradiction(error: ValidationError) -> UserError:
    first = error.errors()[0]
    why = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # a rule about several keys belongs to none of them
        what = "The values that you chose contradict each other."
        return UserError(what, why, "Change or leave out one of them.")
    key = ".".join(map(str, first["loc"]))
    return UserError(
        f"{key} cannot have the value that you chose.",
        f"{why}.",
        f"`windtunnel explain {key}` says what it takes.",
    )


def _with_method(fixed: dict[str, object]) -> dict[str, object]:
    """`fixed` with the adapter and the precision that follow from one another."""
    method: dict[str, object] = {}
    if "load_in_4bit" in fixed:
        method["adapter"] = "qlora" if fixed["load_in_4bit"] else "lora"
    if fixed.get("unfrozen_parameters"):
        method["adapter"] = None
    fixed = {**method, **fixed}
    return {"load_in_4bit": fixed["adapter"] == "qlora", **fixed} if "adapter" in fixed else fixed


_LAYOUT = ("fsdp_config", "dp_shard_size", "dp_replicate_size", "deepspeed")


def _choose(asked: Choice) -> Choice:
    """The values on one card, or on several where that is better.

    Better is what fits, then what needs no weights in a memory that nobody has counted, once for
    each copy; then what is faster, then what keeps nothing in this computer's memory.
    """
    device = asked.place.device
    if any(asked.fixed.get(key) for key in _LAYOUT):
        return _choose_on(replace(asked, layout=layout_on(replace(asked).config(), device)))
    alone = best = _choose_on(asked)
    for layout in _layouts(alone):
        choice = _choose_on(replace(asked, layout=layout))
        if not device.planned and any(f.severity == "error" for f in unsupported(choice.config())):
            continue
        best = max(best, choice, key=_worth)
    if best is not alone:
        best.settle_layout(alone)
    return best


def _layouts(alone: Choice) -> Iterator[Layout]:
    """Ways to use all cards: copies side by side; one copy over the cards of a computer, and a copy
    in each; one over all of them. Where one card is enough, and waits for nothing that lies in RAM,
    no more than leave the rate room to fall."""
    device, known = alone.place.device, alone.known
    if device.cards == 1:
        return
    passes = known.total_tokens / alone.needs().tokens_at_once if known else inf
    copies = int(min(device.cards, passes / UPDATES_AN_EPOCH))
    if copies > 1:
        yield Layout(1, copies)
    if copies < device.cards and alone.needs().verdict == "fits" and not alone.waits():
        return
    if device.count > 1:
        yield Layout(device.count, device.nodes)
    if device.nodes > 1:
        yield Layout(device.cards)


def _worth(choice: Choice) -> tuple[int, bool, float, bool]:
    config, needs = choice.config(), choice.needs()
    pace = pace_of(config, choice.place) or 0.0
    better = pace if needs.verdict != "does not fit" else -float(needs.device_bytes)
    unseen = choice.place.device.ram_bytes is None and choice.waits()
    return RANKS[needs.verdict], not unseen, better, not in_use(config)


def _choose_on(asked: Choice) -> Choice:
    choice = replace(asked)
    choice.lay_out()
    recipe = find_recipe(choice.place.architecture, choice.dataset)
    if recipe is None or not recipe.whole:
        choice.habits()
        choice.method()
        choice.rows()
        choice.adapter()
        choice.batch()
        choice.optimization()
        choice.fit()
        choice.recomputation()
        choice.intervals()
    if recipe is not None:
        choice.follow(recipe)
        choice.fit()
    choice.settle()
    return choice


def _own_reason(free: Choice, key: str, value: object) -> str:
    """Of a value that the person chose, beside what would have been advised."""
    if key not in free.values:
        return "yours"
    advised, why = free.values[key], free.reasons[key]
    if advised == value:
        return f"yours, as recommended: {why}"
    return f"yours (recommended {spell(key, advised)}: {why})"


def advice_document(advice: Recommendation, device: Device) -> dict[str, Any]:
    """A recommendation: config, reasons, estimate, alternatives."""
    return {
        "config": advice.config.file_values(),
        "reasons": dict(advice.reasons),
        "estimate": estimate_document(advice.estimate),
        "alternatives": [alternative_document(other) for other in advice.alternatives],
        "attention": asdict(advice.attention),
        "not_trained": advice.not_trained,
        "duration": asdict(advice.duration) if advice.duration else None,
        "tokens_per_second": advice.tokens_per_second,
        "device": device_document(device),
    }


SHORTEST = 512
LONGEST_WITHOUT_CARD = 2**18
"""For a model whose context no catalog states: that of most Mistral models."""


@dataclass(frozen=True, slots=True)
class Prospect:
    """One model on one device."""

    card: ModelCard
    plan: Recommendation


def survey(device: Device) -> tuple[Prospect, ...]:
    """Every model of the catalog as it would be recommended on `device`, the smallest first."""
    offered = (card for card in list_models() if card.offered)
    plans = [Prospect(c, recommend(Place(read_architecture(c.name), device))) for c in offered]
    return tuple(sorted(plans, key=lambda p: p.plan.estimate.total_parameters))


def propose(prospects: tuple[Prospect, ...], device: Device) -> Prospect:
    """The model to begin with: on a CPU the one that is made here; on a GPU the largest that fits
    with all that it needs on the card, else the smallest.

    Among equals the one that thinks, then the newest.
    """
    trained = [p for p in prospects if p.plan.not_trained is None]
    if device.kind == "cpu":
        return next(p for p in trained if not p.card.repositories)
    fitting = [p for p in trained if p.plan.estimate.verdict == "fits"]
    whole = [p for p in fitting if not p.plan.offloads]
    return max(whole or trained[:1], key=_rank)


def _rank(prospect: Prospect) -> tuple[int, bool, str]:
    card = prospect.card
    billions = round(prospect.plan.estimate.total_parameters / 10**9)
    return billions, card.thinking in ("tokens", "effort"), card.name


@dataclass(frozen=True, slots=True)
class LengthPrice:
    """One sequence at a time of so many tokens."""

    sequence_len: int
    device_bytes: int
    verdict: Verdict
    fitting_bytes: int | None
    """With changes that alter no result; None where they are not enough."""
    changes: tuple[str, ...]
    """Names of those changes."""
    tokens_per_second: float | None
    """With them, by the card's data sheet."""


def price_lengths(config: RunConfig, place: Place) -> tuple[LengthPrice, ...]:
    """Powers of two from 512 to the model's context, and the context itself."""
    card = place.architecture.card
    most = card.context_tokens if card else LONGEST_WITHOUT_CARD
    lengths = [2**n for n in range(SHORTEST.bit_length() - 1, most.bit_length()) if 2**n < most]
    return tuple(_price(config, place, length) for length in (*lengths, most))


def _price(config: RunConfig, place: Place, length: int) -> LengthPrice:
    one = changed(config, {"sequence_len": length, "micro_batch_size": 1})
    needs = estimate(one, place)
    rungs = make_fit(one, place, only=SAME_RESULT)
    fits = rungs[-1].estimate.verdict == "fits" if rungs else needs.verdict == "fits"
    best = changed(one, rungs[-1].changes) if rungs and fits else one
    needed = rungs[-1].estimate if rungs else needs
    return LengthPrice(
        length,
        needs.device_bytes,
        needs.verdict,
        needed.device_bytes if fits else None,
        tuple(rung.name for rung in rungs) if fits else (),
        pace_of(best, place),
    )
