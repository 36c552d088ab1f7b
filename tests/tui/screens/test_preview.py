"""The Preview page on the real worker: what training reads, what each key and switch does."""

import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine.chat.render import LabelRule, labels
from engine.chat.tokenizer import open_tokenizer
from engine.config import DatasetConfig
from engine.data.prepare import prepare
from engine.data.requests import CheckRows, PreviewRows, Request, plain
from engine.wizard.draft import Draft, rows_config
from tests.support.data import write_rows
from tests.support.screens import assert_golden
from tests.support.stand_in import SAMPLE, WORKER, Screen, draft_on, opened
from tui.page import CommandLine
from tui.widgets.tokens import TokenView


def chat(*turns: str | dict[str, Any], **row: Any) -> dict[str, Any]:
    """Turns by turns of user and assistant."""
    messages = []
    for number, turn in enumerate(turns):
        role = "assistant" if number % 2 else "user"
        said = {"content": turn} if isinstance(turn, str) else turn
        messages.append({"role": role, **said})
    return {"messages": messages, **row}


def thinking(thought: str, answer: str) -> dict[str, Any]:
    return {"content": answer, "reasoning_content": thought}


def draft_of(tmp_path: Path, *rows: object, model: str = "demo-tiny", **changes: Any):
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    return draft_on(model, DatasetConfig(path=str(path)), **changes)


def sample() -> Draft:
    return draft_on(dataset=DatasetConfig(path=SAMPLE))


@asynccontextmanager
async def previewed(
    draft: Draft, until: str = "✓ good", size: tuple[int, int] = (80, 24)
) -> AsyncIterator[Screen]:
    async with opened(draft, "Preview", size) as screen:
        await screen.until(until)
        yield screen


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
async def test_the_page_looks_like_its_golden_text(size: tuple[int, int]) -> None:
    async with previewed(sample(), size=size) as screen:
        await screen.until("[THINK]")
        assert_golden(f"preview-{size[0]}x{size[1]}", screen.text)


async def test_it_shows_the_very_arrays_that_training_reads(tmp_path) -> None:
    draft = draft_of(
        tmp_path,
        chat("q", thinking("hm", "a"), "and?", "b"),
        chat("é ☃ 漢字", {"content": "c", "weight": 0}, "more", "d"),
        train_on_thinking=False,
    )
    config = draft.config()
    tokenizer = open_tokenizer("demo-tiny")
    prepared = prepare(config, tmp_path, tokenizer, tmp_path / "store")
    async with opened(draft, "Preview") as screen:
        for index in range(2):
            await screen.until(f"row {index + 1} of 2")
            view = screen.app.screen.query_one(TokenView)
            await screen.until(lambda view=view: view.row is not None)  # type: ignore[misc]
            ids, kinds = prepared.ids(index), prepared.kinds(index)
            expected = labels(ids, kinds, LabelRule(thinking=False)).tolist()
            assert list(view.row.ids) == ids.tolist()
            shown = [token if view.is_learned(n) else -100 for n, token in enumerate(view.row.ids)]
            assert shown == expected
            await screen.press("n")


async def test_rows_are_reached_by_n_p_and_number_and_odd_rows_by_N_P_and_w(tmp_path) -> None:
    rows = [chat(f"question {n}", f"answer {n}") for n in range(40)]
    rows[29] = chat("q", {"content": "silent", "weight": 0})
    async with previewed(
        draft_of(tmp_path, *rows), "nothing to learn in 1 row, left out"
    ) as screen:
        await screen.press("p")
        assert "row 1 of 40" in screen.text
        await screen.press("n")
        assert "row 2 of 40" in screen.text
        assert "answer 1" in screen.text
        await screen.press("p")
        await screen.press("g", "3", "5", "enter")
        await screen.until("row 35 of 40")
        assert "answer 34" in screen.text
        await screen.press("P")
        await screen.until("row 30 of 40")
        await screen.press("g", "9", "9", "enter")
        await screen.until("99 is no row number; there are 40 rows")
        await screen.press("g", "escape")
        assert "row 30 of 40" in screen.text
        await screen.press("w")
        await screen.until("row 30      learns nothing")
        await screen.press("enter")
        await screen.until("row 1 of 40")
        for _ in range(9):  # the longest and the least learned rows lie between
            if "row 30 of 40" not in screen.text:
                await screen.press("N")
        assert "row 30 of 40" in screen.text
        assert "kept out by the row" in await described(screen, "silent")


