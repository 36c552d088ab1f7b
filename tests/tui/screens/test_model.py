"""The Model page: what each model is on the device, and what may be chosen after which question."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.catalog import find_model
from engine.hardware import assume
from engine.plan import Device, Statistics, best_device
from engine.units import GIB
from engine.wizard.draft import Draft
from tests.support.screens import assert_golden
from tests.support.stand_in import Beyond, Screen, opened

CPU = Device("this computer's CPU", "cpu", 64 * GIB, 46 * GIB)
ROWS = Statistics(10, 900, 0, 90.0, 120)


def on(gpu: str, **answers: Any) -> Draft:
    return Draft(device=best_device(assume(gpu)), **answers)


def line(screen: Screen, title: str) -> str:
    return next(each for each in screen.text.splitlines() if title in each and "GiB" not in each)


def is_left(screen: Screen) -> bool:
    return isinstance(screen.app.screen, Beyond)


@pytest.fixture(autouse=True)
def empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


def model_folder(path: Path, **changes: Any) -> Path:
    path.mkdir()
    config = {**find_model("ministral-3-3b").config, **changes}
    (path / "config.json").write_text(json.dumps(config, default=dict), "utf-8")
    return path


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
@pytest.mark.parametrize("name", ["cpu", "rtx-4090"])
async def test_the_whole_page(name: str, size: tuple[int, int]) -> None:
    draft = Draft(device=CPU) if name == "cpu" else on("RTX 4090")
    async with opened(draft, "Model", size) as screen:
        await screen.until("parameters.")
        assert_golden(f"model-{name}-{size[0]}x{size[1]}", screen.text)


async def test_every_model_has_its_verdict_on_the_device() -> None:
    async with opened(on("RTX 4090"), "Model") as screen:
        await screen.until("❯ Magistral Small 1.2")
        assert "✓ fits" in line(screen, "Ministral 3 3B")
        assert "! slow" in line(screen, "Mistral Small 4")
        assert "! slow" in line(screen, "Mistral Medium 3.5")
        assert "made here" in line(screen, "Demo (tiny)")
        assert "<think>" in line(screen, "Magistral Small 1.0")
    async with opened(on("H200"), "Model") as screen:
        await screen.until("❯ Mistral Medium 3.5")
        assert "✓ fits" in line(screen, "Mistral Small 4")


async def test_models_that_read_only_text_are_refused_for_rows_with_images() -> None:
    async with opened(on("H200"), "Model") as screen:
        await screen.until("❯ Mistral Medium 3.5")
        assert "✓ fits" in line(screen, "Magistral Small 1.1")
        screen.app.draft.shows_images = True  # read on the Data page, then back
        screen.app.screen.refresh_from_draft()  # type: ignore[attr-defined]
        await screen.pilot.pause()
        assert "✗ no images" in line(screen, "Magistral Small 1.1")
        assert "✓ fits" in line(screen, "Magistral Small 1.2")
        for _ in range(4):
            await screen.press("up")
        assert "reads only text, and the rows have images" in screen.text
        await screen.press("enter")
        assert "those rows" in screen.text
        assert "left out" in screen.text
        assert not is_left(screen)


async def test_enter_takes_the_proposed_model_or_the_one_that_was_chosen_before() -> None:
    async with opened(Draft(device=CPU), "Model") as screen:
        await screen.press("enter")  # before it is known what fits: it waits
        await screen.until(lambda: is_left(screen))
        assert screen.app.draft.model == "demo-tiny"
    async with opened(on("H100 NVL", model="ministral-3-8b"), "Model") as screen:
        await screen.until("❯ Ministral 3 8B")


async def test_another_model_forgets_the_lengths_and_the_same_one_keeps_them() -> None:
    draft = on("H100 NVL", model="ministral-3-8b", statistics=ROWS)
    async with opened(draft, "Model") as screen:
        await screen.until("❯ Ministral 3 8B")
        await screen.press("enter")
        assert draft.statistics is ROWS
        screen.app.open_step("Model")
        await screen.press("down", "enter")
        assert draft.model == "ministral-3-14b"
        assert draft.statistics is None


@pytest.mark.parametrize("told", ["This version cannot train it.", "It needs "])
async def test_what_cannot_be_trained_here_is_asked_about_first(told: str, tmp_path: Path) -> None:
    gptq = {"quant_method": "gptq", "bits": 4}
    planned_only = model_folder(tmp_path / "gptq", quantization_config=gptq)
    gpu, wanted = "RTX 4090", str(planned_only)
    if told == "It needs ":
        gpu, wanted = "2 GB", "mistral-small-3.2"
    async with opened(on(gpu, model=wanted), "Model") as screen:
        await screen.until("parameters.")
        await screen.press("enter")
        assert "enter plans it" in screen.text
        assert told in screen.text
        await screen.press("escape")
        assert not is_left(screen)
        await screen.press("enter", "enter")
        assert is_left(screen)
        assert screen.app.draft.model == wanted


async def test_the_filter_narrows_the_list_and_escape_clears_it() -> None:
    async with opened(on("RTX 4090"), "Model") as screen:
        await screen.until("❯ Magistral Small 1.2")
        await screen.press("slash")
        await screen.type("ministral")
        assert "❯ Ministral 3 3B" in screen.text
        assert "Magistral Small 1.2  24" not in screen.text
        await screen.type("x")
        assert 'nothing matches "ministralx": esc clears' in screen.text
        await screen.press("escape")
        assert "Demo (tiny)" in screen.text
        assert not is_left(screen)


async def test_a_folder_of_ones_own_is_planned_and_taken(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "mine")
    async with opened(on("RTX 4090"), "Model", (120, 40)) as screen:
        await screen.until("❯ Magistral Small 1.2")
        await screen.press("o")
        await screen.type(str(folder))
        await screen.press("enter")
        await screen.until("3.8B parameters.")
        assert "✓ fits" in screen.text.split("❯")[1]
        await screen.press("enter")
        assert is_left(screen)
        assert screen.app.draft.model == str(folder)


async def test_a_model_that_may_not_be_built_is_refused_and_stays_typed(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "bad", architectures=["MixtralForCausalLM"])
    async with opened(on("RTX 4090"), "Model", (120, 40)) as screen:
        await screen.until("❯ Magistral Small 1.2")
        await screen.press("o")
        await screen.type(str(folder))
        await screen.press("enter")
        await screen.until("what happened")
        assert "MixtralForCausalLM" in screen.text
        await screen.press("escape")
        assert f"{folder}" in screen.text
        assert not is_left(screen)
        await screen.press("escape")
        await screen.press("up")
        assert "! Mistral Medium 3.5" in screen.text


async def test_a_hub_id_that_is_not_here_is_not_fetched() -> None:
    async with opened(on("RTX 4090"), "Model") as screen:
        await screen.until("❯ Magistral Small 1.2")
        await screen.press("o")
        await screen.type("someone/model")
        await screen.press("enter")
        await screen.until("someone/model is not on this computer.")


async def test_a_model_in_the_hub_cache_is_on_disk(empty_hub_cache: Path) -> None:
    card = find_model("ministral-3-8b")
    repository = empty_hub_cache / f"models--{card.repositories[0].id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    (repository / "snapshots" / "c0ffee").mkdir(parents=True)
    (repository / "snapshots" / "c0ffee" / "config.json").write_text("{}")
    async with opened(on("RTX 4090"), "Model") as screen:
        await screen.until("❯ Magistral Small 1.2")
        assert "on disk" in line(screen, "Ministral 3 8B")
        assert "on disk" not in line(screen, "Ministral 3 3B")


async def test_another_device_is_planned_for_anew_and_proposes_again() -> None:
    draft = Draft(device=CPU)
    async with opened(draft, "Model", (120, 24)) as screen:
        await screen.until("❯ Demo (tiny)")
        screen.app.open_step("Data")
        draft.device = best_device(assume("RTX 4090"))
        screen.app.open_step("Model")
        await screen.until("❯ Magistral Small 1.2")
        assert "RTX 4090 (planned)" in screen.text
        screen.app.open_step("Data")
        draft.device = None
        screen.app.open_step("Model")
        await screen.until("· no device")
        await screen.press("enter")
        assert not is_left(screen)
