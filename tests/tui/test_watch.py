"""`windtunnel watch`: a screen on a terminal, lines elsewhere, a sentence for no run."""

import subprocess
import sys
from pathlib import Path

import pytest

from engine.events import Ended
from engine.runs import create_run
from tests.fakes.processes import PATIENCE_SECONDS, ROOT, run_python, running_fake
from tests.support.terminal import Terminal
from tests.support.written_runs import written_run


def test_on_a_terminal_it_opens_the_newest_run_and_q_leaves_it_running(home: Path) -> None:
    written_run(create_run("older").path, 3, Ended("finished", 3))
    with running_fake(create_run("newer"), steps=100_000, step_seconds=0.01) as trainer:
        terminal = Terminal("watch")
        terminal.wait_for("training")
        terminal.press("q")
        assert terminal.end() == 0
        assert terminal.written.rstrip().endswith("still training: windtunnel watch newer")
        assert trainer.poll() is None


@pytest.mark.parametrize(("arguments", "environment"), [(("--plain",), {}), ((), {"TERM": "dumb"})])
def test_plain_and_a_dumb_terminal_get_lines_without_escapes(
    home: Path, arguments: tuple[str, ...], environment: dict[str, str]
) -> None:
    written_run(create_run("told").path, 20, Ended("finished", 20))
    terminal = Terminal("watch", "told", *arguments, **environment)
    assert terminal.end() == 0
    assert "\x1b" not in terminal.written
    assert "step 17: held-out loss 1.130" in terminal.written
    assert "told is finished, step 20 of 99" in terminal.written


def test_a_pipe_gets_lines(home: Path) -> None:
    written_run(create_run("told").path, 20, Ended("finished", 20))
    done = run_python("-m", "tui", "watch", "told")
    assert (done.returncode, done.stderr) == (0, "")
    assert "told is finished" in done.stdout
    assert "\x1b" not in done.stdout


def test_the_engine_alone_follows_too(home: Path) -> None:
    written_run(create_run("told").path, 20, Ended("finished", 20))
    command = [sys.executable, "-m", "engine", "watch", "told"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0
    assert "told is finished" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [((), "There is no run to watch."), (("nobody",), "There is no run called 'nobody'.")],
)
def test_no_such_run_is_a_sentence_and_exit_status_2(
    home: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    done = run_python("-m", "tui", "watch", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(sentence)
    assert len(done.stderr.strip().splitlines()) == 3


def test_ascii_writes_nothing_else(home: Path) -> None:
    with running_fake(create_run("live"), steps=100_000, step_seconds=0.01):
        terminal = Terminal("watch", "live", "--ascii")
        terminal.wait_for("smoothed")
        terminal.press("q")
        assert terminal.end() == 0
    assert terminal.written.isascii()


def test_the_wizard_without_a_terminal_says_so_and_leaves_with_2() -> None:
    done = run_python("-m", "tui")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("No answers can be asked here.")


def test_a_screen_loads_no_library_that_trains_or_tokenizes(home: Path) -> None:
    code = "import sys, tui.app, tui.screens.train, tui.screens.runs; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "textual" in loaded
    heavy = {"torch", "transformers", "peft", "datasets", "mistral_common", "numpy", "pydantic"}
    assert not loaded & heavy
