"""Whole runs that two ranks share: what they report, evaluate, write and obey."""

from typing import Any

import pytest

from engine.events import Answers, Drift, Ended, Note, Sample, Score, Started, Step
from engine.runs import RunFolder
from tests.support.rank_group import RankGroup
from tests.support.trainers import LORA, Workshop, evaluations, events_of, figures

KEYS: dict[str, Any] = {
    "max_steps": 6,
    "save_steps": 3,
    "eval_steps": 3,
    "val_set_size": 0.2,
    "eval_table_size": 4,
    "eval_max_new_tokens": 24,
    "eval_drift": True,
    "eval_train_rows": 4,
    "sample_prompts": ["Where is the pilot station?"],
}
METHODS: dict[str, dict[str, Any]] = {"full": {}, "LoRA": LORA | {"lora_dropout": 0.0}}


@pytest.fixture(scope="module", params=METHODS)
def both(
    request: pytest.FixtureRequest, two_ranks: RankGroup, workshop: Workshop
) -> tuple[RunFolder, RunFolder]:
    """A run of one rank that accumulates twice, and the same of two."""
    keys = METHODS[request.param]
    one = workshop.finished(**keys)
    two = workshop.new(**keys, gradient_accumulation_steps=1)
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
