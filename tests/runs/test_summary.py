"""The status of a run, and its events followed while they are written."""

import json
import math
import os
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from engine.errors import WorkError
from engine.events import (
    Ack,
    Ended,
    Eval,
    Event,
    EventWriter,
    Note,
    Phase,
    Recorded,
    Sample,
    Saved,
    Started,
    Step,
    format_line,
)
from engine.report.run import device_and_model, progress_text
from engine.runs import (
    Follower,
    RunFolder,
    RunLock,
    Status,
    Summary,
    ask,
    follow,
    is_locked,
    status,
    summarize,
    summary,
)
from engine.runs.folder import LineReader, append_line, lines_backwards
from engine.runs.listing import OpenRun, facts_of
from tests.fakes.engine import loss_at, step_event
from tests.fakes.processes import running_fake, wait_until
from tests.support.written_runs import read_steps

STARTED = Started("first", "fake", "lora", ("cpu",), 1, 70, 8)
PAUSED = Ack("1", "pause", "done")


def write(run: RunFolder, *events: Event) -> None:
    with EventWriter(run.events) as writer:
        for event in events:
            writer.emit(event)


def test_a_run_that_was_never_started_is_waiting(run: RunFolder) -> None:
    assert status(run) == "waiting"
    run.events.write_bytes(b'{"v": 1, "torn')
    assert summarize(run) == Summary("first", "waiting")


@pytest.mark.parametrize(
    ("events", "word"),
    [
        ([STARTED, step_event(1)], "lost"),
        ([Phase("load")], "lost"),
        ([STARTED, step_event(1), Ended("finished", 1)], "finished"),
        ([STARTED, step_event(1), Ended("stopped", 1)], "stopped"),
        ([STARTED, step_event(1), Ended("failed", 1)], "failed"),
        ([STARTED, Ended("stopped", 1), Phase("load")], "lost"),
        ([STARTED, step_event(1), PAUSED], "lost"),
    ],
)
def test_unlocked_the_last_event_decides(run: RunFolder, events: list[Event], word: Status) -> None:
    write(run, *events)
    assert status(run) == word


@pytest.mark.parametrize(
    ("events", "word"),
    [
        ([], "running"),
        ([STARTED, step_event(1)], "running"),
        ([STARTED, step_event(1), PAUSED], "paused"),
        (
            [PAUSED, Phase("save"), Saved(1, "x"), Ack("2", "save", "done"), Note("info", "")],
            "paused",
        ),
        ([PAUSED, Ack("2", "pause", "refused")], "paused"),
        ([PAUSED, Ack("2", "resume", "refused")], "paused"),
        ([Ack("1", "pause", "refused")], "running"),
        ([PAUSED, Ack("2", "resume", "done")], "running"),
        ([PAUSED, Ack("2", "stop", "done")], "running"),
        ([PAUSED, step_event(2)], "running"),
        ([STARTED, Ended("stopped", 1)], "running"),
    ],
)
def test_locked_a_run_runs_or_is_paused(run: RunFolder, events: list[Event], word: Status) -> None:
    with RunLock(run):
        write(run, *events)
        assert status(run) == word


def test_a_pause_of_an_earlier_launch_is_over(run: RunFolder) -> None:
    write(run, STARTED, PAUSED)
    with RunLock(run):
        write(run, Phase("load"))
        assert status(run) == "running"


def test_a_clock_that_is_set_back_changes_no_word(run: RunFolder) -> None:
    write(run, STARTED, Ended("stopped", 1))
    with RunLock(run), EventWriter(run.events, clock=lambda: 1.0) as events:
        events.emit(PAUSED)
        assert status(run) == "paused"
        events.emit(Ended("failed", 1))
    assert status(run) == "failed"


