"""The models of the catalog compared on one device, and the one that is proposed."""

import pytest

from engine.plan import Device, propose, survey
from tests.support.machines import MODELS, card, cpu, sized


def proposed(device: Device) -> str:
    return propose(survey(device), device).card.name


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("RTX 4090", "magistral-small-2509"),
        ("24 GB", "magistral-small-2509"),
        ("H100", "mistral-small-4"),
        ("16 GB", "ministral-3-14b"),
        ("8 GB", "ministral-3-3b"),
    ],
)
def test_a_card_is_proposed_the_largest_model_that_fits(name: str, model: str) -> None:
    assert proposed(card(name)) == model


def test_a_cpu_is_proposed_the_model_that_is_made_here() -> None:
    assert proposed(cpu(4)) == "demo-tiny"
    assert proposed(cpu(1000)) == "demo-tiny"


def test_every_model_of_the_catalog_can_be_trained_where_there_is_room() -> None:
    prospects = survey(sized(10_000))
    assert not any(p.plan.not_trained for p in prospects)
    assert all(p.plan.estimate.verdict == "fits" for p in prospects)
    assert proposed(sized(10_000)) == "mistral-medium-3.5"


def test_where_nothing_fits_the_smallest_is_proposed() -> None:
    assert proposed(sized(0.1)) == "demo-tiny"


def test_every_model_is_planned_and_the_smallest_comes_first() -> None:
    prospects = survey(card("RTX 4090"))
    sizes = [p.plan.estimate.total_parameters for p in prospects]
    assert sizes == sorted(sizes)
    assert {p.card.name for p in prospects} == {*MODELS} - {"demo-tiny-vision"}, (
        "that one is its demo's alone"
    )
