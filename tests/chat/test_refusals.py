"""What is refused: the same rows as mistral-common refuses, and a few that it should."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings

from engine.chat.messages import Conversation, RowFormat, RowProblem, read_row
from engine.chat.render import render
from engine.chat.tokenizer import ChatTokenizer
from tests.support import oracle
from tests.support.strategies import tangled_rows
from tests.support.tokenizers import SPECS, Tokenizers

# Rows that mistral-common encodes and that would teach something wrong.
STRICTER = {
    "A tool call's arguments are not a JSON object.",
    "Unclosed thinking is followed by more.",
    "The row starts with a tool call.",
    "The row starts with a tool result.",
}
USER: dict[str, Any] = {"role": "user", "content": "q"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "a"}


def call(call_id: str | None = "abcdefghi", arguments: object = None) -> dict[str, Any]:
    function = {"name": "f", "arguments": {} if arguments is None else arguments}
    return {"role": "assistant", "tool_calls": [{"id": call_id, "function": function}]}


def result(call_id: str = "abcdefghi") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": "r"}


def outcome(row: dict[str, Any], tokenizer: ChatTokenizer) -> list[int] | RowProblem:
    try:
        return render(read_row(row, RowFormat()), tokenizer).input_ids.tolist()
    except RowProblem as problem:
        return problem


@settings(max_examples=600, deadline=None)
@given(row=tangled_rows)
def test_tangled_rows_as_mistral_common(row: dict[str, Any], tokenizers: Tokenizers) -> None:
    for version in SPECS:
        tokenizer = tokenizers[version]
        found, expected = outcome(row, tokenizer), oracle.encode(row, tokenizer)
        if isinstance(found, RowProblem):
            assert found.what in STRICTER or expected is None, found
        elif tokenizer.efforts and row["reasoning_effort"] is None:
            # An effort that nobody states is settled by us, and mistral-common says none.
            assert expected is not None
        else:
            assert found == expected


TABLE: list[tuple[str, list[dict[str, Any]], dict[str, str]]] = [
    # (case, messages, version -> what we say; versions that are not named accept it)
    ("one assistant message", [ANSWER], dict.fromkeys(SPECS, "The row is one assistant message.")),
    ("assistant first", [ANSWER, USER, ANSWER], {}),
    ("system and assistant, no user", [{"role": "system", "content": "s"}, ANSWER], {}),
    ("prefix is dropped", [USER, ANSWER | {"prefix": True}], {}),
    (
        "empty assistant",
        [USER, {"role": "assistant", "content": ""}],
        dict.fromkeys(SPECS, "The assistant message is empty."),
    ),
    (
        "null assistant",
        [USER, {"role": "assistant", "content": None}],
        dict.fromkeys(SPECS, "The assistant message is empty."),
    ),
    ("blank assistant", [USER, {"role": "assistant", "content": "   "}], {}),
    ("empty user", [{"role": "user", "content": ""}, ANSWER], {}),
    (
        "tool without call",
        [USER, result(), ANSWER],
        dict.fromkeys(SPECS, "After the user message comes a tool message."),
    ),
    (
        "more results than calls",
        [USER, call(), result(), result("123456789"), ANSWER],
        dict.fromkeys(SPECS, "A tool result answers no call."),
    ),
    (
        "system after assistant",
        [USER, ANSWER, {"role": "system", "content": "s"}, ANSWER],
        dict.fromkeys(SPECS, "After the assistant message comes a system message."),
    ),
    (
        "calls unanswered, then an answer",
        [USER, call(), ANSWER],
        dict.fromkeys(SPECS, "A tool call has no result."),
    ),
    ("calls last", [USER, call()], {}),
    (
        "text beside a call",
        [USER, call() | {"content": "Let me look."}],
        {"v3": "The assistant message has text and tool calls."},
    ),
    (
        "text before a call, in a message of its own",
        [USER, ANSWER, call()],
        {"v3": "The assistant message has text and tool calls."},
    ),
    (
        "an empty message before the answer",
        [USER, ANSWER | {"content": ""}, ANSWER],
        {"v3": "The assistant message is empty."},
    ),
    (
        "call first",
        [call(), result(), ANSWER],
        dict.fromkeys(SPECS, "The row starts with a tool call."),
    ),
    (
        "result first",
        [result(), ANSWER],
        dict.fromkeys(SPECS, "The row starts with a tool result."),
    ),
    (
        "a tool's name with a blank",
        [USER, call(), result() | {"name": "no name"}, ANSWER],
        dict.fromkeys(SPECS, "A function's name is not allowed."),
    ),
    (
        "a call of no function",
        [USER, {"role": "assistant", "tool_calls": [{"id": "abcdefghi", "function": {}}]}],
        dict.fromkeys(SPECS, "A function has no name."),
    ),
    ("tool then user", [USER, call(), result(), USER, ANSWER], {}),
    (
        "a long call id",
        [USER, call("call_12345")],
        dict.fromkeys(("v3", "v7", "v11"), "A tool call's id is 'call_12345'."),
    ),
    (
        "no call id, last",
        [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}],
        dict.fromkeys(("v13", "v15"), "A tool call has no id."),
    ),
    (
        "no call id, answered",
        [USER, call("null"), result(), ANSWER],
        dict.fromkeys(SPECS, "A tool call has no id."),
    ),
    (
        "a result of another call",
        [USER, call(), result("123456789"), ANSWER],
        dict.fromkeys(("v11", "v13", "v15"), "A tool result answers no call."),
    ),
    (
        "role unknown",
        [{"role": "narrator", "content": "q"}, ANSWER],
        dict.fromkeys(SPECS, "The message's role is unknown."),
    ),
    (
        "bad JSON arguments",
        [USER, call(arguments='{"a": ')],
        dict.fromkeys(SPECS, "A tool call's arguments are not a JSON object."),
    ),
    (
        "arguments encoded twice",
        [USER, call(arguments='"{\\"a\\": 1}"')],
        dict.fromkeys(SPECS, "A tool call's arguments are not a JSON object."),
    ),
    (
        "thinking",
        [USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": "t"}]}],
        dict.fromkeys(
            ("v3", "v7", "v11"), "The message thinks, and this model has no thinking tokens."
        ),
    ),
    (
        "thinking in the system prompt",
        [{"role": "system", "content": [{"type": "thinking", "thinking": "t"}]}, USER, ANSWER],
        {
            "v3": "The message thinks, and this model has no thinking tokens.",
            "v7": "The message thinks, and this model has no thinking tokens.",
            "v11": "The message thinks, and this model has no thinking tokens.",
            "v15": "The system prompt has a thinking chunk.",
        },
    ),
    (
        "missing content",
        [{"role": "user"}, ANSWER],
        dict.fromkeys(SPECS, "The message has no content."),
    ),
    (
        "content a number",
        [{"role": "user", "content": 5}, ANSWER],
        dict.fromkeys(SPECS, "The content is not text."),
    ),
    (
        "an image",
        [{"role": "user", "content": [{"type": "image_url", "image_url": "a.png"}]}, ANSWER],
        {
            **dict.fromkeys(SPECS, "The image was not looked up."),
            **dict.fromkeys(
                ("v3", "v7", "v11"), "The message has an image, and this model reads only text."
            ),
        },
    ),
    (
        "thinking after text",
        [
            USER,
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "a"},
                    {"type": "thinking", "thinking": "t"},
                    {"type": "text", "text": "b"},
                ],
            },
        ],
        dict.fromkeys(
            ("v3", "v7", "v11"), "The message thinks, and this model has no thinking tokens."
        ),
    ),
    (
        "thinking cut off and followed by text",
        [
            USER,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "t", "closed": False},
                    {"type": "text", "text": "b"},
                ],
            },
        ],
        dict.fromkeys(SPECS, "Unclosed thinking is followed by more."),
    ),
]


@pytest.mark.parametrize("version", SPECS)
@pytest.mark.parametrize(("case", "messages", "refused"), TABLE, ids=[case[0] for case in TABLE])
def test_each_version_refuses_what_it_should_with_a_sentence(
    case: str,
    messages: list[dict[str, Any]],
    refused: dict[str, str],
    version: str,
    tokenizers: Tokenizers,
) -> None:
    def render_row() -> None:
        render(read_row({"messages": messages}, RowFormat()), tokenizers[version])

    if version not in refused:
        render_row()
        return
    with pytest.raises(RowProblem) as caught:
        render_row()
    assert caught.value.what == refused[version]
    for sentence in (caught.value.what, caught.value.why, caught.value.fix):
        assert sentence.endswith(".")


def test_the_problem_names_the_message_at_fault(read: Callable[..., Conversation]) -> None:
    with pytest.raises(RowProblem) as caught:
        read(USER, ANSWER, {"role": "user", "content": 5}, ANSWER)
    assert caught.value.message == 2
    with pytest.raises(RowProblem) as caught:
        read(USER, call(), ANSWER)
    assert caught.value.message == 1


def test_a_conversation_without_an_answer_is_refused(read: Callable[..., Conversation]) -> None:
    with pytest.raises(RowProblem, match="no assistant message"):
        read(USER)


def test_unknown_role_names_the_known_ones_and_the_key(read: Callable[..., Conversation]) -> None:
    with pytest.raises(RowProblem) as caught:
        read({"role": "narrator", "content": "q"}, ANSWER)
    assert "human" in caught.value.why
    assert "`roles`" in caught.value.fix


@pytest.mark.parametrize("version", ["v3", "v7", "v11", "v13"])
def test_a_reasoning_effort_is_refused_where_there_are_no_settings(
    version: str, read: Callable[..., Conversation], tokenizers: Tokenizers
) -> None:
    with pytest.raises(RowProblem, match="no such setting"):
        render(read(USER, ANSWER, reasoning_effort="none"), tokenizers[version])


def test_unknown_effort_refused(read: Callable[..., Conversation], tokenizers: Tokenizers) -> None:
    with pytest.raises(RowProblem, match="none and high"):
        render(read(USER, ANSWER, reasoning_effort="turbo"), tokenizers["v15"])


def test_parameters_not_a_schema(read: Callable[..., Conversation], tokenizers: Tokenizers) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}
    with pytest.raises(RowProblem, match="no JSON schema"):
        render(read(USER, ANSWER, tools=[tool]), tokenizers["v13"])


def test_arguments_beyond_json(read: Callable[..., Conversation], tokenizers: Tokenizers) -> None:
    with pytest.raises(RowProblem, match="cannot be written as JSON"):
        render(read(USER, call(arguments={"when": object()})), tokenizers["v13"])


def test_too_many_blanks_refused(read: Callable[..., Conversation], tokenizers: Tokenizers) -> None:
    with pytest.raises(RowProblem, match="cannot be tokenized"):
        render(
            read(USER, {"role": "assistant", "content": "a" + " " * 10**6 + "b"}), tokenizers["v13"]
        )


def test_merged_messages_must_agree_on_what_is_learned(read: Callable[..., Conversation]) -> None:
    with pytest.raises(RowProblem, match="disagree"):
        read(USER, ANSWER | {"weight": 0}, ANSWER)
    read(USER, ANSWER | {"weight": 0}, ANSWER | {"weight": 0})
