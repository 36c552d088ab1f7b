"""The Plan page: values change as in a spreadsheet, and everything follows at once."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from textual.pilot import Pilot

from engine.config import DatasetConfig
from engine.hardware import assume
from engine.plan import Device, Statistics, best_device, cpu_device
from engine.report.plan import bar_parts, legend, share_cells, stretches
from engine.units import GIB, gib
from engine.wizard.draft import Draft, counted_of, set_value
from engine.wizard.plan import list_fields
from tests.support.screens import assert_golden, screen_text, wait_for
from tui.app import WindtunnelApp
from tui.entry import WizardRequest, make_draft
from tui.page import Page
from tui.widgets.choices import Fields

ROWS = Statistics(480, 142_150, 33_180, 296.1, 1213, (1213,) * 9 + (688,) * 471)


OPENED = """\
base_model: mistralai/Magistral-Small-2509
adapter: qlora
load_in_4bit: true
lora_r: 32
sequence_len: 8192
sample_packing: true
micro_batch_size: 2
attn_implementation: sdpa
gradient_checkpointing: true
datasets:
  - path: chats.jsonl
"""


EXPERT_TENSORS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
"""As the recipe of Mistral Small 4 names them."""


def planned(gpu: str, model: str) -> Draft:
    """A draft for a card that nothing else uses."""
    machine = assume(gpu)
    draft = Draft(
        machine=machine,
        device=best_device(machine),
        model=model,
        dataset=DatasetConfig(path="chats.jsonl", type="chat_template"),
        statistics=ROWS,
    )
    draft.counted = counted_of(draft.config())
    return draft


class Beyond(Page):
    STEP = "Review"


class Before(Page):
    STEP = "Preview"


@asynccontextmanager
async def plan_page(draft: Draft, size: tuple[int, int] = (80, 24)) -> AsyncIterator[Pilot[int]]:
    app = WindtunnelApp(draft, start="Plan", pages={"Review": Beyond, "Preview": Before})
    async with app.run_test(size=size) as pilot:
        await pilot.pause()
        yield pilot


async def on_page(draft: Draft, *keys: str, size: tuple[int, int] = (80, 24)) -> str:
    """What the screen shows after these keys."""
    async with plan_page(draft, size) as pilot:
        await pilot.press(*keys)
        await pilot.pause()
        return screen_text(pilot.app)


async def go_to(pilot: Pilot[int], key: str) -> None:
    fields = pilot.app.screen.query_one(Fields)
    while fields.field is not None and fields.field.key != key:
        await pilot.press("down")


@pytest.mark.parametrize(
    ("name", "gpu", "model", "size"),
    [
        ("plan-80x24", "RTX 4090", "magistral-small-2507", (80, 24)),
        ("plan-120x40-slow", "RTX 4090", "mistral-medium-3.5", (120, 40)),
        ("plan-120x40-too-large", "RTX 4090", "magistral-small-2507", (120, 40)),
    ],
)
async def test_the_page_looks_right(name: str, gpu: str, model: str, size: tuple[int, int]) -> None:
    draft = planned(gpu, model)
    draft.change("attn_implementation", "sdpa")  # not what happens to be installed here
    if "too-large" in name:
        draft.change("adapter", "lora")
    assert_golden(name, await on_page(draft, size=size))


async def test_an_opened_config_has_its_ladder_beside_it_in_whole_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yml").write_text(OPENED, "utf-8")
    draft = make_draft(WizardRequest(Path("mine.yml"), assumed="16 GB"))
    draft.statistics, draft.counted = ROWS, counted_of(draft.config())
    assert_golden("plan-120x40-opened", await on_page(draft, size=(120, 40)))


async def test_typing_a_rank_moves_the_verdict_the_bar_and_the_config() -> None:
    draft = planned("RTX 4090", "magistral-small-2507")
    before = draft.advice().estimate.device_bytes
    async with plan_page(draft) as pilot:
        await go_to(pilot, "lora_r")
        await pilot.press("8")
        await pilot.pause()
        text = screen_text(pilot.app)
    assert draft.config().lora_r == 8
    after = draft.advice().estimate.device_bytes
    assert after < before
    assert f"needs {after / 2**30:.1f} GiB" in text
    assert "lora_r=8" in text  # the command that does the same
    assert "8▏" in text


async def test_a_person_s_value_is_marked_and_u_puts_the_recommended_one_back() -> None:
    draft = planned("RTX 4090", "magistral-small-2507")
    recommended = draft.config().lora_r
    async with plan_page(draft) as pilot:
        await go_to(pilot, "lora_r")
        await pilot.press("left")
        await pilot.pause()
        assert "16›*" in screen_text(pilot.app)
        assert draft.advice().reasons["lora_r"].startswith("yours (recommended")
        await pilot.press("u")
    assert "lora_r" not in draft.changes
    assert draft.config().lora_r == recommended


@pytest.mark.parametrize("keys", [("8", ".", "5"), ("0",), ("9", "e", "9", "9")])
async def test_a_typed_value_that_is_none_keeps_the_last_good_plan(keys: tuple[str, ...]) -> None:
    draft = planned("RTX 4090", "magistral-small-2507")
    async with plan_page(draft) as pilot:
        await go_to(pilot, "lora_r")
        await pilot.press(*keys)
        await pilot.press("enter")
        await pilot.pause()
        text = screen_text(pilot.app)
    assert "● Plan" in text  # enter did not pass
    assert "lora_r" in text.split("settings", 1)[1]
    assert isinstance(draft.config().lora_r, int)


def test_experts_and_attention_are_offered_as_they_fit_the_model_and_the_card() -> None:
    fields = {
        each.key: each
        for each in list_fields(planned("T4", "ministral-3-3b"), every=False, wrong=None)
    }
    assert not {"lora_target_parameters", "quantize_moe_experts"} & set(fields)
    assert "flash_attention_2" not in fields["attn_implementation"].usual  # needs Ampere
    assert "; FlashAttention 4 is not eligible: it needs " in fields["attn_implementation"].reason
    draft = planned("H200", "mistral-small-4")
    set_value(draft, "gradient_checkpointing", "true")  # or fewer layers are kept beside experts
    fields = {each.key: each for each in list_fields(draft, every=False, wrong=None)}
    assert "flash_attention_3" in fields["attn_implementation"].usual
    assert "; FlashAttention 4 is eligible: made for Hopper" in fields["attn_implementation"].reason
    before = draft.advice().estimate.device_bytes
    told = fields["lora_target_parameters"].reason
    set_value(draft, "lora_target_parameters", "experts")
    assert draft.config().lora_target_parameters == EXPERT_TENSORS
    after = draft.advice().estimate.device_bytes
    assert after > before
    assert told.startswith(f"with: {gib(after)}")
    fields = {each.key: each for each in list_fields(draft, every=False, wrong=None)}
    assert fields["lora_target_parameters"].value == "experts"
    assert fields["lora_target_parameters"].reason.startswith(f"without: {gib(before)}")
    set_value(draft, "lora_target_parameters", "none")
    assert draft.config().lora_target_parameters is None


def test_full_qlora_and_lora_take_what_belongs_to_them_along() -> None:
    draft = planned("H200", "ministral-3-8b")
    set_value(draft, "adapter", "full")
    assert draft.config().adapter is None
    assert not draft.config().load_in_4bit
    assert draft.config().learning_rate == pytest.approx(2e-5)
    set_value(draft, "adapter", "qlora")
    assert draft.config().load_in_4bit
    draft.reset("adapter")
    assert draft.changes == {}


def test_a_held_out_share_takes_the_place_of_the_recipe_s_sets() -> None:
    draft = planned("H100 80GB HBM3", "demo-tiny")
    draft.dataset = DatasetConfig(path="sample:harbour-pilot", type="chat_template")
    assert draft.config().test_datasets
    set_value(draft, "val_set_size", "0.2")
    assert draft.config().val_set_size == pytest.approx(0.2)
    assert not draft.config().test_datasets
    draft.reset("val_set_size")
    assert draft.config().test_datasets


async def test_f_takes_rungs_until_it_fits() -> None:
    draft = planned("RTX 4090", "magistral-small-2507")
    draft.change("adapter", "lora")
    assert draft.advice().estimate.verdict == "does not fit"
    async with plan_page(draft) as pilot:
        await pilot.press("f")
        await pilot.pause()
        assert "what would fit, least change first" in screen_text(pilot.app)
        await pilot.press("enter")
        await pilot.pause()
        assert "✓ fits" in screen_text(pilot.app)
    assert draft.advice().estimate.verdict == "fits"
    assert draft.changes["adapter"] == "qlora"


async def test_f_says_so_where_it_fits_already() -> None:
    text = await on_page(planned("H200", "ministral-3-3b"), "f")
    assert "what would fit" not in text


async def test_g_plans_for_another_gpu() -> None:
    draft = planned("RTX 4090", "mistral-medium-3.5")
    async with plan_page(draft) as pilot:
        await pilot.press("g")
        await pilot.pause()
        await pilot.press("G", "enter")
    assert draft.device is not None
    assert draft.device.planned
    assert draft.device.total_bytes > 140 * 2**30
    assert draft.advice().estimate.verdict == "fits"


async def test_a_shows_all_settings_and_f1_explains_the_one_under_the_cursor() -> None:
    draft = planned("RTX 4090", "magistral-small-2507")
    text = await on_page(draft, "a", "end", "f1")
    assert "windtunnel explain seed" in text


async def test_enter_accepts_and_escape_goes_back() -> None:
    draft = planned("RTX 4090", "magistral-small-2507")
    assert "● Review" in await on_page(draft, "enter")
    assert "● Preview" in await on_page(draft, "escape")


async def test_the_reason_of_the_value_under_the_cursor_is_never_cut() -> None:
    draft = planned("RTX 4090", "magistral-small-2509")
    fields = list_fields(draft, every=False)
    assert any(len(field.reason) > 76 for field in fields)
    async with plan_page(draft) as pilot:
        for field in fields:
            shown = " ".join(screen_text(pilot.app).split())
            assert f"{field.key} {' '.join(field.reason.split())}" in shown
            await pilot.press("down")
            await pilot.pause()


async def test_a_missing_answer_is_a_sentence() -> None:
    text = await on_page(Draft(model="ministral-3-3b"))
    assert "No device is chosen." in text


def test_the_bar_adds_up_and_an_overflow_is_drawn() -> None:
    fits = planned("RTX 4090", "magistral-small-2507")
    device = fits.device
    assert device is not None
    parts = bar_parts(fits.advice().estimate, device)
    assert sum(part.size_bytes for part in parts) == pytest.approx(device.total_bytes, abs=1)
    fits.change("adapter", "lora")
    large = fits.advice().estimate
    parts = bar_parts(large, device)
    over = next(part for part in parts if part.name == "over by")
    assert over.size_bytes == -large.spare_bytes
    kept = device.total_bytes - large.can_give_bytes
    assert sum(p.drawn_bytes for p in parts) == pytest.approx(large.device_bytes + kept, abs=1)
    assert sum(share_cells([3, 3, 3, 1], 71)) == 71
    assert share_cells([0, 0], 10) == [0, 0]
    for cells in (20, 72):
        assert sum(len(text) for _, text in stretches(parts, cells)) == cells
    assert [part.name for part, _ in legend(parts, 200)] == [part.name for part in parts]
    assert len(legend(parts, 30)) == 2


async def test_a_card_that_is_not_here_is_not_measured() -> None:
    async with plan_page(planned("RTX 4090", "ministral-3-3b")) as pilot:
        await pilot.press("F")
        await pilot.pause()
        (told,) = pilot.app._notifications
        assert told.message.startswith("RTX 4090 is not here")


@pytest.mark.slow
async def test_big_f_measures_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("WINDTUNNEL_MEASURED", str(tmp_path))
    draft = planned("RTX 4090", "demo-tiny")
    draft.device = cpu_device(assume("24 GB"))
    draft.statistics = draft.dataset = None
    async with plan_page(draft) as pilot:
        await pilot.press("F")
        await wait_for(
            pilot,
            lambda: any("measured peak" in told.message for told in pilot.app._notifications),
            seconds=120,
        )
    assert list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    "device",
    [
        Device("RTX 6000 Ada Generation", "cuda", 40 * GIB, 38 * GIB, (8, 9)),
        Device("this computer's CPU", "cpu", 24 * GIB, 21 * GIB),
    ],
)
async def test_what_can_be_given_is_not_cut_at_80_columns(device: Device) -> None:
    draft = planned("RTX 4090", "magistral-small-2507")
    draft.device = device
    draft.change("adapter", "lora")
    needs = draft.advice().estimate
    row = (await on_page(draft)).splitlines()[1]
    amounts = f"needs {gib(needs.device_bytes)} ± {needs.uncertainty:.0%}"
    can_give = f"it can give {needs.can_give_bytes / GIB:.1f} of {device.total_bytes / GIB:.1f}"
    assert row == f"  Plan  ✗ does not fit  {amounts}, {can_give}"
