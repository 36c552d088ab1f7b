"""One row of a dataset to one `Conversation`, or the reason why not.

It puts together what `columns` finds, places the images, and holds the messages to the order of
roles that every tokenizer version asks: the rules that mistral-common's finetuning validators
share, found once and named by message. What single versions ask beyond them is in `rules`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from types import MappingProxyType

from engine.chat.columns import Columns
from engine.chat.conversation import (
    Conversation,
    Image,
    Message,
    Note,
    Part,
    Role,
    RowFormat,
    RowProblem,
    Text,
    Think,
    describe,
)
from engine.chat.image_values import PLACEHOLDER, looks_like_image, read_image
from engine.chat.markers import read_markers
from engine.chat.tools import read_system, read_tools
from engine.chat.written import parse_json
from engine.units import counted

_IMAGE_COLUMNS = ("images", "image")
# In tables: names that hold an image in some datasets and a text about one in others.
_PERHAPS_IMAGE_COLUMNS = (
    "image_id",
    "image_path",
    "image_url",
    "img",
    "picture",
    "file_name",
    "imgname",
)
_PERHAPS_IMAGES = frozenset(_PERHAPS_IMAGE_COLUMNS)
_PLACEHOLDER_TEXT = "<image>"
_NEXT: Mapping[Role, tuple[Role, ...]] = MappingProxyType(
    {
        "system": ("user", "assistant", "system"),
        "user": ("assistant", "system", "user"),
        "assistant": ("assistant", "user", "tool"),
        "tool": ("assistant", "tool", "user"),
    }
)


def read_row(row: Mapping[str, object], row_format: RowFormat) -> Conversation:
    """The conversation in a row, up to its last assistant message.

    Raises RowProblem, and nothing else, whatever JSON the row holds.
    """
    columns = Columns(row, row_format)
    columns.refuse_judged()
    messages, tools, marked = read_markers(
        *_read_messages(columns, row_format), row_format.dataset, read_tools
    )
    kept, trimmed = trim(messages)
    kept = _learn_last(kept, columns)
    notes = [*columns.reader.notes, *columns.notes, *marked]
    notes += [*([trimmed] if trimmed else ()), *check_order(kept)]
    effort = _read_effort(columns, row_format)
    if effort == "none":
        text = "The assistant thinks although reasoning_effort is none."
        thinking = [message.source for message in kept if _thinks(message)]
        notes += [Note("effort_contradicts_thinking", text, at) for at in thinking[:1]]
    notes += _images_left_out(kept, row, row_format)
    unread = columns.unread(messages)
    return Conversation(tuple(kept), tools, effort, tuple(notes), unread)


def _read_messages(
    columns: Columns, row_format: RowFormat
) -> tuple[Sequence[Message], tuple[dict[str, object], ...]]:
    listed = columns.find_list()
    read = None if listed is None else columns.answer_beside(columns.read_list(listed))
    messages = columns.read_tree() if read is None else read
    column, images = _find_images(columns.row, row_format, table=messages is None)
    columns.used.add(column)
    if messages is None:
        messages = columns.read_table(shows_image=bool(images))
    placed = _place_images(messages, images, column)
    tools = read_tools(columns.take("field_tools"), columns.notes)
    return _put_system(placed, tools, columns)


def _put_system(
    messages: Sequence[Message], tools: tuple[dict[str, object], ...], columns: Columns
) -> tuple[Sequence[Message], tuple[dict[str, object], ...]]:
    """The messages after the system prompt of a column, unless they begin with one."""
    column = columns.column("field_system")
    if column is None or not columns.row[column] or (messages and messages[0].role == "system"):
        return messages, tools
    columns.used.add(column)
    system = columns.row[column]
    if not isinstance(system, str):
        raise RowProblem(
            "The row's system prompt is not text.",
            f"Its `{column}` is {describe(system)}.",
            "Write it as a string.",
        )
    system, listed = read_system(system)
    if listed and not tools:
        tools = read_tools(listed)
    return [Message("system", system), *messages], tools


def _learn_last(messages: Sequence[Message], columns: Columns) -> Sequence[Message]:
    """The messages, under only_last with nothing learned before the last answer."""
    column = columns.named(["onlylast"])
    if column is None:
        return messages
    columns.used.add(column)
    if not columns.row[column]:
        return messages
    columns.note("only_last", "only_last: nothing but the last answer of the row is learned.")
    last = len(messages)
    while last and messages[last - 1].role == "assistant":
        last -= 1
    before = (replace(m, learn=m.role != "assistant" and m.learn) for m in messages[:last])
    return [*before, *messages[last:]]


def _find_images(
    row: Mapping[str, object], row_format: RowFormat, table: bool
) -> tuple[str, tuple[Image, ...]]:
    """The column that holds the row's images, and these; "" and none where there is none."""
    chosen = row_format.dataset.field_image
    for column in (chosen,) if chosen is not None else _IMAGE_COLUMNS:
        if row.get(column):
            return column, _read_images(row[column], column)
    if table and chosen is None:
        for column in _PERHAPS_IMAGE_COLUMNS:
            if looks_like_image(row.get(column)):
                return column, _read_images(row[column], column)
    return "", ()


