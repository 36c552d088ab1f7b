"""Whole runs that two ranks share: what they report, evaluate, write and obey."""

from typing import Any

import pytest

from engine.events import Ack, Answers, Drift, Ended, Note, Sample, Saved, Score, Started, Step
from engine.runs import RunFolder
from tests.support.rank_group import RankGroup
from tests.support.trainers import LORA, Workshop, evaluations, events_of, figures, last_end

KEYS: dict[str, Any] = {
    "max_steps": 4,
    "save_steps": 2,
    "eval_strategy": "no",
    "val_set_size": 0.2,
    "eval_table_size": 4,
    "eval_max_new_tokens": 16,
    "eval_drift": True,
    "eval_train_rows": 4,
    "sample_prompts": ["Where is the pilot station?"],
}
QUIET = {"val_set_size": 0, "sample_prompts": [], "eval_drift": False, "eval_table_size": 0}


@pytest.fixture(scope="module")
def both(two_ranks: RankGroup, workshop: Workshop) -> tuple[RunFolder, RunFolder]:
    """A full fine-tune of one rank that accumulates twice, and the same of two."""
    one = workshop.finished()
    two = workshop.new(gradient_accumulation_steps=1)
    two_ranks.run("rank_cases:carry_out", folder=str(two.path))
    return one, two


def of(run: RunFolder, kind: type[Any]) -> list[Any]:
    return [event for event in events_of(run) if isinstance(event, kind)]


def test_steps_and_evaluations_are_those_of_one(both: tuple[RunFolder, RunFolder]) -> None:
    one, two = both
    for ours, theirs in zip(figures(two), figures(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert evaluations(two) == pytest.approx(evaluations(one), rel=1e-5)
    for ours, theirs in zip(of(two, Score), of(one, Score), strict=True):
        assert (ours.dataset, ours.rows, ours.exact) == (theirs.dataset, theirs.rows, theirs.exact)
        assert ours.loss_by_kind == pytest.approx(theirs.loss_by_kind, rel=1e-5)
        assert ours.tokens_by_kind == theirs.tokens_by_kind
    drifts = [[drift.kl for drift in of(run, Drift)] for run in both]
    assert drifts[1] == pytest.approx(drifts[0], rel=1e-3, abs=1e-6)


def test_what_is_written_by_itself_is_as_one_writes_it(both: tuple[RunFolder, RunFolder]) -> None:
    one, two = both
    assert of(two, Answers) == of(one, Answers)
    assert [s.text for s in of(two, Sample)] == [s.text for s in of(one, Sample)]


def test_events_tell_of_every_rank(both: tuple[RunFolder, RunFolder]) -> None:
    _, two = both
    (started,) = of(two, Started)
    assert (started.world_size, started.devices) == (2, ("cpu", "cpu"))
    for step in of(two, Step):
        assert len(step.rank_peak_bytes) == 2
        assert step.peak_memory_bytes == max(step.rank_peak_bytes)
        assert step.slowest_rank in (0, 1)
        assert 0 <= step.imbalance < 0.5
    assert any("2 ranks: one copy of the model over 2 ranks" in n.text for n in of(two, Note))
    assert of(two, Ended)[-1].outcome == "finished"


def test_commands_and_a_signal_to_one_rank_are_obeyed_by_all(
    two_ranks: RankGroup, workshop: Workshop
) -> None:
    keys = QUIET | LORA | {"max_steps": 12, "save_steps": 100, "gradient_accumulation_steps": 1}
    run = workshop.new(**keys)
    taken = two_ranks.run("rank_cases:asked", folder=str(run.path))
    assert taken == [[1, 2, 3, 4], [1, 2, 3, 4]]
    assert [saved.step for saved in of(run, Saved)] == [2, 4]
    assert [ack.command for ack in of(run, Ack)] == ["save"]
    assert (last_end(run).outcome, last_end(run).step) == ("stopped", 4)
