"""Every spelling of a conversation and of its images becomes the one internal form."""

import base64
import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.chat.conversation import Image, Message, RowFormat, RowProblem, Text, Think, ToolCall
from engine.chat.render import render
from engine.chat.row import read_row
from engine.config import DatasetConfig
from engine.errors import UserError
from tests.support.pictures import picture, png
from tests.support.tokenizers import ANSWER, USER, Read, Tokenizers

ASKED = Message("user", "q", source=0)
ANSWERED = Message("assistant", "a", source=1)


def row_format(**keys: Any) -> RowFormat:
    return RowFormat.from_config(DatasetConfig(path="rows.jsonl", **keys))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"messages": json.dumps([USER, ANSWER])},
        {"messages": [USER, ANSWER], "tools": None, "system": None, "images": []},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"role": "user", "content": "q"}, {"role": "model", "content": "a"}]},
        {"conversation": [USER, ANSWER]},
        {"prompt": [USER], "completion": [ANSWER]},
    ],
)
def test_lists_of_messages_are_found_under_their_usual_names(row: dict[str, Any]) -> None:
    assert read_row(row, RowFormat()).messages == (ASKED, ANSWERED)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "response": "a"},
        {"question": "q", "answer": "a"},
        {"instruction": "q", "output": "a", "input": ""},
        {"instruction": "q", "response": "a"},
    ],
)
def test_question_and_answer_columns_are_messages_of_the_row(row: dict[str, Any]) -> None:
    asked, answered = read_row(row, RowFormat()).messages
    assert (asked.content, answered.content) == ("q", "a")
    assert asked.source == answered.source == -1


def test_the_input_of_an_instruction_follows_it() -> None:
    row = {"instruction": "Translate.", "input": "Brot", "output": "bread", "system": "S"}
    system, asked, _ = read_row(row, RowFormat()).messages
    assert (system.role, system.content) == ("system", "S")
    assert asked.content == "Translate.\n\nBrot"


def test_a_row_without_messages_names_its_columns() -> None:
    with pytest.raises(RowProblem, match="'text'"):
        read_row({"text": "a", "id": 1}, RowFormat())


def test_a_configured_column_is_not_guessed_around() -> None:
    with pytest.raises(RowProblem, match="It has no chat"):
        read_row({"conversations": [USER, ANSWER]}, row_format(field_messages="chat"))


def test_the_rows_own_system_prompt_comes_first_unless_there_is_one(read: Read) -> None:
    assert read(USER, ANSWER, system="S").messages[0] == Message("system", "S", source=-1)
    own = {"role": "system", "content": "own"}
    assert [message.content for message in read(own, USER, ANSWER, system="S").messages] == [
        *("own", "q", "a")
    ]


def test_mapped_properties_and_roles_are_read() -> None:
    configured = row_format(
        field_messages="turns",
        field_tools="functions",
        message_property_mappings={"role": "who", "content": "said", "thinking": "mused"},
        roles={"user": ["customer"], "assistant": ["agent"]},
        message_field_training="train",
        chat_template_kwargs={"reasoning_effort": "high"},
    )
    row = {
        "turns": [
            {"who": "customer", "said": "q"},
            {"who": "agent", "said": "a", "mused": "t", "train": False},
        ],
        "functions": [{"name": "f", "parameters": {}}],
    }
    conversation = read_row(row, configured)
    assert conversation.messages == (
        ASKED,
        Message("assistant", (Think("t"), Text("a")), source=1, learn=False),
    )
    assert conversation.reasoning_effort == "high"
    assert conversation.tools == (
        {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}},
    )


@pytest.mark.parametrize(
    "keys", [{"message_property_mappings": {"contents": "said"}}, {"roles": {"critic": ["judge"]}}]
)
def test_misspelt_key_of_the_format_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        row_format(**keys)


