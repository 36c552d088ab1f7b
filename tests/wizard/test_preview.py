"""The fourth step as data: the row that is shown, what is learned, what stops here."""

from pathlib import Path

import pytest

from engine.config import DatasetConfig
from engine.errors import UserError
from engine.wizard.draft import Draft
from engine.wizard.flow import Wizard
from engine.wizard.preview import NEXT, RIGHT, ROW, PreviewStep
from tests.support.data import chat, write_rows
from tests.support.steps import CPU, SAMPLE, choices, facts, ready, recommended


def asked(dataset: DatasetConfig = SAMPLE) -> tuple[PreviewStep, Draft]:
    draft = Draft(device=CPU, model="demo-tiny", dataset=dataset)
    step = Wizard(draft).preview
    ready(step)
    return step, draft


def rows(folder: Path, *answers: str, weight: int = 1) -> DatasetConfig:
    turns = [chat("Why?", answer) for answer in answers]
    for turn in turns:
        turn["messages"][1]["weight"] = weight
    return DatasetConfig(path=str(write_rows(folder / "rows.jsonl", *turns)))


def test_the_first_row_and_all_rows_are_shown() -> None:
    step, _ = asked()
    assert recommended(step) == RIGHT
    assert "row 1, line 1 of train.jsonl" in facts(step)
    assert "4,372 of 5,843 tokens are learned" in facts(step)
    assert step.take(RIGHT, "")


def test_rows_go_round_and_one_is_asked_for_by_its_number(tmp_path: Path) -> None:
    step, _ = asked(rows(tmp_path, "yes", "no"))
    for number in (2, 1):
        step.take(NEXT, "")
        ready(step)
        assert f"row {number}, line {number}" in facts(step)
    step.take(ROW, "2")
    assert step.number == 2
    for text in ("3", "0", "x", "-1"):
        with pytest.raises(UserError, match="is no row number"):
            step.take(ROW, text)
    assert step.number == 2


def test_a_row_that_is_gone_since_it_was_counted_ends_the_reading(tmp_path: Path) -> None:
    step, _ = asked(rows(tmp_path, *["yes"] * 30))
    rows(tmp_path, "yes")
    step.take(ROW, "30")
    assert len(ready(step)) == 1
    assert "There is no row 30 any more" in facts(step)


def test_rows_are_judged_also_while_values_of_the_plan_do_not_go_together() -> None:
    """A screen counts on while the person types on its Plan page."""
    step, draft = asked()
    draft.change("sequence_len", 0)
    with pytest.raises(UserError):
        draft.config()
    assert step.judge().word == "good"
    assert step.odd_rows()
    assert step.switches()[0].name == "thinking"


def test_a_switch_changes_what_is_learned_and_turned_back_leaves_no_change() -> None:
    step, draft = asked()
    assert "  - think" not in facts(step)
    step.take("thinking=no", "")
    assert draft.changes == {"train_on_thinking": False}
    assert ready(step) == []
    assert "- think" in facts(step)
    step.take("thinking=yes", "")
    assert draft.changes == {}


def test_switches_without_a_choice_are_not_offered(tmp_path: Path) -> None:
    step, _ = asked(rows(tmp_path, "yes"))
    assert not any("=" in key for key in choices(step))


def test_rows_that_teach_nothing_stop_here(tmp_path: Path) -> None:
    step, _ = asked(rows(tmp_path, "yes", weight=0))
    assert choices(step)[RIGHT].refusal
    with pytest.raises(UserError, match="no token is learned in any row"):
        step.take(RIGHT, "")


def test_a_key_of_the_full_screen_is_named_there_alone(tmp_path: Path) -> None:
    step, draft = asked(rows(tmp_path, "yes", "yes " * 200))
    draft.change("sequence_len", 64)
    ready(step)
    verdict = step.judge()
    assert (verdict.word, verdict.key) == ("look", "w shows them")
    assert "over 64 tokens in 1 row" in step.question().headline.text
    assert "w shows" not in step.question().headline.text


def test_rows_that_cannot_be_read_end_the_question() -> None:
    step, _ = asked(DatasetConfig(path="nope.jsonl"))
    with pytest.raises(UserError, match=r"There is no nope\.jsonl\."):
        step.question()
