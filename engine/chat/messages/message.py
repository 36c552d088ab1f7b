"""One message of a row, whatever its dialect, to one `Message`.

It is a class because two dialects need memory from message to message: ShareGPT's calls and
results carry no ids, so they are numbered here in the order in which they answer one another.
"""

from collections.abc import Mapping

from engine.chat.messages.content import (
    check_function_name,
    parse_json,
    read_content,
    read_thinking,
    read_tool_calls,
)
from engine.chat.messages.conversation import (
    Image,
    Message,
    Note,
    Part,
    Role,
    RowProblem,
    Text,
    Think,
    ToolCall,
    describe,
)
from engine.chat.messages.row_format import THINKING_PROPERTIES, RowFormat, Speaker

_RESULT_ROLES_WITHOUT_ID = ("observation", "function", "function_response", "tool_response")


class MessageReader:
    """Reads the messages of one row in order; `notes` collects what it repaired."""

    __slots__ = ("_format", "_keys", "_made_ids", "_thinking_keys", "_unanswered", "notes")

    def __init__(self, row_format: RowFormat) -> None:
        self._format = row_format
        self._keys = row_format.message_property_mappings
        self._thinking_keys = tuple(self._keys.get(name, name) for name in THINKING_PROPERTIES)
        self._made_ids = 0
        self._unanswered: list[str] = []
        self.notes: list[Note] = []

    def read(self, value: object, source: int) -> Message:
        """The message at index `source`. Raises RowProblem."""
        if not isinstance(value, Mapping):
            raise RowProblem(
                "The message is not an object.",
                f"It is {describe(value)}.",
                'Write it as {"role": "user", "content": "..."}.',
                source,
            )
        name, speaker = self._read_role(value, source)
        learn = self._read_learn(value, source)
        has_ids = "from" not in value and name not in _RESULT_ROLES_WITHOUT_ID
        if speaker == "assistant":
            content, calls = self._read_assistant(value, source)
            _refuse_images(content, speaker, source)
            return Message("assistant", content, calls, None, source, learn)
        if speaker == "call":
            calls = self._number(self._read_call_content(value, source), source)
            return Message("assistant", "", calls, None, source, learn)
        content = read_content(self._content(value), source)
        if speaker == "tool":
            self._check_name(value, source)
            call_id = self._read_result_id(value, source, has_ids)
            return Message(
                "tool", _no_thinking(content, speaker, source), (), call_id, source, learn
            )
        if speaker == "user":
            content = _no_thinking(content, speaker, source)
        else:
            _refuse_images(content, speaker, source)
        return Message(speaker, content, (), None, source, learn)

    def _read_role(self, message: Mapping[str, object], source: int) -> tuple[str, Speaker]:
        key = self._keys.get("role")
        if key is None:
            key = "role" if message.get("role") is not None else "from"
        name = message.get(key)
        speaker = self._format.roles.get(name) if isinstance(name, str) else None
        if speaker is None or not isinstance(name, str):
            missing = name is None
            raise RowProblem(
                "The message has no role." if missing else "The message's role is unknown.",
                f"Its keys are {describe_keys(message)}."
                if missing
                else f"It is {describe(name)}, and the known ones are "
                f"{', '.join(self._format.roles)}.",
                "Give it a role, or name the key in message_property_mappings."
                if missing
                else "Rename it, or say in the config's `roles` which role it stands for.",
                source,
            )
        return name, speaker

    def _content(self, message: Mapping[str, object]) -> object:
        key = self._keys.get("content")
        if key is None:
            key = "value" if "value" in message and "content" not in message else "content"
        return message.get(key)

    def _read_assistant(
        self, message: Mapping[str, object], source: int
    ) -> tuple[str | tuple[Part, ...], tuple[ToolCall, ...]]:
        calls = read_tool_calls(message.get(self._keys.get("tool_calls", "tool_calls")), source)
        if calls and "from" in message:
            calls = self._number(calls, source)
        elif not calls and message.get("function_call") is not None:
            calls = self._number(read_tool_calls(message["function_call"], source), source)
        value = self._content(message)
        content = "" if value is None else read_content(value, source)
        thinking = self._read_thinking_key(message, source)
        if thinking is None:
            return content, calls
        if isinstance(content, str):
            return (Think(thinking), Text(content)), calls
        if any(isinstance(part, Think) for part in content):
            raise RowProblem(
                "The message gives its thinking twice.",
                "It has a thinking chunk in its content and a key of its own for thinking.",
                "Keep one of them.",
                source,
            )
        return (Think(thinking), *content), calls

    def _read_thinking_key(self, message: Mapping[str, object], source: int) -> str | None:
        thinking = None
        for key in self._thinking_keys:
            value = message.get(key)
            if value is None:
                continue
            text = read_thinking(value, source)
            if thinking is not None and text != thinking:
                raise RowProblem(
                    "The message gives two different thinkings.",
                    f"The keys {', '.join(self._thinking_keys)} must agree.",
                    "Keep one of them.",
                    source,
                )
            thinking = text
        if thinking == "":
            self.notes.append(
                Note("empty_thinking", "The thinking is empty, and is learned as empty.", source)
            )
        return thinking

    def _read_call_content(
        self, message: Mapping[str, object], source: int
    ) -> tuple[ToolCall, ...]:
        value = self._content(message)
        if isinstance(value, str):
            value = parse_json(value, "the call", source)
        calls = read_tool_calls(value, source)
        if not calls:
            raise RowProblem(
                "The message calls no tool.",
                f"Its role is a call, and its content is {describe(value)}.",
                'Write the call as {"name": "...", "arguments": {...}}.',
                source,
            )
        return calls

    def _number(self, calls: tuple[ToolCall, ...], source: int) -> tuple[ToolCall, ...]:
        numbered = []
        for call in calls:
            if call.id is None:
                self._made_ids += 1
                # Nine letters and digits: the only form that v7 and v11 take.
                made = f"call{self._made_ids:05d}"
                call = ToolCall(call.name, call.arguments, made)
                if self._made_ids == 1:
                    text = "The calls have no ids, so they are numbered."
                    self.notes.append(Note("call_ids_made", text, source))
                self._unanswered.append(made)
            numbered.append(call)
        return tuple(numbered)

    def _read_result_id(
        self, message: Mapping[str, object], source: int, has_ids: bool
    ) -> str | None:
        call_id = message.get(self._keys.get("tool_call_id", "tool_call_id"))
        if call_id is None and not has_ids and self._unanswered:
            return self._unanswered.pop(0)
        if isinstance(call_id, str):
            return call_id
        raise RowProblem(
            "The tool result names no call.",
            f"Its tool_call_id is {describe(call_id)}.",
            "Set tool_call_id to the id of the call that it answers.",
            source,
        )

    def _check_name(self, message: Mapping[str, object], source: int) -> None:
        name = message.get(self._keys.get("name", "name"))
        if name is not None:
            check_function_name(name, source)

    def _read_learn(self, message: Mapping[str, object], source: int) -> bool:
        weight = message.get(self._keys.get("weight", "weight"))
        if weight not in (None, 0, 1):
            raise RowProblem(
                "The message's weight is neither 0 nor 1.",
                f"It is {describe(weight)}: a message is learned or it is not.",
                "Use 1 to learn it and 0 to keep it out of the loss.",
                source,
            )
        key = self._format.message_field_training
        flag = message.get(key) if key is not None else None
        if flag not in (None, 0, 1):
            raise RowProblem(
                f"The message's {key} is neither true nor false.",
                f"It is {describe(flag)}.",
                "Use true to learn the message and false to keep it out of the loss.",
                source,
            )
        return weight != 0 and flag != 0


def _no_thinking(
    content: str | tuple[Part, ...], role: Role, source: int
) -> str | tuple[Part, ...]:
    if not isinstance(content, str) and any(isinstance(part, Think) for part in content):
        raise RowProblem(
            f"A {role} message thinks.",
            "Only the assistant thinks, and the system prompt may show how.",
            "Delete the thinking chunk, or move it to an assistant message.",
            source,
        )
    return content


def _refuse_images(content: str | tuple[Part, ...], role: Role, source: int) -> None:
    if not isinstance(content, str) and any(isinstance(part, Image) for part in content):
        raise RowProblem(
            f"The {role} message has an image.",
            "Only a user and a tool show images; the models write text.",
            "Move the image to the user's message.",
            source,
        )


def describe_keys(mapping: Mapping[str, object]) -> str:
    """The first keys of a row or message, for a sentence."""
    names = [describe(name) for name in list(mapping)[:8]]
    return ", ".join(names) + (", ..." if len(mapping) > 8 else "") if names else "none"
