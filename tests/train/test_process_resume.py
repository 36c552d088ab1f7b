"""Going on, going back, and what is refused because it would quietly train something else."""

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UserError
from engine.events import Note, Phase, Step
from engine.launch import resume_run
from engine.runs import Follower, RunFolder, status
from tests.fakes.processes import wait_until
from tests.support.trainers import (
    LORA,
    QLORA,
    DieAfter,
    DieBeforeStep,
    Workshop,
    evaluations,
    events_of,
    figures,
    finish,
    last_end,
    start,
    training,
    wait,
)
from tests.support.written_runs import read_steps

KEYS = LORA | {"max_steps": 6, "save_steps": 2}


def notes_of(run: RunFolder) -> list[str]:
    """What a run said in sentences."""
    return [event.text for event in events_of(run) if isinstance(event, Note)]


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
    workshop.configure(run)  # undone, it goes on
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
    assert "there is no checkpoint: the run begins at step 1" in notes_of(run)
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
def test_a_damaged_checkpoint_is_passed_over_and_damaged_rows_are_prepared_again(
    workshop: Workshop, name: str
) -> None:
    run = workshop.finished()
    whole = figures(run)
    damaged = run.checkpoints / "step-6" / name
    damaged.write_bytes(damaged.read_bytes()[:-20])
    assert finish(run, "--resume", "--from", "step-6") == 1
    assert last_end(run).what == "The checkpoint step-6 cannot be read."
    assert name in last_end(run).why
    ids = bytearray((run.data / "ids").read_bytes())
    ids[len(ids) // 2] ^= 1
    (run.data / "ids").write_bytes(ids)  # of the store, too: they are links
    assert finish(run, "--resume") == 0
    assert all_steps(run) == [1, 2, 3, 4, 5, 6, 5, 6]
    assert figures(run) == whole
    said = notes_of(run)
    assert f"step-6 is damaged and passed over: {name} is not as it was saved" in said
    repaired = "the prepared rows were damaged (ids was not as it was written): prepared again"
    assert said.count(repaired) == 1


def test_what_was_changed_between_stop_and_resume_is_noted(workshop: Workshop) -> None:
    run = workshop.finished(max_steps=2)
    assert not [text for text in notes_of(run) if " until step-" in text]
    workshop.configure(run, max_steps=3, learning_rate=0.002, gradient_checkpointing=True)
    assert finish(run, "--resume") == 0
    changes = [
        "gradient_checkpointing was false until step-2 and is true from there on",
        "learning_rate was 0.01 until step-2 and is 0.002 from there on",
        "max_steps was 2 until step-2 and is 3 from there on",
    ]
    assert [text for text in notes_of(run) if text in changes] == changes


def test_no_number_right_after_a_resume_is_sent_further_back(workshop: Workshop) -> None:
    run = workshop.finished(max_steps=2)
    workshop.configure(run, learning_rate=1e30, save_steps=1)
    assert finish(run, "--resume") == 1
    failed = last_end(run)
    assert "Look at those rows" in failed.fix
    assert finish(run, "--resume") == 1
    end = last_end(run)
    assert (end.what, end.step) == (failed.what, failed.step)
    assert f"after step-{end.step} was put back" in end.why
    assert end.fix == (
        f"Go further back: `windtunnel resume {run.path} --from step-{end.step - 1}`."
    )


METHODS = {"lora": LORA, "qlora": QLORA}
SAVING = {"val_set_size": 0.1, "eval_steps": 4, "save_total_limit": 2, "max_steps": 12}
TRIALS = 20
FAST = {"lora": 1, "qlora": 1}
"""Of the 20 trials, those that are not marked slow."""


class Trials:
    """Runs to be killed, and for each method the run that nobody stopped."""

    def __init__(self, folder: Path) -> None:
        self._workshop = Workshop(folder, SAVING)

    def new(self, method: str) -> RunFolder:
        return self._workshop.new(**METHODS[method])

    def whole(self, method: str) -> RunFolder:
        return self._workshop.finished(**METHODS[method])

    def assert_as_never_stopped(self, run: RunFolder, method: str) -> None:
        whole = self.whole(method)
        assert figures(run) == figures(whole)
        assert evaluations(run) == evaluations(whole)
        assert last_end(run).outcome == "finished"
        for name in ("adapter/adapter_model.safetensors", "checkpoints/BEST"):
            assert (run.path / name).read_bytes() == (whole.path / name).read_bytes(), name
        kept = {path.name for path in run.checkpoints.iterdir()}
        assert kept == {path.name for path in whole.checkpoints.iterdir()}


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(tmp_path_factory.mktemp("kill"))


def numbered() -> list[object]:
    return [
        pytest.param(method, n, marks=pytest.mark.slow if n >= FAST[method] else ())
        for method in METHODS
        for n in range(TRIALS)
    ]


def kill_at_random(trials: Trials, method: str, chance: random.Random) -> RunFolder:
    """A run that was killed from outside; another one where the first was faster than the kill."""
    while True:
        run = trials.new(method)
        with training(run, steps=chance.randint(1, 11)) as process:
            time.sleep(chance.uniform(0, 0.05))
            process.kill()
        if status(run) == "lost":
            assert wait(process) == -signal.SIGKILL
            return run


@pytest.mark.parametrize(("method", "trial"), numbered())
def test_killed_at_any_steps_has_the_same_losses(trials: Trials, method: str, trial: int) -> None:
    chance = random.Random(f"{method} {trial}")
    run = kill_at_random(trials, method, chance)
    saved, done = latest_step(run), len(figures(run))
    assert finish(run, "--resume") == 0, run.log.read_text()
    trials.assert_as_never_stopped(run, method)
    steps = [event.step for event in events_of(run) if isinstance(event, Step)]
    assert steps[done:] == list(range(12 + 1 + done - len(steps), 12 + 1))
    assert len(steps) - done <= 12 - saved, "it went on from its last checkpoint"


def latest_step(run: RunFolder) -> int:
    latest = run.checkpoints / "LATEST"
    return int(latest.read_text("utf-8").removeprefix("step-")) if latest.exists() else 0


def die_and_resume(trials: Trials, method: str, made: str, operation: int) -> bool:
    """Whether the run died at that operation; it is then resumed, and ends as it should."""
    run = trials.new(method)
    exit_status = finish(run, before=DieAfter(made, operation))
    if exit_status == 0:
        return False
    assert exit_status == -signal.SIGKILL, run.log.read_text()
    assert finish(run, "--resume") == 0, run.log.read_text()
    trials.assert_as_never_stopped(run, method)
    return True


def test_a_run_killed_inside_a_save_ends_with_the_same_losses(trials: Trials) -> None:
    """Between the rename of the checkpoint and the one of LATEST."""
    assert die_and_resume(trials, "lora", "step-6.partial", 15)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("made", ["step-3.partial", "step-8.partial", "adapter.partial"])
def test_killed_at_every_file_operation_of_a_save(trials: Trials, method: str, made: str) -> None:
    """step-3 is the first save; step-8 is a best one, after which an older one is removed."""
    last = {"step-3.partial": 22, "step-8.partial": 34, "adapter.partial": 9}[made]
    for operation in range(1, last + 1):
        assert die_and_resume(trials, method, made, operation), operation


@pytest.mark.slow
@pytest.mark.parametrize("operation", range(13, 19))
def test_a_run_may_be_killed_while_it_replaces_a_checkpoint(trials: Trials, operation: int) -> None:
    """A run that went back saves a step that is there already: two renames follow each other."""
    run = trials.whole("lora")
    back = ("--resume", "--from", "step-9")
    assert finish(run, *back, before=DieAfter("step-12.partial", operation)) == -signal.SIGKILL
    assert finish(run, "--resume") == 0, run.log.read_text()
    trials.assert_as_never_stopped(run, "lora")


def test_a_kill_between_the_two_marks_leaves_no_outdated_best(trials: Trials) -> None:
    run = trials.new("lora")
    assert finish(run, before=DieAfter("step-8.partial", 19)) == -signal.SIGKILL
    marks = [(run.checkpoints / name).read_text() for name in ("LATEST", "BEST")]
    assert marks == ["step-8", "step-4"], "the kill was to fall between them"
    assert finish(run, "--resume", before=DieBeforeStep(2)) == -signal.SIGKILL
    assert (run.checkpoints / "BEST").read_text() == "step-8"


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["model", "prepared", "load", "evaluate", "save", "export"])
def test_a_run_may_be_killed_in_every_phase(trials: Trials, phase: str) -> None:
    run = trials.new("lora")
    process = start(run)
    wait_until(lambda: _in_phase(run, phase), 60)
    process.kill()
    process.join()
    assert finish(run, "--resume") == 0, run.log.read_text()
    trials.assert_as_never_stopped(run, "lora")


def _in_phase(run: RunFolder, name: str) -> bool:
    return any(isinstance(event, Phase) and event.name == name for event in events_of(run))


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_losses(trials: Trials) -> None:
    run = trials.new("lora")
    arguments: tuple[str, ...] = ()
    for number in (3, 6, 2, 5):
        assert finish(run, *arguments, before=DieBeforeStep(number)) == -signal.SIGKILL
        arguments = ("--resume",)
    assert finish(run, "--resume") == 0, run.log.read_text()
    trials.assert_as_never_stopped(run, "lora")


@pytest.mark.slow
def test_two_threads_repeat_their_losses_too(trials: Trials) -> None:
    whole, killed = trials.new("lora"), trials.new("lora")
    assert wait(start(whole, threads=2)) == 0
    assert wait(start(killed, before=DieBeforeStep(8), threads=2)) == -signal.SIGKILL
    assert wait(start(killed, "--resume", threads=2)) == 0
    assert figures(killed) == figures(whole)
