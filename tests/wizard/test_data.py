"""The third step as data: what is offered, what is read, what is taken."""

from pathlib import Path

import pytest

from engine.config import DatasetConfig, read_config
from engine.errors import UserError
from engine.wizard.data import EVALUATE, HOLD_OUT, HUB, KEPT, MAP, OTHERS, TYPED, USE, DataStep
from engine.wizard.draft import Draft, draft_from
from engine.wizard.flow import Wizard
from tests.support.data import write_rows
from tests.support.steps import CPU, SAMPLE, choices, facts, ready, recommended

pytestmark = pytest.mark.usefixtures("folder")


def chat(question: str, answer: str, role: str = "role", content: str = "content") -> object:
    turns = (("user", question), ("assistant", answer))
    return [{role: who, content: text} for who, text in turns]


def asked(draft: Draft | None = None) -> DataStep:
    return Wizard(draft or Draft(device=CPU, model="demo-tiny")).data


def test_a_sample_is_recommended_and_read_whole_before_it_is_taken() -> None:
    draft = Draft(device=CPU, model="demo-tiny")
    step = asked(draft)
    assert recommended(step) == SAMPLE.path
    assert not step.take(SAMPLE.path, "")
    assert draft.dataset is None
    assert ready(step) == [f"Reading {SAMPLE.path}.", f"Counting {SAMPLE.path}."]
    assert recommended(step) == USE
    assert "104 of 104 rows" in facts(step)
    assert step.take(USE, "")
    assert draft.dataset == SAMPLE
    assert draft.statistics is not None
    assert draft.statistics.usable_rows == 104


def test_new_files_here_are_offered(folder: Path) -> None:
    write_rows(folder / "mine.jsonl", {"messages": chat("a", "b")})
    assert choices(asked())["mine.jsonl"].note == "newest here"


def test_bad_rows_are_counted_with_their_place(folder: Path) -> None:
    write_rows(folder / "rows.jsonl", {"messages": chat("a", "b")}, {"messages": []})
    step = asked()
    step.take(TYPED, "rows.jsonl")
    ready(step)
    assert "1 row left out" in step.verdict().text
    assert "line 2 of rows.jsonl" in facts(step)


def test_a_missing_file_is_no_answer_and_changes_nothing() -> None:
    step = asked()
    with pytest.raises(UserError, match=r"There is no nope\.jsonl\."):
        step.take(TYPED, "nope.jsonl")
    assert step.dataset is None


def test_columns_by_usual_names_are_mapped(folder: Path) -> None:
    write_rows(folder / "rows.jsonl", {"dialogue": chat("hi", "ho", "speaker", "body")})
    step = asked()
    step.take(TYPED, "rows.jsonl")
    ready(step)
    assert choices(step)[MAP].note == "messages = dialogue, role = speaker, content = body"
    assert USE not in choices(step)
    step.take(MAP, "")
    ready(step)
    assert step.take(USE, "")


def test_rows_without_any_use_cannot_be_taken(folder: Path) -> None:
    write_rows(folder / "rows.jsonl", {"a": 1}, {"a": 2})
    step = asked()
    step.take(TYPED, "rows.jsonl")
    ready(step)
    assert step.verdict().text == "none of 2 rows can be used"
    with pytest.raises(UserError, match="No row can be used"):
        step.take(USE, "")
    assert not step.take(OTHERS, "")
    assert TYPED in choices(step)


def test_the_hub_is_asked_about_once_and_only_where_rows_are_not_here() -> None:
    step = asked()
    confirm = step.confirm(HUB, "nobody/nothing")
    assert confirm is not None
    assert "The hub is told this name" in confirm.text
    assert step.confirm(SAMPLE.path, "") is None
    step.take(HUB, "nobody/nothing")
    assert step.confirm(HUB, "nobody/nothing") is None


def test_the_share_that_is_held_out_goes_round() -> None:
    draft = Draft(device=CPU, model="demo-tiny")
    step = asked(draft)
    step.take(SAMPLE.path, "")
    ready(step)
    shares = []
    for _ in range(4):
        step.take(HOLD_OUT, "")
        shares.append(draft.changes["val_set_size"])
    assert shares == [0.05, 0.1, 0.2, 0.0]
    assert step.verdict().text == "104 to learn from, 2 other sets held out"


def test_the_split_beside_the_rows_can_be_evaluated(folder: Path) -> None:
    for name in ("train", "test", "validation"):
        write_rows(
            folder / "set" / f"{name}.jsonl", *({"messages": chat(f"{n}", name)} for n in "ab")
        )
    draft = Draft(device=CPU, model="demo-tiny")
    step = asked(draft)
    step.take(TYPED, "set")
    ready(step)
    assert choices(step)[EVALUATE].label == "evaluate the split validation"
    step.take(EVALUATE, "")
    assert EVALUATE not in choices(step)
    assert step.verdict().text == "2 to learn from, 1 other set held out"
    step.take(USE, "")
    (held_out,) = draft.config().test_datasets
    assert (held_out.path, held_out.split, draft.config().val_set_size) == ("set", "validation", 0)
    step.hold_out()  # the round goes on with no rows, and comes by the split again
    assert (draft.config().test_datasets, draft.config().val_set_size) == ((), 0)
    for _ in range(4):
        step.hold_out()
    assert draft.config().test_datasets == (held_out,)
    step.back()
    assert "test_datasets" not in draft.changes


def test_another_model_reads_the_rows_again() -> None:
    draft = Draft(device=CPU, model="demo-tiny")
    step = asked(draft)
    step.take(SAMPLE.path, "")
    ready(step)
    draft.model = "demo-tiny-vision"
    assert len(ready(step)) == 2


def test_the_datasets_of_an_opened_config_stay_together(folder: Path) -> None:
    for name in ("a", "b"):
        write_rows(folder / f"{name}.jsonl", {"messages": chat("a", "b")})
    (folder / "run.yml").write_text(
        "base_model: demo-tiny\ndatasets: [{path: a.jsonl}, {path: b.jsonl}]\n", "utf-8"
    )
    draft = draft_from(read_config(folder / "run.yml"), folder)
    draft.device = CPU
    step = asked(draft)
    assert recommended(step) == KEPT
    assert step.take(KEPT, "")
    assert draft.dataset == DatasetConfig(path=str(folder / "a.jsonl"))
