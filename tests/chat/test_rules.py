"""What is refused: the same rows as mistral-common refuses, and a few that it should."""

from typing import Any

import pytest
from hypothesis import given, settings

from engine.chat.conversation import RowFormat, RowProblem
from engine.chat.render import render
from engine.chat.row import read_row
from engine.chat.tokenizer import ChatTokenizer
from tests.support import oracle
from tests.support.strategies import tangled_rows
from tests.support.tokenizers import ANSWER, SPECS, USER, Read, Tokenizers

# Rows that mistral-common encodes and that would teach something wrong.
STRICTER = {
    "A tool call's arguments are not a JSON object.",
    "Unclosed thinking is followed by more.",
    "The row starts with a tool call.",
    "The row starts with a tool result.",
}


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
        if expected is None and not isinstance(found, RowProblem):
            # What it refuses for want of ids alone is read in the order of the messages.
            expected = oracle.encode(oracle.numbered(row), tokenizer)
        if isinstance(found, RowProblem):
            assert found.what in STRICTER or expected is None, found
        elif tokenizer.efforts and row["reasoning_effort"] is None:
            # An effort that nobody states is settled by us, and mistral-common says none.
            assert expected is not None
        else:
            assert found == expected


def every(what: str, *versions: str) -> dict[str, str]:
    """What these versions say, or all of them."""
    return dict.fromkeys(versions or SPECS, what)


def chunks(*parts: tuple[str, str], **keys: Any) -> list[dict[str, Any]]:
    return [{"type": kind, kind: content} | keys for kind, content in parts]


THINKS: dict[str, Any] = {"content": chunks(("thinking", "t"))}
BLIND = every("The message has an image, and this model reads only text.", "v3", "v7", "v11")
THOUGHTLESS = every("The message thinks, and this model has no thinking tokens.", "v3", "v7", "v11")
NO_OBJECT = every("A tool call's arguments are not a JSON object.")
BESIDE_A_CALL = every("The assistant message has text and tool calls.", "v3")
SYSTEM: dict[str, Any] = {"role": "system", "content": "s"}
IMAGE: dict[str, Any] = {"content": chunks(("image_url", "a.png"))}
CUT_OFF: dict[str, Any] = {
    "content": [chunks(("thinking", "t"), closed=False)[0], *chunks(("text", "b"))]
}
AFTER_TEXT: dict[str, Any] = {"content": chunks(("text", "a"), ("thinking", "t"), ("text", "b"))}
NAMELESS: dict[str, Any] = {"tool_calls": [{"id": "abcdefghi", "function": {}}]}
NO_ID: dict[str, Any] = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
# case: (messages, version -> what we say; versions that are not named accept it)
TABLE: dict[str, tuple[list[dict[str, Any]], dict[str, str]]] = {
    "one assistant message": ([ANSWER], every("The row is one assistant message.")),
    "assistant first": ([ANSWER, USER, ANSWER], {}),
    "system and assistant, no user": ([SYSTEM, ANSWER], {}),
    "prefix is dropped": ([USER, ANSWER | {"prefix": True}], {}),
    "empty": ([USER, ANSWER | {"content": ""}], every("The assistant message is empty.")),
    "null": ([USER, ANSWER | {"content": None}], every("The assistant message is empty.")),
    "blank assistant": ([USER, ANSWER | {"content": "   "}], {}),
    "empty user": ([USER | {"content": ""}, ANSWER], {}),
    "tool without call": (
        [USER, result(), ANSWER],
        every("After the user message comes a tool message."),
    ),
    "more results than calls": (
        [USER, call(), result(), result("123456789"), ANSWER],
        every("A tool result answers no call."),
    ),
    "system after assistant": (
        [USER, ANSWER, SYSTEM, ANSWER],
        every("After the assistant message comes a system message."),
    ),
    "unanswered": ([USER, call(), ANSWER], every("A tool call has no result.")),
    "calls last": ([USER, call()], {}),
    "text beside a call": ([USER, call() | {"content": "Let me look."}], BESIDE_A_CALL),
    "text before a call, in a message of its own": ([USER, ANSWER, call()], BESIDE_A_CALL),
    "an empty message before the answer": (
        [USER, ANSWER | {"content": ""}, ANSWER],
        every("The assistant message is empty.", "v3"),
    ),
    "call first": ([call(), result(), ANSWER], every("The row starts with a tool call.")),
    "result first": ([result(), ANSWER], every("The row starts with a tool result.")),
    "a tool's name with a blank": (
        [USER, call(), result() | {"name": "no name"}, ANSWER],
        every("A function's name is not allowed."),
    ),
    "nameless": ([USER, NAMELESS | {"role": "assistant"}], every("A function has no name.")),
    "tool then user": ([USER, call(), result(), USER, ANSWER], {}),
    "a long call id": (
        [USER, call("call_12345")],
        every("A tool call's id is 'call_12345'.", "v3", "v7", "v11"),
    ),
    "no call id, last": ([USER, NO_ID], {}),
    "no call id": ([USER, call("null"), result(), ANSWER], every("A tool call has no id.")),
    "a result of another call": (
        [USER, call(), result("123456789"), ANSWER],
        every("A tool result answers no call.", "v11", "v13", "v15"),
    ),
    "role unknown": (
        [USER | {"role": "narrator"}, ANSWER],
        every("The message's role is unknown."),
    ),
    "bad JSON arguments": ([USER, call(arguments='{"a": ')], NO_OBJECT),
    "arguments encoded twice": ([USER, call(arguments='"{\\"a\\": 1}"')], NO_OBJECT),
    "thinking": ([USER, ANSWER | THINKS], THOUGHTLESS),
    "thinking in the system prompt": (
        [SYSTEM | THINKS, USER, ANSWER],
        THOUGHTLESS | every("The system prompt has a thinking chunk.", "v15"),
    ),
    "missing content": ([{"role": "user"}, ANSWER], every("The message has no content.")),
    "a number": ([USER | {"content": 5}, ANSWER], every("The content is not text.")),
    "an image": ([USER | IMAGE, ANSWER], every("The image was not looked up.") | BLIND),
    "thinking after text": ([USER, ANSWER | AFTER_TEXT], THOUGHTLESS),
    "cut off": ([USER, ANSWER | CUT_OFF], every("Unclosed thinking is followed by more.")),
}


