"""The Runs page: the list, two runs compared, a run resumed, a run taken away."""

import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from textual.content import Content
from textual.pilot import Pilot

from engine.events import Ended, Eval, EventWriter
from engine.runs import RunFolder, RunLock, create_run
from engine.runs.listing import RunFacts, RunsReader
from tests.support.extras import needs_trainer
from tests.support.screens import assert_golden, screen_text, wait_for, wait_for_text
from tests.support.written_runs import BEGAN, written_run
from tui.app import WindtunnelApp
from tui.page import Page
from tui.screens.runs import RunsPage, run_line
from tui.screens.train import TrainPage


class FrozenRunsPage(RunsPage):
    """The same page at a time that never changes."""

    def __init__(self) -> None:
        super().__init__(clock=lambda: BEGAN + 86_400 * 2)


PAGES: dict[str, type[Page]] = {"Runs": FrozenRunsPage, "Train": TrainPage}


@pytest.fixture
def runs(home: Path) -> list[RunFolder]:
    """Three runs, the newest first, as the list has them."""
    folder = home / "runs"
    failed = Ended("failed", 12, "The loss is NaN.", "It diverged.", "Lower the rate.")
    made = [
        written_run(folder / "medium-try", 12, failed),
        written_run(folder / "support-0", 99, Ended("finished", 99), lora_r=16),
        written_run(folder / "support-1", 61),
    ]
    return made[::-1]


@asynccontextmanager
async def listed(
    until: str = "support-0", size: tuple[int, int] = (80, 24)
) -> AsyncIterator[Pilot[int]]:
    app = WindtunnelApp(start="Runs", pages=PAGES)
    async with app.run_test(size=size) as pilot:
        await wait_for_text(pilot, until)
        yield pilot


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
async def test_every_run_with_its_state_and_the_one_under_the_cursor(
    runs: list[RunFolder], size: tuple[int, int]
) -> None:
    with RunLock(runs[0]):
        async with listed("3 runs, 1 training", size) as pilot:
            await wait_for_text(pilot, "step 61/99")
            await pilot.pause(0.2)
            assert_golden(f"runs-{size[0]}x{size[1]}", screen_text(pilot.app))


async def test_no_run_yet_says_how_to_make_one() -> None:
    async with listed("no runs yet: F2 sets one up") as pilot:
        await pilot.press("enter", "r", "delete", "space", "c")


async def test_enter_attaches_and_escape_comes_back_to_the_same_line(runs: list[RunFolder]) -> None:
    async with listed() as pilot:
        await pilot.press("j", "enter")
        await wait_for_text(pilot, "✓ done  support-0")
        await pilot.press("escape")
        await wait_for_text(pilot, "❯   ✓ support-0")


async def test_space_marks_two_and_c_compares_them(runs: list[RunFolder]) -> None:
    async with listed() as pilot:
        await pilot.press("space", "j", "space")
        await wait_for_text(pilot, "❯ B ✓ support-0")
        await pilot.press("c")
        await wait_for_text(pilot, "keys are the same")
        text = screen_text(pilot.app)
        assert "A ━━ support-1   B ┅┅ support-0" in text
        assert "lora_r" in text
        assert re.search(r"─ at [1-9][\d,]* learned tokens ─", text)
        assert re.search(r"step of the best +\d+ +\d+", text)
        await pilot.press("escape")
        await wait_for_text(pilot, "space marks two to compare")


async def test_a_comparison_stays_while_the_list_below_is_read_again(runs: list[RunFolder]) -> None:
    async with listed() as pilot:
        await pilot.press("space", "j", "space", "c")
        await wait_for_text(pilot, "keys are the same")
        before = screen_text(pilot.app)
        page = pilot.app.screen
        assert isinstance(page, RunsPage)
        page.show_runs(*RunsReader().look())
        await pilot.pause(0.2)
        assert screen_text(pilot.app) == before


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ("", "B is better by 2.000 held out"),
        ("seed: 7\n", "held out on different rows"),
        ("sequence_len: 7\n", "held out on other tokens"),
    ],
)
async def test_a_winner_is_named_over_equal_rows(home: Path, changed: str, verdict: str) -> None:
    for name, loss, keys in (("first", 3.0, ""), ("second", 1.0, changed)):
        run = written_run(home / "runs" / name, 61)
        run.config.write_text(f"{run.config.read_text()}val_set_size: 0.1\n{keys}")
        with EventWriter(run.events, clock=lambda: BEGAN + 900) as events:
            events.emit(Eval(61, loss))
        os.utime(run.events, (BEGAN - loss, BEGAN - loss))
    async with listed("second") as pilot:
        await pilot.press("down", "space", "up", "space", "c")
        await wait_for_text(pilot, "keys are the same")
        text = screen_text(pilot.app)
        assert "A ━━ first   B ┅┅ second" in text
        assert verdict in text
        assert "better" in verdict or "better" not in text


