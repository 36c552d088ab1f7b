"""The demo is a real run: it prints what it measured, and other input gives other figures."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.cli.demo import HELD_OUT, SEEN, TRAINED, UNSEEN, write_drawings
from engine.runs import RunFolder
from tests.support.extras import needs_trainer
from tests.support.written_runs import read_steps

ROOT = Path(__file__).parents[2]
STEPS = 13
"""One epoch: every row of the sample is seen."""
ASKED = "How many knots is force 3?"
SAMPLE = ROOT / "presets" / "samples" / "harbour-pilot"


def windtunnel(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "engine", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT), **environment},
    )


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rows of an evaluation set: scoring all of them would take most of a short demo."""
    path = tmp_path_factory.mktemp("rows") / "heldout_wording.jsonl"
    lines = (SAMPLE / "heldout_wording.jsonl").read_text("utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:4]), "utf-8")
    return path


def short_demo(folder: Path, rows: Path, *changes: str) -> dict[str, Any]:
    sets = json.dumps([{"path": str(rows), "type": "chat_template", "split": "train"}])
    # A base that has half learned something new answers on and on: one question is enough.
    short = (
        f"max_steps={STEPS}",
        "eval_train_rows=4",
        "eval_table_size=1",
        f"sample_prompts=[{ASKED}]",
    )
    return demo(folder, "--qlora", *short, f"test_datasets={sets}", *changes)


def demo(folder: Path, *changes: str) -> dict[str, Any]:
    done = windtunnel("demo", str(folder), "--json", *changes)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def losses(folder: Path) -> list[float]:
    return [step.loss for step in read_steps(RunFolder(folder))]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, few_rows: Path) -> dict[str, Any]:
    return short_demo(tmp_path_factory.mktemp("short") / "run", few_rows)


@pytest.fixture(scope="module")
def short(result: dict[str, Any]) -> Path:
    return Path(result["run"])


@needs_trainer
def test_it_answers_before_and_after_and_scores_all(result: dict[str, Any], short: Path) -> None:
    assert set(result) == {"run", "before", "after", "scores"}
    questions = [answer["prompt"] for answer in result["before"]]
    assert questions == [ASKED]
    assert [answer["prompt"] for answer in result["after"]] == questions
    assert result["before"] != result["after"]
    assert set(result["scores"]) == {"train", "heldout_wording"}
    assert all(set(score) == {"before", "after"} for score in result["scores"].values())
    assert (short / "adapter" / "adapter_model.safetensors").is_file()
    assert '"method": "qlora"' in (short / "events.jsonl").read_text("utf-8")


@needs_trainer
def test_the_untouched_base_answers_its_questions_plainly(short: Path) -> None:
    events = [json.loads(line) for line in (short / "events.jsonl").read_text().splitlines()]
    first = [e["text"] for e in events if e["type"] == "sample" and e["when"] == "before"]
    assert first == ["It is 7 to 10 knots."]


@needs_trainer
def test_the_loss_falls_from_the_start(short: Path) -> None:
    run = losses(short)
    assert len(run) == STEPS
    assert run[-1] < run[0] - 1


@needs_trainer
@pytest.mark.slow
def test_another_seed_gives_other_figures(short: Path, tmp_path: Path, few_rows: Path) -> None:
    short_demo(tmp_path / "run", few_rows, "seed=7")
    assert losses(tmp_path / "run") != losses(short)


@needs_trainer
@pytest.mark.slow
def test_one_edited_row_gives_other_figures(short: Path, tmp_path: Path, few_rows: Path) -> None:
    rows = tmp_path / "train.jsonl"
    text = (SAMPLE / "train.jsonl").read_text("utf-8")
    rows.write_text(text.replace("Logged as force 0, pilot.", "Noted, captain.", 1), "utf-8")
    short_demo(tmp_path / "run", few_rows, f"datasets[0].path={rows}")
    assert losses(tmp_path / "run") != losses(short)


def test_the_shipped_sample_is_what_its_script_makes() -> None:
    from tests.make.demo_samples import files

    for name, rows in files().items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        assert (SAMPLE / f"{name}.jsonl").read_text("utf-8") == text


def test_held_out_wordings_are_in_no_training_file() -> None:
    def questions(name: str) -> set[str]:
        lines = (SAMPLE / f"{name}.jsonl").read_text("utf-8").splitlines()
        return {json.loads(line)["messages"][0]["content"] for line in lines}

    assert not questions("heldout_wording") & (questions("train") | questions("base"))
    assert not questions("heldout_pairing") & questions("train")


