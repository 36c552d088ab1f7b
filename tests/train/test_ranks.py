"""Ranks as real processes over gloo: what they tell each other, and what each holds of a model."""

from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UserError
from engine.train.lora import put_on_training
from engine.train.model import load_base
from engine.train.ranks import LONE, lost_rank, refuse_unbuilt, require_started
from engine.train.shard import local_bytes
from tests.support.methods import METHODS
from tests.support.rank_cases import figures, started
from tests.support.rank_group import RankGroup
from tests.support.tiny import ARCHITECTURES, Models, settings, write_model


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
        ({}, 4, None),
        ({"fsdp_config": {}}, 4, (4, 1)),
        ({"fsdp_config": {}, "dp_replicate_size": 2}, 4, (2, 2)),
        ({"dp_replicate_size": 2}, 2, (1, 2)),
        ({"dp_shard_size": 2, "dp_replicate_size": 4}, 8, (2, 4)),
        ({"dp_shard_size": 2}, 8, None),
        ({"dp_shard_size": 2}, 1, None),
        ({"dp_shard_size": 4, "dp_replicate_size": 2}, 4, None),
        ({"dp_shard_size": 3}, 4, None),
    ],
)
def test_sizes_make_the_number_of_ranks(
    keys: dict[str, Any], world_size: int, expected: tuple[int, int] | None
) -> None:
    if expected is None:
        with pytest.raises(UserError, match=f"and {world_size} started"):
            require_started(settings(**keys), world_size)
    else:
        found = require_started(settings(**keys), world_size)
        assert (found.shard, found.replicate) == expected


def test_what_is_not_built_is_refused() -> None:
    with pytest.raises(UserError, match="tensor_parallel_size: 2 cannot be trained"):
        refuse_unbuilt(settings("base", tensor_parallel_size=2))
    refuse_unbuilt(settings("base", tensor_parallel_size=1))


def test_a_lost_rank_has_its_sentence() -> None:
    lost = lost_rank(RuntimeError("[../gloo/transport/tcp] Connection closed by peer [::1]:4"))
    assert lost is not None
    assert "30 minutes" in lost.what
    assert lost_rank(RuntimeError("shapes do not fit")) is None


def test_the_rank_that_failed_is_the_reason_and_not_one_that_waited(two_ranks: RankGroup) -> None:
    assert two_ranks.run("rank_cases:told") == [False, True]


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


SPREAD_BY_TWO = {"expert_parallel_size": 2}
SPREAD = {
    "full": METHODS["full"].keys,
    "LoRA": METHODS["LoRA"].keys,
    "LoRA on experts": METHODS["LoRA on experts"].keys,
    "NF4 LoRA": METHODS["NF4 LoRA"].keys,
    # In float32: an expert's gradient in bfloat16 is rounded once for the rows of both ranks.
    "NF4 experts": METHODS["NF4 LoRA on NF4 experts"].keys | {"bf16": False},
}
"""Ways to train whose experts are spread."""


def assert_spread(
    group: RankGroup, home: Path, folder: Path, keys: dict[str, Any], **case: Any
) -> None:
    """The losses of one rank's own experts, in each layer with the rows of all ranks sent twice,
    their gradients as often, and how many they are once."""
    given = keys | SPREAD_BY_TWO | {"learning_rate": 2e-4}
    one, many = learn_both_ways(group, home, folder, given, rows="uneven", **case)
    assert_equal(one, many, 1e-3 if "load_in_4bit" in keys and keys["bf16"] else 1e-5)
    layers, passes = 2, case.get("micros", 4) // group.count * case["steps"]
    assert {each["collectives"]["alltoall_base"] for each in many} == {5 * layers * passes}


