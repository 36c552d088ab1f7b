"""A run is read in pieces that a screen can take, and its status comes when all of it was read."""

import threading
from pathlib import Path

from textual.message import Message

from engine.events import Ended, Recorded, format_line
from engine.runs import RunFolder, create_run
from tests.fakes.processes import running_fake, wait_until
from tests.support.written_runs import step_event
from tui.follow import EventsRead, RunAsked, RunUnreadable, WorkRefused, follow_run, send_command


def posted(run: RunFolder, enough: int) -> list[Message]:
    """The messages until there are `enough` of them."""
    messages: list[Message] = []
    stop = threading.Event()
    thread = threading.Thread(target=follow_run, args=(run, messages.append, stop.is_set))
    thread.start()
    try:
        wait_until(lambda: len(messages) >= enough)
    finally:
        stop.set()
        thread.join()
    return messages


def test_the_status_of_a_run_comes_with_its_last_event(home: Path) -> None:
    run = create_run("long")
    with run.events.open("ab") as lines:
        for step in range(1, 20_001):
            lines.write(format_line(Recorded(step, 1e9, step_event(step))))
        lines.write(format_line(Recorded(20_001, 1e9, Ended("finished", 20_000))))
    messages = posted(run, 41)
    statuses = [each.status for each in messages if isinstance(each, EventsRead)]
    events = [one for each in messages if isinstance(each, EventsRead) for one in each.events]
    assert len(events) == 20_001
    assert max(len(each.events) for each in messages if isinstance(each, EventsRead)) <= 500
    last = next(place for place, each in enumerate(statuses) if each)
    assert statuses[last] == "finished"
    assert (
        sum(len(each.events) for each in messages[: last + 1] if isinstance(each, EventsRead))
        == 20_001
    )


def test_nothing_is_posted_while_nothing_happens(home: Path) -> None:
    (message,) = posted(create_run("idle"), 1)
    assert isinstance(message, EventsRead)
    assert (list(message.events), message.status) == ([], "waiting")


def test_a_folder_that_cannot_be_read_is_told_once(home: Path) -> None:
    run = create_run("broken")
    run.events.mkdir()
    (message,) = posted(run, 1)
    assert isinstance(message, RunUnreadable)


def test_a_command_is_told_with_the_id_of_its_answer(home: Path) -> None:
    run = create_run("live")
    messages: list[Message] = []
    with running_fake(run):
        send_command(run, "pause", messages.append)
    (message,) = messages
    assert isinstance(message, RunAsked)
    assert message.identity in run.control.read_text()


def test_a_command_that_nobody_would_read_is_refused(home: Path) -> None:
    messages: list[Message] = []
    send_command(create_run("dead"), "save", messages.append)
    (message,) = messages
    assert isinstance(message, WorkRefused)
    assert "is not running" in message.error.what
