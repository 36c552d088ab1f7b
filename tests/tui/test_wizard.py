"""The whole wizard over a real run: what is answered on a page reaches the file and the trainer."""

import json
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from engine.config import read_config
from engine.errors import UserError
from engine.runs import find_run, status
from engine.wizard.draft import Draft
from tests.support.data import chat, write_rows
from tests.support.extras import needs_trainer
from tests.support.screens import wait_for, wait_for_text
from tui.app import WindtunnelApp
from tui.screens.review import ReviewPage
from tui.widgets.choices import Fields, Switches

SECONDS = 240


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDTUNNEL_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)


def row(number: int) -> dict[str, Any]:
    turns = chat(f"What is {number} and one?", f"It is {number + 1}.")
    turns["messages"][1]["reasoning_content"] = f"One more than {number}."
    return turns


async def change_value(pilot: Pilot[int], key: str, *keys: str) -> None:
    fields = pilot.app.screen.query_one(Fields)
    await pilot.press("home")
    while fields.field is not None and fields.field.key != key:
        await pilot.press("down")
    await pilot.press(*keys)
    await pilot.pause()


async def walk(app: WindtunnelApp, pilot: Pilot[int]) -> None:
    """One answer of our own on every page, then start."""
    await wait_for_text(pilot, "this computer's CPU")
    await pilot.press("enter")
    await wait_for_text(pilot, "● Model")
    await wait_for_text(pilot, "Demo (tiny)")
    await pilot.press("home", "enter")
    await wait_for_text(pilot, "● Data")
    await pilot.press("down")  # the newest file here
    await wait_for_text(pilot, "to learn from")  # all rows are read: h waits for that
    await pilot.press("h")  # another share is held out
    await pilot.pause()
    await pilot.press("enter")
    await wait_for_text(pilot, "● Preview")
    await wait_for_text(pilot, "how much is learned")
    app.screen.query_one(Switches).focus()
    await pilot.press("space")  # thinking is read, not learned
    await pilot.pause()
    await pilot.press("enter")
    await wait_for_text(pilot, "● Plan")
    await change_value(pilot, "lora_r", "4")
    await change_value(pilot, "max_steps", "right")
    await change_value(pilot, "max_steps", "2")
    await pilot.press("enter")
    await wait_for_text(pilot, "● Review")
    page = app.screen
    assert isinstance(page, ReviewPage)
    await pilot.press("n")
    page.query_one("Prompt").value = "answers"  # type: ignore[attr-defined]
    await pilot.press("enter")
    await wait_for_text(pilot, "❯ start now")
    await pilot.press("enter")


def events_of(kind: str) -> list[dict[str, Any]]:
    """Of the run that the wizard started; none before it did."""
    try:
        lines = find_run("answers").events.read_text("utf-8").splitlines()
    except (UserError, OSError):
        return []
    return [event for event in map(json.loads, lines) if event["type"] == kind]


@needs_trainer
async def test_one_answer_of_each_page_reaches_the_config_and_the_trainer(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", *map(row, range(12)))
    app = WindtunnelApp(Draft())
    async with app.run_test(size=(80, 24)) as pilot:
        await walk(app, pilot)
        await wait_for(pilot, lambda: events_of("ended"), SECONDS)
        # The end is written before the lock is given back.
        await wait_for(pilot, lambda: status(find_run("answers")) != "running", SECONDS)
    made = find_run("answers")
    config = read_config(made.config).config
    assert config.base_model == "demo-tiny"
    assert config.datasets[0].path == str(tmp_path / "rows.jsonl")
    assert config.val_set_size > 0
    assert config.train_on_thinking is False
    assert config.lora_r == 4
    assert config.max_steps == 2
    started = events_of("started")[0]
    assert started["run"] == "answers"
    assert started["model"] == "demo-tiny"
    assert started["method"] == "lora"
    assert started["devices"] == ["cpu"]
    assert started["total_steps"] == 2
    # Rank 4 is a quarter of the recipe's 98,304 numbers.
    assert started["trainable_parameters"] == 98_304 // 4
    # Without thinking fewer tokens carry the loss than there are in the answers with it.
    step = events_of("step")[0]
    assert 0 < step["learned_tokens"] < step["tokens"] / 2
    plan = json.loads(made.plan.read_text("utf-8"))
    assert plan["device"]["kind"] == "cpu"
    assert plan["reasons"]["lora_r"].startswith("yours (recommended 16")
    assert status(made) == "finished"
