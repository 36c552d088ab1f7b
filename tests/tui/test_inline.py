"""`windtunnel new` on a pseudo terminal, asked by the real questionary."""

import json
import signal
from pathlib import Path

import pytest

from engine.config import read_config
from engine.interrupt import INTERRUPTED
from engine.wizard.data import find_newest, list_sources
from tests.fakes.processes import ROOT
from tests.support.extras import needs_trainer
from tests.support.terminal import Terminal

DOWN, ENTER, ESCAPE, CONTROL_C = "\x1b[B", "\r", "\x1b", "\x03"


def answer(terminal: Terminal, question: str, keys: str = ENTER) -> None:
    """Wait for the list of a step, then press."""
    terminal.wait_for(f"{question} ")
    terminal.wait_for("ctrl+c leaves)")
    terminal.written = ""
    terminal.press(keys)


def to_review(terminal: Terminal) -> None:
    for question in ("Machine", "Model", "Data", "Data", "Preview", "Plan"):
        answer(terminal, question)


@pytest.mark.slow
def test_the_config_is_written_where_it_was_asked_for_and_left_there(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    terminal = Terminal("new", "-o", str(path), "--assume", "RTX 4090")
    terminal.wait_for("plan for RTX 4090")  # what was assumed is the recommended answer
    to_review(terminal)
    answer(terminal, "Review")
    terminal.wait_for("path, Enter for")
    terminal.press(ENTER)
    terminal.wait_for("not now")
    answer(terminal, "Review")  # on `not now`: the card is not here
    assert terminal.end() == 0
    config = read_config(path).config
    assert config.datasets[0].path == "sample:harbour-pilot"
    assert "#" in path.read_text("utf-8")


@pytest.mark.slow
def test_reasons_learned_tokens_and_memory_stand_beside_the_questions(tmp_path: Path) -> None:
    terminal = Terminal("new", WINDTUNNEL_RUNS=str(tmp_path))
    answer(terminal, "Machine", DOWN)
    terminal.wait_for("Everything but the start works for it")  # the reason of the lit answer
    terminal.press(f"{DOWN}{ENTER}")
    for question in ("Model", "Data", "Data"):
        answer(terminal, question)
    terminal.wait_for("+ think")
    answer(terminal, "Preview")
    terminal.wait_for("spare ")
    answer(terminal, "Plan", ESCAPE)
    answer(terminal, "Preview", CONTROL_C)
    assert terminal.end() == INTERRUPTED
    assert "Traceback" not in terminal.written


def test_a_refused_text_is_asked_again_with_its_sentence(tmp_path: Path) -> None:
    terminal = Terminal("new", WINDTUNNEL_RUNS=str(tmp_path))
    answer(terminal, "Machine", f"{DOWN}{ENTER}")
    terminal.wait_for("GPU, such as")
    terminal.press(f"GTX 9{ENTER}")
    terminal.wait_for("GTX 9")
    terminal.wait_for("✗ ")
    terminal.press(ESCAPE)
    answer(terminal, "Machine", CONTROL_C)
    assert terminal.end() == INTERRUPTED


@needs_trainer
def test_a_run_is_started_and_goes_on_when_it_is_left(tmp_path: Path) -> None:
    """From nothing to a config and a run, by Enter alone."""
    home = tmp_path / "home"
    terminal = Terminal("new", "-o", str(tmp_path / "a.yml"), WINDTUNNEL_RUNS=str(home))
    to_review(terminal)
    answer(terminal, "Review")
    terminal.wait_for("path, Enter for")
    terminal.press(ENTER)
    terminal.wait_for("not now")
    answer(terminal, "Review")
    terminal.wait_for("ctrl+c leaves it running")
    terminal.wait_for("starting PyTorch")
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for("is still training: windtunnel watch")
    assert terminal.end() == INTERRUPTED


def test_rows_that_teach_nothing_cannot_be_taken_and_say_why(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So.", "weight": 0},
    ]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": turns}) + "\n", "utf-8")
    terminal = Terminal("new", "--ascii", WINDTUNNEL_RUNS=str(tmp_path))
    for question in ("Machine", "Model"):
        answer(terminal, question)
    terminal.wait_for("sample: harbour-pilot")
    answer(terminal, "Data", DOWN * len(list_sources(find_newest(ROOT))[:-2]) + ENTER)
    terminal.wait_for("path ")
    terminal.press(f"{rows}{ENTER}")
    answer(terminal, "Data")
    terminal.wait_for("next row")
    assert terminal.written.isascii()
    answer(terminal, "Preview", CONTROL_C)
    assert terminal.end() == INTERRUPTED
