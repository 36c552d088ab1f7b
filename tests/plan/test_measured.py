"""Measured figures: found again for the very same run and for no other, and put in the plan."""

import json
import sys
from collections import Counter
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from engine.catalog import read_architecture
from engine.catalog.rows import module_table
from engine.config import RunConfig
from engine.errors import WorkError
from engine.hardware import listed_gpus
from engine.plan import Place, estimate, make_fit
from engine.plan.measured import (
    HOME_VARIABLE,
    INDIFFERENT,
    Measurement,
    corrected,
    find_measured,
    key_of,
    measured_home,
    step_bytes,
    store,
)
from engine.plan.step import make_step
from engine.units import GIB
from tests.make.fits import GOALS, PAGE, cells, page
from tests.support.machines import at, card, config, cpu

H100 = card("H100 80GB")
HERE = at("ministral-3-3b", H100)
RUN = config(adapter="qlora", sequence_len=2048, sample_packing=True, gradient_checkpointing=True)
STEP = make_step(RUN, HERE)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "measured"))
    return tmp_path / "measured"


def figure(peak: int = 9 * GIB, day: str = "2026-11-26", **changes: Any) -> Measurement:
    """A measurement of `STEP` with `changes`."""
    return Measurement(
        key=key_of(replace(STEP, **changes)),
        model="Mistral3ForConditionalGeneration",
        peak_allocated_bytes=peak,
        peak_reserved_bytes=peak + GIB // 8,
        device_bytes=peak + GIB,
        load_peak_bytes=4 * GIB,
        tokens_per_second=1234.5,
        formula_bytes=10 * GIB,
        measured_at=day,
    )


def found(**changes: Any) -> Measurement | None:
    return find_measured(replace(STEP, **changes))


def with_shapes(**text: Any) -> Place:
    """Ministral 3 3B with other sizes."""
    plain = HERE.architecture
    content = {**plain.config, "text_config": {**plain.config["text_config"], **text}}
    return Place(replace(plain, config=content, table=module_table(content)), H100)


class TestTheKey:
    def test_what_is_stored_is_found_again_as_it_was(self, home: Path) -> None:
        assert found() is None
        path = store(figure())
        assert path.parent == home
        again = found()
        assert again is not None
        assert json.loads(json.dumps(asdict(again))) == json.loads(json.dumps(asdict(figure())))

    def test_another_value_of_a_key_is_another_run_where_it_has_a_part_in_memory(self) -> None:
        store(figure())
        for name in RunConfig.model_fields:
            value: Any = 2 if name == "gradient_accumulation_steps" else ("something", "else")
            same = found(config=RUN.model_copy(update={name: value})) is not None
            assert same == (name in INDIFFERENT), name
        assert found() is not None
        assert set(RunConfig.model_fields) >= INDIFFERENT
        assert not INDIFFERENT & {"sequence_len", "optimizer", "layer_offloading", "lora_r"}

    @pytest.mark.parametrize(
        "changes",
        [
            {"place": at("ministral-3-3b", "RTX 4090")},
            {"place": at("ministral-3-3b", cpu())},
            {"place": at("ministral-3-8b", H100)},
            {"place": with_shapes(num_hidden_layers=25)},
            # The same shapes of all parameters, cut into other heads.
            {"place": with_shapes(num_attention_heads=16, head_dim=256)},
            {"place": with_shapes(sliding_window=512)},
            {"tokens": STEP.tokens + 1},
            {"of_images": 1},
        ],
    )
    def test_another_model_place_or_batch_is_another_run(self, changes: dict[str, Any]) -> None:
        store(figure())
        assert found(**changes) is None

    def test_a_fine_tune_of_the_same_shapes_is_the_same_run(self) -> None:
        store(figure())
        tuned = Place(replace(HERE.architecture, name="./my-own", card=None), H100)
        assert found(place=with_shapes(eos_token_id=7)) is not None
        assert found(place=tuned) is not None

    def test_more_forward_passes_than_two_change_nothing(self) -> None:
        several = RUN.model_copy(update={"gradient_accumulation_steps": 4})
        store(figure(config=several))
        more = several.model_copy(update={"gradient_accumulation_steps": 16})
        assert found(config=more) is not None
        assert found() is None

    def test_a_version_here_must_be_the_same_and_one_that_is_not_here_need_not(self) -> None:
        measured = figure()
        versions = measured.key["versions"]
        here = next(name for name, number in versions.items() if number)
        absent = next(name for name, number in versions.items() if not number)
        older = {**measured.key, "versions": {**versions, here: "0.0"}}
        store(replace(measured, key=older))
        assert found() is None
        elsewhere = {**measured.key, "versions": {**versions, absent: "9.9"}}
        store(replace(measured, key=elsewhere))
        assert found() is not None


