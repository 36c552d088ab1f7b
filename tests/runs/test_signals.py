"""The first SIGTERM or SIGINT saves and ends, the second leaves at once, a hangup kills nothing."""

import os
import signal
import subprocess
import sys
import time

import pytest

from engine.events import Ended, Saved
from engine.runs import Follower, RunFolder, StopSignals, status
from tests.fakes.processes import ROOT, fake_environment, running_fake, wait_until


def last_two(run: RunFolder) -> list[type]:
    return [type(each.event) for each in Follower(run.events).read()[-2:]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_one_signal_saves_and_ends(run: RunFolder, number: signal.Signals) -> None:
    with running_fake(run) as process:
        wait_until(run.events.exists)
        process.send_signal(number)
        assert process.wait(60) == 0
    assert last_two(run) == [Saved, Ended]
    assert status(run) == "stopped"
    assert (run.checkpoints / "LATEST").exists()


def test_a_second_signal_leaves_at_once(run: RunFolder) -> None:
    with running_fake(run, save_seconds=30) as process:
        wait_until(run.events.exists)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.4)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
        assert time.monotonic() - begun < 5
    assert status(run) == "lost"


def test_one_request_that_arrives_twice_is_one(run: RunFolder) -> None:
    with running_fake(run, save_seconds=0.1) as process:
        wait_until(run.events.exists)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert status(run) == "stopped"


def test_a_detached_or_nohup_trainer_does_not_hear_a_hangup(run: RunFolder) -> None:
    nohup = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    call = "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    for before, own_session in ((nohup + call, False), ("import os, sys; " + call, True)):
        process = subprocess.Popen(
            [sys.executable, "-c", before, "-m", "tests.fakes.engine", "run", str(run.path)],
            cwd=ROOT,
            env={**os.environ, **fake_environment(step_seconds=0.01)},
            start_new_session=own_session,
        )
        try:
            wait_until(lambda: status(run) == "running" and run.events.exists())
            process.send_signal(signal.SIGHUP)
            time.sleep(0.3)
            assert process.poll() is None
            assert status(run) == "running"
        finally:
            process.kill()
            process.wait()
        run.events.unlink()


def test_the_handlers_of_before_come_back() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE)
    before = [signal.getsignal(number) for number in numbers]
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (signals.requested, signals.name) == (True, "SIGTERM")
    assert [signal.getsignal(number) for number in numbers] == before