def test_a_run_goes_through_all_its_words(run: RunFolder) -> None:
    with running_fake(run) as process:
        wait_until(lambda: summarize(run).step > 2)
        assert status(run) == "running"
        ask(run, "pause", timeout_seconds=20)
        assert status(run) == "paused"
        held = summarize(run).step
        time.sleep(0.1)
        assert summarize(run).step == held
        ask(run, "resume", timeout_seconds=20)
        assert status(run) == "running"
        ask(run, "stop", timeout_seconds=20)
        assert process.wait(60) == 0
    assert status(run) == "stopped"
    with running_fake(run, "--resume") as process:
        assert status(run) == "running"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert status(run) == "lost"


def test_a_launch_that_died_before_its_first_word_is_lost(run: RunFolder) -> None:
    with RunLock(run):
        pass
    assert status(run) == "lost"
    write(run, Ended("stopped", 1))
    assert status(run) == "stopped"
    with RunLock(run):
        pass
    assert status(run) == "lost", "the last end is that of the launch before"


def test_a_run_that_ends_is_not_called_lost(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends just before the lock is looked at: who had read the events before would miss it."""
    looks: list[RunFolder] = []

    def end_and_look(run: RunFolder) -> bool:
        if not looks:
            write(run, Ended("finished", 1))
            lock.__exit__()
        looks.append(run)
        return is_locked(run)

    with RunLock(run) as lock:
        write(run, STARTED, step_event(1))
        monkeypatch.setattr(summary, "is_locked", end_and_look)
        assert status(run) == "finished"


def test_a_run_that_is_started_again_between_two_looks_is_running(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(run, STARTED, step_event(1))
    with RunLock(run):
        answers = iter([False])
        monkeypatch.setattr(summary, "is_locked", lambda run: next(answers, is_locked(run)))
        assert status(run) == "running"


def test_the_summary_is_that_of_the_last_step(run: RunFolder) -> None:
    write(run, STARTED, step_event(1), step_event(2), Eval(2, 9.0), Ended("stopped", 2))
    steps = step_event(2).total_steps
    seconds = step_event(2).seconds
    assert summarize(run) == Summary("first", "stopped", 2, steps, loss_at(2), seconds)


def test_the_summary_counts_the_rows_that_are_left_out(run: RunFolder) -> None:
    write(run, structs.replace(STARTED, rows=5, rows_left_out=2), step_event(1))
    found = summarize(run)
    assert (found.rows, found.rows_left_out) == (5, 2)
    assert progress_text(found).endswith(", 2 of 5 rows left out")
    history = OpenRun(run).read_all()
    assert device_and_model(history).endswith(" · 2 of 5 rows left out")
    assert facts_of(run, "finished", history).rows_left_out == 2


def test_a_run_that_diverged_shows_nan_and_not_nothing(run: RunFolder) -> None:
    line = format_line(Recorded(0, 1.0, step_event(1)))
    run.events.write_bytes(line.replace(b'"loss": %r' % loss_at(1), b'"loss": null'))
    loss = summarize(run).loss
    assert loss is not None
    assert math.isnan(loss)


def test_total_steps_come_from_the_start_where_no_step_tells_them(run: RunFolder) -> None:
    write(run, STARTED)
    assert summarize(run).total_steps == 70
    line = format_line(Recorded(9, time.time(), step_event(1)))
    total = f', "total_steps": {step_event(1).total_steps}'.encode()
    assert total in line
    with run.events.open("ab") as file:
        file.write(line.replace(total, b"") * 300_000)
    assert summarize(run).total_steps == 70


def test_the_last_step_is_found_behind_long_samples(run: RunFolder) -> None:
    samples = [Sample(5, "p", "x" * 300_000, "during") for _ in range(5)]
    write(run, STARTED, step_event(5), *samples)
    assert summarize(run).loss == loss_at(5)


def bytes_read() -> int:
    """What this process has read so far, of files and of pipes."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


def test_a_million_steps_cost_no_more_than_ten(run: RunFolder) -> None:
    line = format_line(Recorded(10**6, time.time(), step_event(10**6)))
    with run.events.open("wb") as file:
        file.write(format_line(Recorded(0, time.time(), STARTED)))
        for _ in range(100):
            file.write(line * 10_000)
    size = run.events.stat().st_size
    try:
        before = bytes_read()
        assert summarize(run).step == 10**6
        write(run, Ended("finished", 10**6))
        assert status(run) == "finished"
        assert bytes_read() - before < size / 100
    finally:
        run.events.unlink()


@pytest.mark.parametrize("name", ["lock", "events.jsonl"])
def test_a_run_that_cannot_be_read_is_a_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to(name)  # a loop: cannot be opened, not even by root
    for look in (status, summarize):
        with pytest.raises(WorkError, match=r"cannot be read.*symbolic links"):
            look(RunFolder(tmp_path))
    assert os.listdir(tmp_path) == [name]


def lines(count: int, *, first: int = 0, time: float = 0.0) -> list[bytes]:
    numbers = range(first, first + count)
    return [format_line(Recorded(seq, time + seq, Eval(seq, 1.0))) for seq in numbers]


def seqs(events: list[Recorded]) -> list[int]:
    return [each.seq for each in events]


@given(st.lists(st.integers(1, 400), max_size=30))
def test_whatever_pieces_a_file_grows_by_each_event_is_given_once(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[int]
) -> None:
    path = tmp_path_factory.mktemp("grow") / "events.jsonl"
    whole = b"".join(lines(12))
    follower, late = Follower(path), Follower(path)
    given_out: list[int] = []
    position = 0
    for piece in [*pieces, len(whole)]:
        with path.open("ab") as file:
            file.write(whole[position : position + piece])
        position += piece
        given_out += seqs(follower.read())
    assert given_out == list(range(12))
    assert seqs(late.read()) == given_out, "a second follower is not robbed by the first"
    assert follower.garbage == 0


def test_a_torn_last_line_is_kept_back_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    follower = Follower(path)
    assert follower.read() == []
    one, two = lines(2)
    path.write_bytes(one + two[:-1])
    assert seqs(follower.read()) == [0]
    assert follower.read() == []
    path.write_bytes(one + two)
    assert seqs(follower.read()) == [1]


def test_garbage_is_counted_and_newer_types_are_counted_apart(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    newer = b'{"v": 2, "seq": 5, "time": 1, "type": "dream"}\n'
    path.write_bytes(b"".join(lines(1)) + b'{"torn\n\n\xff\n' + newer + lines(1, first=6)[0])
    follower = Follower(path)
    assert seqs(follower.read()) == [0, 6]
    assert (follower.garbage, follower.unknown) == (2, 1)


def test_events_behind_a_stretch_of_garbage_arrive_in_the_same_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes((b"x" * 999 + b"\n") * 5_000 + lines(1)[0])
    assert seqs(Follower(path).read()) == [0]


def test_a_line_longer_than_one_read_arrives_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    long = format_line(Recorded(0, 0.0, Note("info", "x" * 10_000)))
    path.write_bytes(long + lines(1, first=1)[0])
    reader = LineReader(path)
    found = reader.read(100) + reader.read(100)
    assert [line + b"\n" for line in found] == [long, *lines(1, first=1)]


def test_a_file_that_was_cut_short_and_written_on_gives_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"".join(lines(5)))
    follower = Follower(path)
    follower.read()
    path.write_bytes(b"".join([*lines(3), *lines(4, first=3, time=100)]))
    assert [(each.seq, each.time) for each in follower.read()] == [
        (n, 100 + n) for n in range(3, 7)
    ]


def test_a_file_replaced_by_a_copy_of_itself_gives_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"".join(lines(5)))
    follower = Follower(path)
    follower.read()
    (tmp_path / "copy").write_bytes(b"".join(lines(7)))
    (tmp_path / "copy").replace(path)
    assert seqs(follower.read()) == [5, 6]


