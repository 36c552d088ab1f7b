"""How one dataset spells its rows: the config's keys, turned into lookups once.

Made before the first row is read, so that a misspelt key in the config is an error by then.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeAlias

from engine.chat.messages.conversation import Role
from engine.config import DatasetConfig
from engine.errors import UserError

# "call" is an assistant message whose content is the call itself, as ShareGPT writes it.
Speaker: TypeAlias = Role | Literal["call"]

_ROLES: Mapping[str, Speaker] = MappingProxyType(
    {
        "system": "system",
        "developer": "system",
        "user": "user",
        "human": "user",
        "assistant": "assistant",
        "gpt": "assistant",
        "model": "assistant",
        "bot": "assistant",
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
_PROPERTIES = (
    *("role", "content", "tool_calls", "tool_call_id", "name", "weight"),
    *THINKING_PROPERTIES,
)
DEFAULT_FIELD_MESSAGES = "messages"
DEFAULT_FIELD_TOOLS = "tools"


@dataclass(frozen=True, slots=True)
class RowFormat:
    """Where a row keeps what, and what its roles are called."""

    field_messages: str = DEFAULT_FIELD_MESSAGES
    field_tools: str = DEFAULT_FIELD_TOOLS
    message_property_mappings: Mapping[str, str] = field(default_factory=dict)
    """Our property -> the key in a message."""
    roles: Mapping[str, Speaker] = field(default_factory=lambda: _ROLES)
    """The row's name of a role -> ours."""
    message_field_training: str | None = None
    reasoning_effort: str | None = None
    """The effort of rows that name none."""
    field_image: str | None = None
    field_question: str | None = None
    field_answer: str | None = None

    @classmethod
    def from_config(
        cls, dataset: DatasetConfig, chat_template_kwargs: Mapping[str, object] | None = None
    ) -> "RowFormat":
        """The format that a dataset's entry in the config describes.

        `chat_template_kwargs` are the run's own; the entry's win over them.

        Raises UserError for a property or role that does not exist.
        """
        mappings = dict(dataset.message_property_mappings or {})
        for name in mappings:
            if name not in _PROPERTIES:
                raise UserError(
                    f"message_property_mappings has the key {name!r}.",
                    f"The properties of a message are {', '.join(_PROPERTIES)}.",
                    "Write it as property: the key that your messages use.",
                )
        return cls(
            field_messages=dataset.field_messages,
            field_tools=dataset.field_tools,
            message_property_mappings=mappings,
            roles=_read_roles(dataset.roles or {}),
            message_field_training=dataset.message_field_training,
            field_image=dataset.field_image,
            field_question=dataset.field_question,
            field_answer=dataset.field_answer,
            reasoning_effort=_read_effort(
                {**(chat_template_kwargs or {}), **(dataset.chat_template_kwargs or {})}
            ),
        )


def _read_roles(roles: Mapping[str, list[str]]) -> Mapping[str, Speaker]:
    names = dict(_ROLES)
    for ours, theirs in roles.items():
        if ours not in _OUR_ROLES:
            raise UserError(
                f"roles has the key {ours!r}.",
                f"Mistral's roles are {', '.join(_OUR_ROLES)}.",
                "Put one of them on the left and the names that your rows use on the right.",
            )
        names.update(dict.fromkeys(theirs, _OUR_ROLES[ours]))
    return names


def _read_effort(chat_template_kwargs: Mapping[str, object]) -> str | None:
    effort = chat_template_kwargs.get("reasoning_effort")
    if effort is None or isinstance(effort, str):
        return effort
    raise UserError(
        f"chat_template_kwargs has reasoning_effort: {effort!r}.",
        "It is a word, such as none or high.",
        "Put quotes around the word.",
    )
