"""Commands to a live run: each is read once, answered by id, and never by the wrong process."""

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.errors import UserError, WorkError
from engine.events import Ack, Step
from engine.runs import ControlReader, Follower, RunFolder, RunLock, ask, send, status
from engine.runs.folder import append_line
from tests.fakes.processes import running_fake, wait_until


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


def test_commands_older_than_the_process_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "control.jsonl"
    append_line(path, command("stale", "stop", 9.9))
    append_line(path, command("fresh", "stop", 10.0))
    assert ids(ControlReader(path, since=10.0)) == ["fresh"]


def test_a_stale_stop_does_not_stop_the_next_launch(run: RunFolder) -> None:
    append_line(run.control, command("stale", "stop", time.time()))
    time.sleep(0.01)
    with running_fake(run):
        follower = Follower(run.events)
        wait_until(lambda: any(isinstance(each.event, Step) for each in follower.read()))
        assert status(run) == "running"


def test_a_half_written_command_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "control.jsonl"
    reader = ControlReader(path, since=0.0)
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
        b'{"id": "d", "command": "stop", "time": NaN}',
        b'{"id": "e", "command": "stop"}',
    ]
    path.write_bytes(b"\n".join(bad) + b"\n")
    append_line(path, command("good", when=10**400))
    assert ids(ControlReader(path, since=10.0)) == ["good"]


def test_a_control_file_that_is_copied_over_itself_repeats_no_command(tmp_path: Path) -> None:
    path = tmp_path / "control.jsonl"
    reader = ControlReader(path, since=0.0)
    append_line(path, command("a", "pause"))
    append_line(path, command("b", "resume"))
    assert ids(reader) == ["a", "b"]
    path.write_text("")
    assert ids(reader) == []
    append_line(path, command("a", "pause"))
    append_line(path, command("c", "stop"))
    assert ids(reader) == ["c"]


def test_a_control_file_that_cannot_be_read_stops_no_training(tmp_path: Path) -> None:
    assert ControlReader(tmp_path, since=0.0).read() == []


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