async def test_a_third_mark_takes_the_place_of_the_oldest(runs: list[RunFolder]) -> None:
    async with listed() as pilot:
        await pilot.press("space", "j", "space", "j", "space")
        await wait_for_text(pilot, "❯ B ✗ medium-try")
        assert "A ✓ support-0" in screen_text(pilot.app)
        await pilot.press("space")
        await wait_for_text(pilot, "❯   ✗ medium-try")


async def test_a_config_that_is_unreadable_says_so_in_the_comparison(runs: list[RunFolder]) -> None:
    runs[1].config.write_text("lora_rank: [", "utf-8")
    async with listed() as pilot:
        await pilot.press("space", "j", "c")
        await wait_for_text(pilot, "config.yml")


async def test_delete_says_what_goes_keeps_the_config(runs: list[RunFolder], home: Path) -> None:
    config = runs[1].config.read_text("utf-8")
    async with listed() as pilot:
        await pilot.press("j", "delete")
        await wait_for_text(pilot, "remove support-0")
        assert "0 saves, 0.0 MiB go." in screen_text(pilot.app)
        await pilot.press("escape")
        await pilot.pause(0.2)
        assert runs[1].path.exists()
        await pilot.press("delete")
        await wait_for_text(pilot, "remove support-0")
        await pilot.press("enter")
        await wait_for(pilot, lambda: not runs[1].path.exists())
        await wait_for_text(pilot, "2 runs")
    (kept,) = (home / "runs" / ".trash").iterdir()
    assert kept.name.startswith("support-0-")
    assert kept.read_text("utf-8") == config


async def test_a_live_run_is_not_removed(runs: list[RunFolder]) -> None:
    with RunLock(runs[0]):
        async with listed() as pilot:
            await pilot.press("delete")
            await wait_for_text(pilot, "remove support-1")
            await pilot.press("enter")
            await wait_for_text(pilot, "The run support-1 is already running.")
    assert runs[0].events.exists()


async def test_a_run_in_a_folder_that_somebody_chose_is_not_removed(tmp_path: Path) -> None:
    chosen = written_run(create_run("mine", output_dir=tmp_path / "mine").path, 3)
    (chosen.path / "thesis.txt").write_text("mine")
    async with listed("mine") as pilot:
        await pilot.press("delete")
        await wait_for_text(pilot, "lies in a folder that somebody chose")
    assert (chosen.path / "thesis.txt").exists()
    assert chosen.events.exists()


async def test_resuming_a_finished_run_says_why_not(runs: list[RunFolder]) -> None:
    async with listed() as pilot:
        await pilot.press("j", "r")
        await wait_for_text(pilot, "The run support-0 has finished.")


async def test_an_unreadable_run_stands_in_the_list_with_its_reason(runs: list[RunFolder]) -> None:
    runs[2].events.unlink()
    runs[2].events.mkdir()
    async with listed("cannot be read") as pilot:
        assert "? medium-try" in screen_text(pilot.app)


@needs_trainer
@pytest.mark.slow
async def test_r_starts_the_trainer_again_and_shows_how_it_went(runs: list[RunFolder]) -> None:
    """The trainer itself refuses this config: its sentence is what the page shows."""
    runs[0].config.write_text("base_model: nobody/nothing\nlora_rank: 3\n", "utf-8")
    async with listed("support-1") as pilot:
        await pilot.press("r")
        await wait_for(pilot, lambda: "lora_rank" in screen_text(pilot.app), seconds=90)


async def test_of_many_runs_those_in_sight_are_drawn(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(120):
        written_run(home / "runs" / f"run-{number:03}", 0)
    drawn: list[str] = []

    def counting(facts: RunFacts, mark: str, now: float, cells: tuple[int, int]) -> Content:
        drawn.append(facts.folder.name)
        return run_line(facts, mark, now, cells)

    monkeypatch.setattr("tui.screens.runs.run_line", counting)
    async with listed("120 runs") as pilot:
        await wait_for(pilot, lambda: "to go" not in screen_text(pilot.app))
        drawn.clear()
        await pilot.press("j")
        await pilot.pause(0.1)
        assert len(set(drawn)) <= 24
        await pilot.press("end")
        await wait_for_text(pilot, "run-000")
        assert len(set(drawn)) <= 48
