"""Real processes for tests: the fake trainer started by hand, and waiting without fixed naps."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from engine.runs import RunFolder
from engine.runs.lock import read_claim

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 120.0
"""Until a program that says nothing is taken for hung, on a machine that does other work too."""


def run_python(
    *arguments: str, cwd: Path = ROOT, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """This Python on `arguments` to its end, with nothing on its standard input."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


def printed_by(*arguments: str, cwd: Path = ROOT, **environment: str) -> str:
    """What this Python prints that ends well."""
    done = run_python(*arguments, cwd=cwd, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Poll until the condition holds; fails the test when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("what the test waits for has not happened")
        time.sleep(0.01)


def fake_environment(**fake: object) -> dict[str, str]:
    """FAKE_STEPS and the like from `steps=...`."""
    return {f"FAKE_{key.upper()}": str(value) for key, value in fake.items()}


def start_fake(run: RunFolder, *arguments: str, **fake: object) -> "subprocess.Popen[bytes]":
    """Start the fake trainer on a run without waiting for its lock."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.fakes.engine", "run", str(run.path), *arguments],
        cwd=ROOT,
        env={**os.environ, **fake_environment(**fake)},
        stderr=subprocess.PIPE,
    )


@contextlib.contextmanager
def running_fake(
    run: RunFolder, *arguments: str, **fake: object
) -> Iterator["subprocess.Popen[bytes]"]:
    """The fake trainer with its lock taken and signed; killed at the end if it still lives."""
    before = read_claim(run)
    process = start_fake(run, *arguments, **fake)
    try:
        wait_until(lambda: read_claim(run) != before or process.poll() is not None)
        yield process
    finally:
        process.kill()
        process.communicate()


def processes_of(folder: Path) -> list[int]:
    """Ids of the processes that have the folder, or one inside, as a word of their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if any(word == os.fsencode(folder) or _lies_in(folder, word) for word in words):
                found.append(int(entry.name))
    return found


def _lies_in(folder: Path, word: bytes) -> bool:
    return word.startswith(os.fsencode(folder) + b"/")


def kill_all_in(folder: Path) -> None:
    """No trainer of a test outlives it, detached or not, passed or failed."""
    for process in processes_of(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
