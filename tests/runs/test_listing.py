"""Thousands of runs and a run of thousands of steps: what is read again, counted in files and bytes
by the interpreter's own audit events and by the descriptors' reads."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from engine.events import Ended, EventWriter, Recorded, Started, Step, format_line
from engine.runs import RunFolder, RunLock, create_run
from engine.runs.history import History
from engine.runs.listing import AT_ONCE, OpenRun, RunsReader, keep_history, summaries
from engine.runs.summary import Follower
from tests.support.written_runs import BEGAN, step_event, written_run

STARTED = Started("run", "org/model", "lora", ("cpu",), 1, 20_000, 100)
FINISHED = Ended("finished", 3)

_opened: list[str] | None = None


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if _opened is not None and event == "open":
        _opened.append(str(arguments[0]))


sys.addaudithook(_note)


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """The paths of all files that are opened meanwhile."""
    global _opened
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


def many(home: Path, count: int) -> list[RunFolder]:
    """Finished runs of three steps, the newest last."""
    made = []
    for number in range(count):
        run = RunFolder(home / "runs" / f"run-{number:03}")
        run.path.mkdir(parents=True)
        steps = [Recorded(n, BEGAN + n, step_event(n, 3)) for n in range(1, 4)]
        events = [Recorded(0, BEGAN, STARTED), *steps, Recorded(4, BEGAN + 4, FINISHED)]
        run.events.write_bytes(b"".join(map(format_line, events)))
        os.utime(run.events, (BEGAN + number, BEGAN + number))
        made.append(run)
    return made


def long_run(home: Path, steps: int = 20_000) -> RunFolder:
    run = create_run("long")
    with run.events.open("wb") as lines:
        lines.write(format_line(Recorded(0, BEGAN, STARTED)))
        for step in range(1, steps + 1):
            lines.write(format_line(Recorded(step, BEGAN + step, step_event(step, steps))))
    return run


def whole(run: RunFolder) -> History:
    history, follower = History(), Follower(run.events)
    while events := follower.read():
        history.add(events)
    return history


def shown(history: History) -> str:
    """All that it holds; nan equals nan, and 1 equals 1.0."""
    return repr(msgspec.convert(msgspec.to_builtins(history), History))


def bytes_read(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> tuple[int, History]:
    """What opening a run reads of its events."""
    taken = 0
    pread = os.pread

    def counting(descriptor: int, length: int, offset: int) -> bytes:
        nonlocal taken
        content = pread(descriptor, length, offset)
        taken += len(content)
        return content

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", counting)
        history = OpenRun(run).read_all()
    return taken, history


def test_the_newest_are_listed_first_and_the_rest_as_they_are_read(home: Path) -> None:
    many(home, 2 * AT_ONCE + 10)
    reader = RunsReader()
    with opened_files() as files:
        runs, waiting = reader.look()
    assert len({file for file in files if file.endswith("events.jsonl")}) == AT_ONCE
    assert [each.folder.name for each in runs[:2]] == ["run-109", "run-108"]
    assert (len(runs), waiting) == (AT_ONCE, AT_ONCE + 10)
    assert [len(reader.look()[0]) for _ in range(2)] == [2 * AT_ONCE, 2 * AT_ONCE + 10]


def test_runs_that_have_ended_are_not_opened_again_even_by_another_reader(home: Path) -> None:
    folders = many(home, 20)
    first, _ = RunsReader().look()
    with opened_files() as files:
        again, waiting = RunsReader().look()
        listed = list(summaries())
    assert [file for file in files if "run-" in file] == []
    assert (again, waiting) == (first, 0)
    assert [each.best for each in first] == [None] * 20
    assert first[0].loss == step_event(3).loss
    summary = listed[0][1]
    assert not isinstance(summary, Exception)
    assert (summary.name, summary.status, summary.step) == (folders[-1].name, "finished", 3)


def test_a_run_that_goes_on_is_read_again(home: Path) -> None:
    run = many(home, 2)[0]
    RunsReader().look()
    with EventWriter(run.events, clock=lambda: BEGAN + 900) as events:
        events.emit(step_event(4, 9))
    with RunLock(run):
        (facts, _), _ = RunsReader().look()
        assert (facts.folder, facts.status, facts.step) == (run, "running", 4)
    facts = RunsReader().look()[0][0]
    assert facts.status == "lost"


def test_an_index_with_torn_and_foreign_lines_hides_nothing(home: Path) -> None:
    many(home, 3)
    expected = RunsReader().look()
    index = home / "ended.jsonl"
    index.write_bytes(b'[]\n{"path": 3}\n\xff\n' + index.read_bytes() + b'{"pa')
    assert RunsReader().look() == expected


def test_the_process_that_writes_the_events_enters_the_run_in_the_index(home: Path) -> None:
    run = many(home, 1)[0]
    keep_history(run)
    with opened_files() as files:
        ((facts,), _) = RunsReader().look()
    assert facts.status == "finished"
    assert [file for file in files if "run-" in file] == []


def test_a_long_run_opens_from_kept_history(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = long_run(home)
    size = run.events.stat().st_size
    keep_history(run)
    with EventWriter(run.events, clock=lambda: BEGAN + 90_000) as events:
        events.emit(step_event(20_001, 30_000))
    taken, history = bytes_read(run, monkeypatch)
    assert taken < 4096 < size // 1000
    assert shown(history) == shown(whole(run))
    assert history.steps_done == 20_001


@pytest.mark.parametrize("damage", ["missing", "torn", "other version", "other events"])
def test_a_history_that_does_not_fit_the_events_is_made_anew(
    home: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    run = long_run(home, 4000)
    keep_history(run)
    content = run.history.read_bytes()
    if damage == "missing":
        run.history.unlink()
    elif damage == "torn":
        run.history.write_bytes(content[:-100])
    elif damage == "other version":
        run.history.write_bytes(content.replace(b"\xa7version\x01", b"\xa7version\x02", 1))
    else:
        lines = run.events.read_bytes().splitlines(keepends=True)
        run.events.write_bytes(b"".join(lines[:2000]) * 2)
    taken, history = bytes_read(run, monkeypatch)
    assert taken >= run.events.stat().st_size
    assert shown(history) == shown(whole(run))
    assert bytes_read(run, monkeypatch)[0] < 4096


def test_every_kind_of_event_can_be_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.runs.listing._KEPT_EVERY_BYTES", 1)
    failed = Ended("failed", 61, "The loss is NaN.", "It diverged.", "Lower the rate.")
    run = written_run(home / "runs" / "all", 61, failed)
    with EventWriter(run.events, clock=lambda: BEGAN + 900) as events:
        events.emit(Step(62, 1.0, float("nan"), *(1, 1, 1e-4, 1.0, 1.0, 1.0, 1)))
    keep_history(run)
    kept = OpenRun(run).history
    assert shown(kept) == shown(whole(run))
    assert kept.nan_since == 62


def test_somebody_elses_run_is_read_without_being_written_to(home: Path, tmp_path: Path) -> None:
    run = long_run(home, 4000)
    run.history.mkdir()
    assert OpenRun(run).read_all().steps_done == 4000