def test_the_rows_reasoning_effort_wins_over_the_datasets() -> None:
    configured = row_format(chat_template_kwargs={"reasoning_effort": "high"})
    row = {"messages": [USER, ANSWER]}
    assert read_row(row, configured).reasoning_effort == "high"
    assert read_row(row | {"reasoning_effort": "none"}, configured).reasoning_effort == "none"


@pytest.mark.parametrize(
    "message",
    [
        {"content": [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}]},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "t"}], "closed": None},
                {"type": "text", "text": "a", "thinking": None},
            ]
        },
        {"content": "a", "reasoning_content": "t"},
        {"content": "a", "reasoning": "t", "reasoning_content": "t"},
        {"content": "a", "thinking": "t"},
        {"content": [{"type": "text", "text": "a"}], "thinking": [{"type": "text", "text": "t"}]},
    ],
)
def test_thinking_in_every_spelling_is_thinking(message: dict[str, Any], read: Read) -> None:
    _, answered = read(USER, {"role": "assistant", **message}).messages
    assert answered.content == (Think("t"), Text("a"))


def test_thinking_that_was_cut_off_stays_open(read: Read) -> None:
    chunk = {"type": "thinking", "thinking": "t", "closed": False}
    _, answered = read(USER, {"role": "assistant", "content": [chunk]}).messages
    assert answered.content == (Think("t", closed=False),)


@pytest.mark.parametrize(
    "message",
    [
        {"content": [{"type": "thinking", "thinking": "t"}], "reasoning_content": "t"},
        {"content": "a", "reasoning_content": "t", "reasoning": "u"},
    ],
)
def test_thinking_given_twice_is_refused(message: dict[str, Any], read: Read) -> None:
    with pytest.raises(RowProblem, match="thinking"):
        read(USER, {"role": "assistant", **message})


@pytest.mark.parametrize(
    "calls",
    [
        [{"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
        [{"id": "abcdefghi", "function": {"name": "f", "arguments": '{"a": 1}'}}],
        [{"id": "abcdefghi", "name": "f", "arguments": '{"a": 1}'}],
        '[{"id": "abcdefghi", "function": {"name": "f", "arguments": {"a": 1}}}]',
        [{"id": "abcdefghi", "name": "f", "arguments": "{'a': 1}"}],
        "[{'id': 'abcdefghi', 'function': {'name': 'f', 'arguments': {'a': 1}}}]",
    ],
)
def test_tool_calls_are_read_in_every_spelling(calls: object, read: Read) -> None:
    _, calling = read(USER, {"role": "assistant", "content": None, "tool_calls": calls}).messages
    assert calling.content == ""
    assert calling.tool_calls == (ToolCall("f", {"a": 1}, "abcdefghi"),)


@pytest.mark.parametrize("printed", ["['a' 'b']", "[{'role': 'user'}\n {'role': 'tool'}]", "{'a'}"])
def test_what_numpy_prints_is_never_joined(printed: str) -> None:
    with pytest.raises(RowProblem, match="not JSON"):
        read_row({"messages": printed}, RowFormat())


@pytest.mark.parametrize("ids", [(None, None), ("abcdefghi", None), ("abcdefghi", "bcdefghij")])
def test_results_without_ids_answer_the_calls_in_their_order(
    ids: tuple[str | None, ...], read: Read
) -> None:
    """As chat templates of transformers write them: by the tool's name alone."""
    called = [
        {"function": {"name": name, "arguments": {}}} | ({"id": given} if given else {})
        for name, given in zip("fg", ids, strict=True)
    ]
    results = [{"role": "tool", "name": name, "content": name} for name in "fg"]
    conversation = read(USER, ANSWER | {"tool_calls": called}, *results, ANSWER)
    calling, *answers = conversation.messages[1:4]
    made = [call.id for call in calling.tool_calls]
    assert made == [message.tool_call_id for message in answers]
    assert all(one in (None, other) for one, other in zip(ids, made, strict=True))
    expected = [] if all(ids) else ["call_ids_made"]
    assert [note.id for note in conversation.notes] == expected


def test_a_call_that_ends_the_row_needs_no_id_where_ids_are_no_tokens(
    read: Read, tokenizers: Tokenizers
) -> None:
    """As sets of single calls are published: mistral-common wants an id, and writes none."""
    call = {"function": {"name": "f", "arguments": {}}}
    with_id, without = (
        render(read(USER, ANSWER | {"content": "", "tool_calls": [each]}), tokenizers["v13"])
        for each in (call | {"id": "abcdefghi"}, call)
    )
    assert with_id.input_ids.tolist() == without.input_ids.tolist()


def test_sharegpt_calls_and_results_are_paired_in_order() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '[{"name": "f", "arguments": {}}, {"name": "g"}]'},
            {"from": "observation", "value": "one"},
            {"from": "observation", "value": "two"},
            {"from": "gpt", "value": "a"},
        ]
    }
    conversation = read_row(row, RowFormat())
    calling, one, two = conversation.messages[1:4]
    assert [call.name for call in calling.tool_calls] == ["f", "g"]
    assert [call.id for call in calling.tool_calls] == [one.tool_call_id, two.tool_call_id]
    assert [note.id for note in conversation.notes] == ["call_ids_made"]


