"""Which processes a computer starts for a config, and what is proposed where it cannot."""

from dataclasses import replace
from typing import Any

import pytest

from engine.errors import UserError
from engine.hardware import Machine, assume
from engine.plan.crew import Crew, crew_of
from engine.plan.layout import layout_of
from engine.units import GIB
from tests.support.machines import config

FSDP = {"fsdp_config": {"reshard_after_forward": True}}


def machine(gpus: str | None, *, cores: int = 2, used: tuple[int, ...] = ()) -> Machine:
    """A computer with these cards, of which other programs hold so many GiB each."""
    found = assume(gpus or "24 GB")
    cards = tuple(
        replace(
            gpu, memory_free_bytes=gpu.memory_free_bytes - held * GIB, memory_used_bytes=held * GIB
        )
        for gpu, held in zip(found.gpus, (*used, *[0] * len(found.gpus)), strict=False)
    )
    return replace(found, gpus=cards if gpus else (), cpu_count=cores, assumed=False)


@pytest.mark.parametrize(
    ("keys", "gpus", "count"),
    [
        ({}, "H100", 1),
        ({}, None, 1),
        ({"dp_shard_size": 2}, "H100 x4", 2),
        ({"dp_shard_size": 2, "dp_replicate_size": 2}, "H100 x4", 4),
        ({"dp_shard_size": 2}, None, 2),
        ({"dp_shard_size": 4}, None, 4),
        (FSDP, "H100 x4", 4),
        (FSDP, "24 GB", 1),
    ],
)
def test_a_rank_has_a_card_or_the_cpu(keys: dict[str, Any], gpus: str | None, count: int) -> None:
    crew = crew_of(config(**keys), machine(gpus))
    assert crew.count == count
    assert len({gpu.uuid for gpu in crew.gpus}) == (count if gpus else 0)


def test_of_the_cards_the_planned_ones_come_first() -> None:
    four = machine("H100 x4")
    uuids = [gpu.uuid for gpu in four.gpus]
    crew = crew_of(config(dp_shard_size=2), four, planned=[uuids[3], "GPU-elsewhere", uuids[1]])
    assert [gpu.uuid for gpu in crew.gpus] == [uuids[3], uuids[1]]


def test_each_of_several_computers_starts_its_share() -> None:
    asked = config(dp_shard_size=8, dp_replicate_size=2)
    assert crew_of(asked, machine("H100 x8"), 2).count == 8
    assert crew_of(config(**FSDP), machine("H100 x8"), 2).count == 8
    with pytest.raises(UserError, match="16 ranks cannot be divided over 3 computers"):
        crew_of(asked, machine("H100 x8"), 3)


@pytest.mark.parametrize(
    ("keys", "gpus", "changes"),
    [
        ({"dp_shard_size": 4}, "H100 x2", "dp_shard_size=2 gradient_accumulation_steps=2"),
        ({"dp_shard_size": 4}, "H100 x3", "dp_shard_size=2 gradient_accumulation_steps=2"),
        (
            {"dp_shard_size": 2, "dp_replicate_size": 4, "gradient_accumulation_steps": 3},
            "H100 x2",
            "dp_replicate_size=1 gradient_accumulation_steps=12",
        ),
        (
            {"dp_shard_size": 2, "tensor_parallel_size": 4},
            "H100 x4",
            "dp_shard_size=1 gradient_accumulation_steps=2",
        ),
        ({"dp_shard_size": 16}, None, "dp_shard_size=4 gradient_accumulation_steps=4"),
    ],
)
def test_too_few_cards_name_a_change(keys: dict[str, Any], gpus: str | None, changes: str) -> None:
    asked, here = config(**keys), machine(gpus)
    with pytest.raises(UserError) as caught:
        crew_of(asked, here)
    assert caught.value.exit_status == 3
    assert caught.value.fix.startswith(f"The smallest change: {changes}, behind the config")
    changed = asked.model_copy(update=dict(_numbers(changes)))
    assert crew_of(changed, here) != Crew()
    before, after = layout_of(asked), layout_of(changed)
    assert before is not None
    assert after is not None
    sums = asked.gradient_accumulation_steps
    assert changed.gradient_accumulation_steps * after.readers == sums * before.readers


def _numbers(changes: str) -> list[tuple[str, int]]:
    pairs = (each.split("=") for each in changes.split())
    return [(key, int(value)) for key, value in pairs]


def test_a_busy_card_is_named() -> None:
    with pytest.raises(UserError) as caught:
        crew_of(config(dp_shard_size=2), machine("RTX 4090 x2", used=(0, 20)))
    assert "1 GPU can be used" in caught.value.why
    assert "20.0 GiB" in caught.value.why
