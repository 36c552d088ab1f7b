"""Both ends of reading a row: how a dataset spells its rows, and the one form that they become.

The form holds what a renderer needs and nothing of how the row spelled it; `source` ties every
message to its place in the row as given. A row that has no such form is a `RowProblem`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from engine.config import DatasetConfig
from engine.errors import UserError

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]


class RowProblem(UserError):
    """A row that cannot be used: what it holds, why that cannot be learned, how to repair it.

    `message` is the index of the message at fault in the row as given, or None when the fault is
    the row's.
    """

    def __init__(self, what: str, why: str, fix: str, message: int | None = None) -> None:
        super().__init__(what, why, fix)
        self.message = message


class JudgedRow(RowProblem):
    """A row that is left out because the dataset's entry says so, with nothing to repair."""


@dataclass(frozen=True, slots=True)
class Text:
    """Text inside a message that is given in parts."""

    text: str


@dataclass(frozen=True, slots=True)
class Think:
    """Reasoning; `closed` is False where it was cut off and must not be ended."""

    text: str
    closed: bool = True


@dataclass(frozen=True, slots=True)
class Image:
    """A picture: the bytes of its file, or, until it was looked up, a path or an http(s) URL.

    `size` is its (width, height) in pixels once the bytes were checked.
    """

    content: bytes | str
    size: tuple[int, int] | None = None


