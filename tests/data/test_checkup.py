from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.chat.conversation import Conversation
from engine.chat.render import WITHHELD, Kind, LabelRule, Rendered
from engine.config import DatasetConfig
from engine.data.checkup import LISTED_LONGEST, Notebook, check_config, length_statistics
from engine.data.rows import RenderedRow
from engine.data.statistics import FEW_ROWS
from engine.errors import UserError
from engine.report.data import list_remarks
from tests.support.data import chat, config_of


def checked(path: Path, tokenizer=None, *, progress=None, **keys):
    config = config_of(DatasetConfig(path=str(path)), **keys)
    return check_config(config, path.parent, tokenizer, progress=progress)


def test_every_bad_row_is_listed_with_line_reason_and_repair(write_jsonl, tokenizer):
    rows = [chat("q"), "text", {"messages": []}, {"other": 1}, chat("q2")]
    rows.append({"messages": [{"role": "user", "content": "q"}, {"role": "robot", "content": "a"}]})
    found = checked(write_jsonl(rows), tokenizer)
    assert (found.rows, found.usable) == (6, 2)
    assert [problem.line for problem in found.problems] == [2, 3, 4, 6]
    assert all(problem.what and problem.why and problem.fix for problem in found.problems)
    assert [problem.message for problem in found.problems] == [None, None, None, 1]


def test_tokens_are_counted_by_kind_and_by_row(write_jsonl, tokenizer):
    thinking = chat("q", "done")
    thinking["messages"][1]["reasoning_content"] = "well"
    found = checked(write_jsonl([chat("q", "a"), thinking]), tokenizer)
    tokens = found.tokens
    # <s>[INST]q[/INST]a</s> and <s>[INST]q[/INST][THINK]well[/THINK]done</s>
    assert tokens.total == 6 + 9
    assert tokens.learned == 2 + 5
    assert (tokens.thinking, tokens.answer) == (3, 2)
    assert tokens.by_kind["bos"] == tokens.by_kind["eos"] == 2
    assert asdict(tokens.row_length) == {"mean": 7.5, "p50": 6, "p95": 9, "p99": 9, "max": 9}
    assert tokens.learned_a_row.max == 5
    quiet = checked(write_jsonl([thinking]), tokenizer, train_on_thinking=False)
    assert quiet.tokens.learned == 2


def test_a_file_of_bad_rows_alone_is_counted_whole_and_listed_in_part(write_jsonl, monkeypatch):
    monkeypatch.setattr("engine.data.checkup.LISTED_PROBLEMS", 3)
    found = checked(write_jsonl([chat("q"), *([7] * 8), {"messages": []}]))
    assert (found.rows, found.usable, found.bad_rows, len(found.problems)) == (10, 1, 9, 3)
    assert [group.count for group in found.groups] == [8, 1]
    assert found.groups[0].rows == tuple(range(2, 10))


def test_without_a_tokenizer_rows_and_problems_are_reported(write_jsonl):
    found = checked(write_jsonl([chat("q"), 7]))
    assert (found.rows, found.usable, found.tokens) == (2, 1, None)
    assert found.roles == {"user": 1, "assistant": 1}


def test_duplicates_long_rows_and_rows_that_teach_nothing_are_counted(write_jsonl, tokenizer):
    muted = chat("x")
    muted["messages"][1]["train"] = False
    path = write_jsonl([chat("q"), chat("q"), chat("q"), chat("word " * 50), muted])
    dataset = DatasetConfig(path=str(path), message_field_training="train")
    found = check_config(config_of(dataset), path.parent, tokenizer, sequence_len=30)
    assert (found.duplicates, found.over_sequence_len, found.nothing_learned) == (2, 1, 1)
    (finding,) = (finding for finding in found.findings if finding.id == "nothing_learned")
    assert finding.lines == (5,)
    assert any("longer than sequence_len (30)" in warning for warning in found.warnings)
    assert any("repeat an earlier row" in warning for warning in found.warnings)


def test_repairs_are_findings_with_their_lines(write_jsonl, tokenizer):
    trimmed = chat("q")
    trimmed["messages"].append({"role": "user", "content": "and?"})
    found = checked(write_jsonl([chat("q"), trimmed, trimmed]), tokenizer)
    (finding,) = found.findings
    assert (finding.id, finding.rows, finding.lines) == ("trimmed", 2, (2, 3))


@pytest.mark.parametrize(("count", "warned"), [(FEW_ROWS - 1, True), (FEW_ROWS, False)])
def test_few_rows_are_a_warning(write_jsonl, count, warned):
    found = checked(write_jsonl([chat(f"q {n}") for n in range(count)]))
    assert any("Few usable rows" in warning for warning in found.warnings) is warned


def test_no_usable_row_is_a_warning(write_jsonl):
    assert "No row can be used." in checked(write_jsonl([1, 2])).warnings


def test_progress_is_reported_and_may_cancel(write_jsonl):
    class Cancelled(Exception):
        pass

    def cancel(rows, done_bytes):
        assert rows == 64
        assert done_bytes > 0
        raise Cancelled

    with pytest.raises(Cancelled):
        checked(write_jsonl([chat(f"q {n}") for n in range(100)]), progress=cancel)


def test_percentiles_are_lengths_that_occur():
    found = length_statistics(np.arange(1, 101))
    assert (found.p50, found.p95, found.p99, found.max, found.mean) == (50, 95, 99, 100, 50.5)
    assert length_statistics(np.array([], dtype=np.int64)).max == 0