@pytest.mark.parametrize("count", [2, 5, 30])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_replaced_file_is_read_from_its_start(tmp_path: Path, count: int, in_place: bool) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"".join(lines(5)))
    follower = Follower(path)
    follower.read()
    other = b"".join(lines(count, time=1000))
    if in_place:  # the same inode, shorter, as long as before, or longer
        path.write_bytes(other)
    else:
        (tmp_path / "other").write_bytes(other)
        (tmp_path / "other").replace(path)
    assert seqs(follower.read()) == list(range(count))


def test_a_file_that_vanishes_and_returns_is_followed_on(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"".join(lines(2)))
    follower = Follower(path)
    follower.read()
    path.unlink()
    assert follower.read() == []
    path.write_bytes(b"".join(lines(3)))
    assert seqs(follower.read()) == [2]


def test_a_follower_from_the_end_gives_what_comes_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    three = lines(3)
    path.write_bytes(three[0] * 3000 + three[1][:20])
    follower = Follower(path, from_end=True)
    with path.open("ab") as file:
        file.write(three[1][20:] + three[2])
    assert seqs(follower.read()) == [1, 2]
    absent = Follower(tmp_path / "later.jsonl", from_end=True)
    (tmp_path / "later.jsonl").write_bytes(three[0])
    assert seqs(absent.read()) == [0]


