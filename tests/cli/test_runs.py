"""`runs`, `pause`, `resume` and `stop` as a person and a script use them."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cyclopts
import pytest

import engine.launch
from engine.cli import build_app, runs
from engine.errors import UserError, WorkError
from engine.events import Ended, EventWriter
from engine.runs import RunFolder, ask, create_run, is_locked, status
from tests.fakes.engine import loss_at, step_event
from tests.fakes.processes import (
    ROOT,
    fake_environment,
    processes_of,
    running_fake,
    wait_until,
)
from tests.support.run_folders import read_steps

pytestmark = pytest.mark.usefixtures("home")

PROGRAM = (
    "import sys; from engine.cli import main; from engine.cli.terminal import Host; "
    "sys.exit(main(host=Host(trainer='tests.fakes.engine')))"
)


@pytest.fixture
def app() -> cyclopts.App:
    return build_app()


def call(app: cyclopts.App, *words: str) -> int:
    result = app(list(words), exit_on_error=False, print_error=False, result_action="return_value")
    return result or 0


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def start_resume(*words: str, **fake: object) -> "subprocess.Popen[str]":
    """`resume` in a process of its own, with the fake trainer in the place of the real one."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "resume", *words],
        cwd=ROOT,
        env={**os.environ, **fake_environment(**fake)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_runs_prints_the_keys_of_the_contract(
    run: RunFolder, app: cyclopts.App, capsys: pytest.CaptureFixture[str]
) -> None:
    with EventWriter(run.events) as events:
        events.emit(step_event(3))
        events.emit(Ended("finished", 3))
    call(app, "runs", "--json")
    (row,) = document(capsys)["runs"]
    assert row["name"] == "first"
    assert row["status"] == "finished"
    assert row["step"] == 3
    assert row["total_steps"] == step_event(3).total_steps
    assert row["loss"] == loss_at(3)
    call(app, "runs")
    assert capsys.readouterr().out.startswith("first  finished  step 3 of ")


def test_a_loss_that_is_not_a_number_is_null_in_json_and_nan_in_words(
    run: RunFolder, app: cyclopts.App, capsys: pytest.CaptureFixture[str]
) -> None:
    with EventWriter(run.events) as events:
        events.emit(dataclasses.replace(step_event(3), loss=math.nan))
    call(app, "runs", "--json")
    assert document(capsys)["runs"][0]["loss"] is None
    call(app, "runs")
    assert "loss nan" in capsys.readouterr().out


def test_no_runs_yet_is_an_empty_list_and_a_way_to_begin(
    app: cyclopts.App, capsys: pytest.CaptureFixture[str]
) -> None:
    call(app, "runs", "--json")
    assert document(capsys) == {"runs": []}
    call(app, "runs")
    assert "windtunnel demo" in capsys.readouterr().out


def test_a_run_that_cannot_be_read_hides_no_other(
    run: RunFolder, app: cyclopts.App, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    broken = create_run("r", output_dir=tmp_path / "\x1b[2J")
    broken.events.mkdir()
    call(app, "runs", "--json")
    captured = capsys.readouterr()
    assert [row["name"] for row in json.loads(captured.out)["runs"]] == ["first"]
    assert "cannot be read" in captured.err
    assert "\x1b" not in captured.err


def test_a_folder_name_cannot_speak_to_the_terminal(
    app: cyclopts.App, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    create_run("r", output_dir=tmp_path / "\x1b[2Jx")
    call(app, "runs")
    assert "\x1b" not in capsys.readouterr().out


def test_runs_of_another_folder_are_listed_with_the_option(
    run: RunFolder, app: cyclopts.App, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    create_run("other", home=tmp_path / "elsewhere")
    call(app, "runs", "--runs", str(tmp_path / "elsewhere"), "--json")
    assert [row["name"] for row in document(capsys)["runs"]] == ["other"]


def test_a_run_is_paused_resumed_and_stopped(
    run: RunFolder, app: cyclopts.App, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_fake(run, save_seconds=0.3) as process:
        wait_until(lambda: len(read_steps(run)) > 1)
        call(app, "pause", "first", "--json")
        paused = document(capsys)
        assert (paused["run"], paused["outcome"], paused["status"]) == ("first", "done", "paused")
        call(app, "resume", "first")
        assert capsys.readouterr().out.startswith("Running: first, step ")
        call(app, "stop", "first", "--json")
        stopped = document(capsys)
        assert stopped["status"] == "stopped"
        assert not is_locked(run), "what was asked to stop has saved and is gone"
        assert process.wait(60) == 0
    assert (run.checkpoints / "LATEST").read_text() == f"step-{stopped['step']}"


def test_what_the_run_refuses_is_an_error(run: RunFolder, app: cyclopts.App) -> None:
    with running_fake(run, refuses="pause"), pytest.raises(WorkError, match="refused to pause"):
        call(app, "pause", "first")


@pytest.mark.parametrize("command", ["pause", "stop"])
def test_a_run_that_is_not_running_cannot_be_asked(
    run: RunFolder, app: cyclopts.App, command: str
) -> None:
    with pytest.raises(UserError, match="is not running"):
        call(app, command, "first")


@pytest.mark.parametrize("command", ["pause", "stop", "resume"])
def test_an_unknown_run_is_answered_with_the_nearest(
    run: RunFolder, app: cyclopts.App, command: str
) -> None:
    with pytest.raises(UserError) as caught:
        call(app, command, "firts")
    assert "The nearest name is first." in caught.value.why


def test_a_run_that_does_not_answer_is_a_sentence(
    run: RunFolder, app: cyclopts.App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_ANSWER_SECONDS", 0.2)
    with running_fake(run) as process:
        wait_until(lambda: len(read_steps(run)) > 1)
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(WorkError, match="has not answered"):
            call(app, "stop", "first")


def test_a_run_with_long_steps_gets_longer_to_answer(run: RunFolder) -> None:
    assert runs._patience_seconds(run) == 60
    with EventWriter(run.events) as events:
        events.emit(dataclasses.replace(step_event(3), seconds=100.0))
    assert runs._patience_seconds(run) == 300


def test_a_dead_run_is_resumed_in_the_foreground_to_its_end(run: RunFolder) -> None:
    with running_fake(run) as process:
        wait_until(lambda: len(read_steps(run)) > 4)
        process.kill()
        process.wait()
    resumed = start_resume("first", "--json", steps=8)
    out, err = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, err
    assert json.loads(out)["status"] == "finished"
    assert [step.step for step in read_steps(run)] == list(range(1, 9))


def test_ctrl_c_in_the_foreground_saves_and_leaves_with_130(run: RunFolder) -> None:
    resumed = start_resume("first")
    wait_until(lambda: len(read_steps(run)) > 2)
    os.killpg(resumed.pid, signal.SIGINT)
    _, err = resumed.communicate(timeout=60)
    assert resumed.returncode == 130
    assert "Traceback" not in err
    assert status(run) == "stopped"
    assert "saved checkpoints/step-" in err


def test_a_run_that_fails_in_the_foreground_says_why(run: RunFolder) -> None:
    resumed = start_resume("first", fails_at=2)
    _, err = resumed.communicate(timeout=60)
    assert resumed.returncode != 0
    assert "The loss is NaN.\nIt diverged.\nLower lr.\n" in err


def test_a_run_that_is_killed_in_the_foreground_is_called_lost(run: RunFolder) -> None:
    resumed = start_resume("first")
    wait_until(lambda: len(read_steps(run)) > 2)
    (trainer,) = processes_of(run.path)
    os.kill(trainer, signal.SIGKILL)
    _, err = resumed.communicate(timeout=60)
    assert "The run first is lost." in err


def test_resume_in_the_background_returns_at_once(
    run: RunFolder, app: cyclopts.App, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed = start_resume("first", "--detach", "--json")
    out, err = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, err
    assert json.loads(out)["status"] == "running"
    assert ask(run, "stop", timeout_seconds=20).outcome == "done"
    wait_until(lambda: not is_locked(run))
    assert engine.child.TRAINER == "engine.train"