class TestTheStore:
    def test_the_newest_wins_and_the_same_key_has_one_file(self, home: Path) -> None:
        store(figure(peak=9 * GIB))
        store(figure(peak=8 * GIB, day="2026-11-27"))
        assert len(list(home.iterdir())) == 1
        again = found()
        assert again is not None
        assert again.peak_allocated_bytes == 8 * GIB

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"key": {}}'])
    def test_a_damaged_file_costs_its_own_figure_only(self, home: Path, text: str) -> None:
        store(figure())
        (home / "damaged.json").write_text(text, "utf-8")
        assert found() is not None

    @pytest.mark.parametrize("peak", [-1, 0, "9", None, True])
    def test_a_figure_that_is_no_size_is_not_believed(self, home: Path, peak: Any) -> None:
        store(replace(figure(), peak_allocated_bytes=peak))
        assert found() is None

    def test_a_folder_that_cannot_be_written_is_said(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way", "utf-8")
        with pytest.raises(WorkError, match="could not be written"):
            store(figure(), tmp_path / "file" / "folder")

    def test_without_it_it_lies_in_the_data_folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(HOME_VARIABLE)
        assert measured_home().name == "measured"
        assert "windtunnel" in str(measured_home())

    def test_no_path_of_the_person_is_in_a_file(self, tmp_path: Path) -> None:
        names = {"base_model": "/secret/model", "image_folder": "/secret/images"}
        private = RUN.model_copy(update=names)
        assert "secret" not in store(figure(config=private)).read_text("utf-8")

    def test_what_ships_can_be_read_and_is_explained(self) -> None:
        ours = files("presets") / "measured"
        assert (ours / "README.md").is_file()
        for entry in ours.iterdir():
            if entry.name.endswith(".json"):
                Measurement(**json.loads(entry.read_text("utf-8")))

    @pytest.mark.parametrize("stored", [False, True])
    def test_a_plan_asks_at_every_keystroke(self, stored: bool) -> None:
        if stored:
            store(figure())
        assert bool(found()) == stored  # reads the store once
        calls: list[str] = []

        def note(_frame: FrameType, event: str, argument: Any) -> None:
            if event in ("call", "c_call"):
                calls.append(getattr(argument, "__name__", ""))

        sys.setprofile(note)
        try:
            found()
        finally:
            sys.setprofile(None)
        assert "open" not in calls
        assert len(calls) < 500


class TestThePlan:
    def test_a_measured_peak_beats_the_formula_and_says_so(self) -> None:
        plain = estimate(RUN, HERE)
        peak = step_bytes(plain) + GIB
        store(figure(peak=peak))
        plan = estimate(RUN, HERE)
        assert (plain.source, plan.source) == ("formula", "measured")
        assert plan.peak_allocated_bytes == sum(plan.parts.values()) == peak
        assert plan.device_bytes == peak + GIB
        assert plan.tokens_per_second == 1234.5
        assert plan.uncertainty == pytest.approx(0.02)

    @given(share=st.floats(0.5, 2.0))
    @hypothesis_settings(max_examples=50, deadline=None)
    def test_the_parts_add_up_to_what_was_measured(self, share: float) -> None:
        plain = estimate(config(adapter="lora"), HERE)
        plain = replace(plain, moments={"loss": plain.peak_allocated_bytes})
        peak = int(plain.peak_allocated_bytes * share)
        plan = corrected(plain, figure(peak=peak))
        assert sum(plan.parts.values()) == plan.peak_allocated_bytes == peak
        assert ("unexplained" in plan.parts) == (peak > plain.peak_allocated_bytes)
        assert all(size >= 0 for size in plan.parts.values())
        assert set(plain.parts) <= set(plan.parts)

    @pytest.mark.parametrize("over", [-2 * GIB, GIB])
    def test_the_verdict_follows_the_measurement(self, over: int) -> None:
        plain = estimate(RUN, HERE)
        plain = replace(plain, moments={"loss": plain.peak_allocated_bytes})
        measured = replace(figure(), device_bytes=plain.can_give_bytes + over)
        assert corrected(plain, measured).verdict == ("does not fit" if over > 0 else "fits")

    def test_a_moment_beside_the_steps_that_is_fuller_stays(self) -> None:
        plain = estimate(RUN, HERE)
        plain = replace(plain, moments={**plain.moments, "evaluation": 30 * GIB})
        plan = corrected(plain, figure(peak=20 * GIB))
        assert plan == replace(plain, tokens_per_second=1234.5)


@pytest.mark.slow
def test_the_page_is_what_is_made_now() -> None:
    """`python -m tests.make.fits` makes it anew."""
    assert PAGE.read_text("utf-8") == page()


@pytest.mark.slow
def test_every_card_model_and_goal_has_its_line() -> None:
    counts = Counter(cell.goal for cell in cells())
    assert len({cell.card for cell in cells()}) == len(listed_gpus()) + 3
    assert set(counts) == set(GOALS)
    assert counts["text"] == 9 * (len(listed_gpus()) + 3)


@pytest.mark.slow
def test_none_is_worse_than_the_ladder_can_make_it() -> None:
    poor = [cell for cell in cells() if cell.advice.estimate.verdict != "fits"]
    for cell in poor:
        rungs = make_fit(cell.advice.config, Place(read_architecture(cell.model), cell.device))
        assert not rungs or rungs[-1].estimate.verdict != "fits"
    # Only the two largest models, and only below 12 GB.
    assert {cell.model for cell in poor} <= {"mistral-medium-3.5", "mistral-small-4"}
    assert {cell.card for cell in poor} <= {"6 GB GPU", "8 GB GPU"}
