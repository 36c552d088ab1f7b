import json

import pytest

from engine.config import DatasetConfig
from engine.data.shape import mapped, propose_mapping, read_shape
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
