"""Going on, going back, and what is refused because it would quietly train something else."""

import signal
from typing import Any

import pytest

from engine.errors import UserError
from engine.events import Note, Step
from engine.launch import resume_run
from engine.runs import Follower, RunFolder, status
from tests.support.run_folders import read_steps
from tests.support.trainers import (
    LORA,
    DieBeforeStep,
    Workshop,
    evaluations,
    events_of,
    figures,
    finish,
    last_end,
)

KEYS = LORA | {"max_steps": 6, "save_steps": 2}


def all_steps(run: RunFolder) -> list[int]:
    """The steps in the order in which they were emitted, repeated ones too."""
    return [event.step for event in events_of(run) if isinstance(event, Step)]


def test_a_run_goes_on_to_more_steps_than_it_had(workshop: Workshop) -> None:
    run = workshop.finished(lr_scheduler="constant")
    workshop.configure(run, lr_scheduler="constant", max_steps=9)
    assert finish(run, "--resume") == 0
    whole = workshop.finished(lr_scheduler="constant", max_steps=9)
    assert figures(run) == figures(whole)
    assert all_steps(run) == list(range(1, 10))


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"micro_batch_size": 2}, {"gradient_accumulation_steps": 1}]
)
def test_a_changed_order_of_rows_is_refused(workshop: Workshop, change: dict[str, Any]) -> None:
    run = workshop.finished(max_steps=2)
    workshop.configure(run, **change)
    assert finish(run, "--resume") == 1
    end = last_end(run)
    assert (end.outcome, end.step) == ("failed", 2)
    assert end.what == "The run cannot go on from step-2."
    assert "batch size, the packing or the seed" in end.why
    assert (run.checkpoints / "LATEST").read_text() == "step-2"


def test_a_change_that_was_undone_lets_the_run_go_on(workshop: Workshop) -> None:
    run = workshop.finished(max_steps=2)
    workshop.configure(run, seed=4)
    assert finish(run, "--resume") == 1
    workshop.configure(run)
    assert finish(run, "--resume") == 0
    assert all_steps(run) == [1, 2, 3, 4, 5, 6]


def test_changed_rows_are_refused(workshop: Workshop) -> None:
    run = workshop.finished(max_steps=2)
    rows = run.path / "rows.jsonl"
    rows.write_text(rows.read_text("utf-8").replace("force 0", "force zero"), "utf-8")
    assert finish(run, "--resume") == 1
    assert last_end(run).what == "The run cannot go on from step-2."


def test_a_run_that_ran_out_of_memory_may_go_on_in_4_bits(workshop: Workshop) -> None:
    run = workshop.finished(max_steps=2)
    workshop.configure(run, adapter="qlora", load_in_4bit=True, gradient_checkpointing=True)
    assert finish(run, "--resume") == 0, run.log.read_text()
    assert all_steps(run) == [1, 2, 3, 4, 5, 6]


def test_a_run_without_a_checkpoint_begins_again(workshop: Workshop) -> None:
    run = workshop.new(save_strategy="no", save_steps=None)
    assert finish(run, before=DieBeforeStep(3)) == -signal.SIGKILL
    assert status(run) == "lost"
    assert finish(run, "--resume") == 0
    notes = [event.text for event in events_of(run) if isinstance(event, Note)]
    assert "there is no checkpoint: the run begins at step 1" in notes
    assert all_steps(run) == [1, 2, 1, 2, 3, 4, 5, 6]
    whole = workshop.finished()
    assert figures(run) == figures(whole)


def test_a_repeated_step_supersedes_the_earlier_one_and_numbers_go_on(workshop: Workshop) -> None:
    run = workshop.new(max_steps=5)
    assert finish(run, before=DieBeforeStep(4)) == -signal.SIGKILL
    assert finish(run, "--resume") == 0
    assert [step.step for step in read_steps(run)] == [1, 2, 3, 4, 5]
    assert all_steps(run) == [1, 2, 3, 3, 4, 5]
    follower = Follower(run.events)
    numbers = [recorded.seq for recorded in follower.read()]
    assert numbers == list(range(len(numbers)))


def test_a_finished_run_does_no_further_step(workshop: Workshop) -> None:
    run = workshop.finished()
    adapter = (run.adapter / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UserError, match="has finished"):
        resume_run(run)
    assert finish(run, "--resume") == 0
    assert all_steps(run) == [1, 2, 3, 4, 5, 6]
    assert last_end(run).outcome == "finished"
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == adapter


def test_a_run_that_went_back_stays_there_when_it_is_killed(workshop: Workshop) -> None:
    run = workshop.finished(val_set_size=0.1, eval_steps=2)
    whole, scores = figures(run), evaluations(run)
    assert (run.checkpoints / "BEST").read_text() == "step-6"
    back = ("--resume", "--from", "step-2")
    assert finish(run, *back, before=DieBeforeStep(2)) == -signal.SIGKILL
    marks = [(run.checkpoints / name).read_text() for name in ("LATEST", "BEST")]
    assert marks == ["step-2", "step-2"], "what came later belongs to the way not taken"
    assert finish(run, "--resume") == 0
    assert all_steps(run) == [1, 2, 3, 4, 5, 6, 3, 3, 4, 5, 6]
    assert figures(run) == whole
    assert evaluations(run) == scores


def test_a_checkpoint_that_is_not_there_is_named(workshop: Workshop) -> None:
    run = workshop.finished(max_steps=2)
    assert finish(run, "--resume", "--from", "step-9") == 1
    assert last_end(run).what == "The checkpoint step-9 cannot be read."
    assert (run.checkpoints / "LATEST").read_text() == "step-2"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over(workshop: Workshop, name: str) -> None:
    run = workshop.finished()
    whole = figures(run)
    damaged = run.checkpoints / "step-6" / name
    damaged.write_bytes(damaged.read_bytes()[:-20])
    assert finish(run, "--resume", "--from", "step-6") == 1
    assert last_end(run).what == "The checkpoint step-6 cannot be read."
    assert finish(run, "--resume") == 0
    assert all_steps(run) == [1, 2, 3, 4, 5, 6, 5, 6]
    assert figures(run) == whole
