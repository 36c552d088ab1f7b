"""A plan has the rows of its config: counted when a config is opened, again when they change."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine.config import DatasetConfig, RunConfig
from engine.data.requests import CheckRows, Request
from engine.data.statistics import Checkup
from engine.errors import UserError
from engine.hardware import assume
from engine.plan import Place, Statistics, best_device, estimate
from engine.units import gib
from engine.wizard.data import check_command
from engine.wizard.draft import (
    COUNTING,
    MOST_BYTES,
    Draft,
    check_rows,
    count_config_rows,
    counted_of,
    next_count,
    take_count,
)
from engine.wizard.plan import plan_command
from engine.wizard.preview import preview_command
from engine.wizard.reading import DataWorker
from tests.support.data import write_rows
from tests.support.stand_in import SAMPLE, WORKER, Screen, draft_on, opened
from tui.app import WindtunnelApp
from tui.entry import WizardRequest, make_draft
from tui.screens.plan import PlanPage
from tui.screens.review import ReviewPage
from tui.widgets.choices import Fields

CONFIG = """\
base_model: demo-tiny
adapter: lora
sequence_len: 4096
micro_batch_size: 4
datasets:
  - path: {path}
    type: chat_template
"""


pytestmark = pytest.mark.usefixtures("folder")


def chat(question: str, answer: str, thought: str = "", **more: object) -> dict[str, Any]:
    content: list[dict[str, str]] = [{"type": "text", "text": answer}]
    if thought:
        content.insert(0, {"type": "thinking", "thinking": thought})
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": content if thought else answer},
    ]
    return {"messages": messages, **more}


def opened_draft(path: Path, text: str, gpu: str = "24 GB") -> Draft:
    path.write_text(text, "utf-8")
    return make_draft(WizardRequest(path, assumed=gpu))


def counted(draft: Draft) -> Statistics:
    """What the command line counts of the draft's config."""
    found, why = count_config_rows(draft.config(), draft.architecture(), Path.cwd())
    assert found is not None, why
    return found


def needs(draft: Draft, rows: Statistics | None) -> str:
    assert draft.device is not None
    place = Place(draft.architecture(), draft.device, rows)
    return gib(estimate(draft.config(), place).device_bytes)


class Held(DataWorker):
    """Answers a count when it is told to."""

    def __init__(self, found: Checkup | UserError) -> None:
        super().__init__()
        self.found = found
        self.asked: list[Request[Any]] = []
        self.told = asyncio.Event()

    async def ask(self, request: Request[Any], progress: Any = None) -> Any:
        self.asked.append(request)
        await self.told.wait()
        if isinstance(self.found, UserError):
            raise self.found
        return self.found


def found_in(draft: Draft) -> Checkup:
    return check_rows(draft.config(), Path.cwd())


