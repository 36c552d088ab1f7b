"""A whole run measures itself: before, inside and after, and again nothing that it has measured."""

from typing import Any

import pytest

from engine.events import Answers, Drift, Phase, Score
from engine.runs import RunFolder
from tests.support.trainers import Workshop, events_of, finish

MEASURING: dict[str, Any] = {
    **{"max_steps": 6, "eval_steps": 3, "save_steps": 3, "val_set_size": 0.2},
    **{"sample_prompts": ["How many knots is force 3?"]},  # cheaper than the three by default
    **{"eval_table_size": 4, "eval_max_new_tokens": 100, "eval_drift": True},
}


@pytest.fixture(scope="module")
def measured(workshop: Workshop) -> RunFolder:
    run = workshop.new(**MEASURING)
    assert finish(run) == 0, run.log.read_text("utf-8")
    return run


def test_answers_drift_and_losses_by_kind_are_reported_at_every_evaluation(
    measured: RunFolder,
) -> None:
    events = events_of(measured)
    answers = [event for event in events if isinstance(event, Answers)]
    assert [(each.step, each.rows) for each in answers] == [(0, 4), (3, 1), (6, 4)]
    drifts = [event for event in events if isinstance(event, Drift)]
    assert [each.step for each in drifts] == [0, 3, 6]
    assert drifts[0].kl == 0.0 < drifts[1].kl
    for score in (event for event in events if isinstance(event, Score)):
        kinds = score.tokens_by_kind
        assert set(kinds) == set(score.loss_by_kind) == {"think", "text", "eos"}
        total = sum(kinds[kind] * score.loss_by_kind[kind] for kind in kinds)
        assert total / sum(kinds.values()) == pytest.approx(score.loss, rel=1e-6)


def test_an_evaluation_counts_the_rows_that_it_scores(measured: RunFolder) -> None:
    events = events_of(measured)
    rows = next(each.rows for each in events if isinstance(each, Score))
    phases = [each for each in events if isinstance(each, Phase) and each.name == "evaluate"]
    assert rows > 2
    assert {(each.total, each.detail) for each in phases} == {(rows, "rows")}
    assert {each.done for each in phases} == {0, rows}


def test_a_resumed_run_measures_against_the_base_that_it_remembers(measured: RunFolder) -> None:
    last = [event.kl for event in events_of(measured) if isinstance(event, Drift)][-1]
    stored = (measured.path / "drift.safetensors").stat().st_mtime_ns
    assert finish(measured, "--resume", "--from", "step-3") == 0, measured.log.read_text("utf-8")
    again = [event.kl for event in events_of(measured) if isinstance(event, Drift)]
    assert len(again) == 4
    assert again[-1] == last
    assert (measured.path / "drift.safetensors").stat().st_mtime_ns == stored
