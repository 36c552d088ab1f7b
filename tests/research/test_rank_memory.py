"""The plan of one rank, part by part, against the real model really sharded by the trainer."""

from typing import Any

import pytest

from tests.research.rank_memory import METHODS, SMALL_4, compare
from tests.support.machines import model


@pytest.mark.slow
@pytest.mark.parametrize("shards", [8, 64])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name", ["ministral-3-8b", "magistral-small-2506", "mistral-small-4", "mistral-medium-3.5"]
)
def test_a_rank_of_the_whole_model_holds_what_is_planned(
    name: str, method: str, shards: int
) -> None:
    compare(model(name), method, shards, **SMALL_4[method] if name == "mistral-small-4" else {})


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_rank_with_experts_of_its_own_holds_and_sends_what_is_planned(method: str) -> None:
    keys = SMALL_4[method] | {"expert_parallel_size": 8}
    compare(model("mistral-small-4"), method, 8, **keys)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "layout", "keys"),
    [
        ("magistral-small-2506", "lora", (8, 1), {"gradient_accumulation_steps": 2}),
        ("ministral-3-8b", "full", (8, 8), {}),
        ("ministral-3-3b", "full", (8, 1), {}),
        ("mistral-medium-3.5", "lora", (64, 1), {"processor_type": "AutoProcessor"}),
    ],
    ids=["added up once", "replicas", "tied", "images"],
)
def test_so_it_does(name: str, method: str, layout: tuple[int, int], keys: dict[str, Any]) -> None:
    compare(model(name), method, *layout, **keys)
