"""What a device is good for: a plan of every model of the catalog on it, and what each length of a
sequence costs there.

A sequence has to fit on one card: spreading one row over several (context parallelism) is not done.
"""

from dataclasses import dataclass

from engine.catalog import Architecture, ModelCard, list_models, read_architecture
from engine.config import RunConfig
from engine.plan.device import Device
from engine.plan.duration import pace_of
from engine.plan.ladder import make_fit
from engine.plan.memory import estimate
from engine.plan.recommend import Recommendation, recommend
from engine.plan.rungs import SAME_RESULT, changed
from engine.plan.verdict import Verdict

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
    plans = [Prospect(card, _plan(card, device)) for card in list_models() if card.offered]
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


def _plan(card: ModelCard, device: Device) -> Recommendation:
    return recommend(read_architecture(card.name), device)


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


def price_lengths(
    config: RunConfig, architecture: Architecture, device: Device
) -> tuple[LengthPrice, ...]:
    """Powers of two from 512 to the model's context, and the context itself."""
    card = architecture.card
    most = card.context_tokens if card else LONGEST_WITHOUT_CARD
    lengths = [2**n for n in range(SHORTEST.bit_length() - 1, most.bit_length()) if 2**n < most]
    return tuple(_price(config, architecture, device, length) for length in (*lengths, most))


def _price(
    config: RunConfig, architecture: Architecture, device: Device, length: int
) -> LengthPrice:
    one = changed(config, {"sequence_len": length, "micro_batch_size": 1})
    needs = estimate(one, architecture, device)
    rungs = make_fit(one, architecture, device, only=SAME_RESULT)
    fits = rungs[-1].estimate.verdict == "fits" if rungs else needs.verdict == "fits"
    best = changed(one, rungs[-1].changes) if rungs and fits else one
    needed = rungs[-1].estimate if rungs else needs
    return LengthPrice(
        length,
        needs.device_bytes,
        needs.verdict,
        needed.device_bytes if fits else None,
        tuple(rung.name for rung in rungs) if fits else (),
        pace_of(best, architecture, device),
    )
