"""The one internal form of a conversation, and the error for a row that has none.

It holds what a renderer needs and nothing of how the row spelled it. `source` ties every message
to its place in the row as given.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

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
    `learn` is False where the row keeps the message out of the loss.
    """

    role: Role
    content: str | tuple[Part, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    source: int = -1
    learn: bool = True


@dataclass(frozen=True, slots=True)
class Note:
    """Something about a usable row that a person should know, such as a repair."""

    id: Literal[
        "trimmed",
        "call_ids_made",
        "effort_contradicts_thinking",
        "empty_thinking",
        "blank_answer",
        "image_left_out",
    ]
    text: str
    message: int | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row, read: it ends with an assistant message and follows Mistral's order of roles.

    `tools` are function definitions in the shape that is rendered; `reasoning_effort` is None
    where neither the row nor the config says one.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, object], ...] = ()
    reasoning_effort: str | None = None
    notes: tuple[Note, ...] = ()


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
