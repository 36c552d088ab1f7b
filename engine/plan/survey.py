"""What a device is good for: a plan of every model of the catalog on it.

Separate from `recommend`, which plans one: here models are compared, and one of them is proposed.
"""

from dataclasses import dataclass

from engine.catalog import ModelCard, list_models, read_architecture
from engine.plan.device import Device
from engine.plan.recommend import Recommendation, recommend


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