async def described(screen, text: str) -> str:
    """The line about the token that `/` finds."""
    await screen.press("slash")
    await screen.type(text)
    await screen.press("enter")
    return next(line for line in screen.text.splitlines() if "  id " in line)


async def test_tokens_are_found_by_text_and_id_and_described() -> None:
    async with previewed(sample()) as screen:
        line = await described(screen, "calm")
        assert "·calm  learned as think" in line
        assert line.endswith("message 1")
        await screen.press("slash", "i", "d", "colon", "3", "5", "enter")
        assert "id 35  [/THINK]  learned as think  control token" in screen.text
        await screen.press("slash", "z", "z", "enter")
        await screen.until("zz is not in this row")


async def test_labels_edges_and_a_copy_of_the_row() -> None:
    async with previewed(sample()) as screen:
        await screen.press("b")
        assert "<s>│[INST]│What│ does│" in screen.text
        await screen.press("b", "m")
        assert "-100" in screen.text
        assert "┃ 34 " in screen.text
        await screen.press("y")
        first, *_, last = screen.app.clipboard.splitlines()
        assert first == "bos\t1\t<s>"
        assert last == "eos\t2\t</s>"


async def test_the_thinking_switch_relabels_at_once_and_asks_nobody() -> None:
    draft = sample()
    async with previewed(draft) as screen:
        asked = list(WORKER.asked)
        assert "4,372  75%" in screen.text
        await screen.press("space", "space")
        assert draft.changes == {"train_on_thinking": False}
        assert "think   ┊ [THINK]" in screen.text
        assert "2,250  39%" in screen.text
        assert "--no-think" in screen.text
        await screen.press("left")
        assert draft.changes == {}
        assert "4,372  75%" in screen.text
        assert WORKER.asked == asked


async def test_dropping_old_thinking_takes_its_tokens_out(tmp_path) -> None:
    row = chat("q", thinking("older thought", "a"), "r", thinking("newer thought", "b"))
    draft = draft_of(tmp_path, row)
    async with previewed(draft) as screen:
        assert "older thought" in screen.text
        await screen.press("space", "down", "space")
        await screen.until(lambda: "older thought" not in screen.text)
        assert "newer thought" in screen.text
        assert draft.changes == {"history_thinking": "drop"}
        await screen.press("space")
        await screen.until("older thought")
        assert draft.changes == {}


async def test_switches_that_are_no_choice_say_why(tmp_path) -> None:
    async with previewed(
        draft_of(tmp_path, chat("q", "a")), "thinking     - none in the rows"
    ) as screen:
        assert "reasoning    - v15 models only" in screen.text


async def test_the_effort_of_v15_is_a_switch_and_none_over_thinking_a_warning(tmp_path) -> None:
    draft = draft_of(tmp_path, chat("q", thinking("t", "a")), model="mistral-small-4")
    async with previewed(
        draft, '[MODEL_SETTINGS]{"reasoning_effort": "high"}', size=(120, 40)
    ) as screen:
        await screen.press("space", "down", "down", "left")
        await screen.until('[MODEL_SETTINGS]{"reasoning_effort": "none"}')
        assert draft.changes == {"chat_template_kwargs": {"reasoning_effort": "none"}}
        await screen.until("! look  effort is none over thinking in 1 row")
        command = screen.app.screen.query_one(CommandLine).command
        assert command.endswith("--row 1 --reasoning-effort none")


async def test_a_bad_row_is_a_sentence_and_n_goes_on(tmp_path) -> None:
    rows = ("{bad\n", chat("q", "fine"))
    async with previewed(draft_of(tmp_path, *rows), "✗ row 1 cannot be used") as screen:
        assert "The line is not JSON." in screen.text
        await screen.until("! look  an error in 1 row")
        await screen.press("n")
        await screen.until("answer  ┃ fine</s>")


