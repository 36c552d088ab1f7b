"""The Review page: the file as it is run, started, saved, named, edited."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from engine.config import DatasetConfig, read_config
from engine.wizard.draft import Draft
from tests.support.extras import needs_trainer
from tests.support.screens import screen_text, wait_for_text
from tests.support.steps import for_a_planned_card, for_the_demo
from tui.app import WindtunnelApp
from tui.page import CommandLine, Page
from tui.screens.review import ReviewPage

SAMPLE = DatasetConfig(path="sample:harbour-pilot", type="chat_template")


class Before(Page):
    STEP = "Plan"


pytestmark = pytest.mark.usefixtures("folder")


@asynccontextmanager
async def review_page(draft: Draft) -> AsyncIterator[Pilot[int]]:
    app = WindtunnelApp(draft, start="Review", pages={"Plan": Before})
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause()
        yield pilot


async def test_what_is_shown_is_what_is_saved(tmp_path: Path) -> None:
    draft = for_the_demo()
    draft.change("learning_rate", 0.003)
    async with review_page(draft) as pilot:
        await pilot.press("down", "enter")
        await pilot.pause()
        text = screen_text(pilot.app)
    saved = tmp_path / "harbour-pilot-demo-tiny.yml"
    assert "✓ saved" in text
    assert f"windtunnel train {saved}"[:40] in text
    assert saved.read_text("utf-8") == draft.config_text()
    assert read_config(saved).config.learning_rate == pytest.approx(0.003)
    assert "yours (recommended 0.005" in saved.read_text("utf-8")


async def test_saving_never_overwrites_a_file(tmp_path: Path) -> None:
    (tmp_path / "harbour-pilot-demo-tiny.yml").write_text("mine\n", "utf-8")
    async with review_page(for_the_demo()) as pilot:
        await pilot.press("down", "enter")
    assert (tmp_path / "harbour-pilot-demo-tiny.yml").read_text("utf-8") == "mine\n"
    assert (tmp_path / "harbour-pilot-demo-tiny-2.yml").exists()


async def test_for_a_planned_card_the_first_answer_is_to_save() -> None:
    async with review_page(for_a_planned_card()) as pilot:
        command = pilot.app.screen.query_one(CommandLine).command
        assert command.endswith("-o harbour-pilot-ministral-3-8b.yml")
        text = screen_text(pilot.app)
    assert "· ready to save" in text
    assert "❯ save only" in text


async def test_what_was_saved_is_said_until_an_answer_changes() -> None:
    draft = for_a_planned_card()
    async with review_page(draft) as pilot:
        page = pilot.app.screen
        assert isinstance(page, ReviewPage)
        await pilot.press("enter")
        page.on_rows_counted()
        await pilot.pause()
        text = screen_text(pilot.app)
        draft.change("learning_rate", 0.001)
        page.on_rows_counted()
        await pilot.pause()
        changed = screen_text(pilot.app)
    assert "✓ saved  /" in text
    assert "save only     first copy it to the machine that has the card" in text
    assert "saved" not in changed
    assert "· ready to save" in changed


async def test_a_plan_that_does_not_fit_is_saved_and_said_to_be_one() -> None:
    draft = for_a_planned_card()
    draft.model = "mistral-medium-3.5"
    draft.change("adapter", "lora")
    async with review_page(draft) as pilot:
        assert "· ready to save  does not fit: " in screen_text(pilot.app)


async def test_start_is_refused_with_its_reason() -> None:
    async with review_page(for_a_planned_card()) as pilot:
        await pilot.press("up", "enter")
        await wait_for_text(pilot, "kept")
        assert "is planned for and not here." in screen_text(pilot.app)


@needs_trainer
async def test_n_names_the_run() -> None:
    draft = for_the_demo()
    async with review_page(draft) as pilot:
        await pilot.press("n")
        field = pilot.app.screen.query_one("Prompt")
        field.value = "pilots"  # type: ignore[attr-defined]
        await pilot.press("enter")
        await pilot.pause()
        text = screen_text(pilot.app)
    assert draft.name == "pilots"
    assert "windtunnel train pilots.yml" in text


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("lora_r: 16", "lora_r: 4", ""),
        ("lora_r:", "lora_rank:", "did you mean"),
        ("lora_r: 16", "lora_r: none", "lora_r"),
    ],
)
async def test_what_the_editor_wrote_is_taken_or_refused(old: str, new: str, expected: str) -> None:
    draft = for_the_demo()
    async with review_page(draft) as pilot:
        page = pilot.app.screen
        assert isinstance(page, ReviewPage)
        page.take_text(draft.config_text().replace(old, new))
        await pilot.pause()
        text = screen_text(pilot.app)
    if expected:
        assert expected in text.lower()
        assert draft.config().lora_r == 16
    else:
        assert draft.config().lora_r == 4
        assert "lora_r: 4" in draft.config_text()


async def test_without_an_editor_it_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDITOR", raising=False)
    monkeypatch.delenv("VISUAL", raising=False)
    async with review_page(for_the_demo()) as pilot:
        await pilot.press("e")
        await pilot.pause()
        assert "There is no editor to open." in screen_text(pilot.app)


async def test_the_run_is_named_and_saved_again_after_it_was_saved(tmp_path: Path) -> None:
    async with review_page(for_the_demo()) as pilot:
        await pilot.press("down", "enter", "n")
        pilot.app.screen.query_one(Input).value = "pilots"
        await pilot.press("enter")
        await pilot.pause()
        assert "save only" in screen_text(pilot.app)
        await pilot.press("enter")
        await pilot.pause()
    assert (tmp_path / "pilots.yml").exists()
