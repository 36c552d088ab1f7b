"""Ranks as real processes over gloo: what they tell each other, and what each holds of a model."""

from pathlib import Path
from typing import Any

import pytest

from engine.errors import UserError
from engine.train.lora import put_on_training
from engine.train.model import load_base
from engine.train.ranks import LONE, layout, lost_rank, refuse_unbuilt
from engine.train.shard import local_bytes
from tests.support.methods import METHODS
from tests.support.rank_group import RankGroup
from tests.support.tiny import Models, settings


def test_ranks_tell_each_other(two_ranks: RankGroup) -> None:
    first, second = two_ranks.run("rank_cases:talk")
    gathered = [{"rank": 0, "longer": ""}, {"rank": 1, "longer": "x"}]
    same = {"sum": [1.0, 2.0], "max": [1.0, 1.0], "first": [0.0, 1.0], "gathered": gathered}
    assert first == same | {"of copy": [1.0, 2.0], "once": 0, "said": 0}
    assert second | {"said": 0} == same | {"of copy": [1.0, 2.0], "once": 1, "said": 0}


def test_a_lone_process_waits_for_nobody() -> None:
    assert (LONE.is_alone, LONE.is_first, LONE.gather(3)) == (True, True, [3])
    assert LONE.once_a_node("rows", lambda: 7, print) == 7
    LONE.barrier()


@pytest.mark.parametrize(
    ("keys", "world_size", "expected"),
    [
        ({}, 1, (1, 1)),
        ({}, 4, (4, 1)),
        ({"dp_replicate_size": 2}, 4, (2, 2)),
        ({"dp_shard_size": 2}, 8, (2, 4)),
        ({"dp_shard_size": 1}, 2, (1, 2)),
        ({"dp_shard_size": 2}, 1, None),
        ({"dp_shard_size": 4, "dp_replicate_size": 2}, 4, None),
        ({"dp_shard_size": 3}, 4, None),
    ],
)
def test_sizes_make_the_number_of_processes(
    keys: dict[str, Any], world_size: int, expected: tuple[int, int] | None
) -> None:
    if expected is None:
        with pytest.raises(UserError, match="processes"):
            layout(settings(**keys), world_size)
    else:
        assert layout(settings(**keys), world_size) == expected


@pytest.mark.parametrize("key", ["tensor_parallel_size", "expert_parallel_size"])
def test_what_is_not_built_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=f"{key}: 2 cannot be trained"):
        refuse_unbuilt(settings("base", **{key: 2}))
    refuse_unbuilt(settings("base", **{key: 1}))


def test_a_lost_rank_has_its_sentence() -> None:
    lost = lost_rank(RuntimeError("[../gloo/transport/tcp] Connection closed by peer [::1]:4"))
    assert lost is not None
    assert "30 minutes" in lost.what
    assert lost_rank(RuntimeError("shapes do not fit")) is None


@pytest.mark.parametrize(
    ("name", "method"),
    [("ministral3", "NF4 LoRA"), ("mistral4", "NF4 LoRA on NF4 experts"), ("mistral", "full")],
)
def test_each_of_two_ranks_holds_half(
    two_ranks: RankGroup, model_folder: Models, name: str, method: str
) -> None:
    folder, keys = model_folder(name), METHODS[method].keys
    whole = _held_by_one(folder, keys)
    for held in two_ranks.run("rank_cases:held", folder=str(folder), keys=keys):
        whole_too = {part: held.pop(part) for part in ("statistics", "buffers") if part in held}
        assert whole_too["buffers"] <= whole["buffers"]
        for part, size in held.items():
            assert size == pytest.approx(whole[part] / 2, rel=0.02), part


def _held_by_one(folder: Path, keys: dict[str, Any]) -> dict[str, int]:
    config = settings(folder, **keys)
    return local_bytes(put_on_training(load_base(folder, config), folder, config))
