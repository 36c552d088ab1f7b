"""The second step as data: every model with its verdict, what is asked twice, what is taken."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.catalog import find_model
from engine.cli.machine import show_planned
from engine.errors import UserError
from engine.hardware import assume
from engine.plan import Device, Statistics, best_device, survey
from engine.units import GIB
from engine.wizard.draft import Draft
from engine.wizard.flow import Wizard, perform
from engine.wizard.model import OWN, ModelStep

CPU = Device("this computer's CPU", "cpu", 64 * GIB, 46 * GIB)
ROWS = Statistics(10, 900, 0, 90.0, 120)


def asked(draft: Draft) -> ModelStep:
    step = Wizard(draft).model
    work = step.work()
    assert work is not None
    step.receive(work, perform(work, lambda _done: None))
    assert step.work() is None
    return step


def on(gpu: str, **answers: Any) -> Draft:
    return Draft(device=best_device(assume(gpu)), **answers)


def words(step: ModelStep) -> dict[str, str]:
    return {choice.key: f"{choice.verdict}" for choice in step.question().choices if choice.verdict}


@pytest.mark.parametrize(
    ("draft", "name"), [(Draft(device=CPU), "demo-tiny"), (on("RTX 4090"), "magistral-small-2509")]
)
def test_the_proposed_model_is_recommended(draft: Draft, name: str) -> None:
    question = asked(draft).question()
    assert question.choices[question.recommended].key == name


def test_the_model_of_the_draft_is_recommended() -> None:
    question = asked(on("H100 NVL", model="ministral-3-8b")).question()
    assert question.choices[question.recommended].key == "ministral-3-8b"


def test_each_choice_names_its_method() -> None:
    notes = {c.key: c.note for c in asked(on("RTX 4090")).question().choices}
    assert "GiB with LoRA" in notes["ministral-3-8b"]
    assert "GiB with QLoRA" in notes["ministral-3-14b"]


def test_one_plan_has_one_verdict_in_the_list_of_models_and_in_the_wizard() -> None:
    device = best_device(assume("T4"))
    listed = show_planned(survey(device), device)
    for key, verdict in words(asked(Draft(device=device))).items():
        mark, label = verdict.split(": ")[0].split(" ", 1)
        line = next(each for each in listed.splitlines() if each.startswith(f"{key} "))
        assert f"  {mark} {label} " in line, key


def test_weights_that_are_read_from_ram_are_counted_beside_the_device() -> None:
    step = asked(on("T4"))
    reasons = {choice.key: choice.reason for choice in step.question().choices}
    assert (
        "the weights on the device take 1.3 GiB; the others are read from"
        in (reasons["mistral-medium-3.5"])
    )
    assert "the weights take 1.3 GiB" not in reasons["mistral-medium-3.5"]
    assert "others are read" not in reasons["ministral-3-3b"]


def test_text_models_are_asked_about_twice_for_rows_with_images() -> None:
    draft = on("H200")
    step = asked(draft)
    assert step.confirm("magistral-small-2507", "") is None
    draft.shows_images = True
    assert words(step)["magistral-small-2507"].startswith("✗ no images")
    asked_again = step.confirm("magistral-small-2507", "")
    assert asked_again is not None
    assert "left out" in asked_again.text
    assert step.confirm("magistral-small-2509", "") is None


def test_another_model_forgets_the_lengths_and_the_same_one_keeps_them() -> None:
    draft = on("H100 NVL", model="ministral-3-8b", statistics=ROWS)
    step = asked(draft)
    assert step.take("ministral-3-8b", "")
    assert draft.statistics is ROWS
    assert step.take("ministral-3-14b", "")
    assert draft.model == "ministral-3-14b"
    assert draft.statistics is None


def test_what_does_not_fit_is_asked_about_first() -> None:
    asked_again = asked(on("2 GB")).confirm("mistral-small-3.2", "")
    assert asked_again is not None
    assert asked_again.title == "plan Mistral Small 3.2 anyway?"
    assert asked_again.text.startswith("It needs ")


def test_an_own_folder_is_read_and_is_a_choice_from_then_on(tmp_path: Path) -> None:
    quantized = {"quant_method": "gptq", "bits": 4}
    config = {**find_model("ministral-3-3b").config, "quantization_config": quantized}
    (tmp_path / "config.json").write_text(json.dumps(config, default=dict), "utf-8")
    draft = on("RTX 4090")
    step = asked(draft)
    asked_again = step.confirm(OWN, str(tmp_path))
    assert asked_again is not None
    assert asked_again.text.startswith("This version cannot train it.")
    assert step.take(OWN, str(tmp_path))
    question = step.question()
    assert draft.model == str(tmp_path)
    assert question.choices[question.recommended].key == str(tmp_path)
    assert question.choices[question.recommended].note.endswith("on disk")


def test_own_models_stay_in_the_list_until_their_folder_is_gone(tmp_path: Path) -> None:
    config = json.dumps(find_model("ministral-3-3b").config, default=dict)
    own = [str(tmp_path / name) for name in ("one", "two")]
    for name in own:
        Path(name).mkdir()
        Path(name, "config.json").write_text(config, "utf-8")
    draft = on("RTX 4090", model=own[0])
    step = asked(draft)
    step.read_own(own[1])
    assert [each.name for each in step.candidates()][-2:] == own
    Path(own[0], "config.json").unlink()
    draft.device = best_device(assume("T4"))
    work = step.survey(draft.device)
    step.receive(work, perform(work, lambda _done: None))
    assert [each.name for each in step.candidates()][-1:] == own[1:]
    question = step.question()
    assert question.choices[question.recommended].key == "ministral-3-8b"


@pytest.mark.parametrize("name", ["./nowhere", "mixtral-9x9b"])
def test_a_model_that_cannot_be_read_leaves_all_as_it_was(name: str) -> None:
    draft = on("RTX 4090", model="ministral-3-8b")
    step = asked(draft)
    with pytest.raises(UserError, match="There is no "):
        step.take(OWN, name)
    assert draft.model == "ministral-3-8b"
    assert [choice.key for choice in step.question().choices][-1] == OWN


def test_a_catalog_name_that_is_typed_is_the_model_of_the_list() -> None:
    draft = on("RTX 4090")
    step = asked(draft)
    before = len(step.question().choices)
    assert step.take(OWN, "magistral-small-2509")
    assert len(step.question().choices) == before


def test_a_survey_of_another_device_is_no_answer() -> None:
    draft = on("RTX 4090")
    wizard = Wizard(draft)
    wizard.at = 1
    work = wizard.work()
    assert work is not None
    draft.device = best_device(assume("H100"))
    assert not wizard.receive(work, perform(work, lambda _done: None))
    assert wizard.work() is not None
