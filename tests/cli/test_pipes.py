"""A reader that leaves, such as `head`, is no error: nothing is said of it."""

import os
import subprocess
import sys

import pytest

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
    assert (done.stderr, "Traceback" in done.stderr) == ("", False)
