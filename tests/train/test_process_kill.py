"""A run that is killed, at any moment, ends as if it had never been stopped: to the last bit."""

import random
import signal
import time
from pathlib import Path

import pytest

from engine.events import Phase, Step
from engine.runs import RunFolder, status
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

METHODS = {"lora": LORA, "qlora": QLORA}
SAVING = {"val_set_size": 0.1, "eval_steps": 4, "save_total_limit": 2, "max_steps": 12}
TRIALS = 20
FAST = {"lora": 2, "qlora": 1}
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
def test_killed_at_random_steps_has_the_same_losses(
    trials: Trials, method: str, trial: int
) -> None:
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
    last = {"step-3.partial": 20, "step-8.partial": 33, "adapter.partial": 6}[made]
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