Part: TypeAlias = Text | Think | Image


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call; `arguments` is the parsed JSON value, `id` None where the row gives none."""

    name: str
    arguments: object
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    `source` is its index in the row as given, -1 for one made from a key of the row itself.
    `learn` is False where the row keeps the message out of the loss. `written` is the content
    before thinking was read out of its text, None where none was.
    """

    role: Role
    content: str | tuple[Part, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    source: int = -1
    learn: bool = True
    written: str | tuple[Part, ...] | None = field(default=None, compare=False)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Its content as parts, a text as one."""
        return (Text(self.content),) if isinstance(self.content, str) else self.content

    def holds(self, kind: type[Part]) -> bool:
        """Whether a part of that kind is in content that is given in parts."""
        return not isinstance(self.content, str) and any(
            isinstance(part, kind) for part in self.content
        )

    def problem(self, what: str, why: str, fix: str) -> RowProblem:
        """The error that this message is at fault for."""
        return RowProblem(what, why, fix, self.source)

    @property
    def is_silent(self) -> bool:
        """Whether it holds nothing but calls and empty texts."""
        if isinstance(self.content, str):
            return not self.content
        return not any(not isinstance(part, Text) or part.text for part in self.content)


NoteId: TypeAlias = Literal[
    "trimmed",
    "call_ids_made",
    "effort_contradicts_thinking",
    "empty_thinking",
    "blank_answer",
    "image_left_out",
    "thinking_read",
    "thinking_kept",
    "thinking_unsure",
    "markers_read",
    "markers_left",
    "answer_beside",
    "answer_chosen",
    "answer_written",
    "choices_listed",
    "context_placed",
    "only_last",
    "prefix_not_kept",
    "tools_rewritten",
    "tree_path",
    "turns_by_place",
]


@dataclass(frozen=True, slots=True)
class Note:
    """Something about a usable row that a person should know, such as a repair.

    Rows are counted by `id` and `about`, which is what the note is of: a marker.
    """

    id: NoteId
    text: str
    message: int | None = None
    about: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row, read: it ends with an assistant message and follows Mistral's order of roles.

    `tools` are function definitions in the shape that is rendered; `reasoning_effort` is None
    where neither the row nor the config says one. `unread` has the columns, and as messages[].KEY
    the keys of messages, that no rule read, with their values.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, object], ...] = ()
    reasoning_effort: str | None = None
    notes: tuple[Note, ...] = ()
    unread: Mapping[str, object] = field(default_factory=dict)


@lru_cache(4096)
def plain_name(name: str) -> str:
    """A column's or key's name without case and punctuation: Complex_CoT is complexcot."""
    return re.sub(r"[\W_]+", "", name).lower()


def describe(value: object) -> str:
    """A value from a row as a few words of a sentence."""
    match value:
        case None | bool():
            return json.dumps(value)
        case str():
            return repr(value) if len(value) <= 60 else f"{value[:57]!r}..."
        case float():
            return repr(value)
        case int():
            return repr(value) if abs(value) < 10**18 else "a huge number"
        case Mapping():
            return "an object"
        case list() | tuple():
            return "a list"
        case _:
            return f"a {type(value).__name__}"


# "call" is an assistant message whose content is the call itself, as ShareGPT writes it.
Speaker: TypeAlias = Role | Literal["call"]

_ROLES: Mapping[str, Speaker] = MappingProxyType(
    {
        "system": "system",
        "developer": "system",
        "user": "user",
        "human": "user",
        "prompter": "user",
        "assistant": "assistant",
        "gpt": "assistant",
        "model": "assistant",
        "bot": "assistant",
        "ai": "assistant",
        "chatgpt": "assistant",
        "tool": "tool",
        "function": "tool",
        "observation": "tool",
        "function_response": "tool",
        "tool_response": "tool",
        "function_call": "call",
        "tool_call": "call",
    }
)
_OUR_ROLES: Mapping[str, Role] = MappingProxyType(
    {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
)
THINKING_PROPERTIES = ("reasoning_content", "reasoning", "thinking")
THINKING_NAMES = (
    *("thinking", "think", "reasoning", "reasoningcontent", "complexcot", "cot", "chainofthought"),
    *("thought", "thoughts", "thinkingtrajectory", "thinkingtrajectories"),
)
"""Plain names of columns and keys that hold the thinking, best first."""
_PROPERTIES = (
    *("role", "content", "tool_calls", "tool_call_id", "name", "weight"),
    *THINKING_PROPERTIES,
)


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How a dataset spells its rows: its entry in the config, with its roles as a lookup."""

    dataset: DatasetConfig = field(default_factory=lambda: DatasetConfig(path="."))
    roles: Mapping[str, Speaker] = field(default_factory=lambda: _ROLES)
    """The row's name of a role -> ours."""
    nested: tuple[str, ...] = ()
    """Columns of the entry that are keys of objects, such as translation.en."""
    names_of_keys: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)
    """What the reader of messages found for those with equal keys."""

    @classmethod
    def from_config(cls, dataset: DatasetConfig) -> "RowFormat":
        """The format of an entry. Raises UserError for a property or role that does not exist."""
        for name in dataset.message_property_mappings or {}:
            if name not in _PROPERTIES:
                raise UserError(
                    f"message_property_mappings has the key {name!r}.",
                    f"The properties of a message are {', '.join(_PROPERTIES)}.",
                    "Write it as property: the key that your messages use.",
                )
        names = dict(_ROLES)
        for ours, theirs in (dataset.roles or {}).items():
            if ours not in _OUR_ROLES:
                raise UserError(
                    f"roles has the key {ours!r}.",
                    f"Mistral's roles are {', '.join(_OUR_ROLES)}.",
                    "Put one of them on the left and the names that your rows use on the right.",
                )
            names.update(dict.fromkeys(theirs, _OUR_ROLES[ours]))
        columns = (value for key, value in dataset if key.startswith("field_"))
        nested = tuple(name for name in columns if isinstance(name, str) and "." in name)
        return cls(dataset, names, nested)

    def named_columns(self) -> dict[str, str]:
        """Keys of the entry that name a column or a key of messages -> that name. Without those
        whose absence every row says."""
        dataset = self.dataset
        keys = ("tools", "system", "context", "thinking", "label", "image", "choices")
        named = {f"field_{key}": getattr(dataset, f"field_{key}") for key in keys}
        named["message_field_training"] = dataset.message_field_training
        for ours, theirs in (dataset.message_property_mappings or {}).items():
            named[f"message_property_mappings.{ours}"] = None if ours == theirs else theirs
        return {key: name for key, name in named.items() if name not in (None, "tools")}