@needs_trainer
@pytest.mark.slow
def test_the_whole_demo_learns_its_conversations_by_heart(tmp_path: Path) -> None:
    result = demo(tmp_path / "run")
    assert len(result["before"]) == len(result["after"]) == 3
    scores = result["scores"]
    assert scores["train"]["before"] == 0.0
    assert scores["train"]["after"] >= 0.9
    assert set(scores) == {"train", "heldout_pairing", "heldout_wording"}


@needs_trainer
@pytest.mark.slow
def test_the_script_that_made_the_shipped_layers_makes_an_equal_base(tmp_path: Path) -> None:
    """A new base need not have the same bits (threads, CPU); it answers the same questions."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.make.demo_base", str(tmp_path)], cwd=ROOT, check=True
    )
    assert done.returncode == 0
    answers = subprocess.run(
        [sys.executable, "-m", "tests.make.ask_base", str(tmp_path / "layers.safetensors")],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    shipped, remade = json.loads(answers.stdout)
    assert shipped == remade == 1.0


SETS = {"train": TRAINED, "new_drawings": HELD_OUT, "shuffled_pixels": HELD_OUT}


def answers(folder: Path, name: str) -> list[str]:
    lines = (folder / f"{name}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["messages"][1]["content"] for line in lines]


def pixels_of(folder: Path, name: str) -> Any:
    return np.stack([np.asarray(Image.open(path)) for path in sorted((folder / name).iterdir())])


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawings")
    write_drawings(folder)
    return folder


def test_pairs_are_drawn_equally_often_and_unseen_ones_in_one_set_alone(drawings: Path) -> None:
    for name, rows in SETS.items():
        wanted = {f"A {colour} {shape}.": rows // len(SEEN) for colour, shape in SEEN}
        assert Counter(answers(drawings, name)) == wanted
    assert set(answers(drawings, "unseen_pairs")) == {f"A {c} {s}." for c, s in UNSEEN}
    assert not set(SEEN) & set(UNSEEN)


def test_shuffled_pixels_are_the_same_pixels_at_other_places(drawings: Path) -> None:
    new, shuffled = (pixels_of(drawings, name) for name in ("new_drawings", "shuffled_pixels"))
    assert answers(drawings, "new_drawings") == answers(drawings, "shuffled_pixels")
    assert Counter(map(bytes, new.reshape(-1, 3))) == Counter(map(bytes, shuffled.reshape(-1, 3)))
    # No image keeps a colour of its own: their means are those of one mixture.
    assert np.ptp(shuffled.mean(axis=(1, 2)), axis=0).max() < 20
    assert np.ptp(new.mean(axis=(1, 2)), axis=0).min() > 60


def test_the_same_seed_draws_the_same(drawings: Path, tmp_path: Path) -> None:
    write_drawings(tmp_path / "same")
    write_drawings(tmp_path / "other", seed=1)
    first = (drawings / "train" / "0001.png").read_bytes()
    assert (tmp_path / "same" / "train" / "0001.png").read_bytes() == first
    assert (tmp_path / "other" / "train" / "0001.png").read_bytes() != first


@needs_trainer
@pytest.mark.slow
def test_three_steps_ask_about_three_held_out_images_and_score_every_set(tmp_path: Path) -> None:
    result = demo(tmp_path / "run", "--vision", "max_steps=3", "eval_train_rows=4")
    assert set(result) == {"run", "before", "after", "scores"}
    asked = [answer["prompt"] for answer in result["before"]]
    shown = "What is drawn here? [image of new_drawings.jsonl line"
    assert asked == [f"{shown} {n}]" for n in (1, 2, 3)]
    assert [answer["prompt"] for answer in result["after"]] == asked
    assert set(result["scores"]) == {*SETS, "unseen_pairs"}
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@needs_trainer
@pytest.mark.slow
def test_it_learns_to_name_what_it_sees_and_guesses_where_nothing_is_shown(tmp_path: Path) -> None:
    scores = demo(tmp_path / "run", "--vision")["scores"]
    chance = 1 / len(SEEN)
    assert scores["new_drawings"]["after"] >= 0.8
    assert scores["shuffled_pixels"]["after"] <= chance + 0.05
    assert 0 <= scores["unseen_pairs"]["after"] <= 1