@pytest.mark.parametrize(
    "tools",
    [
        [{"type": "function", "function": {"name": "f", "description": None, "strict": True}}],
        [{"name": "f", "parameters": None}],
        '[{"name": "f", "parameters": "{}"}]',
    ],
)
def test_tools_are_read_in_every_spelling(tools: object, read: Read) -> None:
    assert read(USER, ANSWER, tools=tools).tools == (
        {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}},
    )


def test_turns_after_the_last_answer_are_left_out_with_a_note(read: Read) -> None:
    conversation = read(USER, ANSWER, USER, {"role": "system", "content": "s"})
    assert conversation.messages == (ASKED, ANSWERED)
    (note,) = conversation.notes
    assert (note.id, note.message) == ("trimmed", 2)
    assert "2 messages" in note.text


@pytest.mark.parametrize(
    ("columns", "expected"),
    [({"weight": 0}, False), ({"weight": 1}, True), ({"weight": None}, True), ({}, True)],
)
def test_weight_zero_is_not_learned(columns: dict[str, Any], expected: bool, read: Read) -> None:
    assert read(USER, ANSWER | columns).messages[1].learn is expected


def test_a_weight_between_is_refused(read: Read) -> None:
    with pytest.raises(RowProblem, match="neither 0 nor 1"):
        read(USER, ANSWER | {"weight": 0.5})


@pytest.mark.parametrize(
    ("row", "note"),
    [
        (
            {"messages": [USER, ANSWER | {"thinking": "t"}], "reasoning_effort": "none"},
            "effort_contradicts_thinking",
        ),
        (
            {
                "messages": [USER, {"role": "assistant", "content": "<think>t</think>a"}],
                "reasoning_effort": "none",
            },
            "effort_contradicts_thinking",
        ),
        ({"messages": [USER, ANSWER | {"reasoning_content": ""}]}, "empty_thinking"),
        ({"messages": [USER, {"role": "assistant", "content": "  "}]}, "blank_answer"),
    ],
)
def test_what_is_odd_but_usable_gets_a_note(row: dict[str, Any], note: str) -> None:
    assert note in [found.id for found in read_row(row, RowFormat()).notes]


KEYS = (
    *("messages", "conversations", "role", "content", "from", "value", "type", "text", "thinking"),
    *("tool_calls", "tool_call_id", "id", "function", "name", "arguments", "tools", "parameters"),
    *("system", "weight", "reasoning_effort", "closed", "reasoning_content", "prompt"),
    *("completion", "function_call", "images", "input", "instruction", "output", "description"),
)
WORDS = (
    *("user", "assistant", "tool", "gpt", "function_call"),
    *("observation", "text", "thinking", "function"),
)
json_values: Any = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
        *(st.sampled_from(WORDS), st.sampled_from(("[]", "{}", "[1", '{"name": "f"}'))),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(KEYS), inner, max_size=6)
    ),
    max_leaves=20,
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(WORDS)},
    optional={key: json_values for key in ("content", "tool_calls", "tool_call_id", "thinking")},
)


