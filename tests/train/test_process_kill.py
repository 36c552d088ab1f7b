"""A run that is killed, at any moment, ends as if it had never been stopped: to the last bit."""

import itertools
import random
import signal
import time
from pathlib import Path

import pytest

from engine.events import Phase, Step
from engine.runs import RunFolder, status
from tests.train.processes import (
    LORA,
    QLORA,
    DieAfter,
    evaluations,
    events_of,
    figures,
    finish,
    last_end,
    new_run,
    training,
    write_model,
)

METHODS = {"lora": LORA, "qlora": QLORA}
KEYS = {"val_set_size": 0.1, "eval_steps": 4, "save_total_limit": 2, "max_steps": 12}
TRIALS = 20
FAST = {"lora": 2, "qlora": 1}
"""Of the 20 trials, those that are not marked slow."""


class Workshop:
    """Runs on one base, and for each method the run that nobody stopped."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, write_model(folder / "base")
        self._numbers = itertools.count()
        self._whole: dict[str, RunFolder] = {}

    def new(self, method: str) -> RunFolder:
        path = self.folder / f"{method}-{next(self._numbers)}"
        return new_run(path, self.base, METHODS[method] | KEYS)

    def whole(self, method: str) -> RunFolder:
        if method not in self._whole:
            run = self.new(method)
            assert finish(run) == 0, run.log.read_text()
            self._whole[method] = run
        return self._whole[method]

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
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("kill"))


def trials() -> list[object]:
    return [
        pytest.param(method, n, marks=pytest.mark.slow if n >= FAST[method] else ())
        for method in METHODS
        for n in range(TRIALS)
    ]


@pytest.mark.parametrize(("method", "trial"), trials())
def test_a_run_killed_at_a_random_step_ends_with_the_same_losses(
    workshop: Workshop, method: str, trial: int
) -> None:
    chance = random.Random(f"{method} {trial}")
    run = workshop.new(method)
    with training(run, steps=chance.randint(1, 10)) as process:
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
    assert process.exitcode == -signal.SIGKILL
    assert status(run) == "lost"
    saved, done = latest_step(run), len(figures(run))
    assert finish(run, "--resume") == 0, run.log.read_text()
    workshop.assert_as_never_stopped(run, method)
    steps = [event.step for event in events_of(run) if isinstance(event, Step)]
    assert steps[done] == saved + 1, "it went on from its last checkpoint"


def latest_step(run: RunFolder) -> int:
    latest = run.checkpoints / "LATEST"
    return int(latest.read_text("utf-8").removeprefix("step-")) if latest.exists() else 0


def die_and_resume(workshop: Workshop, method: str, made: str, operation: int) -> bool:
    """Whether the run died there; then it was resumed, and ended as it should."""
    run = workshop.new(method)
    exit_status = finish(run, before=DieAfter(made, operation))
    if exit_status == 0:
        return False
    assert exit_status == -signal.SIGKILL, run.log.read_text()
    if made.startswith("step-"):
        assert isinstance(events_of(run)[-1], Phase)
    assert finish(run, "--resume") == 0, run.log.read_text()
    workshop.assert_as_never_stopped(run, method)
    return True


def test_a_run_killed_inside_a_save_ends_with_the_same_losses(workshop: Workshop) -> None:
    assert die_and_resume(workshop, "lora", "step-6.partial", 8)
