"""What a scheduler, a keyboard and a closed terminal do to a run."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from engine.events import Phase, Sample
from engine.launch import launch
from engine.runs import is_locked, status
from tests.fakes.processes import ROOT, wait_until
from tests.support.run_folders import read_steps
from tests.support.trainers import (
    Workshop,
    events_of,
    figures,
    finish,
    last_end,
    start,
    training,
    wait,
)


def send_signal(process: BaseProcess, number: signal.Signals) -> None:
    assert process.pid is not None
    os.kill(process.pid, number)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_signal_saves_ends_and_resume_is_equal(workshop: Workshop, number: signal.Signals) -> None:
    run = workshop.new()
    with training(run, steps=3) as process:
        send_signal(process, number)
        assert wait(process) == 0
    end = last_end(run)
    assert (end.outcome, end.what) == ("stopped", "")
    done = end.step
    assert [step.step for step in read_steps(run)] == list(range(1, done + 1))
    assert (run.checkpoints / "LATEST").read_text() == f"step-{done}"
    assert not run.adapter.exists()
    whole = workshop.finished(max_steps=done + 4)
    workshop.configure(run, max_steps=done + 4)
    assert finish(run, "--resume") == 0
    assert figures(run) == figures(whole)
    assert last_end(run).outcome == "finished"


def test_a_second_signal_leaves_at_once(workshop: Workshop) -> None:
    """While it answers its questions nobody saves: only the second signal ends it."""
    run = workshop.new(sample_prompts=["How many knots is force 3?"] * 40)
    process = start(run)
    wait_until(lambda: any(isinstance(event, Sample) for event in events_of(run)), 60)
    send_signal(process, signal.SIGTERM)
    time.sleep(0.3)
    assert process.is_alive()
    send_signal(process, signal.SIGTERM)
    assert wait(process, 20) == 130
    assert status(run) == "lost"
    assert not read_steps(run)


def test_a_signal_while_loading_ends_the_run_before_its_first_answer(workshop: Workshop) -> None:
    run = workshop.new(sample_prompts=["How many knots is force 3?"] * 40, val_set_size=0.2)
    process = start(run)
    wait_until(lambda: any(isinstance(event, Phase) for event in events_of(run)), 60)
    send_signal(process, signal.SIGTERM)
    assert wait(process) == 0
    assert (last_end(run).outcome, last_end(run).step) == ("stopped", 0)
    assert not [event for event in events_of(run) if isinstance(event, Sample)]
    assert not list(run.checkpoints.iterdir())


def test_a_hangup_means_nothing_to_a_run_without_a_terminal(workshop: Workshop) -> None:
    run = workshop.new()
    with training(run, steps=1) as process:
        send_signal(process, signal.SIGHUP)
        before = len(read_steps(run))
        wait_until(lambda: len(read_steps(run)) > before + 3, 60)
        assert process.is_alive()


LAUNCHER = """
import sys, time
from pathlib import Path
from engine.launch import launch
from engine.runs import RunFolder
launch(RunFolder(Path(sys.argv[1])), detach=False)
time.sleep(60)
"""


def test_what_kills_the_group_of_a_foreground_run_kills_the_run(workshop: Workshop) -> None:
    run = workshop.new()
    command = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(run.path)], cwd=ROOT, start_new_session=True
    )
    wait_until(lambda: is_locked(run), 60)
    os.killpg(command.pid, signal.SIGKILL)
    command.wait()
    wait_until(lambda: not is_locked(run))
    assert status(run) in ("lost", "waiting")


def test_engine_folder(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one run here that starts the way a person's runs do, with nothing imported before."""
    for name in ("engine", "torch", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    run = workshop.new(max_steps=2)
    process = launch(run, detach=True)
    assert process.wait(120) == 0, run.log.read_text()
    assert last_end(run).outcome == "finished"
    assert "not this one" not in run.log.read_text()
    assert run.adapter.is_dir()
