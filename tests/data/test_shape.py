import json

import pytest

from engine.config import DatasetConfig, read_config
from engine.data.shape import mapped, propose_mapping, read_shape
from engine.report.data import mapping_text, proposal_lines
from tests.support.data import chat

SPOKEN = {"dialog": [{"speaker": "human", "text": "hi"}, {"speaker": "gpt", "text": "yo"}]}


def shape_of(path, **keys):
    return read_shape(DatasetConfig(path=path.name, **keys), path.parent, 5)


def test_rows_are_shown_as_written_and_as_understood(write_jsonl):
    found = shape_of(write_jsonl([chat("q", "a"), 7, {"messages": []}]))
    assert found.title == "chat messages in messages"
    good, number, empty = found.rows
    assert good.messages == (("user", "q"), ("assistant", "a"))
    assert json.loads(good.raw) == chat("q", "a")
    assert "not a JSON object" in number.problem
    assert empty.problem.startswith("The row has no assistant message.")
    assert (number.line, number.messages) == (2, ())


@pytest.mark.parametrize(
    ("row", "title"),
    [
        ({"conversations": [{"from": "human", "value": "q"}]}, "ShareGPT turns in conversations"),
        ({"prompt": "q", "completion": "a"}, "columns prompt, completion"),
        (SPOKEN, "columns dialog"),
    ],
)
def test_the_shape_has_a_name(write_jsonl, row, title):
    assert shape_of(write_jsonl([row])).title == title


def test_the_usual_names_are_proposed_and_make_the_rows_readable(write_jsonl):
    path = write_jsonl([SPOKEN])
    found = shape_of(path)
    assert found.lists == {"dialog": ("speaker", "text")}
    assert found.proposed == {"field_messages": "dialog", "role": "speaker", "content": "text"}
    mappings = {"role": "speaker", "content": "text"}
    read = shape_of(path, field_messages="dialog", message_property_mappings=mappings)
    assert read.rows[0].messages == (("user", "hi"), ("assistant", "yo"))
    assert read.title == "dialog (speaker, text)"


def test_messages_may_be_the_json_text_of_a_list(write_jsonl):
    found = shape_of(write_jsonl([{"chat": json.dumps(SPOKEN["dialog"])}]))
    assert found.proposed["field_messages"] == "chat"


def test_nothing_is_proposed_where_no_name_is_usual():
    assert propose_mapping({"a": ["x", "y"]}) == {}
    assert propose_mapping({}) == {}


def test_a_huge_row_is_shown_in_part(write_jsonl):
    (row,) = shape_of(write_jsonl([chat("x" * 10**5)])).rows
    assert len(row.raw) == 4000


@pytest.mark.parametrize(
    ("row", "proposed"),
    [
        (
            {"image_id": "a.png", "question": "q", "answer": "a"},
            {"field_image": "image_id", "field_question": "question", "field_answer": "answer"},
        ),
        (
            {"scan": "a.png", "asked": "q", "said": "a"},
            {"field_image": "scan", "field_question": "asked", "field_answer": "said"},
        ),
        ({"scan": "a.png", "finding": "a"}, {"field_image": "scan", "field_answer": "finding"}),
        ({"asked": "q", "reply": "a"}, {"field_question": "asked", "field_answer": "reply"}),
        ({"a": "x", "b": "y", "c": "z"}, {}),
        ({"scan": "a.png"}, {}),
    ],
)
def test_the_columns_of_a_table_are_proposed(write_jsonl, row, proposed):
    found = shape_of(write_jsonl([row]))
    assert found.proposed == proposed
    if proposed:
        dataset = mapped(DatasetConfig(path="rows.jsonl"), found.proposed)
        assert dataset.message_property_mappings is None
        keys = {name: getattr(dataset, name) for name in proposed}
        assert shape_of(write_jsonl([row]), **keys).rows[0].problem is None


def test_rows_show_images_whatever_model_reads_them(write_jsonl):
    assert not shape_of(write_jsonl([chat("q", "a")])).shows_images
    assert shape_of(write_jsonl([chat("q", "a") | {"images": ["a.png"]}])).shows_images


TREE = {"message_id": "m", "parent_id": "p", "text": "t", "role": "assistant", "lang": "en"}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"question": "q", "answer": "a", "rationale": "t"}, ["user:q", "think:t", "assistant:a"]),
        (
            {"problem": "q", "solution": "a", "persona_text": "s", "evidence": "c"},
            ["system:s", "user:c\n\nq", "assistant:a"],
        ),
        ({"article_id": "7", "article": "q", "highlights": "a"}, ["user:q", "assistant:a"]),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, ["user:q", "assistant:a"]),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
            ["user:q", "assistant:a"],
        ),
        ({"prompt": "q", "completion": "a", "label": True}, ["user:q", "assistant:a"]),
        (SPOKEN, ["user:hi", "assistant:yo"]),
        (
            {"messages": [{"role": "user", "content": "q"},
                          {"role": "assistant", "content": "a", "rationale": "t"}]},
            ["user:q", "think:t", "assistant:a"],
        ),
    ],
)  # fmt: skip
def test_a_proposed_mapping_reads_the_rows_and_check_prints_it_as_yaml(write_jsonl, row, messages):
    path = write_jsonl([row])
    dataset = DatasetConfig(path=str(path))
    proposed = read_shape(dataset, path.parent, 5).proposed
    _, *lines = proposal_lines(dataset, proposed)
    config = path.with_name("config.yml")
    config.write_text("\n".join(["base_model: any", *lines]))
    (entry,) = read_config(config).config.datasets
    found = read_shape(entry, path.parent, 5)
    assert [f"{role}:{text}" for role, text in found.rows[0].messages] == messages
    assert not found.reads_more


@pytest.mark.parametrize(
    "row",
    [
        TREE,
        chat("q", "a") | {"source": "x", "hint": "y"},
        {"doc_id": "x", "text_id": "y"},
        {"question": "q", "answers": ["a"], "document_page_no": "one"},
        {"prompt": "p", "completion": "c", "question": "q", "answer": "a", "pred_answer": "a"},
        {"prompt": "q", "response_0": "a", "response_1": "b"},
    ],
)
def test_nothing_is_proposed_rather_than_nonsense(write_jsonl, row):
    assert not shape_of(write_jsonl([row])).reads_more


def test_a_mapping_is_shown_with_examples(write_jsonl):
    found = shape_of(write_jsonl([{"asked": "How?", "said": "So."}]))
    assert mapping_text(found) == "question = asked (How?), answer = said (So.)"