def test_experts_that_are_spread_learn_as_on_one_rank(
    two_ranks: RankGroup, model_folder: Models, tmp_path: Path
) -> None:
    assert_spread(two_ranks, tmp_path, model_folder("mistral4"), SPREAD["full"], steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("method", SPREAD)
@pytest.mark.parametrize(
    ("ranks", "shards", "micros"),
    [("two_ranks", 2, 4), ("four_ranks", 4, 8), ("four_ranks", 2, 4)],
    ids=["two parts", "two parts of two ranks", "two parts in two copies"],
)
def test_twenty_steps_with_spread_experts_are_those_of_one_rank(
    request: pytest.FixtureRequest,
    model_folder: Models,
    tmp_path: Path,
    ranks: str,
    shards: int,
    micros: int,
    method: str,
) -> None:
    group, folder = request.getfixturevalue(ranks), model_folder("mistral4")
    case = {"micros": micros, "steps": 20, "shards": shards}
    assert_spread(group, tmp_path, folder, SPREAD[method], **case)


def _held_by_one(folder: Path, keys: dict[str, Any]) -> dict[str, int]:
    config = settings(folder, **keys)
    return local_bytes(put_on_training(load_base(folder, config), folder, config))


def learn_both_ways(
    group: RankGroup, home: Path, folder: Path, keys: dict[str, Any], micros: int = 4, **case: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures of one rank that accumulates, and those of each that shares its work."""
    keys = {"micro_batch_size": 1, "learning_rate": 1e-3, "warmup_steps": 1} | keys
    keys |= {"max_steps": case["steps"], "gradient_accumulation_steps": micros}
    alone = keys | {"expert_parallel_size": None}
    one = {"home": str(home), "folder": str(folder), "keys": alone} | case
    keys = keys | {"gradient_accumulation_steps": micros // group.count}
    return figures(started(**one), case["steps"]), group.run(
        "rank_cases:learn", **one | {"keys": keys}
    )


def assert_equal(one: dict[str, Any], many: list[dict[str, Any]], tolerance: float) -> None:
    """The same rows in each step, and the same losses and norms on every rank."""
    for figure in ("losses", "norms"):
        assert all(each[figure] == many[0][figure] for each in many)
        assert many[0][figure] == pytest.approx(one[figure], rel=tolerance)
    assert [tuple(tokens) for tokens in many[0]["tokens"]] == one["tokens"]
    for step, rows in enumerate(one["rows"]):
        assert sorted(chain(*(each["rows"][step] for each in many))) == sorted(rows)


BOTH_WAYS = {
    "full": ("mistral", "full", "uneven", {}),
    "layers computed twice": ("ministral3", "full", "uneven", {"gradient_checkpointing": True}),
    "LoRA": ("ministral3", "LoRA", "uneven", {}),
    "LoRA in bfloat16": (
        "mistral",
        "LoRA bfloat16",
        "uneven",
        {"peft_autocast_adapter_dtype": False},
    ),
    "packed": ("ministral3", "LoRA", "uneven", {"sample_packing": True, "sequence_len": 64}),
    "NF4": ("ministral3", "NF4 LoRA", "uneven", {}),
    "int8": ("mistral4", "int8 LoRA", "uneven", {}),
    "experts": ("mistral4", "full", "uneven", {}),
    "adapters of experts": ("mistral4", "LoRA on experts", "uneven", {}),
    "NF4 experts": ("mistral4", "NF4 LoRA on NF4 experts", "uneven", {}),
    "images": ("mistral4", "LoRA", "mixed", {}),
    "images in NF4": ("mistral", "NF4 LoRA", "mixed", {}),
    "tower and projector": ("ministral3", "full", "mixed", {"unfrozen_parameters": [r".*"]}),
    "tower alone": ("mistral", "full", "mixed", {"unfrozen_parameters": [r"model\.vision_tower"]}),
    "balance": (
        "mistral4",
        "full",
        "uneven",
        {"overrides_of_model_config": {"output_router_logits": True}},
    ),
}
"""Architecture, method, rows and keys of runs that two ranks share."""
RARE = {"layers computed twice", "LoRA in bfloat16", "int8", "images in NF4", "tower alone"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in RARE)) for name in BOTH_WAYS],
)
def test_two_ranks_learn_what_one_learns(
    two_ranks: RankGroup,
    model_folder: Models,
    seeing_model: Models,
    tmp_path: Path,
    name: str,
) -> None:
    architecture, method, rows, keys = BOTH_WAYS[name]
    folder = (seeing_model if rows == "mixed" else model_folder)(architecture)
    keys = METHODS[method].keys | keys
    one, many = learn_both_ways(two_ranks, tmp_path, folder, keys, rows=rows, steps=6)
    rounded = "peft_autocast_adapter_dtype" in keys  # at random, and not by the same numbers
    assert_equal(one, many, 1e-2 if rounded else 1e-3 if "bf16" in keys else 1e-5)


@pytest.mark.parametrize("micros", [2, 4], ids=["at once", "one by one"])
@pytest.mark.parametrize("shards", [2, 1], ids=["sharded", "copies"])
def test_a_tied_pair_learns_as_on_one_rank(
    two_ranks: RankGroup, tmp_path: Path, shards: int, micros: int
) -> None:
    """One matrix whose gradient comes from two places, as in Ministral 3 3B."""
    tied = ARCHITECTURES["ministral3"] | {"tie_word_embeddings": True}
    folder = write_model(tmp_path / "tied", tied)
    case: dict[str, Any] = {"rows": "uneven", "steps": 6, "shards": shards}
    one, many = learn_both_ways(two_ranks, tmp_path, folder, METHODS["full"].keys, micros, **case)
    assert_equal(one, many, 1e-5)


@pytest.mark.parametrize(
    ("shards", "collectives"),
    [(2, {"reduce_scatter_base": 2 * 3}), (1, {"allreduce": (1 + 1 + 2) * 3})],
)
def test_gradients_are_added_up_once_a_step(
    two_ranks: RankGroup, ministral: Path, tmp_path: Path, shards: int, collectives: dict[str, int]
) -> None:
    """In three steps of two micro-batches: those of two layers, or of all replicas together beside
    which of them have any, the loss, and the figures."""
    keys = METHODS["LoRA"].keys
    case: dict[str, Any] = {"rows": "uneven", "steps": 3, "shards": shards}
    one, many = learn_both_ways(two_ranks, tmp_path, ministral, keys, **case)
    assert_equal(one, many, 1e-5)
    assert many[0]["collectives"].items() >= collectives.items()


def test_copies_stay_one_model_where_weights_are_rounded_at_random(
    two_ranks: RankGroup, model_folder: Models, tmp_path: Path
) -> None:
    keys = METHODS["LoRA bfloat16"].keys | {"peft_autocast_adapter_dtype": False}
    case: dict[str, Any] = {"rows": "uneven", "steps": 3, "shards": 1}
    _, (first, second) = learn_both_ways(two_ranks, tmp_path, model_folder("mistral"), keys, **case)
    assert first["trained"] == second["trained"]


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("mistral", 6),
        *(pytest.param(name, 20, marks=pytest.mark.slow) for name in ("ministral3", "mistral4")),
    ],
)
def test_bfloat16_gradients_of_two_ranks_are_those_of_two_micro_batches(
    two_ranks: RankGroup, model_folder: Models, tmp_path: Path, name: str, steps: int
) -> None:
    """Of more, one rank rounds each partial sum: see `fill_gradients`."""
    keys = METHODS["full bfloat16"].keys | {"learning_rate": 1e-4}
    case: dict[str, Any] = {"rows": "uneven", "steps": steps, "micros": 2}
    one, many = learn_both_ways(two_ranks, tmp_path, model_folder(name), keys, **case)
    assert one["losses"] == many[0]["losses"]
    assert_equal(one, many, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "ministral3", "mistral4"])
def test_bfloat16_gradients_of_any_number_of_ranks_are_rounded_once(
    two_ranks: RankGroup, four_ranks: RankGroup, model_folder: Models, tmp_path: Path, name: str
) -> None:
    keys = METHODS["full bfloat16"].keys | {"learning_rate": 1e-4}
    case: dict[str, Any] = {"rows": "uneven", "steps": 20}
    found = [
        learn_both_ways(group, tmp_path, model_folder(name), keys, **case)[1][0]
        for group in (two_ranks, four_ranks)
    ]
    for figure in ("losses", "norms"):
        assert found[0][figure] == pytest.approx(found[1][figure], rel=1e-5)


EVERY = [
    (name, method, rows)
    for name in ("mistral", "ministral3", "mistral4")
    for method in ("LoRA", "NF4 LoRA", "full")
    for rows in ("uneven", "mixed")
]
LAYOUTS = {"four shards": 4, "two copies over two": 2, "four copies": 1}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["two shards", *LAYOUTS])
@pytest.mark.parametrize(("name", "method", "rows"), EVERY)
def test_twenty_steps_are_those_of_one_rank(
    request: pytest.FixtureRequest,
    model_folder: Models,
    seeing_model: Models,
    tmp_path: Path,
    name: str,
    method: str,
    rows: str,
    layout: str,
) -> None:
    group = request.getfixturevalue("four_ranks" if layout in LAYOUTS else "two_ranks")
    folder = (seeing_model if rows == "mixed" else model_folder)(name)
    keys = METHODS[method].keys | {"learning_rate": 1e-4}
    case: dict[str, Any] = {"rows": rows, "steps": 20, "shards": LAYOUTS.get(layout, 2)}
    one, many = learn_both_ways(group, tmp_path, folder, keys, **case)
    assert_equal(one, many, 1e-3 if "bf16" in keys else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("count", ["two", "four"])
@pytest.mark.parametrize("method", ["LoRA", "full"])
@pytest.mark.parametrize("name", ["mistral", "ministral3", "mistral4"])
def test_twenty_packed_steps_are_those_of_one_rank(
    request: pytest.FixtureRequest,
    model_folder: Models,
    tmp_path: Path,
    name: str,
    method: str,
    count: str,
) -> None:
    group = request.getfixturevalue(f"{count}_ranks")
    packed = {"sample_packing": True, "sequence_len": 64, "learning_rate": 1e-4}
    keys = METHODS[method].keys | packed
    case: dict[str, Any] = {"rows": "many", "steps": 20}
    one, many = learn_both_ways(group, tmp_path, model_folder(name), keys, **case)
    assert_equal(one, many, 1e-5)
    assert sum(map(len, one["rows"])) > 20 * 4, "some sequences have several rows"
    told = many[0]["imbalance"]
    assert all(each["imbalance"] == told for each in many)
    assert 0 < sum(told) / 20 < 0.1, "each round's sequences are nearly as costly"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("ministral3", METHODS["NF4 LoRA"].keys),
        ("mistral4", METHODS["LoRA on experts"].keys),
        ("mistral4", METHODS["LoRA on experts"].keys | SPREAD_BY_TWO),
        ("mistral4", METHODS["full"].keys | SPREAD_BY_TWO),
    ],
)
def test_each_of_four_ranks_holds_a_quarter(
    four_ranks: RankGroup, model_folder: Models, name: str, keys: dict[str, Any]
) -> None:
    folder = model_folder(name)
    whole = _held_by_one(folder, keys)
    for held in four_ranks.run("rank_cases:held", folder=str(folder), keys=keys):
        for part in held.keys() - {"statistics", "buffers"}:
            assert held[part] == pytest.approx(whole[part] / 4, rel=0.02), part