@settings(max_examples=400, deadline=None)
@given(
    row=st.one_of(
        st.dictionaries(st.sampled_from(KEYS), json_values, max_size=6),
        st.builds(
            lambda listed, tools: {"messages": listed, "tools": tools},
            st.lists(messages, max_size=5),
            json_values,
        ),
    )
)
def test_any_json_is_read_or_refused(row: dict[str, Any], tokenizers: Tokenizers) -> None:
    with suppress(RowProblem):
        conversation = read_row(row, RowFormat())
        for version in ("v11", "v15"):
            with suppress(RowProblem):
                render(conversation, tokenizers[version])


CONTENT = png()
BASE64 = base64.b64encode(CONTENT).decode()
CAT, DOG = Image("cat.png"), Image("dog.png")


def first(row: dict[str, Any], **keys: Any) -> Any:
    """The parts of the first message."""
    return read_row(row, row_format(**keys)).messages[0].content


def ask(*chunks: object, role: str = "user", **columns: object) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(chunks)}, ANSWER], **columns}


@pytest.mark.parametrize("column", ["image_path", "file_name"])
def test_an_image_in_a_column_of_another_name_is_never_dropped_silently(column: str) -> None:
    row = {"messages": [USER, ANSWER], column: "cat.png"}
    (note,) = read_row(row, RowFormat()).notes
    assert note.id == "image_left_out"
    assert f"field_image: {column}" in note.text
    assert first(row, field_image=column)[0] == CAT
    assert not read_row({**row, column: "a cat on a mat"}, RowFormat()).notes


IMAGE_SPELLINGS = {
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


@pytest.mark.parametrize(("chunk", "content"), IMAGE_SPELLINGS.values(), ids=IMAGE_SPELLINGS)
def test_every_spelling_gives_one_image(chunk, content):
    (image,) = first(ask(chunk))
    assert image == Image("file:///a.png" if content is None else content)


def test_a_pillow_image_is_kept_as_a_file():
    (image,) = first(ask({"type": "image", "image": picture(9, 7)}))
    assert image.content.startswith(b"\x89PNG")


NO_IMAGES = {
    "no base64": ask({"type": "image", "base64": "*"}),
    "a number": ask({"type": "image", "image": 5}),
    "an empty path": ask({"type": "image"}),
    "a data URL of text": ask({"type": "image", "url": "data:text/plain,cat"}),
    "bare base64": ask({"type": "image", "image": "A" * 5000}),
    "of the system": ask({"type": "image", "path": "a.png"}, role="system"),
    "of the assistant": {
        "messages": [USER, ANSWER | {"content": [{"type": "image", "path": "a.png"}]}]
    },
    "sound": ask({"type": "input_audio", "input_audio": {}}),
    "fewer images than places": ask({"type": "image"}, {"type": "image"}, images=["a.png"]),
    "more images than places": ask({"type": "image"}, images=["a.png", "b.png"]),
    "twice": ask({"type": "image", "path": "a.png"}, images=["a.png"]),
    "no user": {"messages": [{"role": "system", "content": "s"}, ANSWER], "images": ["a.png"]},
    "a number in the column": {"messages": [USER, ANSWER], "image": 5},
}


@pytest.mark.parametrize("row", NO_IMAGES.values(), ids=NO_IMAGES)
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
        row = {"messages": [USER, ANSWER], "image": "cat.png"}
        assert first(row) == (CAT, Text("q"))

    def test_without_a_column_the_word_is_text(self):
        assert first({"messages": [USER | {"content": "<image>"}, ANSWER]}) == "<image>"

    def test_an_empty_column_is_none(self):
        row = {"messages": [USER, ANSWER], "images": []}
        assert first(row) == "q"

    def test_a_chosen_column_is_the_only_one(self):
        row = {"messages": [USER, ANSWER], "image": 5, "photo": "cat.png"}
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
