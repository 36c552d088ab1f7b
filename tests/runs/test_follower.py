"""Reading a file that is being written: whole lines, once, whatever happens to the file."""

import json
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.events import Ended, Eval, EventWriter, Note, Recorded, Step, format_line
from engine.runs import Follower, RunFolder, follow
from engine.runs.folder import LineReader, append_line, lines_backwards
from tests.fakes.engine import step_event
from tests.fakes.processes import running_fake, wait_until
from tests.support.written_runs import read_steps


def lines(count: int, *, first: int = 0, time: float = 0.0) -> list[bytes]:
    return [
        format_line(Recorded(seq, time + seq, Eval(seq, 1.0)))
        for seq in range(first, first + count)
    ]


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
        (3, 103),
        (4, 104),
        (5, 105),
        (6, 106),
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
def test_a_file_replaced_by_a_later_run_is_read_from_its_start(
    tmp_path: Path, count: int, in_place: bool
) -> None:
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


def test_a_follower_from_the_end_gives_only_what_comes_even_after_a_torn_line(
    tmp_path: Path,
) -> None:
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


def test_a_step_that_is_repeated_after_a_resume_supersedes_the_earlier_ones(
    run: RunFolder,
) -> None:
    with EventWriter(run.events) as events:
        for step in [1, 2, 3, 4, 5, 3, 4]:
            events.emit(step_event(step))
    assert [step.step for step in read_steps(run)] == [1, 2, 3, 4]


def test_a_line_torn_by_kill_9_is_skipped_once_and_the_next_launch_is_followed(
    run: RunFolder,
) -> None:
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
