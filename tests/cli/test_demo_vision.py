"""The demo with images: drawn for its run, answered before and after, scored where it counts."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.cli.demo import HELD_OUT, SEEN, TRAINED, UNSEEN, write_drawings
from tests.support.extras import needs_trainer

SETS = {"train": TRAINED, "new_drawings": HELD_OUT, "shuffled_pixels": HELD_OUT}


def demo(folder: Path, *changes: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "engine", "demo", str(folder), "--vision", "--json", *changes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


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


def test_every_pair_is_drawn_equally_often_and_the_unseen_ones_in_one_set_alone(
    drawings: Path,
) -> None:
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
    result = demo(tmp_path / "run", "max_steps=3", "eval_train_rows=4")
    assert set(result) == {"run", "before", "after", "scores"}
    asked = [answer["prompt"] for answer in result["before"]]
    assert asked == [
        f"What is drawn here? [image of new_drawings.jsonl line {n}]" for n in (1, 2, 3)
    ]
    assert [answer["prompt"] for answer in result["after"]] == asked
    assert set(result["scores"]) == {*SETS, "unseen_pairs"}
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_images_with_4_bit_weights_are_refused_in_sentences(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "engine", "demo", str(tmp_path / "run"), "--vision", "--qlora"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Choose --qlora or --vision." in done.stderr
    assert not (tmp_path / "run").exists()


@needs_trainer
@pytest.mark.slow
def test_it_learns_to_name_what_it_sees_and_guesses_where_nothing_is_to_be_seen(
    tmp_path: Path,
) -> None:
    scores = demo(tmp_path / "run")["scores"]
    chance = 1 / len(SEEN)
    assert scores["new_drawings"]["after"] >= 0.8
    assert scores["shuffled_pixels"]["after"] <= chance + 0.05
    assert 0 <= scores["unseen_pairs"]["after"] <= 1
