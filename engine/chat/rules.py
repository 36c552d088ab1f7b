"""What one tokenizer makes of a conversation before it is written: thinking, effort, refusals.

Thinking is a control token or text, whichever the tokenizer has. The refusals are those of
mistral-common 1.13's finetuning validators that differ between versions; its own name classes and
stop at the first, and a person needs the message and the repair.
"""

import json
import re
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from engine.chat.conversation import (
    Conversation,
    Image,
    Message,
    Note,
    RowProblem,
    Text,
    Think,
    describe,
)

if TYPE_CHECKING:
    from engine.chat.tokenizer import ChatTokenizer


_SHORT_ID = re.compile(r"^[a-zA-Z0-9]{9}$")
_SHORT_ID_VERSIONS = ("v3", "v7", "v11")
_UNSORTED_VERSIONS = ("v3", "v7")
_THINKING_SYSTEM_VERSION = "v13"
_IMAGE_RESULT_VERSION = "v15"


def settle(
    conversation: Conversation,
    tokenizer: "ChatTokenizer",
    history_thinking: Literal["keep", "drop"],
) -> Conversation:
    """The conversation with thinking and effort as this tokenizer writes them.

    Thinking that was written as text is thinking where the tokenizer has [THINK], and the text
    that it was where it has not. An effort that nothing states is "high" for a row that thinks,
    else the tokenizer's default; None where the tokenizer has no settings. Raises RowProblem for
    an answer of which nothing is left.
    """
    messages, notes = conversation.messages, conversation.notes
    if any(message.holds(Think) or message.written is not None for message in messages):
        users = [i for i, message in enumerate(messages) if message.role == "user"]
        last_user = users[-1] if users and history_thinking == "drop" else 0
        messages = tuple(
            _settle_message(message, tokenizer, drop=index < last_user)
            for index, message in enumerate(messages)
        )
    if notes and not tokenizer.thinks:
        notes = tuple(map(_keep_text, notes))
    effort = conversation.reasoning_effort
    if effort is None and tokenizer.efforts:
        thinks = "high" in tokenizer.efforts and any(
            message.role == "assistant" and message.holds(Think) for message in messages
        )
        effort = "high" if thinks else tokenizer.default_effort
    unchanged = messages is conversation.messages and notes is conversation.notes
    if unchanged and effort == conversation.reasoning_effort:
        return conversation
    return replace(conversation, messages=messages, reasoning_effort=effort, notes=notes)


def _keep_text(note: Note) -> Note:
    """The note for a model that reads thinking as the text that it is written in."""
    if note.id != "thinking_read":
        return note
    text = f"Thinking written as {note.about}: stays text, as the model has no [THINK]."
    return replace(note, id="thinking_kept", text=text)


def _settle_message(message: Message, tokenizer: "ChatTokenizer", drop: bool) -> Message:
    answers = message.role == "assistant"
    if answers and drop and not isinstance(message.content, str):
        parts = tuple(part for part in message.parts if isinstance(part, Text))
        if not any(part.text for part in parts) and not message.tool_calls:
            raise message.problem(
                "Nothing is left of the assistant message.",
                "It is all thinking, and history_thinking: drop removes it.",
                "Use history_thinking: keep, or add the answer that followed.",
            )
        return replace(message, content=parts, written=None)
    as_tokens = tokenizer.thinks and (answers or tokenizer.version == _THINKING_SYSTEM_VERSION)
    if as_tokens or message.written is None:
        return message
    return replace(message, content=message.written, written=None)


def check_version(conversation: Conversation, tokenizer: "ChatTokenizer") -> None:
    """Raises RowProblem where the tokenizer's version refuses the conversation."""
    _check_effort(conversation, tokenizer)
    last = conversation.messages[-1]
    answered = False
    for message in conversation.messages:
        if not isinstance(message.content, str):
            _check_images(message, tokenizer)
            _check_thinking(message, tokenizer)
        if message.role == "tool":
            answered = True
            _check_result_id(message, tokenizer.version)
        for call in message.tool_calls:
            _check_call_id(call.id, message, message is last, tokenizer.version)
    if tokenizer.version == "v3":
        _check_one_thing(conversation.messages)
    calls = answered or any(message.tool_calls for message in conversation.messages)
    if calls and tokenizer.version not in _UNSORTED_VERSIONS:
        _check_pairs(conversation.messages)


def _check_effort(conversation: Conversation, tokenizer: "ChatTokenizer") -> None:
    effort = conversation.reasoning_effort
    if effort is None or effort in tokenizer.efforts:
        return
    if tokenizer.efforts:
        raise RowProblem(
            f"reasoning_effort is {describe(effort)}.",
            f"This model knows {' and '.join(tokenizer.efforts)}.",
            "Use one of them in the row or in chat_template_kwargs.",
        )
    raise RowProblem(
        f"reasoning_effort is {describe(effort)}, and this model has no such setting.",
        f"Its tokenizer is {tokenizer.version}; settings came with v15.",
        "Ask for none: not in the row, in chat_template_kwargs or on the command line.",
    )


def _check_images(message: Message, tokenizer: "ChatTokenizer") -> None:
    if not message.holds(Image):
        return
    if tokenizer.image is None:
        raise message.problem(
            "The message has an image, and this model reads only text.",
            f"Its tokenizer ({tokenizer.version}) says of no size how many tokens an image takes.",
            "Choose a model that reads images, such as ministral-3-8b, or delete the row.",
        )
    if message.role == "tool" and tokenizer.version != _IMAGE_RESULT_VERSION:
        raise message.problem(
            "The tool result has an image.",
            f"The model's tokenizer is {tokenizer.version}; results with images came with"
            f" {_IMAGE_RESULT_VERSION}.",
            "Move the image to a user message, or write the result as text.",
        )


