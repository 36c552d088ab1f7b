"""One message of a row, in every spelling: its role, text, thinking, images and tool calls.

Only what every tokenizer version needs is checked here, so that the same row gives the same parts
whatever model is chosen.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from engine.chat.conversation import (
    THINKING_NAMES,
    THINKING_PROPERTIES,
    Image,
    Message,
    Note,
    NoteId,
    Part,
    Role,
    RowFormat,
    RowProblem,
    Speaker,
    Text,
    Think,
    ToolCall,
    describe,
    plain_name,
)
from engine.chat.image_values import read_image_chunk
from engine.chat.written import load_json, parse_if_text, parse_json

_IMAGES = ("image_url", "image", "input_image", "image_path")
_AUDIO = ("input_audio", "audio_url", "audio")
_ROLE_KEYS = ("role", "from", "speaker", "is_user")
_FUNCTION_NAME = re.compile(r"^[a-zA-Z0-9_-]{1,64}$")
_CALL_FIX = 'Write it as {"id": "...", "function": {"name": "...", "arguments": {...}}}.'
_RESULT_ROLES_WITHOUT_ID = ("observation", "function", "function_response", "tool_response")


# Sets of keys; a file has a handful, unless its keys are data.
_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class _Names:
    """What the keys of a message are for; `left` those that no rule reads, by our role."""

    role: str
    content: str
    thinking: Sequence[str]
    left: Mapping[Role, Sequence[str]]


class MessageReader:
    """Reads the messages of one row in order; `notes` collects what it repaired, `unread` the keys
    that no rule read, as messages[].KEY with a value.

    A class because two dialects need memory from message to message: ShareGPT's calls and results
    carry no ids, so they are numbered here in the order in which they answer one another.
    """

    __slots__ = ("_format", "_keys", "_made_ids", "_source", "_unanswered", "notes", "unread")

    def __init__(self, row_format: RowFormat) -> None:
        self._format = row_format
        self._keys = row_format.dataset.message_property_mappings or {}
        self._made_ids = 0
        self._unanswered: list[str] = []
        self._source = -1
        self.notes: list[Note] = []
        self.unread: dict[str, object] = {}

    def read(self, value: object, source: int) -> Message:
        """The message at index `source`. Raises RowProblem with that index."""
        self._source = source
        try:
            return self._read(value)
        except RowProblem as problem:
            problem.message = source
            raise

    def _read(self, value: object) -> Message:
        if not isinstance(value, Mapping):
            raise RowProblem(
                "The message is not an object.",
                f"It is {describe(value)}.",
                'Write it as {"role": "user", "content": "..."}.',
            )
        names = self._names(value)
        name, speaker = self._read_role(value, names.role)
        learn = self._read_learn(value)
        calls: tuple[ToolCall, ...] = ()
        call_id = None
        content: str | tuple[Part, ...] = ""
        if speaker == "call":
            calls = self.number(self._read_call_content(value.get(names.content)))
        elif speaker == "assistant":
            content, calls = self._read_assistant(value, names)
        else:
            content = read_content(value.get(names.content))
        if speaker == "tool":
            if (function := self._property(value, "name")) is not None:
                check_function_name(function)
            has_ids = "from" not in value and name not in _RESULT_ROLES_WITHOUT_ID
            call_id = self._read_result_id(value, has_ids)
        role: Role = "assistant" if speaker == "call" else speaker
        _refuse_parts(content, role)
        if left := names.left[role]:
            self._leave(value, left)
        return Message(role, content, calls, call_id, self._source, learn)

    def leave(self, message: Mapping[str, object], known: Iterable[str]) -> None:
        """Remember the keys of a message that are not among the `known`, and hold something."""
        self._leave(message, message.keys() - set(known))

    def _leave(self, message: Mapping[str, object], keys: Iterable[str]) -> None:
        for key in keys:
            value = message[key]
            if value is not None and value != "" and value != [] and value != {}:
                self.unread.setdefault(f"messages[].{key}", value)

    def _find_names(self, keys: tuple[str, ...], has_role: bool) -> "_Names":
        """What each key of messages with these keys is for."""
        given = self._keys
        spelled = "role" if has_role else next((k for k in _ROLE_KEYS[1:] if k in keys), "role")
        role = given.get("role", spelled)
        others = () if "content" in keys else ("value", "text")
        usual = next((other for other in others if other in keys), "content")
        content = given.get("content", usual)
        named = {given.get(name, name) for name in THINKING_PROPERTIES}
        named.add(self._format.dataset.field_thinking or "")
        thinking = [key for key in keys if key in named or plain_name(key) in THINKING_NAMES]
        known = {given.get("weight", "weight"), self._format.dataset.message_field_training}
        left = [key for key in keys if key not in known | {role, content}]
        result = {given.get(name, name) for name in ("tool_call_id", "name")}
        call = {given.get("tool_calls", "tool_calls"), "function_call", "prefix", *thinking}
        return _Names(
            role,
            content,
            thinking,
            {
                "system": left,
                "user": left,
                "tool": [key for key in left if key not in result],
                "assistant": [key for key in left if key not in call],
            },
        )

    def _names(self, message: Mapping[str, object]) -> "_Names":
        memory, keys = self._format.names_of_keys, (tuple(message), message.get("role") is not None)
        names = memory.get(keys)
        if names is None:
            if len(memory) >= _REMEMBERED:
                memory.clear()
            names = memory[keys] = self._find_names(*keys)
        return names

    def _property(self, message: Mapping[str, object], name: str) -> object:
        return message.get(self._keys.get(name, name))

    def _read_role(self, message: Mapping[str, object], key: str) -> tuple[str, Speaker]:
        name = message.get(key)
        if key == "is_user" and isinstance(name, bool):
            name = "user" if name else "assistant"
        speaker = self._format.roles.get(name) if isinstance(name, str) else None
        if speaker is None and isinstance(name, str):
            speaker = self._format.roles.get(name.lower().replace("-", "_"))
        if speaker is not None and isinstance(name, str):
            return name, speaker
        if name is None:
            raise RowProblem(
                "The message has no role.",
                f"Its keys are {describe_keys(message)}.",
                "Give it a role, or name the key in message_property_mappings.",
            )
        raise RowProblem(
            "The message's role is unknown.",
            f"It is {describe(name)}, and the known ones are {', '.join(self._format.roles)}.",
            "Rename it, or say in the config's `roles` which role it stands for.",
        )

    def _read_assistant(
        self, message: Mapping[str, object], names: "_Names"
    ) -> tuple[str | tuple[Part, ...], tuple[ToolCall, ...]]:
        if message.get("prefix"):
            text = "`prefix: true` is not kept: the message is learned as a whole answer."
            self._note("prefix_not_kept", text)
        calls = read_tool_calls(self._property(message, "tool_calls"))
        if calls and "from" in message:
            calls = self.number(calls)
        elif not calls and message.get("function_call") is not None:
            calls = self.number(read_tool_calls(message["function_call"]))
        value = message.get(names.content)
        content = "" if value is None else read_content(value)
        thinking = self._read_thinking_key(message, names.thinking) if names.thinking else None
        if thinking is None:
            return content, calls
        if isinstance(content, str):
            return (Think(thinking), Text(content)), calls
        if any(isinstance(part, Think) for part in content):
            raise RowProblem(
                "The message gives its thinking twice.",
                "It has a thinking chunk in its content and a key of its own for thinking.",
                "Keep one of them.",
            )
        return (Think(thinking), *content), calls

    def _read_thinking_key(self, message: Mapping[str, object], keys: Sequence[str]) -> str | None:
        found = {read_thinking(message[key]) for key in keys if message.get(key) is not None}
        if len(found) > 1:
            raise RowProblem(
                "The message gives two different thinkings.",
                f"The keys {', '.join(keys)} must agree.",
                "Keep one of them.",
            )
        thinking = next(iter(found), None)
        if thinking == "":
            self._note("empty_thinking", "The thinking is empty, and is learned as empty.")
        return thinking

    def _read_call_content(self, value: object) -> tuple[ToolCall, ...]:
        if isinstance(value, str):
            value = parse_json(value, "the call")
        calls = read_tool_calls(value)
        if not calls:
            raise RowProblem(
                "The message calls no tool.",
                f"Its role is a call, and its content is {describe(value)}.",
                'Write the call as {"name": "...", "arguments": {...}}.',
            )
        return calls

    def number(self, calls: tuple[ToolCall, ...]) -> tuple[ToolCall, ...]:
        """The calls, each with an id: those without one get one that the next results take."""
        numbered = []
        for call in calls:
            if call.id is None:
                self._made_ids += 1
                # Nine letters and digits: the only form that v7 and v11 take.
                made = f"call{self._made_ids:05d}"
                call = ToolCall(call.name, call.arguments, made)
                if self._made_ids == 1:
                    self._note("call_ids_made", "The calls have no ids, so they are numbered.")
                self._unanswered.append(made)
            numbered.append(call)
        return tuple(numbered)

    def _read_result_id(self, message: Mapping[str, object], has_ids: bool) -> str | None:
        """The id of the call that a result answers; None where the row gives none."""
        call_id = self._property(message, "tool_call_id")
        if call_id is None and not has_ids and self._unanswered:
            return self._unanswered.pop(0)
        if call_id is None or isinstance(call_id, str):
            return call_id
        raise RowProblem(
            "The tool result names no call.",
            f"Its tool_call_id is {describe(call_id)}.",
            "Set tool_call_id to the id of the call that it answers.",
        )

    def _read_learn(self, message: Mapping[str, object]) -> bool:
        weight = self._property(message, "weight")
        if weight not in (None, 0, 1):
            raise RowProblem(
                "The message's weight is neither 0 nor 1.",
                f"It is {describe(weight)}: a message is learned or it is not.",
                "Use 1 to learn it and 0 to keep it out of the loss.",
            )
        key = self._format.dataset.message_field_training
        flag = message.get(key) if key is not None else None
        if flag not in (None, 0, 1):
            raise RowProblem(
                f"The message's {key} is neither true nor false.",
                f"It is {describe(flag)}.",
                "Use true to learn the message and false to keep it out of the loss.",
            )
        return weight != 0 and flag != 0

    def _note(self, name: NoteId, text: str) -> None:
        self.notes.append(Note(name, text, self._source))


def _refuse_parts(content: str | tuple[Part, ...], role: Role) -> None:
    """Refuses thinking of a user or a tool, and images of the others."""
    kinds = () if isinstance(content, str) else tuple(map(type, content))
    if Think in kinds and role in ("user", "tool"):
        raise RowProblem(
            f"A {role} message thinks.",
            "Only the assistant thinks, and the system prompt may show how.",
            "Delete the thinking chunk, or move it to an assistant message.",
        )
    if Image in kinds and role in ("system", "assistant"):
        raise RowProblem(
            f"The {role} message has an image.",
            "Only a user and a tool show images; the models write text.",
            "Move the image to the user's message.",
        )


def has_role(message: Mapping[str, object]) -> bool:
    """Whether an object is a message by its keys, whatever it says."""
    return any(key in message for key in _ROLE_KEYS)


def describe_keys(mapping: Mapping[str, object]) -> str:
    """The first keys of a row or message, for a sentence."""
    names = [describe(name) for name in list(mapping)[:8]]
    return ", ".join(names) + (", ..." if len(mapping) > 8 else "") if names else "none"


def read_content(value: object) -> str | tuple[Part, ...]:
    """A message's content: text as it is, a list of chunks as parts.

    Raises RowProblem for anything else, and for sound.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return tuple(_read_chunk(chunk) for chunk in value)
    raise RowProblem(
        "The message has no content." if value is None else "The content is not text.",
        f"Its content is {describe(value)}, and it must be a string or a list of chunks.",
        "Give the message a text, or delete it; an empty string is allowed.",
    )


