"""The token view: lines that never split what must be whole, and meaning without colour."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from textual.app import App
from textual.pilot import Pilot

from engine.chat.render import Kind
from engine.data.requests import PreviewRow
from tests.support.screens import screen_text
from tui.app import THEME
from tui.widgets.tokens import TokenRow, TokenView, lay_out, read_row

CONTROL = 10


def row(*tokens: tuple[str, str]) -> TokenRow:
    """Tokens as (kind, piece); a piece in brackets is a control token."""
    kinds = [kind for kind, _ in tokens]
    pieces = [piece for _, piece in tokens]
    sources = [0 if kind in ("user", "bos") else 1 for kind in kinds]
    ids = [
        number % CONTROL if piece.startswith(("[", "<")) else CONTROL + number
        for number, piece in enumerate(pieces)
    ]
    stored = [Kind[kind.upper()] for kind in kinds]
    return read_row(PreviewRow(1, 1, "", None, ids, pieces, stored, sources, (), (), CONTROL))


TALK = row(
    *[("bos", "<s>"), ("user", "[INST]"), ("user", "Is"), ("user", " it"), ("user", " far")],
    *[("user", "?"), ("user", "[/INST]"), ("think", "[THINK]"), ("think", "No"), ("think", ".")],
    *[("think", "[/THINK]"), ("text", "Not"), ("text", " at"), ("text", " all"), ("eos", "</s>")],
)


def lines(*args, **keys) -> list[str]:
    return ["".join(text for text, _ in line.fragments) for line in lay_out(*args, **keys)]


def test_each_role_is_a_block_and_starts_a_line() -> None:
    assert [block.role for block in TALK.blocks] == ["user", "think", "answer"]
    assert lines(TALK, 40) == ["<s>[INST]Is it far?[/INST]", "[THINK]No.[/THINK]", "Not at all</s>"]


def test_lines_break_at_words_and_before_control_tokens() -> None:
    assert lines(TALK, 12)[:3] == ["<s>[INST]Is", "it far?", "[/INST]"]


def test_a_line_feed_in_the_text_ends_the_line() -> None:
    said = row(("text", "one"), ("text", "␊␊"), ("text", "two"))
    assert lines(said, 40) == ["one␊␊", "two"]


def test_edges_and_labels_show_where_tokens_end() -> None:
    assert lines(row(("text", "lamp"), ("text", "s")), 40, edges="│") == ["lamp│s│"]
    with_labels = lay_out(TALK, 40, labels=True)
    assert all(
        cell_len(text) >= len("-100") + 1 for each in with_labels for text, _ in each.fragments
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["[INST]", "word", " word", "␊", "漢字", "", " ", "x" * 50]), min_size=1
    ),
    st.integers(12, 40),
    st.booleans(),
)
def test_nothing_is_lost_and_no_line_too_wide(pieces: list[str], width: int, labels: bool) -> None:
    told = row(*(("text", piece) for piece in pieces))
    laid = lay_out(told, width, labels=labels)
    assert all(sum(cell_len(text) for text, _ in line.fragments) <= width for line in laid)
    drawn: dict[int, str] = {}
    for line in laid:
        for text, index in line.fragments:
            drawn[index] = drawn.get(index, "") + text
    assert [drawn.get(i, "").strip() for i in range(len(pieces))] == [p.strip() for p in pieces]
    for line in laid:
        for text, index in line.fragments:
            if told.is_control(index):
                assert text.strip() == pieces[index]


def test_text_and_ids_are_found_from_the_cursor_on_and_around() -> None:
    assert TALK.find("it far", -1) == 3
    assert TALK.find("NOT", -1) == 11
    assert TALK.find("no", 8) == 11
    assert TALK.find("no", 11) == 8
    assert TALK.find(f"id:{TALK.ids[5]}", -1) == 5
    assert TALK.find("nowhere", 0) is None


@asynccontextmanager
async def shown(columns: int, rows: int) -> AsyncIterator[tuple[TokenView, Pilot[None]]]:
    app, view = App[None](), TokenView()
    app.register_theme(THEME)
    app.theme = THEME.name
    async with app.run_test(size=(columns, rows)) as pilot:
        await app.mount(view)
        yield view, pilot


def luminance(colour) -> float:
    red, green, blue = colour.get_truecolor()
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


async def test_learned_text_is_lighter_than_text_that_is_only_read() -> None:
    async with shown(60, 10) as (view, _):
        styles = {
            name: view.get_component_rich_style(f"tokens--{name}", partial=True)
            for name in ("think", "answer", "call", "other", "read")
        }
        read = styles.pop("read")
        assert read.dim
        assert not read.underline
        for style in styles.values():
            assert style.underline
            assert luminance(style.color) > luminance(read.color)


async def test_the_gutter_tells_what_is_learned_and_control_tokens_are_bold() -> None:
    async with shown(60, 10) as (view, pilot):
        flags = [kind in ("think", "text", "eos") for kind in TALK.kinds]
        view.show_row(TALK, flags)
        await pilot.pause()
        text = screen_text(pilot.app)
        assert "user    ┊ <s>[INST]Is it far?[/INST]" in text
        assert "think   ┃ [THINK]No.[/THINK]" in text
        view.relabel([kind in ("text", "eos") for kind in TALK.kinds])
        await pilot.pause()
        assert "think   ┊ [THINK]No.[/THINK]" in screen_text(pilot.app)
        styles = {s.text: s.style for s in view.render_line(0)}
        assert styles["[INST]"].bold
        assert not styles["Is"].bold
        pilot.app.add_class("-ascii")
        view.refresh()
        assert "think   : [THINK]" in screen_text(pilot.app) or ":" in view.render_line(1).text


async def test_counts_stand_below_the_role_and_the_cursor_goes_by_token_and_line() -> None:
    async with shown(24, 12) as (view, pilot):
        view.show_row(TALK, [kind != "user" for kind in TALK.kinds])
        view.focus()
        await pilot.press("right", "l")
        assert view.cursor == 2
        await pilot.press("down")
        assert TALK.pieces[view.cursor] == "?"  # below it: "<s>[INST]Is" is 11 cells wide
        await pilot.press("end")
        assert view.cursor == len(TALK) - 1
        await pilot.press("home")
        assert view.cursor == 0
        assert "4/4     ┃" in screen_text(pilot.app)


async def test_a_token_that_is_part_of_a_character_shows_the_cursor_on_the_whole() -> None:
    async with shown(40, 8) as (view, pilot):
        view.show_row(row(("text", "a"), ("text", ""), ("text", "漢")), [True] * 3, cursor=1)
        view.focus()
        await pilot.pause()
        reversed_text = [s.text for s in view.render_line(0) if s.style and s.style.reverse]
        assert reversed_text == ["漢"]
