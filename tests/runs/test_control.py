"""Commands to a run that lives, by its file and by signals."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.errors import UserError, WorkError
from engine.events import Ack, Ended, Saved, Step
from engine.runs import ControlReader, Follower, RunFolder, RunLock, StopSignals, ask, send, status
from engine.runs.folder import append_line
from tests.fakes.processes import ROOT, fake_environment, running_fake, wait_until


def command(identity: str, word: str = "save", when: float = 10.0) -> dict[str, object]:
    return {"id": identity, "command": word, "time": when}


def ids(reader: ControlReader) -> list[str]:
    return [each.id for each in reader.read()]


def test_a_command_has_the_keys_of_the_contract(run: RunFolder) -> None:
    before = time.time()
    with RunLock(run):
        identity = send(run, "sample")
    record = json.loads(run.control.read_text())
    assert record == {"id": identity, "command": "sample", "time": record["time"]}
    assert before <= record["time"] <= time.time()


def test_nobody_is_asked_where_nobody_listens(run: RunFolder) -> None:
    with pytest.raises(UserError, match="is not running"):
        send(run, "pause")
    assert not run.control.exists()


def test_commands_of_before_are_ignored_whatever_the_clock_says(tmp_path: Path) -> None:
    path = tmp_path / "control.jsonl"
    append_line(path, command("stale", "stop", time.time() + 3600))
    reader = ControlReader(path)
    append_line(path, command("fresh", "stop", time.time() - 3600))
    assert ids(reader) == ["fresh"]
    path.write_text("")
    append_line(path, command("stale", "stop"))
    assert ids(reader) == [], "nor where the file was written anew"


def test_a_stale_stop_does_not_stop_the_next_launch(run: RunFolder) -> None:
    append_line(run.control, command("stale", "stop", time.time()))
    time.sleep(0.01)
    with running_fake(run):
        follower = Follower(run.events)
        wait_until(lambda: any(isinstance(each.event, Step) for each in follower.read()))
        assert status(run) == "running"


def test_a_half_written_command_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "control.jsonl"
    reader = ControlReader(path)
    assert ids(reader) == []
    line = json.dumps(command("a")).encode() + b"\n"
    path.write_bytes(line[:-5])
    assert ids(reader) == []
    path.write_bytes(line)
    assert ids(reader) == ["a"]
    assert ids(reader) == []


def test_garbage_in_the_control_file_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "control.jsonl"
    bad = [
        b"stop",
        b"[" * 50_000,
        b"[]",
        b"{}",
        b"\xff",
        b'{"id": 1, "command": "stop", "time": 20}',
        b'{"id": "a", "command": "explode", "time": 20}',
        b'{"id": "b", "command": ["stop"], "time": 20}',
        b'{"id": "c", "command": "stop", "time": "20"}',
        b'{"id": "e", "command": "stop"}',
    ]
    reader = ControlReader(path)
    path.write_bytes(b"\n".join(bad) + b"\n")
    append_line(path, command("good", when=10**400))
    assert ids(reader) == ["good"]


def test_a_control_file_that_is_copied_over_itself_repeats_no_command(tmp_path: Path) -> None:
    path = tmp_path / "control.jsonl"
    reader = ControlReader(path)
    append_line(path, command("a", "pause"))
    append_line(path, command("b", "resume"))
    assert ids(reader) == ["a", "b"]
    path.write_text("")
    assert ids(reader) == []
    append_line(path, command("a", "pause"))
    append_line(path, command("c", "stop"))
    assert ids(reader) == ["c"]


def test_a_control_file_that_cannot_be_read_stops_no_training(tmp_path: Path) -> None:
    assert ControlReader(tmp_path).read() == []


def test_each_command_is_answered_by_its_id(run: RunFolder) -> None:
    with running_fake(run, refuses="sample"):
        assert ask(run, "save", timeout_seconds=20).outcome == "done"
        answer = ask(run, "sample", timeout_seconds=20)
        assert answer == Ack(answer.id, "sample", "refused")


def test_no_answer_in_time_is_a_sentence(run: RunFolder) -> None:
    with RunLock(run), pytest.raises(WorkError, match="has not answered for 0 seconds"):
        ask(run, "pause", timeout_seconds=0.1)


def test_a_run_that_dies_instead_of_answering_is_a_sentence(run: RunFolder) -> None:
    with running_fake(run) as process, ThreadPoolExecutor(1) as pool:
        process.send_signal(signal.SIGSTOP)
        answer = pool.submit(ask, run, "pause", timeout_seconds=20)
        wait_until(run.control.exists)
        process.kill()
        with pytest.raises(WorkError, match="ended before it answered"):
            answer.result(20)


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
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
    assert Saved not in last_two(run)  # the save of 30 s was not waited for
    assert status(run) == "stopped"


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
