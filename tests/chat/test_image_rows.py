"""Images in rows: every spelling of one, and the places of those in a column."""

import base64
from typing import Any

import pytest

from engine.chat.conversation import Image, Message, RowFormat, RowProblem, Text
from engine.chat.row import read_row
from engine.config import DatasetConfig
from tests.support.pictures import picture, png

CONTENT = png()
BASE64 = base64.b64encode(CONTENT).decode()
ANSWER = {"role": "assistant", "content": "A cat."}
CAT, DOG = Image("cat.png"), Image("dog.png")


def first(row: dict[str, Any], **keys: Any) -> Any:
    """The parts of the first message."""
    row_format = RowFormat.from_config(DatasetConfig(path="rows.jsonl", **keys))
    return read_row(row, row_format).messages[0].content


def ask(*chunks: object, role: str = "user", **columns: object) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(chunks)}, ANSWER], **columns}


@pytest.mark.parametrize("column", ["image_path", "file_name"])
def test_an_image_in_a_column_of_another_name_is_never_dropped_silently(column: str) -> None:
    row = {"messages": [{"role": "user", "content": "What is it?"}, ANSWER], column: "cat.png"}
    (note,) = read_row(row, RowFormat()).notes
    assert note.id == "image_left_out"
    assert f"field_image: {column}" in note.text
    assert first(row, field_image=column)[0] == CAT
    assert not read_row({**row, column: "a cat on a mat"}, RowFormat()).notes


SPELLINGS = {
    "a URL": ({"type": "image_url", "image_url": "https://x.org/a.png"}, "https://x.org/a.png"),
    "a URL in an object": ({"type": "image_url", "image_url": {"url": "file:///a.png"}}, None),
    "input_image": ({"type": "input_image", "image_url": "a.png"}, "a.png"),
    "path": ({"type": "image", "path": "a.png"}, "a.png"),
    "url": ({"type": "image", "url": "https://x.org/a"}, "https://x.org/a"),
    "image": ({"type": "image", "image": "a.png"}, "a.png"),
    "image_path": ({"type": "image_path", "image_path": "a.png"}, "a.png"),
    "base64": ({"type": "image", "base64": BASE64}, CONTENT),
    "a data URL": (
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BASE64}"}},
        CONTENT,
    ),
    "bytes": ({"type": "image", "image": CONTENT}, CONTENT),
    "a column of the hub": ({"type": "image", "image": {"bytes": CONTENT, "path": "a"}}, CONTENT),
    "bytes in JSON": ({"type": "image", "image": {"bytes": {"base64": BASE64}}}, CONTENT),
}


@pytest.mark.parametrize(("chunk", "content"), SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_gives_one_image(chunk, content):
    (image,) = first(ask(chunk))
    assert image == Image("file:///a.png" if content is None else content)


def test_a_pillow_image_is_kept_as_a_file():
    (image,) = first(ask({"type": "image", "image": picture(9, 7)}))
    assert image.content.startswith(b"\x89PNG")


REFUSED = {
    "no base64": ask({"type": "image", "base64": "*"}),
    "a number": ask({"type": "image", "image": 5}),
    "an empty path": ask({"type": "image"}),
    "a data URL of text": ask({"type": "image", "url": "data:text/plain,cat"}),
    "bare base64": ask({"type": "image", "image": "A" * 5000}),
    "of the system": ask({"type": "image", "path": "a.png"}, role="system"),
    "of the assistant": {
        "messages": [
            {"role": "user", "content": "draw"},
            {"role": "assistant", "content": [{"type": "image", "path": "a.png"}]},
        ]
    },
    "sound": ask({"type": "input_audio", "input_audio": {}}),
    "fewer images than places": ask({"type": "image"}, {"type": "image"}, images=["a.png"]),
    "more images than places": ask({"type": "image"}, images=["a.png", "b.png"]),
    "twice": ask({"type": "image", "path": "a.png"}, images=["a.png"]),
    "no user": {"messages": [{"role": "system", "content": "s"}, ANSWER], "images": ["a.png"]},
    "a number in the column": {"messages": [{"role": "user", "content": "q"}, ANSWER], "image": 5},
}


@pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED)
def test_what_is_no_image_is_refused_in_sentences(row):
    with pytest.raises(RowProblem) as caught:
        first(row)
    for sentence in (caught.value.what, caught.value.why, caught.value.fix):
        assert sentence.endswith(".")


class TestColumn:
    @pytest.mark.parametrize("column", [["cat.png", "dog.png"], '["cat.png", "dog.png"]'])
    def test_images_stand_where_the_chunks_are(self, column):
        row = ask({"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"})
        assert first(row | {"images": column}) == (CAT, Text("or"), DOG)

    def test_images_stand_where_the_text_says(self):
        messages = [
            {"from": "human", "value": "<image>\nWhich? <image>"},
            {"from": "gpt", "value": "a"},
        ]
        row = {"conversations": messages, "images": ["cat.png", "dog.png"]}
        assert first(row) == (CAT, Text("Which? "), DOG)

    def test_without_places_they_come_before_the_first_text(self):
        row = {"messages": [{"role": "user", "content": "What?"}, ANSWER], "image": "cat.png"}
        assert first(row) == (CAT, Text("What?"))

    def test_without_a_column_the_word_is_text(self):
        assert first({"messages": [{"role": "user", "content": "<image>"}, ANSWER]}) == "<image>"

    def test_an_empty_column_is_none(self):
        row = {"messages": [{"role": "user", "content": "q"}, ANSWER], "images": []}
        assert first(row) == "q"

    def test_a_chosen_column_is_the_only_one(self):
        row = {
            "messages": [{"role": "user", "content": "q"}, ANSWER],
            "image": 5,
            "photo": "cat.png",
        }
        assert first(row, field_image="photo") == (CAT, Text("q"))


class TestTables:
    def test_medpix(self):
        row = {
            "image_id": {"bytes": CONTENT, "path": "mpx1001.jpg"},
            "mode": "train",
            "case_id": "MPX1001",
            "question": "What is shown?",
            "answer": "A lung.",
        }
        conversation = read_row(row, RowFormat())
        assert conversation.messages == (
            Message("user", (Image(CONTENT), Text("What is shown?"))),
            Message("assistant", "A lung."),
        )

    def test_an_id_that_is_no_image_is_none(self):
        assert first({"image_id": "4711", "question": "q", "answer": "a"}) == "q"

    def test_columns_can_be_named(self):
        row = {"ask": "q", "say": "a", "scan": "cat.png"}
        keys = {"field_image": "scan", "field_question": "ask", "field_answer": "say"}
        assert first(row, **keys) == (CAT, Text("q"))

    @pytest.mark.parametrize("column", ["caption", "text"])
    def test_a_caption_answers_the_image_alone(self, column):
        row = {"file_name": "cat.png", column: "A cat."}
        assert read_row(row, RowFormat()).messages == (
            Message("user", (CAT,)),
            Message("assistant", "A cat."),
        )

    def test_text_without_an_image_is_no_caption(self):
        with pytest.raises(RowProblem, match="no messages"):
            first({"file_name": "notes.pdf", "text": "a"})
