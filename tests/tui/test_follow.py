"""A run is read in pieces that a screen can take, and its status comes when all of it was read."""

import asyncio
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.events import Ended, Recorded, format_line
from engine.runs import create_run
from tests.support.written_runs import step_event
from tui.screens.train import follow_run


async def test_the_status_of_a_run_comes_with_its_last_event(home: Path) -> None:
    run, taken = create_run("long"), 0
    with run.events.open("ab") as lines:
        for step in range(1, 20_001):
            lines.write(format_line(Recorded(step, 1e9, step_event(step))))
        lines.write(format_line(Recorded(20_001, 1e9, Ended("finished", 20_000))))
    async for events, status in follow_run(run):
        assert len(events) <= 500
        taken += len(events)
        if status:
            break
    assert (taken, status) == (20_001, "finished")


async def test_nothing_is_posted_while_nothing_happens(home: Path) -> None:
    following = follow_run(create_run("idle"))
    assert await anext(following) == ((), "waiting")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(following), 0.6)


async def test_a_folder_that_cannot_be_read_is_a_sentence(home: Path) -> None:
    run = create_run("broken")
    run.events.mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        await anext(follow_run(run))
