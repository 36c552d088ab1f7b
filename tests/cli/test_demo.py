"""The demo is a real run: it prints what it measured, and other input gives other figures."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.runs import RunFolder
from tests.support.extras import needs_trainer
from tests.support.run_folders import read_steps

ROOT = Path(__file__).parents[2]
STEPS = 13
"""One epoch: every row of the sample is seen."""
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


def short_demo(folder: Path, rows: Path, *changes: str, qlora: bool = False) -> dict[str, Any]:
    sets = json.dumps([{"path": str(rows), "type": "chat_template", "split": "train"}])
    done = windtunnel(
        "demo",
        str(folder),
        f"max_steps={STEPS}",
        "eval_train_rows=4",
        f"test_datasets={sets}",
        *changes,
        *(["--qlora"] if qlora else []),
        "--json",
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def losses(folder: Path) -> list[float]:
    return [step.loss for step in read_steps(RunFolder(folder))]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, few_rows: Path) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "run"
    short_demo(folder, few_rows)
    return folder


@needs_trainer
def test_it_answers_before_and_after_and_scores_every_set(tmp_path: Path, few_rows: Path) -> None:
    result = short_demo(tmp_path / "run", few_rows, "max_steps=40", qlora=True)
    assert set(result) == {"run", "before", "after", "scores"}
    questions = [answer["prompt"] for answer in result["before"]]
    assert len(questions) == 3
    assert [answer["prompt"] for answer in result["after"]] == questions
    assert result["before"] != result["after"]
    assert set(result["scores"]) == {"train", "heldout_wording"}
    assert all(set(score) == {"before", "after"} for score in result["scores"].values())
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    started = (tmp_path / "run" / "events.jsonl").read_text("utf-8")
    assert '"method": "qlora"' in started


@needs_trainer
def test_the_untouched_base_answers_its_questions_plainly(plain: Path) -> None:
    events = [json.loads(line) for line in (plain / "events.jsonl").read_text().splitlines()]
    first = [e["text"] for e in events if e["type"] == "sample" and e["when"] == "before"]
    assert first[1] == "It is 7 to 10 knots."


@needs_trainer
def test_the_loss_falls_from_the_start(plain: Path) -> None:
    run = losses(plain)
    assert len(run) == STEPS
    assert run[-1] < run[0] - 1


@needs_trainer
@pytest.mark.slow
def test_another_seed_gives_other_figures(plain: Path, tmp_path: Path, few_rows: Path) -> None:
    short_demo(tmp_path / "run", few_rows, "seed=7")
    assert losses(tmp_path / "run") != losses(plain)


@needs_trainer
@pytest.mark.slow
def test_one_edited_row_gives_other_figures(plain: Path, tmp_path: Path, few_rows: Path) -> None:
    rows = tmp_path / "train.jsonl"
    text = (SAMPLE / "train.jsonl").read_text("utf-8")
    rows.write_text(text.replace("Logged as force 0, pilot.", "Noted, captain.", 1), "utf-8")
    short_demo(tmp_path / "run", few_rows, f"datasets[0].path={rows}")
    assert losses(tmp_path / "run") != losses(plain)


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
    done = windtunnel("demo", str(tmp_path / "run"), "--json")
    scores = json.loads(done.stdout)["scores"]
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