class TestOpened:
    @pytest.mark.parametrize("page", ["Review", "Plan"])
    async def test_its_rows_make_the_plan_of_the_command(self, tmp_path: Path, page: str) -> None:
        draft = opened_draft(tmp_path / "mine.yml", CONFIG.format(path=SAMPLE))
        full, own = needs(draft, None), needs(draft, counted(draft))
        assert full != own
        async with opened(draft, page, (120, 40)) as screen:
            await screen.until(lambda: draft.statistics is not None)
            await screen.until(f"needs {own.removesuffix(' GiB')}" if page == "Plan" else own)
            assert COUNTING not in screen.text
        assert draft.statistics == counted(draft)
        assert draft.uncounted == ""

    @pytest.mark.parametrize("page", ["Review", "Plan"])
    async def test_until_then_rows_are_taken_to_be_full(self, tmp_path: Path, page: str) -> None:
        draft = opened_draft(tmp_path / "mine.yml", CONFIG.format(path=SAMPLE))
        full = needs(draft, None)
        app = WindtunnelApp(draft, start=page)
        app._data_worker = held = Held(found_in(draft))
        async with app.run_test(size=(120, 40)) as pilot:
            screen = Screen(app, pilot)
            await screen.until(COUNTING)
            assert "full rows" in screen.text
            assert full.removesuffix(" GiB") in screen.text
            held.told.set()
            await screen.until(lambda: COUNTING not in screen.text)
        assert len(held.asked) == 1
        assert draft.statistics is not None

    async def test_the_cursor_stays_when_the_rows_bring_another_line(self, tmp_path: Path) -> None:
        draft = opened_draft(tmp_path / "mine.yml", CONFIG.format(path=SAMPLE))
        app = WindtunnelApp(draft, start="Plan")
        app._data_worker = held = Held(found_in(draft))
        async with app.run_test(size=(120, 40)) as pilot:
            screen = Screen(app, pilot)
            await screen.until(COUNTING)
            assert "train_on_thinking" not in screen.text
            await screen.press("down", "down")
            fields = app.screen.query_one(Fields)
            before = fields.field
            held.told.set()
            await screen.until("train_on_thinking")
            assert before
            assert fields.field
            assert fields.field.key == before.key == "micro_batch_size"

    @pytest.mark.parametrize(
        ("path", "reason"),
        [
            ("org/name", "its rows are on the hub"),
            ("./nowhere.jsonl", "its rows could not be read: There is no"),
            ("large.jsonl", "its rows are too many to count for an estimate"),
        ],
    )
    async def test_what_cannot_be_counted_says_why_and_asks_nobody(
        self, tmp_path: Path, path: str, reason: str
    ) -> None:
        with (tmp_path / "large.jsonl").open("wb") as file:
            file.truncate(MOST_BYTES + 1)
        draft = opened_draft(tmp_path / "mine.yml", CONFIG.format(path=path))
        WORKER.asked.clear()
        async with opened(draft, "Plan", (120, 40)) as screen:
            await screen.until(reason[:30])
        assert draft.uncounted.startswith(reason)
        assert not any(isinstance(each, CheckRows) for each in WORKER.asked)

    async def test_a_count_that_fails_says_why_once(self, tmp_path: Path) -> None:
        draft = opened_draft(tmp_path / "mine.yml", CONFIG.format(path=SAMPLE))
        app = WindtunnelApp(draft, start="Review")
        app._data_worker = held = Held(UserError("It ended.", "Why.", "Fix."))
        held.told.set()
        async with app.run_test(size=(120, 40)) as pilot:
            await Screen(app, pilot).until("its rows could not be counted: It ended.")
        assert len(held.asked) == 1
        assert next_count(draft) is None

    async def test_images_are_looked_up_where_the_config_says(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        there, here = tmp_path / "there", tmp_path / "here"
        rows = chat("What is it?", "A lamp.", images=["lamp.png"])
        write_rows(there / "rows.jsonl", rows)
        for folder in (there / "pictures", here):
            folder.mkdir()
        Image.new("RGB", (448, 336)).save(there / "pictures" / "lamp.png")
        text = CONFIG.format(path="rows.jsonl").replace("demo-tiny", "demo-tiny-vision")
        text += "processor_type: AutoProcessor\nimage_folder: pictures\n"
        monkeypatch.chdir(here)
        for page, shown in (("Data", "1 in 1 row"), ("Preview", "[image 448x336: 8 x 6 tokens]")):
            async with opened(opened_draft(there / "mine.yml", text), page, (120, 40)) as screen:
                await screen.until(shown)


@pytest.mark.parametrize("thought", ["", "a thought"])
@pytest.mark.parametrize("model", ["demo-tiny", "magistral-small-2507"])
async def test_what_the_data_page_counted_is_kept(tmp_path: Path, model: str, thought: str) -> None:
    write_rows(tmp_path / "rows.jsonl", *[chat("one?", "two", thought)] * 30)
    draft = draft_on(model)
    async with opened(draft, "Data", (120, 40)) as screen:
        await screen.until("where from")
        await screen.press("down")
        await screen.until("✓ 30 conversations")
        await screen.press("enter")
        await screen.until(lambda: draft.statistics is not None)
    assert draft.statistics is not None
    assert draft.statistics.usable_rows == 30
    assert next_count(draft) is None


class TestChanged:
    async def test_smaller_images_are_counted_anew_and_take_less(self, tmp_path: Path) -> None:
        rows = [chat("What is it?", "A lamp.", images=["lamp.png"])] * 3
        write_rows(tmp_path / "rows.jsonl", *rows)
        Image.new("RGB", (896, 896)).save(tmp_path / "lamp.png")
        text = CONFIG.format(path="rows.jsonl").replace("demo-tiny", "demo-tiny-vision")
        draft = opened_draft(tmp_path / "mine.yml", text + "processor_type: AutoProcessor\n")
        async with opened(draft, "Plan", (120, 40)) as screen:
            await screen.until(lambda: draft.statistics is not None)
            assert draft.statistics is not None
            large, before = draft.statistics.image_tokens, draft.advice().estimate
            page = screen.app.screen
            assert isinstance(page, PlanPage)
            draft.change("image_size", 112)
            page.refresh_from_draft()
            assert draft.statistics.image_tokens == large  # until there is a better one
            await screen.until(lambda: draft.statistics == counted(draft))
            assert draft.statistics.image_tokens < large
            assert draft.advice().estimate.moments["loss"] < before.moments["loss"]

    def test_thoughts_that_are_only_read_are_not_learned_tokens(self, tmp_path: Path) -> None:
        write_rows(tmp_path / "rows.jsonl", *[chat("one?", "two", "a long thought " * 9)] * 3)
        draft = draft_on(dataset=DatasetConfig(path="rows.jsonl"), train_on_thinking=True)
        take_count(draft, draft.config(), counted(draft))
        assert next_count(draft) is None
        assert draft.statistics is not None
        learned = draft.statistics.most_learned_tokens
        draft.change("train_on_thinking", False)
        assert next_count(draft) == draft.config()
        assert draft.statistics.most_learned_tokens == learned
        assert draft.uncounted == COUNTING
        take_count(draft, draft.config(), counted(draft))
        assert draft.statistics.most_learned_tokens < learned

    def test_a_switch_that_is_turned_back_leaves_nothing_to_count(self) -> None:
        draft = draft_on(dataset=DatasetConfig(path=SAMPLE), train_on_thinking=True)
        take_count(draft, draft.config(), counted(draft))
        draft.change("train_on_thinking", False)
        assert next_count(draft) is not None
        draft.change("train_on_thinking", True)
        assert next_count(draft) is None
        assert draft.uncounted == ""

    async def test_a_count_that_nobody_asks_for_any_more_is_dropped(self) -> None:
        draft = draft_on(dataset=DatasetConfig(path=SAMPLE))
        app = WindtunnelApp(draft, start="Plan")
        app._data_worker = held = Held(found_in(draft))
        async with app.run_test() as pilot:
            screen = Screen(app, pilot)
            await screen.until(lambda: bool(held.asked))
            draft.change("train_on_thinking", False)
            held.told.set()
            await screen.until(lambda: app._counting is None)
            assert draft.statistics is None

    def test_another_model_counts_the_same_rows_anew(self) -> None:
        draft = draft_on(dataset=DatasetConfig(path=SAMPLE))
        take_count(draft, draft.config(), counted(draft))
        draft.model = "ministral-3-3b"
        assert next_count(draft) == draft.config()
        assert draft.statistics is None

    async def test_other_rows_in_the_editor_leave_the_plan(self, tmp_path: Path) -> None:
        write_rows(tmp_path / "rows.jsonl", *[chat("one?", "two")] * 3)
        draft = opened_draft(tmp_path / "mine.yml", CONFIG.format(path=SAMPLE))
        async with opened(draft, "Review", (120, 40)) as screen:
            await screen.until(lambda: draft.statistics is not None)
            page = screen.app.screen
            assert isinstance(page, ReviewPage)
            before = draft.statistics
            page.take_text(draft.config_text() + "seed: 7\n")
            assert draft.statistics is before
            page.take_text(draft.config_text().replace(SAMPLE, "rows.jsonl"))
            assert draft.statistics is None
            await screen.until(lambda: draft.statistics is not None)
            assert draft.statistics is not None
            assert draft.statistics.usable_rows == 3

    def test_all_datasets_of_a_config_are_counted_not_the_first_alone(self, tmp_path: Path) -> None:
        write_rows(tmp_path / "rows.jsonl", *[chat("one?", "two")] * 3)
        draft = opened_draft(
            tmp_path / "mine.yml", CONFIG.format(path="rows.jsonl") + f"  - path: {SAMPLE}\n"
        )
        first = draft.config().model_copy(update={"datasets": draft.config().datasets[:1]})
        take_count(draft, first, check_rows(first, Path.cwd()).statistics())
        assert next_count(draft) == draft.config()


class TestCommand:
    def test_of_an_opened_config_is_an_estimate_of_the_file(self, tmp_path: Path) -> None:
        draft = opened_draft(tmp_path / "mine.yml", CONFIG.format(path=SAMPLE))
        draft.change("lora_r", 8)
        path = str(tmp_path / "mine.yml")
        device = draft.device
        assert device is not None
        assert plan_command(draft) == ["estimate", path, "lora_r=8", "--assume", device.name]

    def test_of_an_opened_configs_rows_is_a_check_of_the_file(self, tmp_path: Path) -> None:
        """Of the rows alone it would look for their images elsewhere."""
        path = tmp_path / "mine.yml"
        draft = opened_draft(path, CONFIG.format(path=SAMPLE) + "image_folder: pictures\n")
        (own,) = draft.config().datasets
        other = DatasetConfig(path="other.jsonl")
        assert check_command(draft, own) == ["check", str(path)]
        assert check_command(draft, other) == ["check", "other.jsonl", "--model", "demo-tiny"]
        assert check_command(draft_on(), other) == check_command(draft, other)
        draft.change("image_size", 112)
        assert check_command(draft, own) == []
        two = opened_draft(path, CONFIG.format(path=SAMPLE) + "  - path: other.jsonl\n")
        assert check_command(two, two.config().datasets[0]) == []

    def test_of_a_row_it_is_a_preview_of_the_file_or_of_the_rows(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.yml"
        draft = opened_draft(path, CONFIG.format(path=SAMPLE) + "image_folder: pictures\n")
        assert preview_command(draft, draft.config(), 3) == ["preview", str(path), "--row", "3"]
        draft.change("train_on_thinking", False)
        assert preview_command(draft, draft.config(), 3)[-1] == "--no-think"
        draft.change("chat_template_kwargs", {"reasoning_effort": "high"})
        assert preview_command(draft, draft.config(), 3)[-2:] == ["--reasoning-effort", "high"]
        draft.change("history_thinking", "drop")
        assert preview_command(draft, draft.config(), 3) == []
        plain = draft_on(dataset=DatasetConfig(path=SAMPLE), train_on_thinking=False)
        words = ["preview", SAMPLE, "--model", "demo-tiny", "--row", "1", "--no-think"]
        assert preview_command(plain, plain.config(), 1) == words
        plain.change("train_on_inputs", True)
        assert preview_command(plain, plain.config(), 1) == []

    @pytest.mark.parametrize("gpus", ["16 GB", "H100 80GB HBM3 x2", "2 x 8 x H100 80GB HBM3"])
    def test_it_plans_for_the_same_gpus(self, gpus: str) -> None:
        draft = draft_on(dataset=DatasetConfig(path=SAMPLE))
        draft.device = best_device(assume(gpus))
        *_, flag, named = plan_command(draft)
        assert flag == "--assume"
        assert best_device(assume(named)) == draft.device

    def test_none_says_what_only_the_wizard_knows(self, tmp_path: Path) -> None:
        draft = opened_draft(tmp_path / "mine.yml", CONFIG.format(path=SAMPLE))
        draft.path = None  # edited
        assert plan_command(draft) == []
        draft.path = tmp_path / "mine.yml"
        draft.dataset = DatasetConfig(path="other.jsonl")
        assert plan_command(draft) == []
        mapped = DatasetConfig(path=SAMPLE, field_messages="turns")
        assert plan_command(draft_on(dataset=mapped)) == []


def test_what_a_count_holds_for_has_every_key_that_changes_a_row() -> None:
    plain = RunConfig(base_model="demo-tiny")
    for key, value in {
        "train_on_inputs": True,
        "train_on_thinking": False,
        "history_thinking": "drop",
        "image_size": 448,
        "image_folder": "there",
        "image_resize_algorithm": "nearest",
        "chat_template_kwargs": {"reasoning_effort": "none"},
        "tokenizer_config": "there",
        "datasets": (DatasetConfig(path="a"),),
    }.items():
        assert counted_of(plain.model_copy(update={key: value})) != counted_of(plain)
    assert counted_of(plain.model_copy(update={"lora_r": 4})) == counted_of(plain)
