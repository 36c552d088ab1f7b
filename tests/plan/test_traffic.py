"""What ranks send and how long it takes, and the layout that is recommended for that.

`tests.research.rank_memory` counts the real collectives.
"""

from typing import Any

import pytest

from engine.hardware import speed_of
from engine.plan import changed, estimate, recommend
from engine.plan.duration import count_steps, expected_duration, pace_of, paces_of
from engine.plan.layout import Layout, layout_of
from engine.plan.step import make_step
from engine.plan.traffic import link_bytes, traffic_of
from tests.make import scaling
from tests.support.machines import at, card, config, dataset

FULL: dict[str, Any] = {"adapter": None, "bf16": True, "gradient_checkpointing": True}


@pytest.mark.slow
def test_the_page_is_what_the_plan_says() -> None:
    """`python -m tests.make.scaling` makes it anew."""
    assert scaling.PAGE.read_text("utf-8") == scaling.page()


@pytest.mark.parametrize(
    ("name", "ranks", "here", "gigabytes"),
    [
        ("NVIDIA H100 80GB HBM3", 8, 8, 450),  # NVLink
        ("NVIDIA H100 80GB HBM3", 64, 8, 400),  # eight adapters of 50 GB/s
        ("NVIDIA H100 80GB HBM3", 8, 1, 50),  # each copy in a computer of its own
        ("NVIDIA GeForce RTX 4090", 2, 2, 16),  # half the bus
        ("NVIDIA GeForce RTX 4090", 4, 2, None),  # no network that is known
    ],
)
def test_the_slower_link_counts(name: str, ranks: int, here: int, gigabytes: float | None) -> None:
    speed = speed_of(name)
    assert speed
    found = link_bytes(speed, ranks, here)
    assert found == (None if gigabytes is None else gigabytes * 1e9)


def test_copies_send_gradients_alone_and_a_sharded_copy_its_weights() -> None:
    def sent(**keys: Any) -> Any:
        run = config(**FULL, **keys)
        layout = layout_of(run)
        assert layout
        return traffic_of(make_step(run, at("ministral-3-8b", "H100 x8")), layout)

    copies, sharded = sent(dp_replicate_size=8), sent(dp_shard_size=8)
    both = sent(dp_shard_size=8, dp_replicate_size=2)
    trained = estimate(config(**FULL), at("ministral-3-8b", "H100")).trainable_parameters
    assert (copies.gathered_forward, copies.scattered) == (0, 0)
    assert copies.summed == sharded.scattered == 4 * trained
    assert sharded.gathered_forward > sharded.gathered_backward > trained
    assert (sharded.summed, both.summed) == (0, 4 * trained / 8)


def test_slower_links_cost_time() -> None:
    def share(name: str) -> float:
        run = config(**FULL, dp_shard_size=2)
        paces, alone = paces_of(run, at("ministral-3-8b", name)), config(**FULL)
        one = pace_of(alone, at("ministral-3-8b", name))
        assert paces
        assert one
        assert paces[1] <= paces[0] <= 2 * one
        return paces[0] / 2 / one

    assert share("RTX 4090 x2") < 0.7 < 0.85 < share("H100 x2")


def test_steps_and_cost_count_ranks() -> None:
    rows = dataset(1000, 500, 900)
    one, eight = config(), config(dp_replicate_size=8)
    steps = count_steps(one, rows)
    assert steps
    assert count_steps(eight, rows, 8) == pytest.approx(steps / 8, abs=1)
    place = at("ministral-3-8b", "H100 x8", rows)
    alone, together = expected_duration(one, place), expected_duration(eight, place)
    assert alone
    assert together
    assert together.steps == count_steps(eight, rows, 8)
    assert together.seconds < alone.seconds / 7
    assert together.usd == pytest.approx(alone.usd, rel=0.15)


@pytest.mark.parametrize(
    ("name", "machine", "fixed", "layout"),
    [
        ("ministral-3-8b", "H100", {}, Layout()),
        ("ministral-3-8b", "H100 80GB x8", {}, Layout(1, 8)),
        ("ministral-3-8b", "H100 80GB x8", {"adapter": None}, Layout(8)),
        ("magistral-small-2506", "8 x 8 H100", {"adapter": None}, Layout(8, 8)),
        ("mistral-medium-3.5", "8 x 8 H100", {"adapter": None}, Layout(64)),
        ("mistral-medium-3.5", "8 x 8 H100", {}, Layout(8, 8)),
        # Too large for one of 16 GB without what waits in RAM.
        ("magistral-small-2506", "RTX 5060 Ti 16GB x2", {}, Layout(2)),
        ("ministral-3-8b", "H100 x8", {"dp_shard_size": 4}, Layout(4)),
        ("ministral-3-8b", "H100 x8", {"dp_replicate_size": 1}, Layout(1, 1)),
    ],
)
def test_cards_are_laid_out(name: str, machine: str, fixed: dict[str, Any], layout: Layout) -> None:
    advice = recommend(at(name, machine), fixed=fixed)
    assert layout_of(advice.config) == layout
    assert advice.estimate.verdict == "fits"
    assert advice.estimate.cards == layout.cards
    for key in {"dp_shard_size", "dp_replicate_size"} & advice.config.file_values().keys():
        assert advice.reasons[key]


def test_few_rows_are_not_spread_over_many_copies() -> None:
    few = recommend(at("ministral-3-8b", "H100 x8", dataset(40, 300, 400)))
    many = recommend(at("ministral-3-8b", "H100 x8", dataset(40_000, 300, 400)))
    assert layout_of(few.config) == Layout()
    assert layout_of(many.config) == Layout(1, 8)


def test_a_rank_has_what_the_fullest_card_can_give() -> None:
    place = at("ministral-3-8b", card("RTX 4090 x2"))
    run = config(dp_shard_size=2)
    assert estimate(run, place).can_give_bytes == place.device.can_give_bytes
    whole = changed(run, {"dp_shard_size": 1})
    assert estimate(run, place).host_bytes > estimate(whole, place).host_bytes
