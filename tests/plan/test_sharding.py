"""How many cards hold a run whose weights are sharded over them."""

from pathlib import Path

import pytest

from engine.catalog import read_architecture
from engine.config import SHARDED_OPTIMIZERS, read_config, require_supported
from engine.errors import UserError
from engine.hardware import assume
from engine.plan import Estimate, best_device, changed, estimate, make_fit, recommend
from engine.plan.memory import cards_needed, moment_parts
from engine.plan.step import cards_laid_out
from tests.support.machines import config, model, sized

FSDP = {"fsdp_version": 2, "fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}
FULL = {"adapter": None, "bf16": True, "gradient_checkpointing": True}


def needed(gibibytes: float, name: str = "magistral-small-2506") -> int | None:
    return cards_needed(config(**FULL), model(name), sized(gibibytes))


def test_the_fewest_cards_follow_their_size() -> None:
    counts = [needed(size) or 0 for size in (24, 40, 80, 160, 400)]
    assert 0 not in counts
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 1


def test_all_cards_together_hold_what_is_divided() -> None:
    run, architecture, device = config(**FULL), model("magistral-small-2506"), sized(80)
    needs = estimate(run, architecture, device)
    count = needed(80)
    assert count is not None
    assert needs.parts["linear"] + needs.parts["optimizer"] < count * 80 * 2**30


def test_a_card_too_small_for_one_layer_is_none_of_many() -> None:
    assert needed(1) is None


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
    assert cards_laid_out(config(**keys)) == count


def on_each(name: str = "magistral-small-2506", **keys: object) -> Estimate:
    return estimate(config(**FULL | FSDP | keys), model(name), sized(80))


def test_a_card_holds_its_share_and_what_is_gathered() -> None:
    whole = estimate(config(**FULL), model("magistral-small-2506"), sized(80))
    each = on_each(dp_shard_size=8)
    assert each.cards == 8
    stepping = [
        moment_parts(
            config(**FULL | keys), model("magistral-small-2506"), sized(80), "optimizer step"
        )
        for keys in ({}, FSDP | {"dp_shard_size": 8})
    ]
    for part in ("linear", "gradients", "optimizer"):
        assert stepping[1][part] == pytest.approx(stepping[0][part] / 8, abs=2)
    assert each.parts["activations"] == moment("activations") > 0
    # Two layers of forty, and the embedding with the head, which stay gathered.
    assert each.parts["gathered"] > whole.parts["embeddings"] + whole.parts["linear"] * 2 // 40


def moment(part: str) -> int:
    found = moment_parts(config(**FULL), model("magistral-small-2506"), sized(80), "backward pass")
    return found[part]


def test_more_copies_change_nothing_on_a_card() -> None:
    plain, copies = (
        on_each(dp_shard_size=8, dp_replicate_size=copies).parts for copies in (None, 4)
    )
    assert plain == copies


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
    architecture = read_architecture(given.base_model)
    for name in ("T4 x4", "RTX 4090 x2", "A100 80GB x8", "H100 x8", "H200 x8", "B200 x8"):
        device = best_device(assume(name))
        for optimizer in ("adamw_torch", "adamw_torch_fused", "adamw_torch_8bit"):
            run = changed(given, {"optimizer": optimizer})
            for rung in make_fit(run, architecture, device):
                assert rung.changes.get("optimizer") not in SHARDED_OPTIMIZERS, (name, rung.name)


def test_none_is_recommended_beside_fsdp() -> None:
    fixed = {"adapter": None, "fsdp_config": {"reshard_after_forward": True}}
    for name in ("24 GB", "H100 x8"):
        advice = recommend(model("ministral-3-8b"), best_device(assume(name)), fixed=fixed)
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
        cards_needed(config(optimizer=name, **FULL), model("magistral-small-2506"), sized(40))
        for name in ("adamw_torch_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
    }
    assert len(counts) == 1
