"""The parts of one message: its text, its thinking in every spelling, its tool calls.

Only what every tokenizer version needs is checked here, so that the same row gives the same
parts whatever model is chosen.
"""

import json
import re
from collections.abc import Mapping

from engine.chat.messages.conversation import Part, RowProblem, Text, Think, ToolCall, describe
from engine.chat.messages.image import read_image_chunk

_IMAGES = ("image_url", "image", "input_image", "image_path")
_AUDIO = ("input_audio", "audio_url", "audio")
_FUNCTION_NAME = re.compile(r"^[a-zA-Z0-9_-]{1,64}$")
_CALL_FIX = 'Write it as {"id": "...", "function": {"name": "...", "arguments": {...}}}.'


def read_content(value: object, source: int) -> str | tuple[Part, ...]:
    """A message's content: text as it is, a list of chunks as parts.

    Raises RowProblem for anything else, and for sound.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return tuple(_read_chunk(chunk, source) for chunk in value)
    raise RowProblem(
        "The message has no content." if value is None else "The content is not text.",
        f"Its content is {describe(value)}, and it must be a string or a list of chunks.",
        "Give the message a text, or delete it; an empty string is allowed.",
        source,
    )


def _read_chunk(chunk: object, source: int) -> Part:
    kind = chunk.get("type") if isinstance(chunk, Mapping) else None
    if kind == "text":
        assert isinstance(chunk, Mapping)
        return Text(_read_text(chunk.get("text"), "text", source))
    if kind == "thinking":
        assert isinstance(chunk, Mapping)
        closed = chunk.get("closed")
        if closed is not None and not isinstance(closed, bool):
            raise RowProblem(
                "A thinking chunk has an odd `closed`.",
                f"It is {describe(closed)}, and it must be true or false.",
                "Delete the key: thinking is closed unless it was cut off.",
                source,
            )
        return Think(read_thinking(chunk.get("thinking"), source), closed is not False)
    if kind in _IMAGES:
        assert isinstance(chunk, Mapping)
        return read_image_chunk(chunk, source)
    if isinstance(kind, str) and kind in _AUDIO:
        raise RowProblem(
            "The message has sound.",
            "Only text and images are read.",
            "Leave such rows out of this dataset.",
            source,
        )
    raise RowProblem(
        "A chunk of the content is unknown.",
        "It has no type." if kind is None else f"Its type is {describe(kind)}.",
        'Use {"type": "text", "text": "..."}, {"type": "image", "path": "..."} or '
        '{"type": "thinking", "thinking": "..."}.',
        source,
    )


def _read_text(value: object, key: str, source: int) -> str:
    if isinstance(value, str):
        return value
    raise RowProblem(
        f"A chunk of the content has no {key}.",
        f"Its {key} is {describe(value)}, and it must be a string.",
        f"Give the chunk a string in {key}, or delete it.",
        source,
    )


def read_thinking(value: object, source: int) -> str:
    """Thinking as a string, or as the list of text chunks that Mistral's API returns."""
    if not isinstance(value, list | tuple):
        return _read_text(value, "thinking", source)
    texts = []
    for chunk in value:
        inner = chunk.get("text") if isinstance(chunk, Mapping) else chunk
        texts.append(_read_text(inner, "thinking", source))
    return "".join(texts)


def read_tool_calls(value: object, source: int) -> tuple[ToolCall, ...]:
    """The calls of an assistant message: a list, a JSON string of one, or a single call."""
    value = parse_if_text(value, "tool_calls", source)
    if value is None:
        return ()
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise RowProblem(
            "The tool calls are not a list.",
            f"tool_calls is {describe(value)}.",
            _CALL_FIX,
            source,
        )
    return tuple(_read_call(call, source) for call in value)


def _read_call(value: object, source: int) -> ToolCall:
    call = parse_if_text(value, "a tool call", source)
    if not isinstance(call, Mapping):
        raise RowProblem(
            "A tool call is not an object.", f"It is {describe(call)}.", _CALL_FIX, source
        )
    kind, call_id = call.get("type"), call.get("id")
    if kind not in (None, "function"):
        raise RowProblem(
            "A tool call is not a function call.",
            f"Its type is {describe(kind)}, and the models know only functions.",
            _CALL_FIX,
            source,
        )
    if call_id is not None and not isinstance(call_id, str):
        raise RowProblem(
            "A tool call's id is not text.",
            f"It is {describe(call_id)}.",
            "Write the id as a string, the same in the call and in its result.",
            source,
        )
    function = call.get("function") or call
    if not isinstance(function, Mapping):
        raise RowProblem(
            "A tool call names no function.", f"It is {describe(function)}.", _CALL_FIX, source
        )
    name = check_function_name(function.get("name"), source)
    arguments = _read_arguments(function.get("arguments"), source)
    return ToolCall(name, arguments, None if call_id == "null" else call_id)


def check_function_name(name: object, source: int | None) -> str:
    """The name of a function, as mistral-common allows it in calls, results and definitions."""
    if isinstance(name, str) and _FUNCTION_NAME.match(name):
        return name
    raise RowProblem(
        "A function has no name." if name is None else "A function's name is not allowed.",
        f"It is {describe(name)}.",
        "Use 1 to 64 letters, digits, underscores and dashes.",
        source,
    )


def _read_arguments(value: object, source: int) -> object:
    if value is None or value == "":
        return {}
    if isinstance(value, Mapping):
        return value
    why, arguments = f"They are {describe(value)}.", None
    if isinstance(value, str):
        try:
            arguments = json.loads(value)
        except (ValueError, RecursionError) as error:
            why = f"{error}: {describe(value)}."
        else:
            if not isinstance(arguments, str):
                return arguments
            why = f"They are JSON inside a JSON string: {describe(value)}."
    raise RowProblem(
        "A tool call's arguments are not a JSON object.",
        why,
        'Write them as an object such as {"city": "Paris"}, or as that object in a string, once.',
        source,
    )


def parse_if_text(value: object, what: str, source: int | None) -> object:
    """A value that a column of strings holds as JSON; empty text stands for nothing."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    return parse_json(value, what, source)


def parse_json(text: str, what: str, source: int | None) -> object:
    """A column or key that holds JSON as a string. Raises RowProblem where it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowProblem(
            f"The text in {what} is not JSON.",
            f"{error}: {describe(text)}.",
            "Write valid JSON, with double quotes around keys and strings.",
            source,
        ) from error
