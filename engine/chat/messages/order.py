"""The order of roles that every tokenizer version asks of a conversation to learn from.

These are the rules that mistral-common's finetuning validators share, found once and named by
message; what single versions ask beyond them is in `engine.chat.render.rules`.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from types import MappingProxyType

from engine.chat.messages.conversation import Message, Note, Role, RowProblem, Text, Think

_NEXT: Mapping[Role, tuple[Role, ...]] = MappingProxyType(
    {
        "system": ("user", "assistant", "system"),
        "user": ("assistant", "system", "user"),
        "assistant": ("assistant", "user", "tool"),
        "tool": ("assistant", "tool", "user"),
    }
)


def trim(messages: Sequence[Message]) -> tuple[Sequence[Message], Note | None]:
    """The messages up to the last one of the assistant, and a note where some were left out."""
    end = len(messages)
    while end and messages[end - 1].role != "assistant":
        end -= 1
    if not end:
        raise RowProblem(
            "The row has no assistant message.",
            "There is nothing in it to learn.",
            "Add the answer that the model should give, or delete the row.",
        )
    if end == len(messages):
        return messages, None
    count = len(messages) - end
    text = (
        "The last message has no answer after it, and is left out."
        if count == 1
        else f"The last {count} messages have no answer after them, and are left out."
    )
    return messages[:end], Note("trimmed", text, messages[end].source)


def check_order(messages: Sequence[Message]) -> Iterator[Note]:
    """Yields what is worth knowing. Raises RowProblem at the first message out of order."""
    if len(messages) == 1:
        raise RowProblem(
            "The row is one assistant message.",
            "A conversation starts with a user or a system message.",
            "Add the question that this answers.",
            messages[0].source,
        )
    _check_roles(messages)
    _check_answers(messages)
    for role, group in groupby(messages, lambda message: message.role):
        if role == "assistant":
            turn = list(group)
            _check_turn(turn)
            yield from _note_blank(turn)


def _check_roles(messages: Sequence[Message]) -> None:
    for before, message in pairwise(messages):
        if message.role not in _NEXT[before.role]:
            raise RowProblem(
                f"After the {before.role} message comes a {message.role} message.",
                f"Only {' or '.join(_NEXT[before.role])} may follow {before.role}.",
                "A tool result comes right after the assistant message that calls it."
                if message.role == "tool"
                else "Put the messages in that order, or delete this one.",
                message.source,
            )


def _check_answers(messages: Sequence[Message]) -> None:
    first = messages[0]
    if first.role == "tool" or first.tool_calls:
        raise RowProblem(
            f"The row starts with a tool {'result' if first.role == 'tool' else 'call'}.",
            "Nobody asked for it: mistral-common pairs no call or result in the first message.",
            "Put the user's question, and the call, before it.",
            first.source,
        )
    unanswered = 0
    calls_at: int | None = None
    for message in messages:
        if message.role == "tool":
            unanswered -= 1
        elif message.role == "assistant":
            if unanswered:
                _refuse_count(unanswered, calls_at, message)
            unanswered, calls_at = len(message.tool_calls), message.source
    if unanswered < 0:
        _refuse_count(unanswered, calls_at, messages[-1])


def _refuse_count(unanswered: int, calls_at: int | None, message: Message) -> None:
    if unanswered > 0:
        raise RowProblem(
            "A tool call has no result.",
            f"{unanswered} of its calls are unanswered when the next assistant message comes.",
            "Add one tool message for each call, right after it.",
            calls_at,
        )
    raise RowProblem(
        "A tool result answers no call.",
        "There are more tool messages than calls before this message.",
        "Delete the extra result, or add the call to the assistant message before it.",
        message.source,
    )


def _check_turn(turn: Sequence[Message]) -> None:
    """Messages of the assistant in a row: they are rendered as one."""
    last = turn[-1]
    if not any(message.tool_calls or has_content(message) for message in turn):
        raise RowProblem(
            "The assistant message is empty.",
            "It has neither text nor tool calls.",
            "Write the answer, or delete the message.",
            last.source,
        )
    if any(message.learn != last.learn for message in turn):
        raise RowProblem(
            "Assistant messages in a row disagree on what is learned.",
            "They are rendered as one message, which is learned or is not.",
            "Give them the same weight, or put a user message between them.",
            last.source,
        )
    open_thinking: Message | None = None
    for message in turn:
        content = message.content
        for part in (Text(content),) if isinstance(content, str) else content:
            if open_thinking is not None and (not isinstance(part, Text) or part.text):
                raise RowProblem(
                    "Unclosed thinking is followed by more.",
                    "Nothing would mark where the thinking ends and the answer begins.",
                    "Delete `closed: false`, or cut the message after the thinking.",
                    open_thinking.source,
                )
            if isinstance(part, Think) and not part.closed:
                open_thinking = message


def has_content(message: Message) -> bool:
    """Whether it holds more than calls and empty texts."""
    if isinstance(message.content, str):
        return bool(message.content)
    return any(not isinstance(part, Text) or part.text for part in message.content)


def _note_blank(turn: Sequence[Message]) -> Iterator[Note]:
    only_text = all(isinstance(message.content, str) for message in turn)
    if only_text and not any(
        message.tool_calls or (isinstance(message.content, str) and message.content.strip())
        for message in turn
    ):
        text = "The answer is blank: the model learns to say nothing."
        yield Note("blank_answer", text, turn[-1].source)