def _check_thinking(message: Message, tokenizer: "ChatTokenizer") -> None:
    if not message.holds(Think):
        return
    if not tokenizer.thinks:
        raise message.problem(
            "The message thinks, and this model has no thinking tokens.",
            f"Its tokenizer is {tokenizer.version} and has no [THINK].",
            "Choose a model that thinks in tokens, or write the thinking as <think>...</think> "
            "at the start of the text.",
        )
    if message.role == "system" and tokenizer.version != _THINKING_SYSTEM_VERSION:
        raise message.problem(
            "The system prompt has a thinking chunk.",
            f"{tokenizer.version} takes only text there.",
            "Write the chunk as text.",
        )


def _check_call_id(call_id: str | None, message: Message, is_last: bool, version: str) -> None:
    if version in _SHORT_ID_VERSIONS:
        if call_id is None:
            if is_last:
                return
            raise _id_problem("A tool call has no id.", version, message)
        if not _SHORT_ID.match(call_id):
            raise _id_problem(f"A tool call's id is {describe(call_id)}.", version, message)
    elif not call_id and not (is_last and call_id is None):
        raise _id_problem("A tool call has no id.", version, message)


def _check_result_id(message: Message, version: str) -> None:
    call_id = message.tool_call_id
    if version in _SHORT_ID_VERSIONS:
        if call_id is None or not _SHORT_ID.match(call_id):
            raise _id_problem(f"A tool result's id is {describe(call_id)}.", version, message)
    elif not call_id or call_id == "null":
        raise _id_problem("A tool result names no call.", version, message)


def _id_problem(what: str, version: str, message: Message) -> RowProblem:
    if version in _SHORT_ID_VERSIONS:
        why = f"{version} writes ids as tokens, and takes exactly nine letters and digits."
        return message.problem(what, why, 'Use ids such as "a1B2c3D4e", one for each call.')
    why = f"{version} pairs calls and results by id."
    return message.problem(what, why, "Give every call an id and its result the same one.")


def _check_one_thing(messages: tuple[Message, ...]) -> None:
    """v3 takes text or calls from a message of the assistant, and from several in a row."""
    for role, group in groupby(messages, lambda message: message.role):
        turn = list(group) if role == "assistant" else []
        speaks = False
        for message in turn:
            if message.is_silent and not message.tool_calls:
                raise message.problem(
                    "The assistant message is empty.",
                    "It has neither text nor tool calls.",
                    "Write the answer, or delete the message.",
                )
            speaks |= not message.is_silent
            if speaks and any(each.tool_calls for each in turn):
                raise message.problem(
                    "The assistant message has text and tool calls.",
                    "v3 writes either the one or the other.",
                    "Delete the text, or choose a newer model, such as ministral-3-8b.",
                )


def _check_pairs(messages: tuple[Message, ...]) -> None:
    called: set[str | None] = set()
    answered: set[str | None] = set()
    for message in messages:
        if message.role == "tool":
            if message.tool_call_id in answered:
                raise _pair_problem("Two tool results have the same id.", message)
            if message.tool_call_id not in called:
                raise _pair_problem("A tool result answers no call.", message)
            answered.add(message.tool_call_id)
        elif message.role == "assistant":
            called, answered = set(), set()
            for call in message.tool_calls:
                if call.id in called:
                    raise _pair_problem("Two tool calls have the same id.", message)
                called.add(call.id)


def _pair_problem(what: str, message: Message) -> RowProblem:
    return message.problem(
        what,
        "Results are put in the order of their calls, by id.",
        "Give each call of a message its own id, and its result the same one.",
    )


def write_json(value: object, what: str, source: int | None) -> str:
    """The JSON text that becomes tokens, as mistral-common writes it."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowProblem(
            f"{what} cannot be written as JSON.",
            f"{error}.",
            "Use only objects, lists, strings, numbers, true, false and null.",
            source,
        ) from error


def write_result(content: str, call_id: str, source: int) -> str:
    """A tool result as v3 writes it: the value where the text is JSON, else the text."""
    value: object = {}
    if content:
        try:
            value = json.loads(content)
        except json.JSONDecodeError:
            value = content
        except (ValueError, RecursionError) as error:
            raise RowProblem(
                "The tool result's JSON cannot be read.",
                f"v3 writes its value, and reading it ended in: {error}.",
                "Shorten the result, or delete the row.",
                source,
            ) from error
    return write_json({"content": value, "call_id": call_id}, "The tool result", source)


@lru_cache(256)
def _schema_fault(tools_json: str) -> str | None:
    from mistral_common.utils.json_utils import validate_json_schema_by_draft7

    for tool in json.loads(tools_json):
        try:
            validate_json_schema_by_draft7(tool["function"]["parameters"])
        except (ValueError, RecursionError) as error:
            return f"{tool['function']['name']}: {str(error)[:200]}."
    return None


def check_tools(tools_json: str) -> None:
    """Raises RowProblem where a tool's parameters are no JSON schema (draft 7)."""
    fault = _schema_fault(tools_json)
    if fault is not None:
        raise RowProblem(
            "A tool's parameters are no JSON schema.",
            fault,
            'Write them as {"type": "object", "properties": {...}}.',
        )
