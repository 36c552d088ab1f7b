"""One wording: an event, a verdict and a bad row read the same wherever a person meets them.

Each printer is a function from the fact to the text that it shows; a new printer joins the tables.
"""

import io
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from rich.console import Console

from engine.cli import main
from engine.cli.terminal import PlainWatch
from engine.config import DatasetConfig
from engine.events import (
    Answers,
    Drift,
    Ended,
    Eval,
    Event,
    Note,
    Phase,
    Recorded,
    Saved,
    Score,
    Shortage,
    Started,
)
from engine.hardware import assume
from engine.plan import best_device
from engine.report.run import event_line
from engine.runs import Follower, RunFolder
from engine.runs.history import History
from engine.wizard.data import TYPED
from engine.wizard.draft import Draft
from engine.wizard.flow import Wizard
from tests.support.data import Conversation
from tests.support.screens import screen_text, wait_for
from tests.support.stand_in import draft_on, opened
from tests.support.steps import ready, recommended
from tests.support.written_runs import RunWriter
from tui.app import WindtunnelApp
from tui.inline import Inline
from tui.plain import follow_run, run_plain
from tui.progress import Progress
from tui.screens.train import log_line

GIB = 2**30
Printer = Callable[[pytest.CaptureFixture[str]], Awaitable[str]]
EVENTS = (
    Started("r", "demo-tiny", "lora", ("cpu",), 1, 99, 98_304),
    Phase("load"),
    Eval(0, 2.0241),
    Score(20, "held", 0.91249, 0.31, 20, {"think": 1.25, "text": 0.5}),
    Answers(20, "held", 20, 0.88, 1.1, 0.31),
    Drift(20, 0.123, 900),
    Eval(20, 1.5),
    Saved(20, "checkpoints/step-20"),
    Note("warning", "the loss leapt"),
    Shortage(21, "the backward pass", 30 * GIB, parts={"weights": 8 * GIB}),
)


def follower_of(run: RunFolder) -> list[Recorded]:
    return Follower(run.events).read()


def in_watch(run: RunFolder) -> str:
    out = io.StringIO()
    minutes = iter(range(0, 100_000, 60))
    watch = PlainWatch(out, clock=lambda: next(minutes))
    for recorded in follower_of(run):
        watch.show(recorded)
    return out.getvalue()


def in_the_foreground(run: RunFolder) -> str:
    out = io.StringIO()
    progress = Progress(Console(file=out, width=200, force_terminal=True, color_system=None))
    for recorded in follower_of(run):
        progress.show(recorded)
    progress.close()
    return out.getvalue()


def in_plain_lines(run: RunFolder) -> str:
    conversation = Conversation()
    follow_run(run, conversation.dialogue)
    return conversation.text


def on_the_screen(run: RunFolder) -> str:
    history = History()
    history.add(follower_of(run))
    return "\n".join(log_line(logged).plain for logged in history.log)


EVENT_PRINTERS: dict[str, Callable[[RunFolder], str]] = {
    "watch": in_watch,
    "train": in_the_foreground,
    "--plain and new": in_plain_lines,
    "screen": on_the_screen,
}


@pytest.mark.parametrize("printer", EVENT_PRINTERS.values(), ids=EVENT_PRINTERS)
def test_an_event(printer: Callable[[RunFolder], str], tmp_path: Path) -> None:
    told = RunWriter(tmp_path / "run")
    events: tuple[Event, ...] = (*EVENTS, Ended("finished", 21))
    for event in events:
        told.write(event)
    text = printer(told.folder)
    for event in EVENTS:
        assert str(event_line(event)) in text


def planned_draft() -> Draft:
    machine = assume("RTX 4090")
    rows = DatasetConfig(path="sample:harbour-pilot")
    return Draft(machine=machine, device=best_device(machine), model="demo-tiny", dataset=rows)


async def in_recommend(capsys: pytest.CaptureFixture[str]) -> str:
    sample = ("--data", "sample:harbour-pilot", "--assume", "RTX 4090")
    assert main(["recommend", "--model", "demo-tiny", *sample]) == 0
    return capsys.readouterr().out


async def in_the_questions(_capsys: pytest.CaptureFixture[str]) -> str:
    conversation = Conversation(*[""] * 5, "q")
    run_plain(planned_draft(), conversation.dialogue)
    return conversation.text


async def in_new_about_the_plan(_capsys: pytest.CaptureFixture[str]) -> str:
    wizard = Wizard(planned_draft(), new=True)
    while wizard.step is not wizard.plan:
        ready(wizard.step)
        wizard.take(recommended(wizard.step))
    return shown_in_new(wizard).replace("fits  needs", "fits: needs")


def shown_in_new(wizard: Wizard) -> str:
    out = io.StringIO()
    ready(wizard.step)
    Inline(wizard, Console(file=out, width=200)).show(wizard.question())
    return out.getvalue()


async def on_the_plan_page(_capsys: pytest.CaptureFixture[str]) -> str:
    app = WindtunnelApp(planned_draft(), start="Plan")
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for(pilot, lambda: app.draft.statistics is not None)
        await pilot.pause()
        # A page has the verdict's word and its sentence apart.
        return screen_text(app).replace("fits  needs", "fits: needs")


VERDICT_PRINTERS: dict[str, Printer] = {
    "recommend": in_recommend,
    "--plain": in_the_questions,
    "new": in_new_about_the_plan,
    "screen": on_the_plan_page,
}


@pytest.mark.parametrize("printer", VERDICT_PRINTERS.values(), ids=VERDICT_PRINTERS)
async def test_a_verdict(
    printer: Printer,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = (await in_recommend(capsys)).splitlines()[0]
    assert line.startswith("✓ fits: needs ")
    assert line in await printer(capsys)


async def in_check(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["check", "rows.jsonl"]) == 0
    return capsys.readouterr().out


async def in_preview(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["preview", "rows.jsonl", "--model", "demo-tiny", "--row", "2"]) == 0
    return capsys.readouterr().out


async def in_the_question_of_rows(_capsys: pytest.CaptureFixture[str]) -> str:
    conversation = Conversation("", "", "2", "rows.jsonl", "q")
    run_plain(Draft(), conversation.dialogue)
    return conversation.text


async def in_new_about_rows(_capsys: pytest.CaptureFixture[str]) -> str:
    wizard = Wizard(planned_draft(), new=True)
    for step in (wizard.machine, wizard.model):
        ready(step)
        wizard.take(recommended(step))
    wizard.take(TYPED, "rows.jsonl")
    return shown_in_new(wizard)


async def on_the_data_page(_capsys: pytest.CaptureFixture[str]) -> str:
    async with opened(draft_on(), "Data", (120, 40)) as screen:
        await screen.until("rows.jsonl")
        await screen.press("down")
        await screen.until("1 conversation")
        return screen.text


ROW_PRINTERS: dict[str, Printer] = {
    "check": in_check,
    "preview": in_preview,
    "--plain": in_the_question_of_rows,
    "new": in_new_about_rows,
    "screen": on_the_data_page,
}


@pytest.mark.parametrize("printer", ROW_PRINTERS.values(), ids=ROW_PRINTERS)
async def test_a_bad_row(
    printer: Printer,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    good = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    (tmp_path / "rows.jsonl").write_text(f'{json.dumps(good)}\n{{"messages": []}}\n', "utf-8")
    text = await printer(capsys)
    assert "✗ " in text
    assert "The row has no assistant message." in text
    assert "line 2 of rows.jsonl" in text
