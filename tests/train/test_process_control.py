"""Commands to a live run: each is answered, and does what its word says."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess

import pytest

from engine.events import Ack, Phase, Sample, Saved
from engine.runs import Request, RunFolder, ask, is_locked, send, status
from tests.fakes.processes import ROOT, wait_until
from tests.support.trainers import (
    LORA,
    Workshop,
    events_of,
    figures,
    finish,
    last_end,
    start,
    training,
    wait,
)
from tests.support.written_runs import read_steps

KEYS = LORA | {"max_steps": 5_000, "save_steps": 5_000, "lr_scheduler": "constant"}
QUESTION = "How many knots is force 3?"


@pytest.fixture(scope="module")
def long_run(workshop: Workshop) -> Iterator[RunFolder]:
    run = workshop.new()
    with training(run, steps=2):
        assert outcome(run, "pause") == "done"
        yield run


@pytest.fixture
def live(long_run: RunFolder) -> Iterator[RunFolder]:
    """A run that trains; one for many tests, paused between them."""
    assert outcome(long_run, "resume") == "done"
    yield long_run
    assert outcome(long_run, "pause") == "done"


def outcome(run: RunFolder, word: Request) -> str:
    return ask(run, word, timeout_seconds=60).outcome


def test_a_paused_run_makes_no_step_until_it_is_resumed(live: RunFolder) -> None:
    assert outcome(live, "pause") == "done"
    before = len(read_steps(live))
    assert status(live) == "paused"
    time.sleep(0.5)
    assert len(read_steps(live)) == before
    assert outcome(live, "resume") == "done"
    wait_until(lambda: len(read_steps(live)) > before + 1, 60)
    assert status(live) == "running"


def test_a_paused_run_saves_and_stays_paused(live: RunFolder) -> None:
    outcome(live, "pause")
    done = len(read_steps(live))
    assert outcome(live, "save") == "done"
    assert Saved(done, f"checkpoints/step-{done}") in events_of(live)
    assert (live.checkpoints / "LATEST").read_text() == f"step-{done}"
    assert status(live) == "paused"
    assert len(read_steps(live)) == done


def test_a_paused_run_can_be_stopped(workshop: Workshop) -> None:
    run = workshop.new()
    with training(run, steps=2) as process:
        outcome(run, "pause")
        done = len(read_steps(run))
        assert outcome(run, "stop") == "done"
        assert wait(process) == 0
    assert (last_end(run).outcome, last_end(run).step) == ("stopped", done)
    assert (run.checkpoints / "LATEST").read_text() == f"step-{done}"
    assert status(run) == "stopped"


def test_a_save_is_answered_when_it_is_on_the_disk(live: RunFolder) -> None:
    answer = ask(live, "save", timeout_seconds=60)
    events = events_of(live)
    saved = events[events.index(answer) - 1]
    assert isinstance(saved, Saved)
    assert (live.path / saved.path / "state.json").is_file()


def test_a_sample_is_answered_with_what_the_model_says_now(workshop: Workshop) -> None:
    run = workshop.new(sample_prompts=[QUESTION])
    with training(run, steps=1):
        outcome(run, "pause")
        assert outcome(run, "sample") == "done"
        samples = [event for event in events_of(run) if isinstance(event, Sample)]
        assert [(s.prompt, s.when) for s in samples] == [(QUESTION, "before"), (QUESTION, "during")]
        assert samples[1].step == len(read_steps(run))
        assert samples[0].text


def test_commands_of_before_the_start_mean_nothing(workshop: Workshop) -> None:
    run = workshop.new(max_steps=2)
    old = [
        {"id": f"old-{word}", "command": word, "time": time.time() - 5}
        for word in ("stop", "pause", "save", "sample")
    ]
    run.control.write_text("".join(json.dumps(each) + "\n" for each in old))
    assert wait(start(run)) == 0
    assert last_end(run).outcome == "finished"
    assert not [event for event in events_of(run) if isinstance(event, Ack)]


def test_lines_that_are_no_commands_do_no_harm(live: RunFolder) -> None:
    with live.control.open("ab") as file:
        file.write(b'\xff\x00 no json\n{"id": "x", "command": "explode", "time": 9e9}\n[]\n')
    assert outcome(live, "save") == "done"


def test_each_of_many_commands_at_once_is_answered(live: RunFolder) -> None:
    words: list[Request] = ["save", "pause", "save", "resume"]
    identities = [send(live, word) for word in words]

    def answered() -> list[str]:
        return [event.id for event in events_of(live) if isinstance(event, Ack)]

    wait_until(lambda: set(identities) <= set(answered()), 60)
    assert sorted(answered()) == sorted(set(answered()))


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
    assert (last_end(run).outcome, last_end(run).step) == ("stopped", 0)
    assert not read_steps(run)


def test_a_signal_before_the_first_step_ends_the_run_at_the_next_phase(workshop: Workshop) -> None:
    run = workshop.new()
    process = start(run)
    wait_until(lambda: any(isinstance(event, Phase) for event in events_of(run)), 60)
    send_signal(process, signal.SIGTERM)
    assert wait(process) == 0
    assert (last_end(run).outcome, last_end(run).step) == ("stopped", 0)
    assert not {e.name for e in events_of(run) if isinstance(e, Phase)} & {"prepared", "load"}
    assert not run.checkpoints.exists()


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
