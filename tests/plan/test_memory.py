"""The estimate against published figures, its verdicts, and what must hold for any config."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.catalog import read_architecture
from engine.config import SHARDED_OPTIMIZERS, read_config, require_supported
from engine.errors import UserError
from engine.hardware import assume
from engine.plan import (
    Device,
    Estimate,
    Place,
    Statistics,
    best_device,
    changed,
    estimate,
    make_fit,
    recommend,
)
from engine.plan.layers import kept_bytes, widths
from engine.plan.layout import layout_of
from engine.plan.memory import cards_needed, compare_peer, moment_parts
from engine.plan.step import AXOLOTL as AXOLOTL_STACK
from engine.plan.step import DIFFERENCES, WINDTUNNEL, Stack
from engine.plan.verdict import TIGHT_BYTES, judge
from engine.units import GIB
from tests.research.published import (
    LARGEST_MEAN_ERROR,
    LEAST_INSIDE,
    mean_error,
    mistral_rows,
    read_rows,
    share_inside,
)
from tests.research.published import main as published
from tests.support.machines import at, card, config, cpu, dataset, model, sized

SMALL, DENSE, H200 = "ministral-3-3b", "magistral-small-2506", card("H200")
AXOLOTL: dict[str, Any] = {
    "adapter": "qlora",
    "lora_r": 32,
    "sequence_len": 2048,
    "micro_batch_size": 2,
    "sample_packing": True,
    "gradient_checkpointing": True,
    "optimizer": "adamw_bnb_8bit",
    "attn_implementation": "flash_attention_2",
}
SMALL_4: dict[str, Any] = {
    "micro_batch_size": 1,
    "quantize_moe_experts": True,
    "lora_target_modules": ["o_proj"],
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IMAGES = {"sample_packing": False, "sequence_len": 1500, "processor_type": "AutoProcessor"}


def needs(device: Device = H200, rows: Statistics | None = None, **keys: Any) -> Estimate:
    """Of the 3B model."""
    return estimate(config(**keys), at(SMALL, device, rows))


def test_published_peaks_lie_in_the_range_and_close() -> None:
    """`python -m tests.research.published` prints the table that this is about."""
    assert mean_error(mistral_rows()) <= LARGEST_MEAN_ERROR
    assert share_inside() >= LEAST_INSIDE
    assert published() == 0


@pytest.mark.parametrize(
    ("name", "keys", "largest"),
    [
        ("mistral-small-4", SMALL_4, "a layer's experts in 16 bits at once"),
        (
            "mistral-small-4",
            SMALL_4 | {"lora_target_parameters": EXPERTS},
            "the update of a layer's experts formed whole",
        ),
        ("mistral-medium-3.5", IMAGES, "the vision tower"),
        ("ministral-3-8b", {"adapter": None}, "what bfloat16 weights keep beside them"),
    ],
)
def test_a_peer_is_counted_as_it_is_built_and_the_difference_has_a_name(
    name: str, keys: dict[str, Any], largest: str
) -> None:
    run, place = config(**AXOLOTL | keys), at(name, H200)
    peer = compare_peer(AXOLOTL_STACK, run, place)
    ours, theirs = (
        estimate(run, place, stack=stack).peak_allocated_bytes
        for stack in (WINDTUNNEL, AXOLOTL_STACK)
    )
    assert peer.peak_allocated_bytes == theirs
    assert sum(peer.differences.values()) == theirs - ours
    assert max(peer.differences, key=lambda each: abs(peer.differences[each])) == largest


def test_every_way_in_which_a_stack_can_differ_has_words() -> None:
    assert set(DIFFERENCES) == {field.name for field in fields(Stack)} - {"name"}


def test_the_table_fails_where_the_formula_gets_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.plan.step.PACKED_BYTES", 0.6)
    read_rows.cache_clear()
    try:
        assert published() == 1
    finally:
        read_rows.cache_clear()


@pytest.mark.parametrize("adapted", [False, True])
def test_packed_experts_add_one_matrix_and_no_whole_tensor(adapted: bool) -> None:
    """A layer of Small 4 has 6 GiB of experts in bfloat16, one matrix of an expert 32 MiB."""
    keys = AXOLOTL | SMALL_4 | {"lora_r": 8, "sequence_len": 256}
    keys |= {"lora_target_parameters": EXPERTS} if adapted else {}
    parts = estimate(config(**keys), at("mistral-small-4", H200)).parts
    assert 32 * 2**20 < parts["layer"] < GIB // 2


def test_experts_that_stay_whole_are_held_once_and_trained_ones_have_a_whole_gradient() -> None:
    place = at("mistral-small-4", H200)
    table = place.table
    frozen, moving = (
        moment_parts(config(adapter=adapter, sequence_len=256), place, "backward pass")
        for adapter in ("lora", None)
    )
    stack = max(p.count for p in table.parameters if p.group == "experts")
    assert frozen["experts"] == 2 * table.counts_by_group()["experts"]
    assert frozen["layer"] < 2 * stack <= moving["layer"]


def test_without_checkpointing_every_layer_keeps_its_routed_rows() -> None:
    keys = AXOLOTL | SMALL_4 | {"gradient_checkpointing": False}
    place = at("mistral-small-4", H200)
    found, sizes = estimate(config(**keys), place), widths(place.table)
    dense = sizes.layers * kept_bytes(config(**keys), sizes, found.tokens_at_once, 2, flash=True)
    assert found.parts["activations"] == dense + 36 * 4 * found.tokens_at_once * 4096 * 2


@pytest.mark.parametrize(
    ("spare", "verdict"),
    [
        (-1, "does not fit"),
        (0, "tight"),
        (TIGHT_BYTES - 1, "tight"),
        (TIGHT_BYTES, "fits"),
        (10 * TIGHT_BYTES, "fits"),
    ],
)
def test_the_verdict_follows_from_what_is_to_spare(spare: int, verdict: str) -> None:
    assert judge(8 * GIB, 8 * GIB + spare) == verdict


def test_a_card_holds_more_than_the_tensors_and_a_cpus_memory_is_the_computers() -> None:
    found, here = needs(sized(12)), needs(cpu(64))
    assert found.spare_bytes == 12 * GIB - found.device_bytes
    assert found.verdict == judge(found.device_bytes, 12 * GIB)
    assert found.can_give_bytes == 12 * GIB
    assert found.device_bytes == int(found.peak_allocated_bytes * 1.03) + int(0.55 * GIB)
    assert here.host_bytes == here.device_bytes > here.peak_allocated_bytes


def test_packed_rows_need_a_mask_unless_they_are_cut_apart() -> None:
    def parts(backend: str | None, packed: bool = True, **keys: Any) -> Mapping[str, int]:
        keys |= {"sample_packing": packed, "attn_implementation": backend}
        return needs(sequence_len=4096, **keys).parts

    torch, flash = parts("sdpa"), parts("flash_attention_2")
    assert torch["mask"] == 26 * 2 * 4096**2  # a copy in bfloat16 for every layer
    computed = parts("sdpa", gradient_checkpointing=True)["mask"]
    assert computed == (1 + 2) * 4096**2  # the one for all, and that of the layer at work
    for others in (flash, parts(None), parts("sdpa", packed=False)):
        assert "mask" not in others
    # Under a mask keys and values are repeated for every head of the queries, and kept so.
    assert torch["activations"] > 1.1 * flash["activations"]


def test_a_batch_beyond_the_rows_needs_no_smaller_mask() -> None:
    keys: dict[str, Any] = {
        "sample_packing": True,
        "sequence_len": 300,
        "attn_implementation": "sdpa",
    }
    # By the kernel, or the loss is the fullest moment.
    keys |= {"gradient_checkpointing": True, "cut_cross_entropy": True}
    masks = [
        needs(rows=dataset(20, 60, 200), micro_batch_size=size, **keys).parts["mask"]
        for size in (2, 4, 80)
    ]
    assert masks == [3 * 600 * 300, 3 * 1200 * 300, 3 * 1200 * 300]


def test_rows_that_learn_little_take_as_few_logits() -> None:
    rows = dataset(100, 50, 100)

    def loss(rows: Statistics, **keys: Any) -> float:
        settings = config(sequence_len=1024, **keys)
        return estimate(settings, at("demo-tiny", cpu(), rows)).moments["loss"]

    few = replace(rows, most_learned_tokens=10)
    width, vocabulary = 128, 131072
    # State, gradient, product and the target's row of the head; logits, which become slopes.
    spared = 4 * 4 * width + 4 * vocabulary
    assert loss(rows) - loss(few) == 90 * spared
    for keys in ({"sample_packing": True}, {"train_on_inputs": True}):  # all may be learned
        assert loss(rows, **keys) == loss(few, **keys)


def test_rows_that_are_known_to_be_short_need_less() -> None:
    rows = dataset(100, 300, 700)
    unknown, known = needs(sequence_len=8192), needs(rows=rows, sequence_len=8192)
    assert (unknown.tokens_at_once, known.tokens_at_once) == (8192, 700)
    assert known.peak_allocated_bytes < unknown.peak_allocated_bytes
    packed: dict[str, Any] = {"sequence_len": 8192, "sample_packing": True}
    assert needs(rows=rows, **packed).tokens_at_once
    assert needs(rows=dataset(2, 300, 700), **packed).tokens_at_once == 600


@pytest.mark.parametrize(("name", "width"), [("T4", 4), ("RTX 4090", 2), ("CPU", 4)])
def test_bf16_auto_is_float32_where_bfloat16_would_be_emulated(name: str, width: int) -> None:
    place = at("magistral-small-2507", cpu() if name == "CPU" else name)
    counts = place.table.counts_by_group()
    parts = estimate(config(bf16="auto"), place).parts
    assert parts["embeddings"] == width * (counts["embedding"] + counts["head"])


def test_a_paged_optimizer_makes_room_on_the_card_and_takes_it_here() -> None:
    plain, small, paged = (
        needs(optimizer=name)
        for name in ("adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit")
    )
    trained = plain.trainable_parameters
    assert plain.parts["optimizer"] == 8 * trained
    assert small.parts["optimizer"] == int((2 + 8 / 256) * trained)
    assert "optimizer" not in paged.parts


def test_the_disk_holds_download_checkpoints_and_result() -> None:
    one, two, three = (needs(save_total_limit=limit).disk_bytes for limit in (1, 2, 3))
    assert three - two == two - one > 0
    assert one > 2 * model(SMALL).table.total_parameters
    assert estimate(config(), at("demo-tiny", H200)).disk_bytes < 10**8


RANDOM = {
    "adapter": st.sampled_from(["lora", "qlora", None]),
    "lora_r": st.integers(1, 256),
    "lora_dropout": st.sampled_from([0.0, 0.05]),
    "sequence_len": st.integers(1, 32_768),
    "micro_batch_size": st.integers(1, 16),
    "sample_packing": st.booleans(),
    "gradient_checkpointing": st.booleans(),
    "bf16": st.sampled_from(["auto", True, False]),
    "optimizer": st.sampled_from(
        ["adamw_torch_fused", "adamw_torch", "adamw_bnb_8bit", "paged_adamw_8bit"]
    ),
    "attn_implementation": st.sampled_from([None, "sdpa", "flash_attention_2"]),
}
MODELS = st.sampled_from(
    ["demo-tiny", "ministral-3-3b", "magistral-small-2507", "mistral-medium-3.5"]
)
DEVICES = st.sampled_from([card("T4"), card("RTX 4090"), H200, cpu(32)])
ROWS = st.sampled_from([None, dataset(20, 60, 200), dataset(5000, 900, 40_000)])


def planned(keys: dict[str, Any], name: str, *rest: Any) -> Estimate:
    return estimate(config(**keys), at(name, *rest))


@settings(max_examples=100, deadline=None)
@given(st.fixed_dictionaries(RANDOM), MODELS, DEVICES, ROWS)
def test_the_parts_add_up_and_the_range_holds_the_peak(
    keys: dict[str, Any], name: str, device: Any, rows: Any
) -> None:
    found = planned(keys, name, device, rows)
    assert sum(found.parts.values()) == found.peak_allocated_bytes
    assert all(size > 0 for size in found.parts.values())
    low, high = found.range_bytes
    assert low < found.peak_allocated_bytes < high
    assert found.peak_allocated_bytes < found.device_bytes
    assert found.verdict == judge(found.device_bytes, device.can_give_bytes)
    assert 0 < found.trainable_parameters <= found.total_parameters or keys["lora_r"] > 64
    assert min(found.host_bytes, found.disk_bytes) > 0


@settings(max_examples=100, deadline=None)
@given(
    st.fixed_dictionaries(RANDOM),
    MODELS,
    DEVICES,
    ROWS,
    st.sampled_from(["lora_r", "sequence_len", "micro_batch_size"]),
    st.integers(1, 4096),
)
def test_more_never_needs_less(
    keys: dict[str, Any], name: str, device: Any, rows: Any, key: str, more: int
) -> None:
    less = planned(keys, name, device, rows)
    found = planned(keys | {key: keys[key] + more}, name, device, rows)
    assert found.device_bytes >= less.device_bytes
    assert found.host_bytes >= less.host_bytes
    assert found.disk_bytes >= less.disk_bytes


@settings(max_examples=100, deadline=None)
@given(st.fixed_dictionaries(RANDOM), MODELS, DEVICES, ROWS)
def test_qlora_never_needs_more_than_lora(
    keys: dict[str, Any], name: str, device: Any, rows: Any
) -> None:
    whole = planned(keys | {"adapter": "lora"}, name, device, rows)
    packed = planned(keys | {"adapter": "qlora"}, name, device, rows)
    assert packed.device_bytes <= whole.device_bytes
    assert packed.trainable_parameters == whole.trainable_parameters


def test_where_there_is_no_memory_beside_the_devices_nothing_is_paged_out() -> None:
    """bitsandbytes keeps the state in RAM itself on a CPU, and RAM is what a unified card has."""
    for device in (cpu(), replace(card("24 GB"), unified=True)):
        names = ("paged_adamw_8bit", "adamw_bnb_8bit")
        paged, plain = (needs(device, optimizer=name) for name in names)
        assert paged.parts["optimizer"] == plain.parts["optimizer"] > 0


def test_float32_on_a_card_keeps_keys_and_values_for_every_head() -> None:
    """A CPU has a kernel for grouped heads, a card has none in float32."""
    keys = {"bf16": False, "gradient_checkpointing": False, "sample_packing": False}
    run = config(**keys, sequence_len=1024)
    parts = [moment_parts(run, at(SMALL, device), "backward pass") for device in ("T4", cpu())]
    kept = [each["activations"] for each in parts]
    layers, heads = 26, 32 * 128
    assert kept[0] - kept[1] == layers * 1024 * 2 * heads * 4


FSDP = {"fsdp_version": 2, "fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}
FULL = {"adapter": None, "bf16": True, "gradient_checkpointing": True}


def needed(gibibytes: float) -> int | None:
    return cards_needed(config(**FULL), at(DENSE, sized(gibibytes)))


def test_the_fewest_cards_follow_their_size() -> None:
    counts = [needed(size) or 0 for size in (24, 40, 80, 160, 400)]
    assert 0 not in counts
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 1


def test_all_cards_together_hold_what_is_divided() -> None:
    parts = estimate(config(**FULL), at(DENSE, sized(80))).parts
    assert parts["linear"] + parts["optimizer"] < (needed(80) or 0) * 80 * 2**30
    assert needed(1) is None, "too small for one layer"


@pytest.mark.parametrize(
    ("keys", "count"),
    [
        ({}, 1),
        (FSDP, None),
        (FSDP | {"dp_shard_size": 8}, 8),
        (FSDP | {"dp_shard_size": 8, "dp_replicate_size": 2}, 16),
        ({"deepspeed": "zero3.json"}, None),
    ],
)
def test_a_config_says_how_many_cards_it_is_for(keys: dict[str, object], count: int | None) -> None:
    found = layout_of(config(**keys))
    assert (found and found.cards) == count


def on_each(name: str = DENSE, **keys: object) -> Estimate:
    return estimate(config(**FULL | FSDP | keys), at(name, sized(80)))


def test_a_card_holds_its_share_and_what_is_gathered() -> None:
    def parts(moment: str, **keys: Any) -> dict[str, int]:
        return moment_parts(config(**FULL | keys), at(DENSE, sized(80)), moment)

    whole = estimate(config(**FULL), at(DENSE, sized(80)))
    each = on_each(dp_shard_size=8)
    assert each.cards == 8
    alone, shared = parts("optimizer step"), parts("optimizer step", **FSDP, dp_shard_size=8)
    for part in ("linear", "gradients", "optimizer"):
        assert shared[part] == pytest.approx(alone[part] / 8, abs=2)
    assert each.parts["activations"] == parts("backward pass")["activations"] > 0
    # Two layers of forty; the embedding and the head come and go for themselves.
    two = (whole.parts["linear"] + whole.parts["norms"]) * 2 / 40
    assert parts("backward pass", **FSDP, dp_shard_size=8)["gathered"] == pytest.approx(two)


def test_more_copies_take_what_they_have_to_add_up_and_nothing_else() -> None:
    plain, copies = (
        moment_parts(
            config(**FULL | FSDP, dp_shard_size=8, dp_replicate_size=copies),
            at(DENSE, sized(80)),
            "backward pass",
        )
        for copies in (None, 4)
    )
    trained = model(DENSE).table.total_parameters
    assert 0 < copies["reduced"] - plain["reduced"] <= 4 * trained / 8
    assert {**copies, "reduced": 0} == {**plain, "reduced": 0}


def test_experts_that_are_spread_are_never_gathered() -> None:
    gathered, spread = (
        on_each("mistral-small-4", dp_shard_size=32, expert_parallel_size=size).parts
        for size in (None, 32)
    )
    assert gathered["experts"] == spread["experts"]
    assert gathered["gathered"] - spread["gathered"] > 8 * 2**30


RECIPES = sorted(
    path
    for path in (Path(__file__).parents[2] / "presets" / "recipes").glob("*/*.yml")
    if "fsdp_config" in path.read_text("utf-8")
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_sharded_plan_gets_an_optimizer_that_cannot_be_sharded(path: Path) -> None:
    """On machines with several cards of each size, whichever optimizer the config begins with."""
    given = read_config(path).config
    for name in ("T4 x4", "RTX 4090 x2", "A100 80GB x8", "H100 x8", "H200 x8", "B200 x8"):
        place = Place(read_architecture(given.base_model), best_device(assume(name)))
        for optimizer in ("adamw_torch", "adamw_torch_fused", "adamw_torch_8bit"):
            run = changed(given, {"optimizer": optimizer})
            for rung in make_fit(run, place):
                assert rung.changes.get("optimizer") not in SHARDED_OPTIMIZERS, (name, rung.name)


def test_none_is_recommended_beside_fsdp() -> None:
    fixed = {"adapter": None, "fsdp_config": {"reshard_after_forward": True}}
    for name in ("24 GB", "H100 x8"):
        advice = recommend(at("ministral-3-8b", best_device(assume(name))), fixed=fixed)
        assert advice.config.optimizer not in SHARDED_OPTIMIZERS
        require_supported(advice.config, sharded=True)


@pytest.mark.parametrize("optimizer", SHARDED_OPTIMIZERS)
def test_a_config_with_one_is_refused(optimizer: str) -> None:
    with pytest.raises(UserError, match=f"Write optimizer: {SHARDED_OPTIMIZERS[optimizer]}"):
        require_supported(config(optimizer=optimizer, **FSDP), sharded=True)
    require_supported(config(optimizer=optimizer))


def test_cards_are_counted_with_one_that_can_be_sharded() -> None:
    """A paged state would take no room on any of them."""
    counts = {
        cards_needed(config(optimizer=name, **FULL), at(DENSE, sized(40)))
        for name in ("adamw_torch_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
    }
    assert len(counts) == 1