@pytest.mark.parametrize("version", SPECS)
@pytest.mark.parametrize(("messages", "refused"), TABLE.values(), ids=TABLE)
def test_each_version_refuses_what_it_should_with_a_sentence(
    messages: list[dict[str, Any]], refused: dict[str, str], version: str, tokenizers: Tokenizers
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


def test_the_problem_names_the_message_at_fault(read: Read) -> None:
    with pytest.raises(RowProblem) as caught:
        read(USER, ANSWER, {"role": "user", "content": 5}, ANSWER)
    assert caught.value.message == 2
    with pytest.raises(RowProblem) as caught:
        read(USER, call(), ANSWER)
    assert caught.value.message == 1


def test_a_conversation_without_an_answer_is_refused(read: Read) -> None:
    with pytest.raises(RowProblem, match="no assistant message"):
        read(USER)


def test_unknown_role_names_the_known_ones_and_the_key(read: Read) -> None:
    with pytest.raises(RowProblem) as caught:
        read({"role": "narrator", "content": "q"}, ANSWER)
    assert "human" in caught.value.why
    assert "`roles`" in caught.value.fix


@pytest.mark.parametrize("version", ["v3", "v7", "v11", "v13"])
def test_a_reasoning_effort_is_refused_where_there_are_no_settings(
    version: str, read: Read, tokenizers: Tokenizers
) -> None:
    with pytest.raises(RowProblem, match="no such setting"):
        render(read(USER, ANSWER, reasoning_effort="none"), tokenizers[version])


def test_unknown_effort_refused(read: Read, tokenizers: Tokenizers) -> None:
    with pytest.raises(RowProblem, match="none and high"):
        render(read(USER, ANSWER, reasoning_effort="turbo"), tokenizers["v15"])


def test_parameters_not_a_schema(read: Read, tokenizers: Tokenizers) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}
    with pytest.raises(RowProblem, match="no JSON schema"):
        render(read(USER, ANSWER, tools=[tool]), tokenizers["v13"])


def test_arguments_beyond_json(read: Read, tokenizers: Tokenizers) -> None:
    with pytest.raises(RowProblem, match="cannot be written as JSON"):
        render(read(USER, call(arguments={"when": object()})), tokenizers["v13"])


def test_too_many_blanks_refused(
    read: Read, tokenizers: Tokenizers, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RowProblem, match="cannot be tokenized"):
        render(
            read(USER, {"role": "assistant", "content": "a" + " " * 10**6 + "b"}), tokenizers["v13"]
        )
    assert capfd.readouterr().err == ""  # nothing of Rust's panic


def test_merged_messages_must_agree_on_what_is_learned(read: Read) -> None:
    with pytest.raises(RowProblem, match="disagree"):
        read(USER, ANSWER | {"weight": 0}, ANSWER)
    read(USER, ANSWER | {"weight": 0}, ANSWER | {"weight": 0})
