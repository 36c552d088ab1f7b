"""A measured figure is found for the very same run, beats the formula there, and nowhere else."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import RunConfig
from engine.plan import Estimate, estimate
from engine.plan.measured import (
    HOME_VARIABLE,
    INDIFFERENT,
    RANGE,
    Measurement,
    find_measured,
    key_of,
    step_bytes,
    store,
)
from tests.plan.machines import card, config, model

H200 = card("H200")
QLORA: dict[str, Any] = {
    "adapter": "qlora",
    "sequence_len": 2048,
    "sample_packing": True,
    "gradient_checkpointing": True,
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "measured"))
    return tmp_path / "measured"


def measured(run: RunConfig, share: float = 1.05, name: str = "ministral-3-8b") -> Measurement:
    needs = estimate(run, model(name), H200)
    peak = int(step_bytes(needs) * share)
    return Measurement(
        key=key_of(run, model(name), H200, needs.tokens_at_once, 0),
        model=name,
        peak_allocated_bytes=peak,
        peak_reserved_bytes=int(peak * 1.02),
        device_bytes=int(peak * 1.05),
        load_peak_bytes=peak // 2,
        tokens_per_second=4321.0,
        formula_bytes=step_bytes(needs),
        measured_at="2026-11-26",
    )


def planned(run: RunConfig, name: str = "ministral-3-8b") -> Estimate:
    return estimate(run, model(name), H200)


@pytest.mark.parametrize("share", [0.99, 1.0, 1.2])
def test_it_beats_the_formula_and_says_so(home: Path, share: float) -> None:
    run = config(**QLORA)
    before, found = planned(run), measured(run, share)
    store(found)
    after = planned(run)
    assert (before.source, after.source) == ("formula", "measured")
    assert after.peak_allocated_bytes == found.peak_allocated_bytes
    assert after.device_bytes == found.device_bytes
    assert sum(after.parts.values()) == after.peak_allocated_bytes
    assert after.uncertainty == pytest.approx(RANGE, abs=1e-6)
    assert after.tokens_per_second == 4321.0


def test_a_fuller_moment_than_the_steps_is_still_the_formulas(home: Path) -> None:
    run = config(**QLORA)
    store(replace(measured(run), peak_allocated_bytes=1))
    after = planned(run)
    assert after.source == "formula"
    assert after.tokens_per_second == 4321.0


CHANGED: dict[str, Any] = {
    "lora_r": 8,
    "lora_dropout": 0.1,
    "micro_batch_size": 3,
    "sequence_len": 1024,
    "sample_packing": False,
    "gradient_checkpointing": False,
    "optimizer": "paged_adamw_8bit",
    "bf16": False,
    "peft_use_dora": True,
    "peft_autocast_adapter_dtype": False,
    "activation_offloading": True,
    "layer_offloading": True,
    "offload_embeddings": True,
    "lora_target_modules": ["q_proj"],
    "lora_modules_to_save": ["lm_head"],
    "attn_implementation": "sdpa",
    "gradient_accumulation_steps": 2,
}


@pytest.mark.parametrize("key", CHANGED)
def test_another_value_that_has_a_part_in_memory_is_another_run(home: Path, key: str) -> None:
    run = config(**QLORA)
    store(measured(run))
    keys = {key: CHANGED[key]}
    if key == "gradient_checkpointing":
        keys |= {"activation_offloading": None}
    other = config(**QLORA | keys)
    assert planned(other).source == "formula"
    assert planned(run).source == "measured"


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(sorted(RunConfig.model_fields)))
def test_every_key_either_counts_or_is_listed_as_having_no_part(name: str) -> None:
    run = config(**QLORA)
    assert (name in key_of(run, model("ministral-3-8b"), H200, 2048, 0)["run"]) == (
        name not in INDIFFERENT
    )
    assert set(RunConfig.model_fields) >= INDIFFERENT


def test_another_model_card_length_or_version_is_another_run(home: Path) -> None:
    run = config(**QLORA)
    found = measured(run)
    store(found)
    tokens = found.key["tokens_at_once"]
    assert find_measured(run, model("ministral-3-8b"), H200, tokens, 0) == found
    assert find_measured(run, model("ministral-3-14b"), H200, tokens, 0) is None
    assert find_measured(run, model("ministral-3-8b"), card("H100"), tokens, 0) is None
    assert find_measured(run, model("ministral-3-8b"), H200, tokens + 1, 0) is None
    assert find_measured(run, model("ministral-3-8b"), H200, tokens, 5) is None
    (path,) = home.iterdir()
    older = json.loads(path.read_text("utf-8"))
    older["key"]["versions"]["peft"] = "0.1"
    path.unlink()
    (home / "older.json").write_text(json.dumps(older), "utf-8")
    assert find_measured(run, model("ministral-3-8b"), H200, tokens, 0) is None


def test_what_does_not_matter_to_memory_does_not_separate(home: Path) -> None:
    store(measured(config(**QLORA)))
    other = config(**QLORA, learning_rate=1e-5, num_epochs=3, seed=7, val_set_size=0.1)
    assert planned(other).source == "measured"


@pytest.mark.parametrize("damage", ["{", "[]", '{"key": 3}', ""])
def test_a_damaged_file_only_costs_its_figure(home: Path, damage: str) -> None:
    home.mkdir()
    (home / "broken.json").write_text(damage, "utf-8")
    run = config(**QLORA)
    assert planned(run).source == "formula"
    store(measured(run))
    assert planned(run).source == "measured"


def test_a_newer_figure_replaces_the_older(home: Path) -> None:
    run = config(**QLORA)
    first, second = measured(run, 1.1), measured(run, 1.2)
    assert store(first) == store(second)
    assert planned(run).peak_allocated_bytes == second.peak_allocated_bytes