def test_lengths_turns_and_questions_are_kept_for_the_plan(write_jsonl, tokenizer):
    long = chat("what is " + "very " * 400 + "long?")
    two = {"messages": [*chat("q")["messages"], *chat("r")["messages"]]}
    found = checked(write_jsonl([chat("q", "a"), two, chat("q", "b"), long]), tokenizer)
    assert found.tokens.longest_rows[0] == found.tokens.row_length.max
    assert list(found.tokens.longest_rows) == sorted(found.tokens.longest_rows, reverse=True)
    assert len(found.tokens.longest_rows) == sum(found.tokens.length_counts) == 4
    assert found.odd.longest[:2] == (4, 2)
    assert found.turns == (1, 2)
    assert found.prompts == ("q",)


def test_answers_that_think_or_call_are_counted_by_message(write_jsonl, tokenizer):
    thinks = chat("q", "a")
    thinks["messages"][1]["reasoning_content"] = "hm"
    twice = {"messages": [*thinks["messages"], *thinks["messages"]]}
    found = checked(write_jsonl([chat("q"), thinks, twice]), tokenizer)
    assert (found.tokens.thinking_answers, found.tokens.call_answers) == (3, 0)


def test_equal_problems_are_one_with_their_rows_the_most_frequent_first(write_jsonl):
    found = checked(write_jsonl([7, {"messages": []}, chat("q"), {"messages": []}]))
    first, second = found.groups
    assert first.first.what == "The row has no assistant message."
    assert (first.count, first.rows) == (2, (2, 4))
    assert (first.first.line, second.count, second.rows) == (2, 1, (1,))


def odd_rows_of(*rows: Sequence[int], thinking: bool = True):
    notebook, measured = Notebook(LabelRule(thinking=thinking)), list[RenderedRow]()
    for number, kinds in enumerate(rows, start=1):
        count = len(kinds)
        rendered = Rendered(
            np.zeros(count, np.uint32), np.array(kinds, np.uint8), np.zeros(count, np.int32)
        )
        read = (None, Conversation(()), rendered)
        measured.append(RenderedRow(number, number, "f", 0, 0, *read))
    notebook.take(measured)
    return notebook.odd_rows()


def test_rows_that_learn_nothing_are_apart_from_rows_that_only_think():
    odd = odd_rows_of([Kind.USER], [Kind.THINK], [Kind.TEXT], [Kind.TEXT | WITHHELD])
    assert (odd.learns_nothing, odd.learns_nothing_count) == ((1, 4), 2)
    assert (odd.only_thinking, odd.only_thinking_count) == ((2,), 1)


def test_both_answers_to_the_thinking_switch_are_known_whichever_was_asked():
    rows = ([Kind.THINK], [Kind.TEXT])
    assert odd_rows_of(*rows, thinking=False).only_thinking == (1,)
    assert odd_rows_of(*rows, thinking=True).only_thinking == (1,)


def test_the_longest_come_first_and_the_least_learned_have_learned_something():
    odd = odd_rows_of([Kind.TEXT], [Kind.USER] * 8 + [Kind.TEXT], [Kind.USER] * 3 + [Kind.TEXT])
    assert odd.longest == (2, 3, 1)
    assert odd.least_learned[0] == (2, 9, 1)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30))
def test_the_longest_are_sorted(lengths):
    odd = odd_rows_of(*([Kind.TEXT] * length for length in lengths))
    shown = [lengths[number - 1] for number in odd.longest]
    assert shown == sorted(lengths, reverse=True)[:LISTED_LONGEST]


def test_what_no_rule_reads_is_counted_and_shown(write_jsonl):
    rows = [chat("q") | {"source": "x", "hint": "look left", "label": 3} for _ in range(3)]
    rows = [row | {"helpfulness": 1, "quality_score": 0.5} for row in rows]
    rows.append(
        {"messages": [{"role": "user", "content": "q", "mood": "m"}, chat("q")["messages"][1]]}
    )
    found = checked(write_jsonl(rows))
    assert {each.name: (each.rows, each.example, each.quiet) for each in found.unread} == {
        "source": (3, "x", True),
        "hint": (3, "look left", False),
        "label": (3, "3", False),
        "helpfulness": (3, "1", False),
        "quality_score": (3, "0.5", False),
        "messages[].mood": (1, "m", False),
    }
    shown = [str(remark.line) for remark in list_remarks(found)]
    assert "! hint: in 75% of rows, not read, such as 'look left'" in shown
    assert "! messages[].mood: in 25% of rows, not read, such as 'm'" in shown
    assert "· not read: source 75% of rows (ids, sources)" in shown
    assert (
        "! ratings: helpfulness (75%, such as 1), quality_score (75%, such as 0.5) not read:"
        " badly rated answers are learned like the others"
    ) in shown


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"field_system": "sytem"}, "field_system names sytem"),
        ({"field_tools": "tool_list"}, "field_tools names tool_list"),
        ({"message_property_mappings": {"thinking": "why"}}, "thinking names why"),
        ({"message_field_training": "learn"}, "message_field_training names learn"),
    ],
)
def test_a_key_that_names_what_no_row_has_is_an_error(write_jsonl, keys, named):
    path = write_jsonl([chat("q"), chat("r")])
    with pytest.raises(UserError, match=named):
        check_config(config_of(DatasetConfig(path=str(path), **keys)), path.parent)


@pytest.mark.parametrize(
    "keys",
    [
        {"field_system": "sys"},
        {"message_property_mappings": {"thinking": "why", "role": "role", "name": "name"}},
    ],
)
def test_a_key_that_one_row_has_is_none(write_jsonl, keys):
    rare = chat("r") | {"sys": "s"}
    rare["messages"][1]["why"] = "t"
    path = write_jsonl([chat("q"), rare])
    assert check_config(config_of(DatasetConfig(path=str(path), **keys)), path.parent).usable == 2