def _read_chunk(chunk: object) -> Part:
    fields = chunk if isinstance(chunk, Mapping) else {}
    kind = fields.get("type")
    if kind == "text":
        return Text(_read_text(fields.get("text"), "text"))
    if kind == "thinking":
        closed = fields.get("closed")
        if closed is not None and not isinstance(closed, bool):
            raise RowProblem(
                "A thinking chunk has an odd `closed`.",
                f"It is {describe(closed)}, and it must be true or false.",
                "Delete the key: thinking is closed unless it was cut off.",
            )
        return Think(read_thinking(fields.get("thinking")), closed is not False)
    if kind in _IMAGES:
        return read_image_chunk(fields)
    if isinstance(kind, str) and kind in _AUDIO:
        raise RowProblem(
            "The message has sound.",
            "Only text and images are read.",
            "Leave such rows out of this dataset.",
        )
    raise RowProblem(
        "A chunk of the content is unknown.",
        "It has no type." if kind is None else f"Its type is {describe(kind)}.",
        'Use {"type": "text", "text": "..."}, {"type": "image", "path": "..."} or '
        '{"type": "thinking", "thinking": "..."}.',
    )


def _read_text(value: object, key: str) -> str:
    if isinstance(value, str):
        return value
    raise RowProblem(
        f"A chunk of the content has no {key}.",
        f"Its {key} is {describe(value)}, and it must be a string.",
        f"Give the chunk a string in {key}, or delete it.",
    )


