"""The word for a run comes from the lock and the end of its events."""

import math
import os
import signal
import time
from pathlib import Path

import pytest

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
    format_line,
)
from engine.runs import (
    RunFolder,
    RunLock,
    Status,
    Summary,
    ask,
    is_locked,
    status,
    summarize,
    summary,
)
from tests.fakes.engine import loss_at, step_event
from tests.fakes.processes import running_fake, wait_until

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
def test_without_the_lock_the_last_event_decides(
    run: RunFolder, events: list[Event], word: Status
) -> None:
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
def test_while_the_lock_is_held_a_run_is_running_or_paused(
    run: RunFolder, events: list[Event], word: Status
) -> None:
    with RunLock(run):
        write(run, *events)
        assert status(run) == word


def test_a_pause_of_an_earlier_launch_is_over(run: RunFolder) -> None:
    write(run, STARTED, PAUSED)
    time.sleep(0.01)
    with RunLock(run):
        write(run, Phase("load"))
        assert status(run) == "running"


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
    time.sleep(0.01)
    with RunLock(run):
        pass
    assert status(run) == "lost", "the last end is that of the launch before"


def test_a_run_that_ends_between_two_looks_is_not_called_lost(
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
    with RunLock(run) as lock:
        answers = iter([False])
        monkeypatch.setattr(summary, "is_locked", lambda run: next(answers, is_locked(run)))
        assert status(run) == "running"
        assert lock.since


def test_the_summary_is_that_of_the_last_step(run: RunFolder) -> None:
    write(run, STARTED, step_event(1), step_event(2), Eval(2, 9.0), Ended("stopped", 2))
    steps = step_event(2).total_steps
    assert summarize(run) == Summary(
        "first", "stopped", 2, steps, loss_at(2), step_event(2).seconds
    )


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
