"""Two runs are compared where both have learned as many tokens, not at the same step."""

import math
from pathlib import Path
from typing import Any

import pytest

from engine.events import Eval, EventWriter
from engine.runs.comparison import _loss_at, compare_figures, differences, read_curves
from tests.support.written_runs import step, write_run

TEST = {"path": "test.jsonl"}


def figures(first: Path, second: Path) -> dict[str, tuple[float, float]]:
    from engine.runs import RunFolder

    runs = [read_curves(RunFolder(path)) for path in (first, second)]
    _, found = compare_figures(*runs)
    return {figure.name: (figure.first, figure.second) for figure in found}


def test_losses_are_compared_at_the_same_learned_tokens(tmp_path: Path) -> None:
    write_run(tmp_path / "a", losses=(4, 3, 2, 1))  # 100 tokens a step
    run = write_run(tmp_path / "b", losses=())
    with EventWriter(run.events) as events:
        for number in (1, 2):
            events.emit(step(number, 10.0 - number, learned_tokens=100))
    found = figures(tmp_path / "a", tmp_path / "b")
    assert found["loss at the same tokens"] == (3.0, 8.0)
    assert found["held out at the same tokens"][0] == 4.5  # of step 0, not of step 4
    assert found["best held out"][0] == 1.5
    assert found["step of the best"][0] == 4
    assert found["exact answers, validation"][0] == 0.75
    assert found["learned tokens"] == (400, 200)


def test_steps_that_a_resume_repeated_count_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", losses=(4, 3, 2, 1))
    with EventWriter(run.events) as events:
        events.emit(step(3, 2.5))
        events.emit(Eval(3, 2.0))
    curves = read_curves(run)
    assert [each.loss for each in curves.steps] == [4, 3, 2.5]
    assert [each.step for each in curves.evals] == [0, 3]
    assert curves.learned_tokens == 300


def test_a_run_without_a_step_has_no_figures_and_breaks_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", losses=())
    found = figures(tmp_path / "a", tmp_path / "b")
    assert math.isnan(found["loss at the same tokens"][1])
    assert found["steps"] == (4, 0)


def test_configs_differ_by_key_and_defaults_count(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", lora_r=8, lora_alpha=32)
    second = write_run(tmp_path / "b", learning_rate=3e-4)
    found = differences(first, second)
    assert {key for key, _, _ in found.lines} == {"lora_r", "learning_rate"}
    assert ("lora_r", "8", "16") in found.lines
    assert found.same > 100
    assert not found.held_out


@pytest.mark.parametrize(
    ("ours", "theirs", "keys"),
    [
        ({}, {"datasets": [{"path": "b.jsonl"}]}, ("datasets",)),
        ({"val_set_size": 0.1}, {"val_set_size": 0.1, "seed": 7}, ("seed",)),
        ({"test_datasets": [TEST]}, {"test_datasets": [TEST], "seed": 7}, ()),
        ({"test_datasets": [TEST]}, {"val_set_size": 0.1}, ("test_datasets",)),
        ({}, {"train_on_thinking": False}, ("train_on_thinking",)),
    ],
)
def test_held_out_losses_compare_only_where_the_rows_are_the_same(
    ours: dict[str, Any], theirs: dict[str, Any], keys: tuple[str, ...], tmp_path: Path
) -> None:
    first = write_run(tmp_path / "a", **{"datasets": [{"path": "a.jsonl"}], **ours})
    second = write_run(tmp_path / "b", **{"datasets": [{"path": "a.jsonl"}], **theirs})
    assert differences(first, second).held_out == keys


@pytest.mark.parametrize("tokens", [0, 50])
def test_before_the_first_step_there_is_no_loss(tokens: int, tmp_path: Path) -> None:
    assert math.isnan(_loss_at(read_curves(write_run(tmp_path / "a")), tokens))