def test_a_line_appended_after_a_torn_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "control.jsonl"
    path.write_bytes(b'{"id": "to')
    append_line(path, {"id": "whole"})
    append_line(path, {"id": "next"})
    assert [json.loads(line) for line in path.read_bytes().splitlines()[1:]] == [
        {"id": "whole"},
        {"id": "next"},
    ]


@given(st.lists(st.text("ab", max_size=40_000), max_size=6), st.booleans())
def test_lines_backwards_are_the_lines_forwards_reversed(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], torn: bool
) -> None:
    path = tmp_path_factory.mktemp("back") / "file"
    path.write_text("".join(text + "\n" for text in texts) + ("torn" if torn else ""))
    found = list(lines_backwards(path, 1 << 30))
    assert found == [text.encode() for text in reversed(texts)]


def test_lines_backwards_stop_at_their_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456\n" * 100)
    assert len(list(lines_backwards(path, 80))) == 9, "the cut one is left out"


def test_two_followers_see_every_step_of_a_live_run(run: RunFolder) -> None:
    seen: list[list[Recorded]] = [[], []]
    with running_fake(run, steps=60):
        threads = [
            threading.Thread(target=lambda own=own: own.extend(follow(run, poll_seconds=0.01)))
            for own in seen
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    for own in seen:
        assert [each.event.step for each in own if isinstance(each.event, Step)] == [*range(1, 61)]
        assert isinstance(own[-1].event, Ended)
        assert all(after.seq == before.seq + 1 for before, after in pairwise(own))


def test_following_ends_when_asked_after_giving_what_is_there(run: RunFolder) -> None:
    with EventWriter(run.events) as events:
        events.emit(step_event(1))
    assert len(list(follow(run, lambda: True))) == 1


def test_a_step_repeated_after_a_resume_supersedes_the_earlier_ones(run: RunFolder) -> None:
    with EventWriter(run.events) as events:
        for step in [1, 2, 3, 4, 5, 3, 4]:
            events.emit(step_event(step))
    assert [step.step for step in read_steps(run)] == [1, 2, 3, 4]


def test_a_line_torn_by_kill_9_is_skipped_and_the_next_launch_followed(run: RunFolder) -> None:
    follower = Follower(run.events)
    with running_fake(run) as process:
        wait_until(follower.read)
        process.kill()
        process.wait()
    follower.read()
    with run.events.open("ab") as file:
        file.write(b'{"v": 1, "seq": 99, "ty')
    assert follower.read() == []
    with running_fake(run, steps=2) as process:
        assert process.wait(60) == 0
    events = follower.read()
    assert follower.garbage == 1
    assert isinstance(events[-1].event, Ended)
