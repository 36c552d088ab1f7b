"""The models of the catalog compared on one device, and every length of a sequence priced."""

import json
from pathlib import Path

import pytest

from engine.cli import main
from engine.plan import Device, changed, estimate, price_lengths, propose
from tests.support.machines import MODELS, card, config, cpu, model, sized


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


QLORA = {
    "adapter": "qlora",
    "sequence_len": 2048,
    "sample_packing": True,
    "gradient_checkpointing": True,
}


@pytest.mark.parametrize("name", MODELS)
def test_prices_reach_the_context_and_grow_with_the_length(name: str) -> None:
    architecture = model(name)
    keys = QLORA if name != "mistral-small-4" else QLORA | {"quantize_moe_experts": True}
    if name == "mistral-small-4":
        keys |= {"lora_target_modules": ["o_proj"]}
    prices = price_lengths(config(**keys), architecture, card("H200"))
    assert architecture.card
    assert prices[-1].sequence_len == architecture.card.context_tokens
    needed = [price.device_bytes for price in prices]
    assert needed == sorted(needed)
    for price in prices:
        if price.verdict == "fits":
            assert price.fitting_bytes == price.device_bytes
            assert price.changes == ()
        elif price.fitting_bytes is not None:
            assert price.fitting_bytes < price.device_bytes
            assert price.changes


def test_a_price_is_the_estimate_of_that_length() -> None:
    run = config(**QLORA, micro_batch_size=4)
    prices = price_lengths(run, model("ministral-3-8b"), card("RTX 4090"))
    one = changed(run, {"micro_batch_size": 1, "sequence_len": 16_384})
    (price,) = [price for price in prices if price.sequence_len == 16_384]
    needs = estimate(one, model("ministral-3-8b"), card("RTX 4090"))
    assert (price.device_bytes, price.verdict) == (needs.device_bytes, needs.verdict)


def test_the_command_says_that_a_row_is_not_spread(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yml"
    file.write_text("base_model: ministral-3-3b\nadapter: lora\n", "utf-8")
    assert main(["estimate", str(file), "--lengths", "--assume", "H100 80GB"]) == 0
    out = capfd.readouterr().out
    assert "262,144" in out
    assert "A row has to fit on one card" in out
    assert main(["estimate", str(file), "--lengths", "--assume", "H100 80GB", "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)["lengths"]
    assert printed[0].keys() >= {"sequence_len", "device_bytes", "verdict", "tokens_per_second"}
