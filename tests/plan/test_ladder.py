"""What makes a plan fit: rung by rung, each of them something that the trainer does."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import require_supported
from engine.plan import (
    Alternative,
    assess,
    changed,
    describe_faster,
    estimate,
    list_alternatives,
    make_faster,
    make_fit,
    next_rung,
    recommend,
)
from engine.plan.duration import pace_of
from engine.plan.savers import IN_RAM, SAME_RESULT, Saver, in_use
from engine.units import GIB
from tests.support.machines import at, card, config, cpu, dataset, sized

BIG: dict[str, Any] = {
    "adapter": "lora",
    "lora_r": 64,
    "sequence_len": 8192,
    "micro_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "sample_packing": True,
    "gradient_checkpointing": False,
}
SMALL, LARGE = "ministral-3-3b", "magistral-small-2509"


def names_of(rungs: tuple[Alternative, ...]) -> list[str]:
    return [rung.name for rung in rungs]


@pytest.mark.parametrize("gigabytes", ["16 GB", "24 GB"])
def test_rungs_lead_a_24b_model_down_to_a_small_card(gigabytes: str) -> None:
    device = card(gigabytes)
    rungs = make_fit(config(**BIG), at(LARGE, device))
    # What changes no result first, what costs exactness after it.
    assert names_of(rungs)[:2] == ["micro_batch_size 1, accumulation 8", "gradient_checkpointing"]
    assert "qlora" in names_of(rungs)
    assert rungs[-1].estimate.verdict == "fits"
    assert not {"sequence_len", "lora_target_modules"} & set(rungs[-1].changes)


def test_only_as_many_layers_are_computed_again_as_have_to() -> None:
    """The cheapest change, beside batches that keep the card busy all the same."""
    start = config(**BIG | {"micro_batch_size": 1, "lora_r": 32, "sequence_len": 4096})
    device = card("16 GB")
    (rung,) = make_fit(start, at(SMALL, device))
    count = rung.changes["checkpointed_layers"]
    assert isinstance(count, int)
    assert rung.name == f"gradient_checkpointing, {count} of 26 layers"
    assert rung.estimate.verdict == "fits"
    fewer = changed(start, {**rung.changes, "checkpointed_layers": count - 1})
    assert estimate(fewer, at(SMALL, device)).verdict != "fits"
    (none,) = make_fit(start, at(SMALL, device), only={"gradient_checkpointing"})
    assert none.changes == {"gradient_checkpointing": True}


def test_a_run_that_was_planned_to_fit_and_did_not_computes_half_of_the_others_again() -> None:
    start = config(**BIG | {"micro_batch_size": 1, "sequence_len": 1024})
    for count in (13, 20, 23):
        rung = next_rung(start, at(SMALL, "H200"), only=SAME_RESULT)
        assert rung
        start = changed(start, rung.changes)
        assert start.checkpointed_layers == count


def test_a_sharded_plan_computes_all_layers_again_or_none() -> None:
    sharded = {"fsdp_config": {}, "fsdp_version": 2, "dp_shard_size": 2}
    start = config(**BIG | {"micro_batch_size": 1, "sequence_len": 4096} | sharded)
    rungs = make_fit(start, at(LARGE, "48 GB"), only=SAME_RESULT)
    assert "checkpointed_layers" not in rungs[-1].changes
    roomy = changed(start, {"gradient_checkpointing": True})
    assert estimate(roomy, at(LARGE, "H200")).verdict == "fits"
    assert make_faster(roomy, at(LARGE, "H200")) is None


class TestFaster:
    START: ClassVar[dict[str, Any]] = BIG | {
        **{"micro_batch_size": 1, "sequence_len": 4096, "gradient_checkpointing": True}
    }

    def test_a_roomy_card_computes_every_layer_once(self) -> None:
        faster = make_faster(config(**self.START), at(SMALL, "H100"))
        assert faster
        assert faster.changes == {"gradient_checkpointing": False}
        assert "every layer computed once: about 4" in faster.trade
        assert faster.estimate.verdict == "fits"
        assert describe_faster(faster).startswith("gradient_checkpointing=false would fit: ")

    def test_a_smaller_one_as_many_as_there_is_room_for(self) -> None:
        start, device = config(**self.START), sized(18)
        faster = make_faster(start, at(SMALL, device))
        assert faster
        count = faster.changes["checkpointed_layers"]
        assert isinstance(count, int)
        assert f"{26 - count} of 26 layers computed once" in faster.trade
        assert faster.estimate.verdict == "fits"
        fewer = changed(start, {"checkpointed_layers": count - 1})
        assert estimate(fewer, at(SMALL, device)).verdict != "fits"

    def test_nothing_is_said_where_it_would_hardly_be_faster_or_does_not_fit(self) -> None:
        start = config(**self.START)
        needed = estimate(start, at(SMALL, "H100")).device_bytes
        assert make_faster(start, at(SMALL, sized(needed / GIB + 1.2))) is None
        assert make_faster(start, at(SMALL, sized(needed / GIB - 1))) is None
        assert make_faster(config(**BIG), at(SMALL, "H200")) is None


def test_a_rung_that_the_later_ones_make_needless_is_left_out() -> None:
    """Rank 64 in float32 on a 24B model does not fit 24 GB by small changes: 4 bits do it alone."""
    start = config(**BIG | {"micro_batch_size": 1, "gradient_checkpointing": True})
    rungs = make_fit(start, at(LARGE, "RTX 5090"))
    assert rungs[-1].estimate.verdict == "fits"
    for key in set(rungs[-1].changes) - {"adapter", "load_in_4bit", "load_in_8bit"}:
        fewer = {k: v for k, v in rungs[-1].changes.items() if k != key}
        assert estimate(changed(start, fewer), at(LARGE, "RTX 5090")).verdict != "fits", key


QLORA: dict[str, Any] = {
    "adapter": "qlora",
    "lora_r": 32,
    "lora_alpha": 32,
    "sequence_len": 2048,
    "micro_batch_size": 2,
    "sample_packing": True,
    "gradient_checkpointing": True,
    "optimizer": "adamw_bnb_8bit",
    "bf16": True,
}
WITH_EXPERTS: dict[str, Any] = {
    "quantize_moe_experts": True,
    "lora_target_modules": ["o_proj", "q_b_proj", "kv_b_proj"],
    "lora_target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


@pytest.mark.parametrize(
    ("name", "size", "keys"),
    [
        ("mistral-medium-3.5", "H100 80GB HBM3", {}),
        ("mistral-small-4", "H100 80GB HBM3", WITH_EXPERTS),
        ("magistral-small-2507", "16 GB", {}),
        ("ministral-3-14b", "12 GB", {}),
        ("ministral-3-8b", "8 GB", {}),
        ("ministral-3-3b", "6 GB", {}),
    ],
)
def test_goals_of_no_rival_end_in_a_fitting_config(
    name: str, size: str, keys: dict[str, Any]
) -> None:
    """Rank and length stay: what is given up is time, and bits of the adapter at most."""
    start, device = config(**QLORA | keys), card(size)
    rungs = make_fit(start, at(name, device))
    assert rungs[-1].estimate.verdict == "fits"
    made = changed(start, rungs[-1].changes)
    require_supported(made)
    assert (made.lora_r, made.sequence_len) == (32, 2048)
    assert made.lora_target_parameters == start.lora_target_parameters


def test_only_as_many_layers_are_offloaded_as_have_to_be() -> None:
    start = config(**QLORA | {"micro_batch_size": 1})
    rungs = make_fit(start, at(LARGE, "12 GB"))
    count = rungs[-1].changes["offloaded_layers"]
    assert isinstance(count, int)
    assert 2 < count < 40
    fewer = changed(start, {**rungs[-1].changes, "offloaded_layers": count - 1})
    assert estimate(fewer, at(LARGE, "12 GB")).verdict != "fits"


def test_nothing_is_offloaded_that_ram_cannot_hold() -> None:
    start = config(**QLORA | {"micro_batch_size": 1})
    poor = replace(card("12 GB"), ram_bytes=8 * GIB)
    rungs = make_fit(start, at(LARGE, poor))
    assert all(rung.estimate.host_bytes <= 8 * GIB for rung in rungs)
    assert "layer_offloading" not in rungs[-1].changes


def test_experts_go_to_4_bits_with_the_rest_of_their_model() -> None:
    rungs = make_fit(config(**BIG), at("mistral-small-4", "H200"))
    assert rungs[-1].estimate.verdict == "fits"
    assert rungs[-1].changes["quantize_moe_experts"] is True
    fitting = changed(config(**BIG), rungs[-1].changes)
    require_supported(fitting)
    assert not fitting.lora_target_linear, "experts are no linear layers"


def test_rungs_end_with_the_first_that_fits_and_change_nothing_that_they_may_not() -> None:
    assert make_fit(config(), at(SMALL, "H200")) == ()
    start, place, keep = config(**BIG), at(LARGE, "24 GB"), {"adapter", "sequence_len"}
    *others, last = [rung.estimate.verdict == "fits" for rung in make_fit(start, place)]
    assert last
    assert not any(others)
    same, kept = make_fit(start, place, only=SAME_RESULT), make_fit(start, place, keep=keep)
    assert same[-1].changes.keys() <= SAME_RESULT
    assert kept
    assert all(keep.isdisjoint(rung.changes) for rung in kept)


@pytest.mark.parametrize("saver", IN_RAM, ids=lambda saver: saver.label)
def test_what_waits_in_ram_is_counted_there_and_not_on_the_card(saver: Saver) -> None:
    plain, place = config(**QLORA), at(LARGE, "H200")
    with_it = changed(plain, {saver.keys[0]: True})
    before, after = estimate(plain, place), estimate(with_it, place)
    assert (in_use(plain), in_use(with_it)) == ((), (saver,))
    assert after.device_bytes < before.device_bytes
    assert after.host_bytes > before.host_bytes
    assert (pace_of(with_it, place) or 0) <= (pace_of(plain, place) or 0)
    assert assess(with_it, place).offloads
    assert set(saver.keys) <= SAME_RESULT


def test_a_cpu_is_offered_no_optimizer_of_a_gpu() -> None:
    rungs = make_fit(config(**BIG), at(LARGE, cpu(8)))
    assert rungs[-1].estimate.verdict == "does not fit"
    assert "optimizer" not in rungs[-1].changes


def test_a_shorter_sequence_says_how_many_rows_it_costs() -> None:
    rows = dataset(500, 300, 3000)
    whole = config(adapter="qlora", lora_r=8, sequence_len=4096, optimizer="paged_adamw_8bit")
    rungs = make_fit(whole, at(SMALL, sized(1), rows))
    costs = {rung.changes["sequence_len"]: rung.trade for rung in rungs if rung.name[0] == "s"}
    # Longest rows are 3000, 2990, 2980, ...
    assert costs[2048] == "96 longer rows are left out"
    assert costs[1024] == "198 longer rows are left out"
    assert make_fit(whole, at(SMALL, sized(1)))[-1].trade == "longer rows are left out"


CONFIGS = st.fixed_dictionaries(
    {
        "adapter": st.sampled_from(["lora", "qlora", None]),
        "lora_r": st.sampled_from([4, 8, 16, 48, 128]),
        "sequence_len": st.sampled_from([300, 512, 2048, 16_000]),
        "micro_batch_size": st.sampled_from([1, 2, 8]),
        "sample_packing": st.booleans(),
        "gradient_checkpointing": st.booleans(),
        "optimizer": st.sampled_from(["adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit"]),
    }
)
DEVICES = st.sampled_from([sized(2), sized(8), sized(23), sized(80), cpu(12)])


@settings(max_examples=60, deadline=None)
@given(CONFIGS, DEVICES, st.sampled_from([SMALL, LARGE]))
def test_every_rung_saves_and_holds_those_above_it(
    keys: dict[str, Any], device: Any, architecture: Any
) -> None:
    own = config(**keys)
    start = estimate(own, at(architecture, device))
    rungs = make_fit(own, at(architecture, device))
    assert start.verdict != "fits" or rungs == ()
    needed = start.device_bytes
    held: set[str] = set()
    for rung in rungs:
        assert rung.estimate.device_bytes < needed
        assert held <= set(rung.changes)
        needed, held = rung.estimate.device_bytes, set(rung.changes)
        made = changed(own, rung.changes)
        assert estimate(made, at(architecture, device)) == rung.estimate
        require_supported(made)
        assert rung.trade
    if rungs:
        # All are exhausted, or the last one fits.
        fits = rungs[-1].estimate.verdict == "fits"
        assert fits or make_fit(changed(own, rungs[-1].changes), at(architecture, device)) == ()


@settings(max_examples=40, deadline=None)
@given(CONFIGS)
def test_an_alternative_is_the_same_plan_with_its_changes(keys: dict[str, Any]) -> None:
    own, device = config(**keys), card("24 GB")
    others = list_alternatives(own, at(SMALL, device))
    assert {"qlora", "lora", "full"} - {own.adapter or "full"} <= {o.name for o in others}
    assert (own.adapter or "full") not in {o.name for o in others}
    for other in others:
        made = changed(own, other.changes)
        assert estimate(made, at(SMALL, device)) == other.estimate
        require_supported(made)
        assert all(getattr(made, key) == value for key, value in other.changes.items())


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_from_a_full_fine_tune_one_can_go_to_an_adapter(method: str) -> None:
    whole = config(adapter=None, lora_target_linear=False, unfrozen_parameters=["lm_head"])
    (other,) = [o for o in list_alternatives(whole, at(SMALL, "H200")) if o.name == method]
    made = changed(whole, other.changes)
    assert made.lora_target_linear
    assert made.unfrozen_parameters is None


def test_alternatives_of_a_recommendation_can_be_taken_one_after_another() -> None:
    device = card("RTX 4090")
    fixed: dict[str, object] = {}
    for name in ("full", "qlora", "full", "lora"):
        advice = recommend(at(SMALL, device), fixed=fixed)
        (other,) = [o for o in advice.alternatives if o.name == name]
        fixed |= other.changes
        assert (recommend(at(SMALL, device), fixed=fixed).config.adapter or "full") == name
