"""The Train page shows a finished run at any size, and says what a live one does in every state."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path

import pytest
from textual.pilot import Pilot

from engine.errors import UserError
from engine.events import (
    Drift,
    Ended,
    Eval,
    EventWriter,
    Note,
    Phase,
    Recorded,
    Sample,
    Shortage,
    format_line,
)
from engine.report import run
from engine.runs import Follower, RunFolder, RunLock, Status, create_run, is_locked, status
from engine.runs.history import History
from tests.fakes.processes import running_fake, wait_until
from tests.support.screens import assert_golden, screen_text, wait_for, wait_for_text
from tests.support.written_runs import BEGAN, RunWriter, step_event, written_run
from tui.app import WindtunnelApp
from tui.page import Page
from tui.screens.runs import RunsPage
from tui.screens.train import TrainPage, follow_run

NOW = BEGAN + 570


class FrozenTrainPage(TrainPage):
    """The same page at a time that never changes."""

    def __init__(self, folder: RunFolder, *, fresh: bool = False) -> None:
        super().__init__(folder, fresh=fresh, clock=lambda: NOW)


PAGES: dict[str, type[Page]] = {"Train": FrozenTrainPage, "Runs": RunsPage}


@asynccontextmanager
async def shown(
    run: RunFolder, until: str, size: tuple[int, int] = (80, 24), *, alive: bool = True
) -> AsyncIterator[Pilot[int]]:
    app = WindtunnelApp(run=run, pages=PAGES)
    with RunLock(run) if alive else nullcontext():
        async with app.run_test(size=size) as pilot:
            await wait_for_text(pilot, until)
            yield pilot


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
async def test_a_run_under_way(tmp_path: Path, size: tuple[int, int]) -> None:
    async with shown(written_run(tmp_path / "support-magistral-1"), "step 61/99", size) as pilot:
        await wait_for_text(pilot, "step 60  I'm sorry")
        await pilot.pause()
        assert_golden(f"train-{size[0]}x{size[1]}", screen_text(pilot.app))


async def test_a_run_that_has_finished(tmp_path: Path) -> None:
    run = written_run(tmp_path / "support-magistral-1", 99, Ended("finished", 99))
    async with shown(run, "✓ done", alive=False) as pilot:
        await wait_for_text(pilot, "99 steps in")
        await pilot.pause(0.3)
        assert_golden("train-done-80x24", screen_text(pilot.app))


OUT_OF_MEMORY = Shortage(
    62,
    "step 62",
    held_bytes=int(21.9 * 2**30),
    asked_bytes=int(2.6 * 2**30),
    predicted_bytes=int(19.8 * 2**30),
    parts={"weights": int(13.4 * 2**30), "activations": int(6.9 * 2**30)},
    predicted_parts={"weights": int(13.4 * 2**30), "activations": int(3.8 * 2**30)},
    grew="activations",
    longest="rows.jsonl line 1877, 8,012 tokens",
    changes={"micro_batch_size": "1", "gradient_accumulation_steps": "2"},
    trade="the same result, slower",
    saves_bytes=int(1.8 * 2**30),
)


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
async def test_a_run_without_memory_offers_room(tmp_path: Path, size: tuple[int, int]) -> None:
    run = written_run(tmp_path / "support-magistral-1")
    end = Ended(
        "failed",
        61,
        "Memory ran out in step 62: 21.9 GiB were held and 2.6 GiB more were asked for.",
        "19.8 GiB were predicted for its fullest moment. Furthest above that are the activations, "
        "by 3.1 GiB. The longest row of the batch is rows.jsonl line 1877, 8,012 tokens.",
        "Go on with 1.8 GiB less, the same result, slower: `windtunnel resume "
        "support-magistral-1 micro_batch_size=1 gradient_accumulation_steps=2`.",
    )
    with EventWriter(run.events, clock=lambda: NOW) as writer:
        writer.emit(OUT_OF_MEMORY)
        writer.emit(end)
    async with shown(run, "go on with micro_batch_size 1", size, alive=False) as pilot:
        await pilot.pause()
        assert_golden(f"train-memory-{size[0]}x{size[1]}", screen_text(pilot.app))


async def test_a_run_that_failed_says_what_why_kept_and_what_can_be_done(tmp_path: Path) -> None:
    end = Ended("failed", 61, "The save could not be written.", "The disk is full.", "Free 1 GB.")
    run = written_run(tmp_path / "support-magistral-1", 61, end)
    async with shown(run, "The disk is full.", alive=False) as pilot:
        assert_golden("train-failed-80x24", screen_text(pilot.app))
        await pilot.press("escape")
        await wait_for_text(pilot, "smoothed")


async def test_a_run_that_was_killed_is_lost_and_says_so(tmp_path: Path) -> None:
    async with shown(written_run(tmp_path / "run"), "✗ lost", alive=False) as pilot:
        await wait_for_text(pilot, "wrote no last word")
        await wait_for_text(pilot, "❯ resume from step-60")


async def test_a_folder_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.events.mkdir(parents=True)
    async with shown(run, "cannot be read.", alive=False):
        pass


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("l", "engine.log"),
        ("v", "what it said"),
        ("f1", "keys here"),
        ("z", "━ smoothed"),
        ("enter", "━ smoothed"),
    ],
)
async def test_a_key_shows_more_and_escape_shows_all(tmp_path: Path, key: str, text: str) -> None:
    run = written_run(tmp_path / "run")
    run.log.write_text("loading shards\rloading shards 100%\n\x1b[31mred\n")
    async with shown(run, "grad norm") as pilot:
        await pilot.press(key)
        await wait_for_text(pilot, text)
        assert "grad norm" not in screen_text(pilot.app)
        await pilot.press("escape")
        await wait_for_text(pilot, "grad norm")


async def test_the_log_of_libraries_cannot_act_on_the_terminal(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run")
    run.log.write_text("\x1b[31mred [bold]x\n")
    async with shown(run, "grad norm") as pilot:
        await pilot.press("l")
        await wait_for_text(pilot, "␛[31mred [bold]x")


async def test_answers_and_names_of_strangers_are_shown_and_do_nothing(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run")
    writer.begin(model="org/[bold]x\x1b]0;t\x07")
    writer.write(Sample(0, "q [red]?", "a\x9b31m [/nope] \u202e", "after"), Note("error", "[/x]"))
    async with shown(writer.folder, "what it says now") as pilot:
        assert "[bold]x␛]0;t␇" in screen_text(pilot.app)
        await pilot.press("v")
        await wait_for_text(pilot, "asked    q [red]?")
        assert "a⟨U+009B⟩31m [/nope] ⟨U+202E⟩" in screen_text(pilot.app)


async def test_leaving_a_run_that_trains_says_how_to_come_back(tmp_path: Path) -> None:
    async with shown(written_run(tmp_path / "run"), "▶ training") as pilot:
        await pilot.press("q")
    assert pilot.app.parting == "still training: windtunnel watch run"  # type: ignore[attr-defined]


async def test_leaving_a_run_that_has_ended_says_nothing(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", 99, Ended("finished", 99))
    async with shown(run, "✓ done", alive=False) as pilot:
        await pilot.press("q")
    assert pilot.app.parting == ""  # type: ignore[attr-defined]


async def test_escape_goes_to_the_list_of_runs(tmp_path: Path) -> None:
    async with shown(written_run(tmp_path / "run"), "▶ training") as pilot:
        await pilot.press("escape")
        await wait_for_text(pilot, "space marks two to compare")


# The sentences, without a screen.


def begun(tmp_path: Path, steps: int = 0) -> RunWriter:
    writer = RunWriter(tmp_path / "run")
    writer.begin()
    writer.train(1, steps)
    return writer


def history_of(writer: RunWriter) -> History:
    history = History()
    history.add(Follower(writer.folder.events).read())
    return history


def test_loading_says_what_is_waited_for(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run")
    writer.write(Phase("hashing", 3, 12, "rows"))
    line = run.headline(history_of(writer), "running", BEGAN)
    assert (line.mark, line.word, line.share) == ("◌", "loading", 0.25)
    assert line.text == "reading the data: 3 of 12 rows"
    writer.write(Phase("hashing", 9, 12, "rows"), seconds=2)
    line = run.headline(history_of(writer), "running", BEGAN + 12)
    assert line.text == "reading the data: 9 of 12 rows  0:12"


def test_the_time_that_is_left_runs_down_during_a_step(tmp_path: Path) -> None:
    writer = begun(tmp_path, 95)
    history = history_of(writer)
    for quiet, left in ((0, "0:36 left"), (6, "0:30 left"), (43, "0:00 left")):
        assert left in run.headline(history, "running", writer.time + quiet).text


def test_the_first_step_is_awaited_in_words(tmp_path: Path) -> None:
    writer = begun(tmp_path)
    line = run.headline(history_of(writer), "running", BEGAN + 30)
    assert line.text == "step 0/99  the first step takes longer than the others"


def test_a_check_in_between_is_called_one(tmp_path: Path) -> None:
    writer = begun(tmp_path, 5)
    writer.write(Phase("evaluate", 9, 24, "rows"))
    line = run.headline(history_of(writer), "running", writer.time)
    assert line.word == "checking"
    assert line.text.endswith("scoring what is held out: 9 of 24 rows")


def test_silence_is_shown_with_the_usual_step_time(tmp_path: Path) -> None:
    writer = begun(tmp_path, 5)
    history = history_of(writer)
    assert run.headline(history, "running", writer.time + 44).word == "training"
    line = run.headline(history, "running", writer.time + 61)
    assert (line.mark, line.word) == ("?", "silent")
    assert line.text.startswith("no word for 61 s (a step takes 8.9). The process lives")


@pytest.mark.parametrize(
    ("status", "word"),
    [("paused", "paused"), ("stopped", "stopped"), ("waiting", "starting"), (None, "starting")],
)
def test_other_states_have_their_word(tmp_path: Path, status: Status | None, word: str) -> None:
    writer = begun(tmp_path, 5)
    assert run.headline(history_of(writer), status, writer.time).word == word


def test_a_loss_that_is_no_number_says_what_to_do(tmp_path: Path) -> None:
    writer = begun(tmp_path, 18)
    writer.write(*(step_event(step, loss=math.nan) for step in (19, 20)))
    sentence = run.notes(history_of(writer))
    assert sentence == (
        "! loss is not a number since step 19: s stops, the last good save is step 17"
    )


def test_a_rising_held_out_loss_names_the_best_step(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run")
    writer.write(*(Eval(step, loss) for step, loss in enumerate((1.0, 0.7, 0.8, 0.9, 1.0))))
    sentence = run.notes(history_of(writer))
    assert "rose 3 times in a row" in sentence
    assert "best is 0.700 at step 1" in sentence


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0:00"), (341.2, "5:41"), (3600, "1 h 00 min"), (math.nan, "?")]
)
def test_durations_are_short(seconds: float, words: str) -> None:
    assert run.duration(seconds) == words


@pytest.mark.parametrize(
    ("phase", "writer"),
    [
        (Phase("download", 1_200_000_000, 8_000_000_000, "bytes"), "1.2 of 8.0 GB, 15%"),
        (Phase("hashing", 300, 300, "bytes"), "reading the data: 0.3 of 0.3 kB, 100%"),
        (Phase("load", 33_000_000, 66_000_000, "bytes"), "33.0 of 66.0 MB, 50%"),
        (
            Phase("tokenizing", 1_000_000, 4_000_000, "bytes, 120 rows"),
            "1.0 of 4.0 MB, 25%, 120 rows",
        ),
        (Phase("load", detail="demo-tiny"), "loading the model: demo-tiny"),
    ],
)
def test_what_is_read_is_told_in_bytes_and_percent(phase: Phase, writer: str) -> None:
    history = History()
    history.add([Recorded(1, NOW, phase)])
    line = run.headline(history, "running", NOW)
    assert writer in line.text
    assert line.share == (phase.done / phase.total if phase.total else None)


async def test_figures_stand_below_curves_and_a_finished_run_says_more(tmp_path: Path) -> None:
    writer = begun(tmp_path, 20)
    writer.write(Drift(20, 0.04, 900), Ended("finished", 20))
    async with shown(writer.folder, "✓ done", alive=False) as pilot:
        await wait_for_text(pilot, "step 20: drift 0.04")
        await wait_for_text(pilot, run.NEXT)
        await wait_for_text(pilot, "$ windtunnel generate run --prompt 'My lamp (order 4471)")


@asynccontextmanager
async def attached(**fake: object) -> AsyncIterator[tuple[RunFolder, Pilot[int]]]:
    """The page on the fake trainer, which goes on until the work is done."""
    run = create_run("live")
    app = WindtunnelApp(run=run)
    with running_fake(run, **{"steps": 100_000, "step_seconds": 0.01, **fake}):
        async with app.run_test(size=(80, 24), notifications=True) as pilot:
            await wait_for_text(pilot, "▶ training")
            yield run, pilot


async def test_charts_move_while_the_run_goes_on(home: Path) -> None:
    async with attached() as (_, pilot):
        await wait_for_text(pilot, "smoothed")
        before = screen_text(pilot.app)
        await wait_for(pilot, lambda: screen_text(pilot.app) != before)


async def test_a_run_that_was_just_started_says_that_it_outlives_the_window(home: Path) -> None:
    async with attached() as (_, pilot):
        app = pilot.app
        assert isinstance(app, WindtunnelApp)
        app.open_run(create_run("other"), fresh=True)
        await wait_for_text(pilot, "started; it goes on")


async def test_p_pauses_and_p_goes_on(home: Path) -> None:
    async with attached() as (run, pilot):
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
    async with attached(save_seconds=1) as (run, pilot):
        await pilot.press("c")
        await wait_for_text(pilot, "asked to save…")
        await wait_for_text(pilot, "▶ training  live  CPU")
        assert (run.checkpoints / "LATEST").exists()
        await pilot.press("l")
        await wait_for_text(pilot, "saved checkpoints/step-")


async def test_s_asks_first_and_escape_lets_the_run_go_on(home: Path) -> None:
    async with attached() as (run, pilot):
        await pilot.press("s")
        await wait_for_text(pilot, "save it and keep the adapter?")
        await pilot.press("escape")
        await pilot.pause(0.3)
        assert status(run) == "running"


async def test_s_and_enter_save_and_stop_the_run(home: Path) -> None:
    async with attached() as (run, pilot):
        await pilot.press("s")
        await wait_for_text(pilot, "Stop after step")
        await pilot.press("enter")
        await wait_for_text(pilot, "· stopped")
        assert not is_locked(run)
        assert (run.checkpoints / "LATEST").exists()
        assert "r resume" in screen_text(pilot.app)


async def test_what_a_run_refuses_is_a_sentence(home: Path) -> None:
    async with attached(refuses="save") as (_, pilot):
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
    async for events, state in follow_run(run, Follower(run.events)):
        assert len(events) <= 500
        taken += len(events)
        if state:
            break
    assert (taken, state) == (20_001, "finished")


async def test_nothing_is_posted_while_nothing_happens(home: Path) -> None:
    run = create_run("idle")
    following = follow_run(run, Follower(run.events))
    assert await anext(following) == ((), "waiting")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(following), 0.6)


async def test_a_folder_that_cannot_be_read_is_a_sentence(home: Path) -> None:
    run = create_run("broken")
    run.events.mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        await anext(follow_run(run, Follower(run.events)))
