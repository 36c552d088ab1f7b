"""A newcomer's way in a real terminal: Enter until it trains, leave, come back, stop, resume."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.runs import find_run, status
from tests.support.extras import needs_trainer

pytestmark = [
    pytest.mark.slow,
    needs_trainer,
    pytest.mark.skipif(not shutil.which("tmux"), reason="needs tmux, which draws the terminal"),
]

SECONDS = 240.0
"""For the longest wait: from a resume to the last of 150 steps."""
WINDTUNNEL = str(Path(sys.executable).with_name("windtunnel"))
"""By its path: a shell of tmux sets its own PATH."""


class Terminal:
    """An 80x24 terminal in a tmux server of its own."""

    def __init__(self, socket: str) -> None:
        self._tmux = ["tmux", "-L", socket, "-f", "/dev/null"]

    def open(self, folder: Path, environment: dict[str, str]) -> None:
        variables = [f"-e{name}={value}" for name, value in environment.items()]
        command = ["new-session", "-d", "-s", "t", "-x", "80", "-y", "24", *variables]
        subprocess.run([*self._tmux, *command, "-c", str(folder), "sh"], check=True)

    def close(self) -> None:
        subprocess.run([*self._tmux, "kill-server"], check=False, capture_output=True)

    def press(self, *keys: str) -> None:
        subprocess.run([*self._tmux, "send-keys", "-t", "t", *keys], check=True)

    def screen(self) -> str:
        command = [*self._tmux, "capture-pane", "-p", "-t", "t"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def wait_for(self, condition: str | Callable[[str], bool]) -> str:
        """The screen once it holds the text; it is looked at, never slept for."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            screen = self.screen()
            if condition in screen if isinstance(condition, str) else condition(screen):
                return screen
            time.sleep(0.1)
        raise AssertionError(f"{condition!r} did not come:\n{self.screen()}")


def step_on(screen: str) -> int:
    """The step that the Train page shows, 0 before the first."""
    found = re.search(r"step (\d+)/150", screen)
    return int(found[1]) if found else 0


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(f"windtunnel-{os.getpid()}")
    environment = {
        "WINDTUNNEL_RUNS": str(tmp_path / "runs"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "TERM": "xterm-256color",
    }
    terminal.open(tmp_path, environment)
    yield terminal
    terminal.close()


def test_only_enter_trains_and_nothing_is_ever_lost(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WINDTUNNEL_RUNS", str(tmp_path / "runs"))
    terminal.press(WINDTUNNEL, "Enter")
    for page, ready in (
        ("Machine", "❯ this computer's CPU"),
        ("Model", "❯ Demo (tiny)"),
        ("Data", "104 "),
        ("Preview", "how much is learned"),
        ("Plan", "✓ fits"),
        ("Review", "❯ start now"),
    ):
        terminal.wait_for(f"● {page}")
        terminal.wait_for(ready)
        terminal.press("Enter")
    first = terminal.wait_for(lambda screen: step_on(screen) >= 3)
    later = terminal.wait_for(lambda screen: step_on(screen) >= step_on(first) + 5)
    assert first.splitlines()[3:12] != later.splitlines()[3:12]  # the curve moves

    terminal.press("q")
    terminal.wait_for("still training: windtunnel watch")
    run = find_run("harbour-pilot-demo-tiny")
    assert status(run) == "running"

    terminal.press(f"clear; {WINDTUNNEL} watch", "Enter")
    terminal.wait_for("▶ training")
    terminal.press("s")
    terminal.wait_for("enter stops")
    terminal.press("Enter")
    terminal.wait_for("· stopped")
    assert status(run) == "stopped"

    terminal.press("r")
    terminal.wait_for("▶ training")
    terminal.wait_for("✓ done")
    assert status(run) == "finished"
    assert (run.adapter / "adapter_model.safetensors").exists()
