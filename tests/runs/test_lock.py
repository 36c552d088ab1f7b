"""The lock is the one proof of life: for a zombie, a killed trainer, a worker that stays behind."""

import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine.errors import UserError, WorkError
from engine.runs import RunFolder, RunLock, is_locked, status
from engine.runs.lock import read_claim
from tests.fakes.processes import running_fake, start_fake, wait_until


def test_a_run_is_locked_exactly_while_its_trainer_lives(run: RunFolder) -> None:
    assert not is_locked(run)
    with running_fake(run) as process:
        assert is_locked(run)
        process.kill()
        process.wait()
    assert not is_locked(run)


def test_a_second_trainer_is_refused_with_a_sentence(run: RunFolder) -> None:
    with running_fake(run) as first:
        second = start_fake(run)
        _, printed = second.communicate(timeout=60)
        assert second.returncode == 2
        assert b"already running" in printed
        assert b"windtunnel stop first" in printed
        assert first.poll() is None


def test_a_zombie_is_dead(run: RunFolder) -> None:
    with running_fake(run, steps=3) as process:
        wait_until(lambda: _state(process.pid) == "Z")
        os.kill(process.pid, 0)  # the process table still answers for it
        assert not is_locked(run)
        assert status(run) == "finished"


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_a_forked_worker_that_outlives_its_trainer_does_not_hold_the_lock(run: RunFolder) -> None:
    with running_fake(run, leaves_a_worker=1) as process:
        wait_until(run.events.exists)
        assert is_locked(run), "the worker's copy was closed without giving the lock back"
        process.kill()
        process.wait()
        wait_until(lambda: not is_locked(run), 3)
        assert status(run) == "lost"


def test_a_program_that_the_trainer_starts_does_not_hold_the_lock(run: RunFolder) -> None:
    with RunLock(run):
        program = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"],
            stdin=subprocess.PIPE,
            close_fds=False,
        )
        assert is_locked(run)
    assert not is_locked(run)
    program.communicate(timeout=60)


def test_looking_at_a_run_never_keeps_its_trainer_out(run: RunFolder) -> None:
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            is_locked(run)

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for each in lookers:
        each.start()
    try:
        for _ in range(100):
            with RunLock(run):
                pass
    finally:
        done.set()
        for each in lookers:
            each.join()


def test_a_look_that_takes_long_is_waited_for_and_a_trainer_is_not(run: RunFolder) -> None:
    look = os.open(run.lock, os.O_RDONLY)
    fcntl.flock(look, fcntl.LOCK_SH)
    threading.Timer(0.7, os.close, [look]).start()
    # A wait for a trainer would end in "cannot be locked".
    with RunLock(run), pytest.raises(UserError, match="already running"), RunLock(run):
        pass


def test_the_lock_says_when_and_for_whom(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDTUNNEL_LAUNCH", "a token that leaves a longer line behind")
    with RunLock(run):
        pass
    monkeypatch.setenv("WINDTUNNEL_LAUNCH", "token")
    before = time.time()
    run.events.write_text("what an earlier launch said\n")
    with RunLock(run):
        claim = read_claim(run)
        assert before <= claim.since <= time.time()
        assert (claim.launch, claim.events_bytes) == ("token", 28)
    run.lock.write_bytes(b"")
    assert read_claim(run).launch == ""


def test_the_lock_can_be_taken_again_after_it_was_given_back(run: RunFolder) -> None:
    for _ in range(2):
        with RunLock(run), pytest.raises(UserError, match="already running"), RunLock(run):
            pass


def test_a_folder_that_is_gone_cannot_be_locked(tmp_path: Path) -> None:
    gone = RunFolder(tmp_path / "gone")
    assert not is_locked(gone)
    with pytest.raises(WorkError, match="cannot be locked"), RunLock(gone):
        pass
