"""The Train page on a process that lives: attach, pause, save, stop, and what comes after."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from textual.pilot import Pilot

from engine.errors import UserError
from engine.events import Ended, Recorded, format_line
from engine.runs import RunFolder, create_run, is_locked, status
from tests.fakes.processes import running_fake, wait_until
from tests.support.screens import screen_text, wait_for, wait_for_text
from tests.support.written_runs import step_event
from tui.app import WindtunnelApp
from tui.screens.train import TrainPage, follow_run


@asynccontextmanager
async def attached(run: RunFolder, **fake: object) -> AsyncIterator[Pilot[int]]:
    """The page on the fake trainer, which goes on until the work is done."""
    app = WindtunnelApp(run=run)
    with running_fake(run, **{"steps": 100_000, "step_seconds": 0.01, **fake}):
        async with app.run_test(size=(80, 24), notifications=True) as pilot:
            yield pilot


async def test_charts_move_while_the_run_goes_on(home: Path) -> None:
    async with attached(create_run("live")) as pilot:
        await wait_for_text(pilot, "▶ training")
        await wait_for_text(pilot, "loss 2.")
        before = screen_text(pilot.app)
        await wait_for(pilot, lambda: screen_text(pilot.app) != before)


async def test_a_run_that_was_just_started_says_that_it_outlives_the_window(home: Path) -> None:
    run = create_run("live")
    async with attached(run) as pilot:
        app = pilot.app
        assert isinstance(app, WindtunnelApp)
        await wait_for_text(pilot, "▶ training  live")
        app.open_run(create_run("other"), fresh=True)
        await wait_for_text(pilot, "started; it goes on")


async def test_p_pauses_and_p_goes_on(home: Path) -> None:
    run = create_run("live")
    async with attached(run) as pilot:
        await wait_for_text(pilot, "▶ training")
        await pilot.press("p")
        await wait_for_text(pilot, "❚❚ paused")
        assert status(run) == "paused"
        assert isinstance(pilot.app.screen, TrainPage)
        assert pilot.app.screen.parting == "still paused: windtunnel watch live"
        assert "p go on" in screen_text(pilot.app)
        await pilot.press("p")
        await wait_for_text(pilot, "▶ training")
        assert status(run) == "running"


async def test_a_request_is_shown_until_the_run_answers(home: Path) -> None:
    run = create_run("live")
    async with attached(run, save_seconds=1) as pilot:
        await wait_for_text(pilot, "▶ training")
        await pilot.press("c")
        await wait_for_text(pilot, "asked to save…")
        await wait_for_text(pilot, "▶ training  live  CPU")
        assert (run.checkpoints / "LATEST").exists()
        await pilot.press("l")
        await wait_for_text(pilot, "saved checkpoints/step-")


async def test_s_asks_first_and_escape_lets_the_run_go_on(home: Path) -> None:
    run = create_run("live")
    async with attached(run) as pilot:
        await wait_for_text(pilot, "▶ training")
        await pilot.press("s")
        await wait_for_text(pilot, "save it and keep the adapter?")
        await pilot.press("escape")
        await pilot.pause(0.3)
        assert status(run) == "running"


async def test_s_and_enter_save_and_stop_the_run(home: Path) -> None:
    run = create_run("live")
    async with attached(run) as pilot:
        await wait_for_text(pilot, "▶ training")
        await pilot.press("s")
        await wait_for_text(pilot, "Stop after step")
        await pilot.press("enter")
        await wait_for_text(pilot, "· stopped")
        assert not is_locked(run)
        assert (run.checkpoints / "LATEST").exists()
        assert "r resume" in screen_text(pilot.app)


async def test_what_a_run_refuses_is_a_sentence(home: Path) -> None:
    async with attached(create_run("live"), refuses="save") as pilot:
        await wait_for_text(pilot, "▶ training")
        await pilot.press("c")
        await wait_for_text(pilot, "The run live refused to save.")


async def test_leaving_lets_the_run_go_on(home: Path) -> None:
    run = create_run("live")
    app = WindtunnelApp(run=run)
    with running_fake(run, steps=100_000, step_seconds=0.01):
        async with app.run_test(size=(80, 24)) as pilot:
            await wait_for_text(pilot, "▶ training")
            await pilot.press("q")
        size = run.events.stat().st_size
        wait_until(lambda: run.events.stat().st_size > size)
        assert is_locked(run)
    assert app.parting == "still training: windtunnel watch live"


async def test_a_killed_run_is_told_at_once(home: Path) -> None:
    run = create_run("live")
    app = WindtunnelApp(run=run)
    with running_fake(run, steps=100_000, step_seconds=0.01) as process:
        async with app.run_test(size=(80, 24)) as pilot:
            await wait_for_text(pilot, "▶ training")
            process.kill()
            await wait_for_text(pilot, "✗ lost")


async def test_keys_are_answered_while_a_long_run_is_read(home: Path) -> None:
    """Reading it takes many turns of the event loop: in each, few of its events are taken in."""
    run, steps = create_run("long"), 30_000
    with run.events.open("ab") as lines:
        for step in range(1, steps + 1):
            lines.write(format_line(Recorded(step, 1e9, step_event(step, steps))))
        lines.write(format_line(Recorded(steps + 1, 1e9, Ended("finished", steps))))
    in_a_turn: list[int] = []

    app = WindtunnelApp(run=run)
    async with asyncio.timeout(120), app.run_test(size=(80, 24)) as pilot:
        page, taken = app.screen, 0
        assert isinstance(page, TrainPage)
        while taken < steps:
            before = taken
            await asyncio.sleep(0)  # one turn, in which a key would have been answered
            taken = page._history.steps_done
            in_a_turn.append(taken - before)
        await wait_for_text(pilot, f"{steps} steps in")
    assert sum(in_a_turn) == steps
    assert max(in_a_turn) <= 1000


async def test_the_status_of_a_run_comes_with_its_last_event(home: Path) -> None:
    run, taken = create_run("long"), 0
    with run.events.open("ab") as lines:
        for step in range(1, 20_001):
            lines.write(format_line(Recorded(step, 1e9, step_event(step))))
        lines.write(format_line(Recorded(20_001, 1e9, Ended("finished", 20_000))))
    async for events, state in follow_run(run):
        assert len(events) <= 500
        taken += len(events)
        if state:
            break
    assert (taken, state) == (20_001, "finished")


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
