"""Which cards a run uses together, and how its config lays it over them."""

import re
from dataclasses import replace
from typing import Any

import pytest

from engine.catalog import read_architecture
from engine.errors import UserError
from engine.hardware import assume
from engine.plan import best_device, gpu_device
from engine.plan.device import devices_document
from engine.plan.layout import Layout, is_sharded, layout_of, layout_on, refuse_spread
from engine.units import GIB
from tests.support.machines import card, config

FSDP = {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}


@pytest.mark.parametrize(
    ("keys", "layout", "cards", "readers"),
    [
        ({}, Layout(), 1, 1),
        ({"dp_shard_size": 2}, Layout(2), 2, 2),
        (FSDP | {"dp_shard_size": 8, "dp_replicate_size": 4}, Layout(8, 4), 32, 32),
        ({"dp_replicate_size": 4}, Layout(1, 4), 4, 4),
        ({"dp_shard_size": 4, "tensor_parallel_size": 2}, Layout(4, 1, 2), 8, 4),
        ({"dp_shard_size": 8, "expert_parallel_size": 8}, Layout(8, expert=8), 8, 8),
    ],
)
def test_a_config_has_layout(
    keys: dict[str, Any], layout: Layout, cards: int, readers: int
) -> None:
    found = layout_of(config(**keys))
    assert found == layout
    assert (found.cards, found.readers) == (cards, readers)
    assert is_sharded(config(**keys)) == (layout.shard > 1)


def test_a_sharded_config_without_a_number_takes_all_cards() -> None:
    run = config(**FSDP, tensor_parallel_size=2)
    assert is_sharded(run)
    assert layout_of(run) is None
    assert layout_on(run, card("8 x 8 H100")) == Layout(32, 1, 2)
    assert layout_on(run, card("H100")) == Layout(1, 1, 2)


@pytest.mark.parametrize(
    ("model", "shard", "expert", "fix"),
    [
        ("ministral-3-8b", 2, 2, "Remove it"),
        ("mistral-small-4", 8, 3, "dp_shard_size: 8 and expert_parallel_size: 2"),
        ("mistral-small-4", 24, 8, "dp_shard_size: 16 and expert_parallel_size: 8"),
        ("mistral-small-4", 1, 2, "dp_shard_size: 2 and expert_parallel_size: 2"),
        ("mistral-small-4", 2, 4, "dp_shard_size: 2 and expert_parallel_size: 2"),
    ],
)
def test_experts_that_cannot_be_spread_are_refused_with_sizes_that_can(
    model: str, shard: int, expert: int, fix: str
) -> None:
    table = read_architecture(model).table
    with pytest.raises(UserError) as refused:
        refuse_spread(Layout(shard, expert=expert), table)
    assert fix in refused.value.fix
    if written := re.findall(r"_size: (\d+)", refused.value.fix):
        refuse_spread(Layout(int(written[0]), expert=int(written[1])), table)


def test_a_card_that_others_use_is_left_out_with_the_reason() -> None:
    machine = assume("RTX 4090 x4")
    used = (0, 2, 20, 1)
    gpus = tuple(
        replace(
            gpu,
            memory_used_bytes=size * GIB,
            memory_free_bytes=(gpu.memory_total_bytes or 0) - size * GIB,
        )
        for gpu, size in zip(machine.gpus, used, strict=True)
    )
    device = best_device(replace(machine, gpus=gpus, assumed=False))
    assert [each.uuid for each in (device, *device.others)] == [gpus[i].uuid for i in (0, 3, 1)]
    assert device.count == device.cards == 3
    assert device.left_out == ("GPU 2, 20.0 GiB in use",)
    # A rank of three gets no more than the fullest of them can give.
    assert device.among(2).can_give_bytes == device.others[0].can_give_bytes
    assert device.among(3).can_give_bytes == device.others[1].can_give_bytes
    chosen = gpu_device(gpus[2], replace(machine, gpus=gpus))
    assert len(chosen.others) == 3, "a busy card that a person chose has all others beside it"


def test_a_plan_names_every_card_of_one_computer() -> None:
    device = card("2 x 4 x H100")
    one, four, eight = (devices_document(device, cards) for cards in (1, 4, 8))
    assert "devices" not in one
    assert one["device"] == four["device"] == eight["devices"][0]
    assert (len(four["devices"]), four["nodes"]) == (4, 1)
    assert (len(eight["devices"]), eight["nodes"]) == (4, 2)
