"""The Data page on the real worker: what it finds, what it says about it, what Enter takes."""

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from engine.wizard.data import complete_path, find_newest
from engine.wizard.draft import Draft
from tests.support.data import chat, write_rows
from tests.support.screens import assert_golden
from tests.support.stand_in import SAMPLE, Screen, draft_on, opened
from tui.screens.data import spark


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the wizard was started."""
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


@asynccontextmanager
async def pointed_at(
    name: str, until: str, draft: Draft | None = None, size: tuple[int, int] = (80, 24)
) -> AsyncIterator[Screen]:
    """The page with the cursor on the newest file of the folder, once it shows `until`."""
    async with opened(draft or draft_on(), "Data", size) as screen:
        await screen.until(name)
        await screen.press("down")
        await screen.until(until)
        yield screen


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
async def test_the_page_looks_like_its_golden_text(size: tuple[int, int]) -> None:
    async with opened(draft_on(), "Data", size) as screen:
        await screen.until("104 to learn from, 2 other sets held out")
        assert_golden(f"data-{size[0]}x{size[1]}", screen.text)


async def test_enter_takes_the_sample_and_its_statistics() -> None:
    draft = draft_on()
    async with opened(draft, "Data") as screen:
        await screen.press("enter")  # before it is read: goes on when it is
        await screen.until(lambda: screen.went_on)
        assert draft.dataset.path == SAMPLE
        assert draft.statistics.usable_rows == 104
        assert draft.statistics.longest_tokens == draft.statistics.longest_rows[0] == 70
        assert draft.changes == {}


async def test_what_is_wrong_is_listed_worst_first_with_a_place_and_a_repair(folder) -> None:
    write_rows(
        folder / "rows.jsonl",
        *(chat(f"q {n}") for n in range(120)),
        "{bad\n",
        *({"messages": []} for _ in range(3)),
        chat("q 7"),
        chat("x", "  "),
    )
    async with pointed_at("rows.jsonl", "122 conversations") as screen:
        assert "110 to learn from, 12 held out; 4 rows left out" in screen.text
        told = [line for line in screen.text.splitlines() if " rows: " in line or "row: " in line]
        assert "✗ 3 rows: The row has no assistant message. (lines 122, 123, 124" in told[0]
        assert "✗ 1 row: The line is not JSON." in told[1]
        assert "! 1 row: The answer is blank" in told[2]
        assert "! 1 row: repeating" in screen.text
        await screen.press("tab", "enter")
        await screen.until("fix   Add the answer that the model should give")
        assert "rows  122, 123, 124" in screen.text
        await screen.press("escape")
        assert "what was found" in screen.text


async def test_a_dataset_that_cannot_be_used_does_not_pass(folder) -> None:
    write_rows(folder / "rows.jsonl", {"a": 1}, {"a": 2})
    draft = draft_on()
    verdict = "✗ not usable  none of 2 rows can be used"
    async with pointed_at("rows.jsonl", verdict, draft) as screen:
        assert "columns  a" in screen.text
        await screen.press("m")
        assert "no column holds messages or texts; there are a" in screen.text
        await screen.press("enter")
        assert "● Data" in screen.text
        assert draft.dataset is None


async def test_columns_are_mapped_as_proposed_or_otherwise(folder) -> None:
    said = [{"speaker": "human", "said": "hi"}, {"speaker": "gpt", "said": "yo", "musing": "t"}]
    write_rows(folder / "rows.jsonl", {"dialog": said})
    draft = draft_on()
    async with pointed_at("rows.jsonl", "✗ not usable", draft) as screen:
        await screen.press("m")
        await screen.until("which column is which")
        assert "messages     (•) dialog" in screen.text
        await screen.press("down", "down", "space", "enter")
        await screen.until("✓ 1 conversation")
        assert "in 1 of 1 answers" not in screen.text
        await screen.press("enter")
        await screen.until(lambda: screen.went_on)
        assert draft.dataset.field_messages == "dialog"
        assert draft.dataset.message_property_mappings == {"role": "speaker", "content": "said"}


async def test_h_holds_rows_out() -> None:
    draft = draft_on()
    async with opened(draft, "Data") as screen:
        await screen.until("104 to learn from, 2 other sets held out")
        await screen.press("h")
        assert "99 to learn from, 5 held out" in screen.text
        assert draft.changes == {"val_set_size": 0.05}
        await screen.press("h", "h")
        assert "83 to learn from, 21 held out" in screen.text
        await screen.press("h")
        assert "104 to learn from, 2 other sets held out" in screen.text


async def test_the_first_rows_show_hostile_text_and_do_not_act_on_it(folder) -> None:
    write_rows(folder / "[bold]b[x.jsonl", chat("\x1b]0;x\x07 [bold]b[/] \u202e", "[/] fine"))
    async with pointed_at("[bold]b[x.jsonl", "1 conversation") as screen:
        await screen.press("e")
        await screen.until("user      ␛]0;x␇ [bold]b[/] ⟨U+202E⟩")
        assert "[/] fine" in screen.text
        assert "\x1b" not in screen.text


async def test_a_name_that_no_config_may_hold_is_a_sentence(folder) -> None:
    write_rows(folder / "a\x1b[31m.jsonl", chat("q"))
    async with pointed_at("a␛[31m.jsonl", "holds invisible characters") as screen:
        assert "✗ cannot be read" in screen.text


async def test_a_path_is_typed_and_completed_and_a_missing_one_is_a_sentence(folder) -> None:
    write_rows(folder / "tickets" / "spring.jsonl", chat("q"))
    write_rows(folder / "tickets" / "notes.txt", "x")
    draft = draft_on()
    async with opened(draft, "Data") as screen:
        await screen.until("spring.jsonl")
        await screen.press("down", "down", "enter")
        await screen.type("nothing")
        await screen.press("enter")
        await screen.until("✗ cannot be read  There is no nothing.")
        await screen.press(*["backspace"] * 7, "t", "tab", "tab", "enter")
        await screen.until("✓ 1 conversation")
        await screen.press("enter")
        await screen.until(lambda: screen.went_on)
        assert draft.dataset.path == "tickets/spring.jsonl"


async def test_keys_of_the_page_work_again_once_a_typed_path_was_read(folder) -> None:
    """`m maps them` says the page: in the field the m would become part of the path."""
    write_rows(folder / "deep" / "own.jsonl", {"frage": "?", "antwort": "!"})
    async with opened(draft_on(), "Data") as screen:
        await screen.until("own.jsonl")
        await screen.press("down", "down", "enter")
        await screen.until("esc leave the field")
        await screen.type("deep/own.jsonl")
        await screen.press("enter")
        await screen.until("m maps them")
        await screen.until("m map")
        await screen.press("m")
        await screen.until("use this")
        await screen.press("escape", "enter")
        await screen.until("esc leave the field")


async def test_the_hub_is_asked_only_after_yes(folder) -> None:
    draft = draft_on()
    async with opened(draft, "Data") as screen:
        await screen.until("2 other sets held out")
        await screen.press("down", "down", "enter")
        await screen.type("org/set")
        await screen.press("enter")
        await screen.until("connect to huggingface.co?")
        assert "There is no local org/set." in screen.text
        await screen.press("escape")
        assert "· no data" in screen.text
        assert "reading org/set" not in screen.text


async def test_a_worker_that_is_killed_is_a_sentence_and_r_reads_again(folder) -> None:
    write_rows(folder / "rows.jsonl", *(chat(f"q {n}") for n in range(20_000)))
    async with opened(draft_on(), "Data", (80, 24)) as screen:
        await screen.until("2 other sets held out")  # the worker is free
        await screen.until("rows.jsonl")
        await screen.press("down")
        await screen.until("rows so far")
        await screen.until(" MB")
        os.kill(screen.app.data_worker.process_id, signal.SIGKILL)  # type: ignore[arg-type]
        await screen.until("It was stopped by signal 9.")
        await screen.press("up")
        await screen.until("104 to learn from")


def test_the_newest_files_are_found_at_most_three_folders_below(folder) -> None:
    for age, name in enumerate(
        ["a.jsonl", "b/c.jsonl", "b/d.txt", ".hidden/e.jsonl", "f.jsonl.gz"]
    ):
        path = write_rows(folder / name, "x")
        os.utime(path, (1000 - age, 1000 - age))
    deep = folder / "1" / "2" / "3" / "4"
    deep.mkdir(parents=True)
    write_rows(deep / "g.jsonl", "x")
    assert find_newest(folder) == ["a.jsonl", "b/c.jsonl", "f.jsonl.gz"]
    assert find_newest(folder / "nowhere") == []


def test_a_path_is_completed_as_far_as_names_agree(folder) -> None:
    for name in ("alpha.jsonl", "alps.csv", "album.png", "data/x.jsonl", ".secret/y.jsonl"):
        write_rows(folder / name, "x")
    assert complete_path("al", folder) == ("alp", ["alpha.jsonl", "alps.csv"])
    assert complete_path("d", folder) == ("data/", ["data/"])
    assert complete_path("data/", folder) == ("data/x.jsonl", ["x.jsonl"])
    assert complete_path("zz", folder) == ("zz", [])
    assert complete_path("no/where", folder) == ("no/where", [])
    assert complete_path("\0", folder) == ("\0", [])


def test_a_spark_has_a_bar_for_every_count_above_nothing() -> None:
    assert spark([0, 1, 100], 3) == "▁▂█"
    assert spark([1, 1, 1, 1], 2) == "██"
    assert spark([], 5) == ""


def picture(path: Path, shade: int = 0) -> bytes:
    """A PNG of 64 x 32 pixels."""
    Image.new("RGB", (64, 32), (shade, 90, 90)).save(path)
    return path.read_bytes()


async def test_images_are_counted_and_missing_ones_listed_by_line(folder) -> None:
    picture(folder / "a.png")
    rows = [chat("what is it?") | {"images": [name]} for name in ("a.png", "a.png", "b.png")]
    write_rows(folder / "rows.jsonl", *rows)
    async with pointed_at("rows.jsonl", "2 conversations", draft_on("demo-tiny-vision")) as screen:
        assert "images   2 in 2 rows, " in screen.text
        assert "1 different, " in screen.text
        assert "up to 64x32" in screen.text
        assert "There is no image b.png. (line 3 of rows.jsonl" in screen.text
        assert screen.app.draft.shows_images


async def test_a_text_model_over_images_is_said_in_the_verdict(folder) -> None:
    picture(folder / "a.png")
    write_rows(folder / "rows.jsonl", chat("q"), chat("q") | {"images": ["a.png"]})
    sentence = "the model reads only text, and rows have images"
    async with pointed_at("rows.jsonl", sentence, size=(120, 40)):
        pass


async def test_the_columns_of_a_table_are_mapped_too(folder) -> None:
    scan = {"bytes": picture(folder / "a.png"), "path": None}
    row = {"scan": scan, "asked": "Which organ?", "said": "A lung."}
    pq.write_table(pa.Table.from_pylist([row, row]), folder / "scans.parquet")
    draft = draft_on("demo-tiny-vision")
    async with opened(draft, "Data") as screen:
        await screen.press("down", "down")
        await screen.until("a path")
        await screen.press("enter")
        await screen.type("scans.parquet")
        await screen.press("enter")
        await screen.until("none of 2 rows can be used")
        assert "m maps them: image = scan, question = asked (Which" in screen.text
        await screen.press("m", "enter")
        await screen.until("2 conversations")
        await screen.press("enter")
        await screen.until(lambda: screen.went_on)
        taken = draft.dataset
        found = (taken.field_image, taken.field_question, taken.field_answer)
        assert found == ("scan", "asked", "said")
