"""The fifth step as data: the verdict, values with reasons, what makes it fit, other cards."""

from pathlib import Path
from typing import Any

import pytest

from engine.config import parse_config
from engine.errors import UserError
from engine.wizard.draft import Draft, draft_from
from engine.wizard.flow import Wizard
from engine.wizard.plan import (
    ACCEPT,
    ALL,
    CARDS,
    FIT,
    MEASURE,
    RECOMMENDED,
    SET,
    PlanStep,
    list_rungs,
)
from tests.support.steps import CPU, SAMPLE, choices, facts, on, ready, recommended


def asked(draft: Draft | None = None) -> tuple[PlanStep, Draft]:
    draft = draft or Draft(device=CPU, model="demo-tiny", dataset=SAMPLE)
    step = Wizard(draft).plan
    ready(step)
    return step, draft


def test_rows_that_nobody_counted_are_counted_first() -> None:
    draft = Draft(device=CPU, model="demo-tiny", dataset=SAMPLE)
    step = Wizard(draft).plan
    assert ready(step) == [f"Counting {SAMPLE.path}."]
    assert draft.statistics is not None
    assert ready(step) == []


def test_a_plan_that_fits_is_accepted_with_enter() -> None:
    step, _ = asked()
    assert recommended(step) == ACCEPT
    assert step.verdict().label == "fits"
    assert FIT not in choices(step)
    assert "spare" in facts(step)
    assert step.take(ACCEPT, "")


def test_a_value_is_changed_and_goes_back_to_the_recommended_one() -> None:
    step, draft = asked()
    assert choices(step)["lora_r"].label == "lora_r 16"
    assert not step.take("lora_r", "4")
    assert "· changed: lora_r 16 -> 4" in facts(step)
    assert choices(step)["lora_r"].label == "lora_r 4, yours"
    step.take("lora_r", "")
    assert draft.config().lora_r == 4
    step.take("lora_r", RECOMMENDED)
    assert "lora_r 4 -> 16" in facts(step)
    assert draft.changes == {}


def test_any_key_is_set_by_its_name() -> None:
    step, draft = asked()
    step.take(SET, "seed=11")
    assert draft.config().seed == 11


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("lora_r=3x", 'lora_r is "3x".'),
        ("lora_r=0", "lora_r is 0."),
        ("loar_r=8", '"loar_r" is not a key.'),
        ("optimizer=lion", 'optimizer is "lion".'),
        ("lora_target_modules=[nope]", "nope matches no module"),
        ("99", "99 sets no value."),
    ],
)
def test_a_bad_value_is_a_sentence_and_changes_nothing(text: str, what: str) -> None:
    step, draft = asked()
    before = draft.config()
    with pytest.raises(UserError) as refused:
        step.take(SET, text)
    assert what in f"{refused.value}"
    assert "The command line" not in f"{refused.value}"
    assert (draft.config(), draft.changes) == (before, {})


def test_the_method_is_one_value_and_what_follows_from_it_follows() -> None:
    step, draft = asked()
    step.take("adapter", "qlora")
    assert "adapter lora -> qlora; load_in_4bit false -> true" in facts(step)
    step.take("adapter", "full")
    assert draft.config().adapter is None


def test_several_cards_are_divided_by_values_with_a_reason() -> None:
    step, draft = asked(on("RTX 4090 x4", model="mistral-small-4", dataset=SAMPLE))
    fields = {field.key: field for field in step.fields()}
    assert fields["dp_shard_size"].value == "4"
    assert fields["dp_shard_size"].reason.startswith("on one card each step would wait for")
    assert fields["dp_replicate_size"].reason == "one copy learns"
    step.take("dp_shard_size", "8")
    assert str(step.verdict()).startswith("✗ too few cards: needs")
    assert step.verdict().text.endswith("; there are 4")
    step.take("dp_shard_size", "none")
    step.take("dp_replicate_size", "3")
    assert draft.advice().estimate.cards == 3
    one, _ = asked(on("RTX 4090", model="mistral-small-4", dataset=SAMPLE))
    assert "dp_shard_size" not in [field.key for field in one.fields()]


def too_large() -> Draft:
    return on("12 GB", model="ministral-3-8b", dataset=SAMPLE, changes={"adapter": "lora"})


def test_what_would_make_it_fit_is_taken_with_all_above_it() -> None:
    step, draft = asked(too_large())
    assert step.verdict().mark == "✗"
    step.take(FIT, "")
    assert step.question().headline.label == "make it fit"
    assert recommended(step) == str(len(list_rungs(draft)) - 1)
    assert step.back()
    assert not step.back()
    step.take(FIT, "")
    step.take(recommended(step), "")
    assert step.verdict().label != "does not fit"
    assert draft.config().adapter == "qlora"


def test_leaving_the_rungs_changes_nothing() -> None:
    step, draft = asked(too_large())
    before = draft.config()
    step.take(FIT, "")
    assert not step.take(ACCEPT, "")
    assert draft.config() == before
    assert ACCEPT in choices(step)


def test_the_same_plan_on_other_cards() -> None:
    step, draft = asked(too_large())
    step.take(CARDS, "")
    offered = choices(step)
    key = next(key for key, choice in offered.items() if choice.label == "H100 80GB HBM3")
    verdict = offered[key].verdict
    assert verdict is not None
    assert verdict.mark == "✓"
    step.take(key, "")
    assert draft.device is not None
    assert draft.device.name == "H100 80GB HBM3"


def test_all_settings_are_more_and_fewer_again() -> None:
    step, _ = asked()
    few = len(choices(step))
    step.take(ALL, "")
    assert "seed" in choices(step)
    step.take(ALL, "")
    assert len(choices(step)) == few


def test_only_a_device_that_is_here_is_measured() -> None:
    step, _ = asked(too_large())
    assert MEASURE not in choices(step)
    with pytest.raises(UserError, match="is not here"):
        step.take(MEASURE, "")
    here, _ = asked()
    here.take(MEASURE, "")
    work = here.work()
    assert work is not None
    here.receive(work, UserError("No.", "Because.", "Wait."))
    assert "✗ not measured: No. Because. Wait." in facts(here)
    assert here.work() is None


def test_a_saved_config_keeps_its_reasons_when_it_is_opened_again() -> None:
    step, draft = asked()
    reasons: dict[str, Any] = {field.key: field.reason for field in step.fields()}
    again = draft_from(parse_config(draft.config_text(), "config.yml"), Path.cwd())
    again.device = draft.device
    reopened, _ = asked(again)
    found = {field.key: field.reason for field in reopened.fields()}
    kept = [key for key in reasons if found[key] == reasons[key]]
    assert {"lora_r", "learning_rate", "micro_batch_size", "adapter"} <= set(kept)
    assert "in the config" not in found.values()
