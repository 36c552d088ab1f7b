"""What becomes of thinking on one tokenizer, and the reasoning effort that goes with it.

Rows spell thinking as chunks or as <think> tags; which of them are control tokens depends on the
tokenizer, so it is settled here and not when the row is read.
"""

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from engine.chat.messages import Conversation, Message, Part, RowProblem, Text, Think

if TYPE_CHECKING:
    from engine.chat.tokenizer.chat_tokenizer import ChatTokenizer

_TAG = re.compile(r"\s*<think>")
_END_TAG = "</think>"


def settle(
    conversation: Conversation,
    tokenizer: "ChatTokenizer",
    history_thinking: Literal["keep", "drop"],
) -> Conversation:
    """The conversation with thinking and effort as this tokenizer writes them.

    <think> tags at the start of an answer become thinking where the tokenizer has [THINK] and
    stay text where it has not. An effort that nothing states is "high" for a row that thinks, else
    the tokenizer's default; None where the tokenizer has no settings. Raises RowProblem for tags
    that never close and for an answer of which nothing is left.
    """
    messages = conversation.messages
    if any(map(_may_think, messages)):
        last_user = _last_user(messages) if history_thinking == "drop" else 0
        messages = tuple(
            _settle_message(message, tokenizer.thinks, index < last_user)
            if message.role == "assistant"
            else message
            for index, message in enumerate(messages)
        )
    effort = conversation.reasoning_effort
    if effort is None and tokenizer.efforts:
        thinks = "high" in tokenizer.efforts and any(map(_has_thinking, messages))
        effort = "high" if thinks else tokenizer.default_effort
    if messages is conversation.messages and effort == conversation.reasoning_effort:
        return conversation
    return replace(conversation, messages=messages, reasoning_effort=effort)


def _may_think(message: Message) -> bool:
    if message.role != "assistant":
        return False
    content = message.content
    return _TAG.match(content) is not None if isinstance(content, str) else bool(content)


def _has_thinking(message: Message) -> bool:
    return (
        message.role == "assistant"
        and not isinstance(message.content, str)
        and any(isinstance(part, Think) for part in message.content)
    )


def _last_user(messages: tuple[Message, ...]) -> int:
    return max((i for i, message in enumerate(messages) if message.role == "user"), default=0)


def _settle_message(message: Message, as_tokens: bool, drop: bool) -> Message:
    split = split_tags(message) if as_tokens or drop else None
    if split is None and not drop:
        return message
    parts = split if split is not None else message.content
    if drop and not isinstance(parts, str):
        parts = tuple(part for part in parts if isinstance(part, Text))
        if not any(part.text for part in parts) and not message.tool_calls:
            raise RowProblem(
                "Nothing is left of the assistant message.",
                "It is all thinking, and history_thinking: drop removes it.",
                "Use history_thinking: keep, or add the answer that followed.",
                message.source,
            )
    return replace(message, content=parts)


def split_tags(message: Message) -> tuple[Part, ...] | None:
    """The parts of an answer that opens with <think>...</think>, or None where it does not.

    Blanks around the tags belong to them. Empty tags, which some models write for "no thinking",
    give no thinking.
    """
    content = message.content
    first, others = (
        (content, ()) if isinstance(content, str) else (_leading_text(content), content[1:])
    )
    tag = _TAG.match(first) if first is not None else None
    if tag is None or first is None:
        return None
    thinking, end, answer = first[tag.end() :].partition(_END_TAG)
    if not end:
        raise RowProblem(
            "The assistant's <think> is never closed.",
            "Nothing marks where the thinking ends and the answer begins.",
            "Add </think> where the answer begins, or delete the row if it was cut off.",
            message.source,
        )
    thinking, answer = thinking.strip(), answer.lstrip()
    if isinstance(content, str):
        answer = answer.rstrip(" ")  # as mistral-common does to an answer that is one string
    head = (Think(thinking),) if thinking else ()
    return (*head, Text(answer), *others)


def _leading_text(parts: tuple[Part, ...]) -> str | None:
    return parts[0].text if parts and isinstance(parts[0], Text) else None