def _images_left_out(
    messages: Sequence[Message], row: Mapping[str, object], row_format: RowFormat
) -> Sequence[Note]:
    """A note where a column seems to hold an image and no message shows one."""
    if _PERHAPS_IMAGES.isdisjoint(row):
        return ()
    column = next((c for c in _PERHAPS_IMAGE_COLUMNS if looks_like_image(row.get(c))), None)
    chosen = row_format.dataset.field_image is not None
    if chosen or column is None or any(message.holds(Image) for message in messages):
        return ()
    text = f"No message shows the image in {column}; field_image: {column} would put it there."
    return (Note("image_left_out", text),)


def _read_effort(columns: Columns, row_format: RowFormat) -> str | None:
    columns.used.add("reasoning_effort")
    effort = columns.row.get("reasoning_effort")
    if effort is None:
        return (row_format.dataset.chat_template_kwargs or {}).get("reasoning_effort")
    if isinstance(effort, str):
        return effort
    raise RowProblem(
        "The row's reasoning_effort is not a word.",
        f"It is {describe(effort)}.",
        "Write none or high, or delete the column.",
    )


def _thinks(message: Message) -> bool:
    return message.role == "assistant" and message.holds(Think)


def _read_images(value: object, column: str) -> tuple[Image, ...]:
    """The images of a column: one, a list of them, or the JSON text of a list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value, column)
    several = value if isinstance(value, list | tuple) else [value]
    return tuple(read_image(each) for each in several)


def _place_images(
    messages: Sequence[Message], images: Sequence[Image], column: str
) -> Sequence[Message]:
    """The messages with the images of the row's `column` in their places, in order.

    A place is a chunk {"type": "image"} or, where there is a column, `<image>` in a text of the
    user; without any the images come before the first text of the user.
    """
    if not images and all(isinstance(message.content, str) for message in messages):
        return messages
    written = [_mark_places(message) if images else message for message in messages]
    places = sum(part == PLACEHOLDER for message in written for part in message.parts)
    if not images and not places:
        return messages
    if images and not places:
        return _put_first(written, images, column)
    if places != len(images):
        raise RowProblem(
            f"The row has {counted(len(images), 'image')} and {counted(places, 'place')} for them.",
            f'A place is {{"type": "image"}} or {_PLACEHOLDER_TEXT}.',
            "Make the numbers equal, or leave the places out: images then come first.",
        )
    left = iter(images)
    return [
        replace(m, content=tuple(next(left) if p == PLACEHOLDER else p for p in m.parts))
        if PLACEHOLDER in m.parts
        else m
        for m in written
    ]


def _mark_places(message: Message) -> Message:
    """`<image>` in the texts of a user message as placeholders; the line ends around it go."""
    if message.role != "user":
        return message
    parts: list[Part] = []
    for part in message.parts:
        if not isinstance(part, Text) or _PLACEHOLDER_TEXT not in part.text:
            parts.append(part)
            continue
        pieces = part.text.split(_PLACEHOLDER_TEXT)
        for index, piece in enumerate(pieces):
            if index:
                parts.append(PLACEHOLDER)
                piece = piece.removeprefix("\n")
            text = piece.removesuffix("\n") if index + 1 < len(pieces) else piece
            if text:
                parts.append(Text(text))
    return replace(message, content=tuple(parts)) if PLACEHOLDER in parts else message


def _put_first(
    messages: Sequence[Message], images: Sequence[Image], column: str
) -> Sequence[Message]:
    if any(message.holds(Image) for message in messages):
        raise RowProblem(
            "The row gives images twice.",
            f"Its messages hold images of their own, and so does the column {column}.",
            "Keep one of them, or name another column in field_image.",
        )
    for index, message in enumerate(messages):
        if message.role == "user":
            shown = replace(message, content=(*images, *(message.parts if message.content else ())))
            return [*messages[:index], shown, *messages[index + 1 :]]
    raise RowProblem(
        "The row has images and no user message.",
        f"They are in the column {column}, and only a user shows images.",
        "Add the question that they belong to.",
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
        raise messages[0].problem(
            "The row is one assistant message.",
            "A conversation starts with a user or a system message.",
            "Add the question that this answers.",
        )
    _check_roles(messages)
    _check_answers(messages)
    for role, group in groupby(messages, lambda message: message.role):
        if role == "assistant":
            turn = list(group)
            _check_turn(turn)
            if all(map(_is_blank, turn)):
                text = "The answer is blank: the model learns to say nothing."
                yield Note("blank_answer", text, turn[-1].source)


def _check_roles(messages: Sequence[Message]) -> None:
    for before, message in pairwise(messages):
        if message.role not in _NEXT[before.role]:
            raise message.problem(
                f"After the {before.role} message comes a {message.role} message.",
                f"Only {' or '.join(_NEXT[before.role])} may follow {before.role}.",
                "A tool result comes right after the assistant message that calls it."
                if message.role == "tool"
                else "Put the messages in that order, or delete this one.",
            )


def _check_answers(messages: Sequence[Message]) -> None:
    first = messages[0]
    if first.role == "tool" or first.tool_calls:
        raise first.problem(
            f"The row starts with a tool {'result' if first.role == 'tool' else 'call'}.",
            "Nobody asked for it: mistral-common pairs no call or result in the first message.",
            "Put the user's question, and the call, before it.",
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
    raise message.problem(
        "A tool result answers no call.",
        "There are more tool messages than calls before this message.",
        "Delete the extra result, or add the call to the assistant message before it.",
    )


def _check_turn(turn: Sequence[Message]) -> None:
    """Messages of the assistant in a row: they are rendered as one."""
    last = turn[-1]
    if not any(message.tool_calls or not message.is_silent for message in turn):
        raise last.problem(
            "The assistant message is empty.",
            "It has neither text nor tool calls.",
            "Write the answer, or delete the message.",
        )
    if any(message.learn != last.learn for message in turn):
        raise last.problem(
            "Assistant messages in a row disagree on what is learned.",
            "They are rendered as one message, which is learned or is not.",
            "Give them the same weight, or put a user message between them.",
        )
    open_thinking: Message | None = None
    for message in turn:
        if open_thinking is None and isinstance(message.content, str):
            continue
        for part in message.parts:
            if open_thinking is not None and (not isinstance(part, Text) or part.text):
                raise open_thinking.problem(
                    "Unclosed thinking is followed by more.",
                    "Nothing would mark where the thinking ends and the answer begins.",
                    "Delete `closed: false`, or cut the message after the thinking.",
                )
            if isinstance(part, Think) and not part.closed:
                open_thinking = message


def _is_blank(message: Message) -> bool:
    content = message.content
    return isinstance(content, str) and not content.strip() and not message.tool_calls