async def test_where_nothing_is_learned_enter_does_not_go_on(tmp_path) -> None:
    row = chat("q", {"content": "a", "weight": 0})
    async with previewed(
        draft_of(tmp_path, row), "✗ stop  no token is learned in any row"
    ) as screen:
        await screen.press("enter")
        assert "● Preview" in screen.text


async def test_enter_goes_on_and_a_row_that_is_too_long_is_told(tmp_path) -> None:
    draft = draft_of(tmp_path, chat("q", "word " * 200), chat("q", "b"), sequence_len=128)
    async with previewed(
        draft, "! look  over 128 tokens in 1 row, left out: w shows them"
    ) as screen:
        await screen.press("enter")
        assert screen.went_on


async def test_hostile_text_is_shown_and_does_nothing(tmp_path) -> None:
    text = "\x1b[31mred \u202eback [bold]b[/bold] [/] [INST]"
    async with previewed(draft_of(tmp_path, chat(text, text))) as screen:
        shown = screen.text
        assert "␛[31mred ⟨U+202E⟩back [bold]b[/bold] [/] [INST]" in shown.replace("\n", "")
        assert "\x1b" not in shown
        view = screen.app.screen.query_one(TokenView)
        row = view.row
        control = [piece for at, piece in enumerate(row.pieces) if row.is_control(at)]
        assert control == ["<s>", "[INST]", "[/INST]", "</s>"]


@pytest.mark.slow  # 4 s; the page of the data does the same in each run of the tests
async def test_a_worker_that_is_killed_is_a_sentence_and_r_reads_again(tmp_path) -> None:
    rows = [chat(f"question {n}", "a") for n in range(60)]
    async with previewed(draft_of(tmp_path, *rows)) as screen:
        os.kill(screen.app.data_worker.process_id, signal.SIGSTOP)  # type: ignore[arg-type]
        await screen.press("g", "5", "0", "enter")
        os.kill(screen.app.data_worker.process_id, signal.SIGKILL)  # type: ignore[arg-type]
        await screen.until("It was stopped by signal 9")
        await screen.press("r")
        await screen.until("✓ good")
        assert "question 0" in screen.text


@pytest.mark.parametrize("request_", [CheckRows, PreviewRows])
async def test_the_screen_gets_no_more_of_many_rows_than_of_few(
    tmp_path, request_: type[CheckRows] | type[PreviewRows]
) -> None:
    """The worker counts them: what an answer brings onto the event loop does not grow with them."""

    async def answered_bytes(count: int) -> int:
        rows = [chat(f"question {n}", "a word or two " * 10) for n in range(count)]
        bad = [{"messages": "none"}] * (count // 2)
        config = draft_of(tmp_path, *rows, *bad).config()
        request: Request[Any] = request_(rows_config(config), Path.cwd())
        return len(json.dumps(plain(await WORKER.ask(request))))

    assert await answered_bytes(8000) < 1.5 * await answered_bytes(2000)


async def test_an_image_is_one_chip_that_the_cursor_steps_over_and_nobody_learns(tmp_path) -> None:
    Image.new("RGB", (448, 336)).save(tmp_path / "lamp.png")
    row = chat("What is it?", "A lamp.", images=["lamp.png"])
    draft = draft_of(tmp_path, row, model="demo-tiny-vision")
    async with previewed(draft, "every row learns something") as screen:
        await screen.until("[image 448x336: 8 x 6 tokens]")
        assert screen.text.count("[image 448x336: 8 x 6 tokens]") == 1
        await screen.press("right", "right")
        told = "54 tokens from 3  image 448x336: 8 x 6 tokens  only read: image  message 0"
        assert told in screen.text
        assert "54 are of images" in screen.text
        view = screen.app.screen.query_one(TokenView)
        assert not any(view.is_learned(at) for at in range(2, 56))
        await screen.press("right")
        assert view.cursor == 56
        await screen.press("left", "left")
        assert view.cursor == 1