def read_thinking(value: object) -> str:
    """Thinking as a string, or as the list of text chunks that Mistral's API returns."""
    if not isinstance(value, list | tuple):
        return _read_text(value, "thinking")
    texts = []
    for chunk in value:
        inner = chunk.get("text") if isinstance(chunk, Mapping) else chunk
        texts.append(_read_text(inner, "thinking"))
    return "".join(texts)


def read_tool_calls(value: object) -> tuple[ToolCall, ...]:
    """The calls of an assistant message: a list, a JSON string of one, or a single call."""
    value = parse_if_text(value, "tool_calls")
    if value is None:
        return ()
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise RowProblem(
            "The tool calls are not a list.",
            f"tool_calls is {describe(value)}.",
            _CALL_FIX,
        )
    return tuple(_read_call(call) for call in value)


def looks_like_calls(value: object) -> bool:
    """Whether a column of answers holds calls, as the list or its JSON text, and no sentences."""
    if isinstance(value, str) and value.lstrip().startswith('[{"name"'):
        value = parse_json(value, "the calls")
    listed = value if isinstance(value, list | tuple) else ()
    return bool(listed) and all(
        isinstance(call, Mapping) and {"name", "arguments"} <= call.keys() for call in listed
    )


def _read_call(value: object) -> ToolCall:
    call = parse_if_text(value, "a tool call")
    if not isinstance(call, Mapping):
        raise RowProblem("A tool call is not an object.", f"It is {describe(call)}.", _CALL_FIX)
    kind, call_id = call.get("type"), call.get("id")
    if kind not in (None, "function"):
        raise RowProblem(
            "A tool call is not a function call.",
            f"Its type is {describe(kind)}, and the models know only functions.",
            _CALL_FIX,
        )
    if call_id is not None and not isinstance(call_id, str):
        raise RowProblem(
            "A tool call's id is not text.",
            f"It is {describe(call_id)}.",
            "Write the id as a string, the same in the call and in its result.",
        )
    function = call.get("function") or call
    if not isinstance(function, Mapping):
        raise RowProblem(
            "A tool call names no function.", f"It is {describe(function)}.", _CALL_FIX
        )
    name = check_function_name(function.get("name"))
    arguments = _read_arguments(function.get("arguments"))
    return ToolCall(name, arguments, None if call_id == "null" else call_id)


def check_function_name(name: object) -> str:
    """The name of a function, as mistral-common allows it in calls, results and definitions."""
    if isinstance(name, str) and _FUNCTION_NAME.match(name):
        return name
    raise RowProblem(
        "A function has no name." if name is None else "A function's name is not allowed.",
        f"It is {describe(name)}.",
        "Use 1 to 64 letters, digits, underscores and dashes.",
    )


def _read_arguments(value: object) -> object:
    if value is None or value == "":
        return {}
    if isinstance(value, Mapping):
        return value
    why, arguments = f"They are {describe(value)}.", None
    if isinstance(value, str):
        try:
            arguments = load_json(value)
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
    )
