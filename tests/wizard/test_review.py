"""The last step as data: start or save, the name, an edited config and its faults."""

from pathlib import Path

import pytest

from engine.config import read_config
from engine.errors import UserError
from engine.runs import create_run
from engine.wizard.draft import Draft
from engine.wizard.flow import Wizard, live_runs
from engine.wizard.review import EDIT, LEAVE, NAME, SAVE, SHOW, START, ReviewStep, Saved
from tests.fakes.processes import running_fake
from tests.support.extras import needs_trainer
from tests.support.steps import (
    choices,
    facts,
    for_a_planned_card,
    for_the_demo,
    ready,
    recommended,
)

pytestmark = pytest.mark.usefixtures("folder")


def asked(draft: Draft, *, new: bool = False, out: Path | None = None) -> ReviewStep:
    step = Wizard(draft, new=new, out=out).review
    ready(step)
    return step


@needs_trainer
def test_what_can_start_is_started_with_enter() -> None:
    step = asked(for_the_demo())
    assert step.verdict().label == "ready to start"
    assert recommended(step) == START


def test_what_is_planned_is_saved_and_says_where_it_goes() -> None:
    step = asked(for_a_planned_card())
    assert step.verdict().label == "ready to save"
    assert recommended(step) == SAVE
    assert choices(step)[START].refusal == "H100 80GB HBM3 is planned for and not here."
    with pytest.raises(UserError, match="is planned for and not here"):
        step.take(START, "")
    assert step.take(SAVE, "out.yml")
    assert isinstance(step.outcome, Saved)
    assert [line.label for line in step.outcome.lines()] == ["saved", "planned"]
    assert read_config(Path("out.yml")).config.base_model == "ministral-3-8b"


@needs_trainer
def test_new_writes_the_config_and_offers_its_start_after_it() -> None:
    step = asked(for_the_demo(), new=True, out=Path("mine.yml"))
    assert list(choices(step)) == [SAVE, SHOW, NAME]
    assert choices(step)[SAVE].usual == "mine.yml"
    assert not step.take(SAVE, "mine.yml")
    assert read_config(Path("mine.yml")).config.base_model == "demo-tiny"
    assert list(choices(step)) == [START, LEAVE]
    assert recommended(step) == START
    assert "run it with: windtunnel train" in facts(step)
    assert step.take(LEAVE, "")
    assert isinstance(step.outcome, Saved)


def test_new_for_a_card_that_is_not_here_recommends_to_leave_it() -> None:
    step = asked(for_a_planned_card(), new=True)
    step.take(SAVE, "")
    assert recommended(step) == LEAVE


def test_back_from_the_start_of_new_asks_for_the_path_again() -> None:
    step = asked(for_the_demo(), new=True)
    step.take(SAVE, "a.yml")
    assert step.back()
    assert list(choices(step)) == [SAVE, SHOW, NAME]
    assert not step.back()


def test_a_file_that_is_there_is_replaced_only_when_asked(folder: Path) -> None:
    step = asked(for_the_demo())
    assert step.confirm(SAVE, "out.yml") is None
    (folder / "out.yml").write_text("mine", "utf-8")
    confirm = step.confirm(SAVE, "out.yml")
    assert confirm is not None
    assert not confirm.is_usual
    (folder / choices(step)[SAVE].usual).write_text("mine", "utf-8")
    assert step.confirm(SAVE, choices(step)[SAVE].usual) is None


def test_a_config_that_cannot_be_written_keeps_the_answers(folder: Path) -> None:
    (folder / "file").write_text("", "utf-8")
    step = asked(for_the_demo())
    with pytest.raises(UserError, match="could not be written"):
        step.take(SAVE, "file/out.yml")
    assert step.outcome is None


def test_the_run_is_named_and_the_file_shown() -> None:
    draft = for_the_demo()
    step = asked(draft)
    step.take(NAME, "harbour-2")
    assert draft.run_name() == "harbour-2"
    step.take(NAME, "")
    assert draft.run_name() == "harbour-2"
    assert "base_model: demo-tiny" not in facts(step)
    step.take(SHOW, "")
    assert "base_model: demo-tiny" in facts(step)


def test_an_edited_config_is_taken_over() -> None:
    draft = for_the_demo()
    step = asked(draft)
    step.take(EDIT, step.edit_text().replace("lora_r: 16", "lora_r: 8"))
    assert draft.config().lora_r == 8
    assert "lora_r: 8" in step.edit_text()


def test_an_edited_config_with_a_typo_keeps_the_edits_and_names_the_fault() -> None:
    draft = for_the_demo()
    step = asked(draft)
    typo = step.edit_text().replace("lora_r: 16", "lora_rank: 8")
    with pytest.raises(UserError, match="is not a key"):
        step.take(EDIT, typo)
    assert draft.config().lora_r == 16
    again = step.edit_text()
    assert again.endswith(typo)
    assert '"lora_rank" is not a key' in again.removesuffix(typo)
    step.take(EDIT, again.replace("lora_rank", "lora_r"))
    assert draft.config().lora_r == 8
    assert "is not a key" not in step.edit_text()


def test_a_text_that_comes_back_unchanged_forgets_the_fault() -> None:
    step = asked(for_the_demo())
    text = step.edit_text()
    with pytest.raises(UserError):
        step.take(EDIT, "nonsense")
    step.take(EDIT, text)
    assert step.edit_text() == text


def test_a_run_that_trains_is_named_with_the_way_back(folder: Path) -> None:
    assert live_runs(folder) == []
    with running_fake(create_run("live", home=folder), steps=10**6, step_seconds=0.05):
        (line,) = live_runs(folder)
    assert line.text == "live is still training: windtunnel watch live"
