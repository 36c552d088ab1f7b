"""A reader that leaves, such as `head`, is no error: nothing is said of it."""

import io
import os
import subprocess
import sys

import pytest

from engine.cli import main
from engine.cli.terminal import Host
from tests.fakes.processes import PATIENCE_SECONDS, ROOT


@pytest.mark.parametrize("program", ["tui", "engine"])
@pytest.mark.parametrize("words", [["--help"], ["models"], ["schema"]], ids=" ".join)
def test_a_command_whose_reader_has_left_says_nothing(program: str, words: list[str]) -> None:
    receiver, sender = os.pipe()
    os.close(receiver)
    done = subprocess.run(
        [sys.executable, "-m", program, *words],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=sender,
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    os.close(sender)
    left = 1 if words == ["--help"] else 0  # rich, which prints the help, leaves by itself
    assert (done.returncode, done.stderr) == (left, "")


class Leaving(io.StringIO):
    """A reader that leaves when the list of commands is there."""

    def write(self, text: str) -> int:
        if "THE WIZARD" in text:
            raise BrokenPipeError
        return super().write(text)


def test_nor_one_that_leaves_before_the_last_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Leaving())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert main(["--help"], Host(more_help="THE WIZARD")) == 0
