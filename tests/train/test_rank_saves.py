"""Checkpoints and results of several ranks, each of which writes its own rows."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from engine.runs import RunFolder
from engine.train.merge import merge
from engine.train.moments import restore_optimizer
from engine.train.optim import build_optimizer
from engine.train.ranks import LONE
from engine.train.seal import Damaged, read_checkpoint
from tests.support.rank_group import RankGroup
from tests.support.rank_saves import Saver, content, learn, losses
from tests.support.tiny import Models, assert_same, flip, settings

LORA: dict[str, Any] = {"adapter": "lora", "lora_r": 64, "learning_rate": 0.01}
FULL: dict[str, Any] = {"learning_rate": 0.01}
CASES: dict[str, dict[str, Any]] = {
    "lora": LORA | {"optimizer": "adamw_torch"},
    "full": FULL | {"optimizer": "adamw_torch_fused"},
    "full in 8 bits": FULL | {"optimizer": "adamw_bnb_8bit"},
}


@pytest.fixture(scope="module", params=CASES)
def saved(
    request: pytest.FixtureRequest,
    two_ranks: RankGroup,
    model_folder: Models,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any]]:
    """A run that two ranks saved at steps 2 and 4 and finished, and its keys."""
    keys = {"base": str(model_folder("ministral3")), "keys": CASES[request.param]}
    home = tmp_path_factory.mktemp("two")
    two_ranks.run("rank_saves:learn", home=str(home), until=[2, 4], begin=True, **keys)
    return home, keys


def began(saved: Path, home: Path) -> str:
    """A copy of the run as it was at step 2."""
    shutil.copytree(saved / "checkpoints" / "step-2", home / "checkpoints" / "step-2")
    return str(home)


def at(home: Path | str, step: int) -> dict[str, torch.Tensor]:
    return content(Path(home) / "checkpoints" / f"step-{step}")


def test_two_ranks_resume_as_if_they_had_never_stopped(
    saved: tuple[Path, dict[str, Any]], two_ranks: RankGroup, tmp_path: Path
) -> None:
    home, keys = saved
    two_ranks.run("rank_saves:learn", home=began(home, tmp_path), until=[4], **keys)
    assert_same(at(tmp_path, 4), at(home, 4), rtol=0, atol=0)


def test_one_resumes_what_two_saved_and_two_what_one_saved(
    saved: tuple[Path, dict[str, Any]], two_ranks: RankGroup, tmp_path: Path
) -> None:
    home, keys = saved
    saver = Saver(LONE, began(home, tmp_path / "one"), **keys)
    saver.resume()
    saver.step = 3
    saver.save()
    assert_same(at(saver.home, 3), at(home, 2), rtol=0, atol=0)
    again = tmp_path / "again"
    shutil.copytree(saver.home, again)
    two_ranks.run("rank_saves:learn", home=str(again), until=[3], **keys)
    assert_same(at(again, 3), at(home, 2), rtol=0, atol=0)
    saver.step = 2
    saver.learn(4)
    assert_same(at(saver.home, 4), at(home, 4), rtol=1e-5, atol=1e-6)


def test_the_result_is_what_one_rank_writes(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    home, keys = saved
    saver = Saver(LONE, str(tmp_path), **keys)
    shutil.copytree(home / "checkpoints", saver.home / "checkpoints")
    saver.resume()
    saver.export()
    name = "adapter" if "adapter" in keys["keys"] else "model"
    theirs = {path.name: path.read_bytes() for path in (home / name).iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} == theirs
    assert theirs


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_every_rank_wrote_its_own_rows_as_dcp_reads_them(
    saved: tuple[Path, dict[str, Any]],
) -> None:
    home, keys = saved
    folder = home / "checkpoints" / "step-4"
    ours = content(folder)
    stored = {path.stem.rsplit("-", 3)[0] for path in folder.glob("*-of-00002.safetensors")}
    assert stored == {
        "adapter_model" if "adapter" in keys["keys"] else "trained",
        "optimizer",
        "random",
    }
    sizes = [path.stat().st_size for path in sorted(folder.glob("optimizer-*"))]
    assert max(sizes) < 1.2 * min(sizes)
    plain = {n: t for n, t in ours.items() if "|state" not in n}
    theirs = {name: torch.empty_like(tensor) for name, tensor in plain.items()}
    load(theirs, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert_same(theirs, plain, rtol=0, atol=0)


def test_a_flipped_bit_in_any_file_is_noticed(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    began(saved[0], tmp_path)
    folder = tmp_path / "checkpoints" / "step-2"
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        flip(path)
        with pytest.raises(Damaged, match=path.name):
            read_checkpoint(folder)
        path.write_bytes(whole)
    read_checkpoint(folder)


def test_all_ranks_say_what_is_damaged(
    saved: tuple[Path, dict[str, Any]], two_ranks: RankGroup, tmp_path: Path
) -> None:
    home, keys = saved
    began(home, tmp_path)
    flip(sorted((tmp_path / "checkpoints" / "step-2").glob("optimizer-*"))[1])
    said = two_ranks.run("rank_saves:refusal", home=str(tmp_path), name="step-2", **keys)
    assert said[0] == said[1]
    assert "optimizer-00002-of-00002.safetensors is not as it was saved" in said[0][1]


@pytest.mark.slow  # starts the ranks anew for each
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("writes", [0, 1, 2, 3, 6])
def test_a_rank_that_is_killed_inside_a_save_leaves_the_one_before(
    model_folder: Models, tmp_path: Path, rank: int, writes: int
) -> None:
    group = RankGroup(2)
    keys: dict[str, Any] = {"base": str(model_folder("ministral3")), "keys": CASES["full"]}
    if rank == 1 and writes > 2:
        pytest.skip("it writes three files")
    with pytest.raises(AssertionError, match=r"is gone|Connection closed|reset"):
        group.run("rank_saves:save_and_die", home=str(tmp_path), rank=rank, writes=writes, **keys)
    saver = Saver(LONE, str(tmp_path), **keys)
    saver.resume()
    assert saver.step == 1


def assert_copies_save_once(group: RankGroup, base: Path, home: Path, shards: int) -> None:
    """Ranks of other copies write their random generators alone."""
    keys: dict[str, Any] = {"base": str(base), "keys": CASES["lora"], "until": [2], "begin": True}
    group.run("rank_saves:learn", home=str(home / "many"), shards=shards, **keys)
    learn(LONE, str(home / "one"), **keys)
    assert_same(at(home / "many", 2), at(home / "one", 2), rtol=1e-5, atol=1e-6)
    found = [path.name.partition(".")[0] for path in (home / "many/checkpoints/step-2").iterdir()]
    assert sum(name.startswith("optimizer") for name in found) == shards
    assert sum(name.startswith("random") for name in found) == group.count
    name = "adapter/adapter_model.safetensors"
    assert (home / "many" / name).stat().st_size == (home / "one" / name).stat().st_size
    keys |= {"until": [3], "begin": False}
    group.run("rank_saves:learn", home=str(home / "many"), shards=shards, **keys)
    learn(LONE, str(home / "one"), **keys)
    assert_same(at(home / "many", 3), at(home / "one", 3), rtol=1e-5, atol=1e-6)


def test_two_copies_save_once(two_ranks: RankGroup, model_folder: Models, tmp_path: Path) -> None:
    assert_copies_save_once(two_ranks, model_folder("ministral3"), tmp_path, 1)


@pytest.mark.slow  # starts four ranks
def test_two_copies_of_two_ranks_save_once(
    four_ranks: RankGroup, model_folder: Models, tmp_path: Path
) -> None:
    assert_copies_save_once(four_ranks, model_folder("ministral3"), tmp_path, 2)


def test_no_room_on_one_rank_is_said_by_all_and_leaves_what_was_there(
    two_ranks: RankGroup, model_folder: Models, tmp_path: Path
) -> None:
    keys = {"base": str(model_folder("ministral3")), "keys": CASES["lora"]}
    first, second = two_ranks.run("rank_saves:no_room", home=str(tmp_path), **keys)
    assert first == "The system says: on rank 1, File too large."
    assert second == "The system says: File too large."
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step-1", "LATEST"}


def test_moments_whose_blocks_would_be_cut_go_on_in_32_bits(
    two_ranks: RankGroup, tmp_path: Path
) -> None:
    two_ranks.run("rank_saves:cut_blocks", home=str(tmp_path))
    saved = content(tmp_path)
    named = list(nn.Linear(66, 250, bias=False).named_parameters())
    optimizer = build_optimizer(named, settings(optimizer="adamw_bnb_8bit"))
    restore_optimizer(named, optimizer, tmp_path, {"weight|step": 1}, LONE)
    state = dict(optimizer.state[named[0][1]])
    assert state.pop("step") == 1
    assert_same(state, {name[-6:]: t for name, t in saved.items()}, rtol=0, atol=0)
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    named[0][1].grad = torch.ones(250, 66)
    optimizer.step()
    assert int(optimizer.state[named[0][1]]["step"]) == 2


SLOW: dict[str, Any] = {"learning_rate": 0.001}
"""With ten times as much, what is added up in another order is tenfold after each step."""
NARROW: dict[str, Any] = SLOW | {"bf16": True}
SPREAD: dict[str, Any] = {"expert_parallel_size": 2}
QLORA: dict[str, Any] = NARROW | {"adapter": "qlora", "load_in_4bit": True}


@pytest.mark.parametrize(
    ("keys", "tolerance"),
    [(LORA, 1e-5), (FULL, 1e-5), (QLORA, 1e-3), (NARROW, 1e-3)],
    ids=["LoRA", "full", "NF4 LoRA", "full in bfloat16"],
)
def test_a_run_goes_on_with_the_same_losses_on_two_ranks_and_on_one(
    two_ranks: RankGroup,
    model_folder: Models,
    tmp_path: Path,
    keys: dict[str, Any],
    tolerance: float,
) -> None:
    given: dict[str, Any] = {"folder": str(model_folder("ministral3")), "keys": keys}
    unbroken = losses(LONE, home=str(tmp_path / "whole"), begin=0, until=6, **given)
    given["home"] = str(tmp_path / "cut")
    found = losses(LONE, begin=0, until=2, **given)
    found += two_ranks.run("rank_saves:losses", begin=2, until=4, **given)[1]
    found += losses(LONE, begin=4, until=6, **given)
    assert found == pytest.approx(unbroken, rel=tolerance)


@pytest.mark.slow  # starts four ranks
@pytest.mark.parametrize(
    ("keys", "as_one"),
    [
        (LORA | SLOW, 1e-5),
        (FULL | SLOW, 1e-5),
        (QLORA, 1e-3),
        (FULL | SLOW | {"optimizer": "adamw_bnb_8bit"}, 1e-2),  # its blocks depend on the ranks
        (FULL | SLOW | SPREAD, 1e-5),
    ],
    ids=["LoRA", "full", "NF4 LoRA", "full in 8 bits", "experts are spread"],
)
def test_a_run_goes_on_with_two_four_and_one_ranks(
    two_ranks: RankGroup,
    four_ranks: RankGroup,
    model_folder: Models,
    tmp_path: Path,
    keys: dict[str, Any],
    as_one: float,
) -> None:
    given: dict[str, Any] = {"folder": str(model_folder("mistral4")), "keys": keys}
    alone = losses(LONE, home=str(tmp_path / "one"), begin=0, until=6, **given)
    whole = {"home": str(tmp_path / "four"), "begin": 0, "until": 6}
    unbroken = four_ranks.run("rank_saves:losses", **whole, **given)[0]
    given["home"] = str(tmp_path / "cut")
    found = two_ranks.run("rank_saves:losses", begin=0, until=2, **given)[0]
    found += four_ranks.run("rank_saves:losses", begin=2, until=4, **given)[3]
    found += losses(LONE, begin=4, until=6, **given)
    assert found == pytest.approx(unbroken, rel=1e-5 if as_one == 1e-5 else 1e-3)
    assert found == pytest.approx(alone, rel=as_one)


@pytest.mark.slow  # starts four ranks
@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_bnb_8bit"])
def test_experts_that_are_spread_are_saved_as_they_lie_on_one_rank(
    four_ranks: RankGroup, model_folder: Models, tmp_path: Path, optimizer: str
) -> None:
    keys = FULL | SPREAD | {"optimizer": optimizer}
    given: dict[str, Any] = {"base": str(model_folder("mistral4")), "keys": keys}
    home, one = tmp_path / "many", tmp_path / "one"
    four_ranks.run("rank_saves:learn", home=str(home), until=[2, 4], begin=True, shards=4, **given)
    began(home, tmp_path / "cut")
    again: dict[str, Any] = {"home": str(tmp_path / "cut"), "until": [4], "shards": 4}
    four_ranks.run("rank_saves:learn", **again, **given)
    assert_same(at(tmp_path / "cut", 4), at(home, 4), rtol=0, atol=0)
    shutil.copytree(home / "checkpoints", one / "checkpoints")
    saver = Saver(LONE, str(one), **given)
    saver.resume()
    saver.export()
    saver.step = 5
    saver.save()
    assert_same(at(one, 5), at(home, 4), rtol=0, atol=0)
    name = "model/model.safetensors"
    assert (one / name).read_bytes() == (home / name).read_bytes()
    if "8bit" not in optimizer:  # its blocks depend on the ranks
        learn(LONE, str(tmp_path / "whole"), until=[4], begin=True, **given)
        assert_same(at(tmp_path / "whole", 4), at(home, 4), rtol=1e-5, atol=1e-6)


def test_merge_reads_what_two_ranks_saved(
    two_ranks: RankGroup, model_folder: Models, tmp_path: Path
) -> None:
    base, run = model_folder("ministral3"), RunFolder(tmp_path / "run")
    keys: dict[str, Any] = {"keys": CASES["lora"], "until": [2], "begin": True}
    two_ranks.run("rank_saves:learn", home=str(run.path), base=str(base), **keys)
    run.config.write_text(
        settings(base, **LORA, optimizer="adamw_torch").model_dump_json(exclude_none=True)
    )
    finished = merge(run, tmp_path / "finished")
    shutil.rmtree(run.adapter)
    saved = merge(run, tmp_path / "saved")
    name = "model.safetensors"
    assert (saved / name).read_bytes() == (finished / name).read_bytes()
    assert (saved / name).read_bytes() != (base / name).read_bytes()
