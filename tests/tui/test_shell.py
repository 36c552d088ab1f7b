"""The frame of every page: rows, keys, steps, panels, small terminals, plain glyphs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import ClassVar

import pytest
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.pilot import Pilot
from textual.widgets import Input, Static

from engine.errors import UserError
from engine.wizard.draft import Draft
from tests.support.screens import screen_text, wait_for_text
from tui.app import WindtunnelApp
from tui.line import to_ascii
from tui.page import Key, Page, fit_keys
from tui.widgets.choices import Choices
from tui.widgets.pane import Confirm, Pane


class First(Page):
    STEP = "Machine"
    KEYS = (Key("enter", "use this"), Key("r", "look again"), Key("esc", "back"))
    BINDINGS: ClassVar[list[BindingType]] = [Binding("r", "look", "look again")]

    looked = 0
    refreshed = 0

    def compose_body(self) -> ComposeResult:
        with Pane(title="GPUs [red]x", subtitle="space picks"):
            yield Choices([Content(name) for name in ("one", "two", "three")])
        with Pane(title="name"):
            yield Input(id="name")

    def on_mount(self) -> None:
        self.say("✓", "ready", "one GPU [b]x[/b]\x1b[31m")
        self.show_command(["probe", "a b"])
        self.show_title("2 × H100")

    def refresh_from_draft(self) -> None:
        self.refreshed += 1

    def action_look(self) -> None:
        self.looked += 1


class Second(Page):
    STEP = "Model"

    def compose_body(self) -> ComposeResult:
        yield Static("the second page")


PAGES: dict[str, type[Page]] = {"Machine": First, "Model": Second, "Runs": Second}


@asynccontextmanager
async def in_app(
    size: tuple[int, int] = (80, 24), *, ascii_only: bool = False
) -> AsyncIterator[Pilot[int]]:
    app = WindtunnelApp(pages=PAGES, ascii_only=ascii_only)
    async with app.run_test(size=size) as pilot:
        await pilot.pause()
        yield pilot


def page_of(pilot: Pilot[int]) -> First:
    page = pilot.app.screen
    assert isinstance(page, First)
    return page


def page_app(pilot: Pilot[int]) -> WindtunnelApp:
    assert isinstance(pilot.app, WindtunnelApp)
    return pilot.app


def problem() -> UserError:
    return UserError("The file is gone.", "Somebody moved it.", "Choose it again.")


async def test_a_page_says_where_you_are_the_answer_the_command_and_the_keys() -> None:
    async with in_app() as pilot:
        lines = screen_text(pilot.app).splitlines()
        assert lines[0].startswith(" windtunnel  ● Machine  ○ Model  ○ Data")
        assert lines[0].endswith("2 × H100")
        assert lines[1] == "  Machine  ✓ ready  one GPU [b]x[/b]␛[31m"
        assert lines[-2] == " $ windtunnel probe 'a b'"
        assert lines[-1] == " enter use this   r look again   esc back   F1 help"


async def test_the_pane_with_the_focus_has_a_heavy_border_and_the_line_a_cursor() -> None:
    async with in_app() as pilot:
        text = screen_text(pilot.app)
        assert "┏━ GPUs [red]x ━" in text
        assert "┃ ❯ one" in text
        assert "╭─ name ─" in text
        await pilot.press("tab")
        assert "┏━ name ━" in screen_text(pilot.app)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("down",), "❯ two"),
        (("j", "j"), "❯ three"),
        (("G",), "❯ three"),
        (("G", "k"), "❯ two"),
        (("G", "g"), "❯ one"),
        (("up",), "❯ one"),
    ],
)
async def test_arrows_and_vim_keys_move_the_cursor(keys: tuple[str, ...], line: str) -> None:
    async with in_app() as pilot:
        await pilot.press(*keys)
        assert line in screen_text(pilot.app)


async def test_enter_goes_on_escape_goes_back_and_nothing_is_lost() -> None:
    async with in_app() as pilot:
        await pilot.press("down", "enter")
        assert "✓ Machine  ● Model" in screen_text(pilot.app)
        await pilot.press("escape")
        assert "● Machine" in screen_text(pilot.app)
        assert "❯ two" in screen_text(pilot.app)
        assert page_of(pilot).refreshed == 2


async def test_letters_are_text_inside_an_input() -> None:
    async with in_app() as pilot:
        await pilot.press("r")
        await pilot.press("tab", "r", "q")
        assert page_of(pilot).looked == 1
        assert page_of(pilot).query_one("#name", Input).value == "rq"


async def test_a_problem_takes_the_body_and_gives_it_back_as_it_was() -> None:
    async with in_app() as pilot:
        await pilot.press("down", "tab", "a")
        page_of(pilot).show_problem(problem(), kept="your answers.")
        await pilot.pause()
        text = screen_text(pilot.app)
        for line in ("what  The file is gone.", "why   Somebody", "kept  your", "fix   Choose"):
            assert line in text
        assert "GPUs" not in text
        await pilot.press("r")
        assert page_of(pilot).looked == 0
        await pilot.press("escape")
        assert "❯ two" in screen_text(pilot.app)
        assert page_of(pilot).query_one("#name", Input).value == "a"
        assert pilot.app.focused is page_of(pilot).query_one("#name")


async def test_what_can_be_done_about_a_problem_is_a_list_that_enter_takes() -> None:
    done: list[str] = []
    async with in_app() as pilot:
        actions = [("try again", lambda: done.append("again")), ("log", lambda: done.append("log"))]
        page_of(pilot).show_problem(problem(), actions=actions)
        await pilot.pause()
        await pilot.press("down", "enter")
        await pilot.pause()
        assert done == ["log"]
        assert not page_of(pilot).is_covered


async def test_a_problem_can_be_copied_as_text() -> None:
    async with in_app() as pilot:
        page_of(pilot).show_problem(problem())
        await pilot.pause()
        await pilot.press("y")
        assert pilot.app.clipboard.startswith("what: The file is gone.\nwhy: ")


async def test_y_copies_the_command() -> None:
    async with in_app() as pilot:
        await pilot.press("y")
        assert pilot.app.clipboard == "windtunnel probe 'a b'"


async def test_f1_lists_the_keys_that_work_here_and_closes_with_escape() -> None:
    async with in_app() as pilot:
        await pilot.press("f1")
        await pilot.pause()
        text = screen_text(pilot.app)
        assert "keys here" in text
        assert "look again" in text
        await pilot.press("escape")
        assert "GPUs" in screen_text(pilot.app)


async def test_ctrl_p_finds_an_action_by_what_it_does() -> None:
    async with in_app() as pilot:
        await pilot.press("ctrl+p")
        await pilot.press(*"look again")
        await pilot.pause(0.5)
        await pilot.press("enter")
        await pilot.pause(0.2)
        assert page_of(pilot).looked == 1


async def test_f4_opens_the_runs_and_f2_comes_back_to_the_step() -> None:
    async with in_app() as pilot:
        await pilot.press("f4")
        await pilot.pause()
        assert "the second page" in screen_text(pilot.app)
        await pilot.press("f2")
        await pilot.pause()
        assert "● Machine" in screen_text(pilot.app)


async def test_a_page_that_is_opened_over_a_question_answers_it_with_nothing() -> None:
    answers: list[bool | None] = []
    async with in_app() as pilot:
        pilot.app.push_screen(Confirm("t", "Sure?", yes="does it", no="does not"), answers.append)
        await pilot.pause()
        page_app(pilot).open_runs()
        await pilot.pause()
        assert "the second page" in screen_text(pilot.app)
    assert True not in answers


@pytest.mark.parametrize(("key", "answer"), [("enter", True), ("escape", False)])
async def test_a_question_is_answered_by_enter_or_escape(key: str, answer: bool) -> None:
    answers: list[bool | None] = []
    async with in_app() as pilot:
        question = "Stop [b]it[/b] after step 3?"
        confirm = Confirm("the run", question, yes="stops", no="goes on")
        pilot.app.push_screen(confirm, answers.append)
        await pilot.pause()
        text = screen_text(pilot.app)
        assert question in text
        assert "enter stops, esc goes on" in text
        await pilot.press(key)
    assert answers == [answer]


async def test_ctrl_q_leaves_with_exit_status_0() -> None:
    async with in_app() as pilot:
        await pilot.press("ctrl+q")
    assert pilot.app.return_value == 0


@pytest.mark.parametrize("size", [(52, 24), (80, 16)])
async def test_too_small_a_terminal_is_told_what_it_needs(size: tuple[int, int]) -> None:
    async with in_app(size) as pilot:
        text = " ".join(screen_text(pilot.app).split())
        width, height = size
        assert f"needs 60 columns and 18 rows, has {width}x{height}; --plain works" in text
        assert "Machine" not in text
        await pilot.resize_terminal(80, 24)
        await wait_for_text(pilot, "● Machine")


async def test_at_60_columns_the_steps_and_the_kept_keys_are_whole() -> None:
    async with in_app((60, 18)) as pilot:
        lines = screen_text(pilot.app).splitlines()
        assert lines[0] == " ● Machine  ○ Model  ○ Data  ○ Preview  ○ Plan  ○ Review"
        assert lines[-1].startswith(" enter use this")
        assert lines[-1].endswith("F1 help")


async def test_ascii_draws_nothing_else() -> None:
    async with in_app(ascii_only=True) as pilot:
        strips = pilot.app.screen._compositor.render_strips()
        text = "\n".join(strip.text for strip in strips)
        assert text.isascii()
        assert "> one" in text
        assert "+ ready" in text


def test_ascii_keeps_the_width_and_the_letters_of_a_language() -> None:
    text = "✓ fits ▁▃█ ⣿⠉⠤ ┏━┓ café 日本"
    assert len(to_ascii(text)) == len(text)
    assert to_ascii(text).endswith("café 日本")


def keys_of(*names: str) -> list[Key]:
    return [Key(name, "does something") for name in names]


def test_key_hints_go_whole_from_the_middle_and_the_three_stay() -> None:
    keys = keys_of("enter", "a", "b", "c", "esc", "F1")
    assert [key.key for key in fit_keys(keys, 200)] == ["enter", "a", "b", "c", "esc", "F1"]
    assert [key.key for key in fit_keys(keys, 90)] == ["enter", "a", "esc", "F1"]
    assert [key.key for key in fit_keys(keys, 10)] == ["enter", "esc", "F1"]


def test_a_hint_of_a_higher_priority_stays_longer() -> None:
    keys = [*keys_of("enter", "a", "b"), Key("c", "does something", 1), *keys_of("F1")]
    assert [key.key for key in fit_keys(keys, 60)] == ["enter", "c", "F1"]


async def test_no_color_leaves_no_hue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    async with in_app() as pilot:
        for strip in pilot.app.screen._compositor.render_strips():
            for segment in strip:
                for colour in (segment.style.color, segment.style.bgcolor) if segment.style else ():
                    if colour and colour.triplet:
                        assert len(set(colour.triplet)) == 1, segment


def test_nothing_moves_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEXTUAL_ANIMATIONS", raising=False)
    assert WindtunnelApp().animation_level == "none"


class Leaf(Static):
    """Takes its time to go."""

    going: ClassVar[asyncio.Event]

    async def on_unmount(self) -> None:
        self.going.set()
        await asyncio.sleep(0.1)


class Busy(Page):
    """Shows an answer that comes while the page is taken apart."""

    STEP = "Machine"

    def compose_body(self) -> ComposeResult:
        with Vertical():
            yield Leaf(id="leaf")

    def on_mount(self) -> None:
        self.run_worker(self._answer())

    async def _answer(self) -> None:
        await Leaf.going.wait()
        await asyncio.sleep(0.05)
        self.query_one("#leaf", Leaf).update("answered")
        self.app.copied = True  # type: ignore[attr-defined]


async def test_an_answer_that_comes_while_the_app_ends_ends_nothing_else() -> None:
    Leaf.going = asyncio.Event()
    app = WindtunnelApp(Draft(), pages={"Machine": Busy})
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause()
    app = app
    assert not hasattr(app, "copied")
