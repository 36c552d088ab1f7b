"""One row of a dataset to one `Conversation`.

It decides where a row keeps its messages: in a list, in a JSON string, or in columns such as
question, answer and image. What a message says is for `message`, in which order for `order`.
"""

from collections.abc import Mapping, Sequence

from engine.chat.messages.content import parse_json
from engine.chat.messages.conversation import (
    Conversation,
    Image,
    Message,
    Note,
    RowProblem,
    Think,
    describe,
)
from engine.chat.messages.image import looks_like_image
from engine.chat.messages.image_column import place_images, read_images
from engine.chat.messages.message import MessageReader, describe_keys
from engine.chat.messages.order import check_order, trim
from engine.chat.messages.row_format import DEFAULT_FIELD_MESSAGES, RowFormat
from engine.chat.messages.tools import read_tools

_OTHER_FIELDS = ("conversations", "conversation")
_QUESTION_AND_ANSWER = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
)
_CAPTIONS = ("caption", "text")
_IMAGE_COLUMNS = ("images", "image")
# In tables: names that hold an image in some datasets and a text about one in others.
_PERHAPS_IMAGE_COLUMNS = ("image_id", "image_path", "image_url", "img", "picture", "file_name")


def read_row(row: Mapping[str, object], row_format: RowFormat) -> Conversation:
    """The conversation in a row, up to its last assistant message.

    Raises RowProblem, and nothing else, whatever JSON the row holds.
    """
    reader = MessageReader(row_format)
    kept, trimmed = trim(_read_messages(row, row_format, reader))
    notes = [*reader.notes, *([trimmed] if trimmed else ()), *check_order(kept)]
    effort = _read_effort(row, row_format)
    if effort == "none":
        text = "The assistant thinks although reasoning_effort is none."
        thinking = [message.source for message in kept if _thinks(message)]
        notes += [Note("effort_contradicts_thinking", text, at) for at in thinking[:1]]
    notes += _images_left_out(kept, row, row_format)
    tools = read_tools(row.get(row_format.field_tools))
    return Conversation(tuple(kept), tools, effort, tuple(notes))


def _read_messages(
    row: Mapping[str, object], row_format: RowFormat, reader: MessageReader
) -> Sequence[Message]:
    listed = _find_list(row, row_format)
    column, images = _find_images(row, row_format, table=listed is None)
    if listed is None:
        messages = _read_columns(row, row_format, shows_image=bool(images))
    else:
        messages = [reader.read(message, index) for index, message in enumerate(listed)]
    messages = place_images(messages, images, column)
    system = row.get("system")
    if not system or (messages and messages[0].role == "system"):
        return messages
    if not isinstance(system, str):
        raise RowProblem(
            "The row's system prompt is not text.",
            f"Its `system` is {describe(system)}.",
            "Write it as a string.",
        )
    return [Message("system", system), *messages]


def _find_list(row: Mapping[str, object], row_format: RowFormat) -> Sequence[object] | None:
    field = row_format.field_messages
    others = _OTHER_FIELDS if field == DEFAULT_FIELD_MESSAGES else ()
    for name in (field, *others):
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            value = parse_json(value, name, None)
        if isinstance(value, list | tuple):
            return value
        if value is not None:
            raise RowProblem(
                "The messages are not a list.",
                f"{name} is {describe(value)}.",
                'Write them as [{"role": "user", "content": "..."}, ...].',
            )
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list | tuple) and isinstance(completion, list | tuple):
        return [*prompt, *completion]
    return None


def _find_images(
    row: Mapping[str, object], row_format: RowFormat, table: bool
) -> tuple[str, tuple[Image, ...]]:
    """The column that holds the row's images, and these; "" and none where there is none."""
    chosen = row_format.field_image
    for column in (chosen,) if chosen is not None else _IMAGE_COLUMNS:
        if row.get(column):
            return column, read_images(row[column], column)
    if table and chosen is None:
        for column in _PERHAPS_IMAGE_COLUMNS:
            if looks_like_image(row.get(column)):
                return column, read_images(row[column], column)
    return "", ()


def _images_left_out(
    messages: Sequence[Message], row: Mapping[str, object], row_format: RowFormat
) -> Sequence[Note]:
    """A note where a column seems to hold an image and no message shows one."""
    if row_format.field_image is not None:
        return ()
    parts = (part for m in messages if not isinstance(m.content, str) for part in m.content)
    column = next((c for c in _PERHAPS_IMAGE_COLUMNS if looks_like_image(row.get(c))), None)
    if column is None or any(isinstance(part, Image) for part in parts):
        return ()
    text = f"No message shows the image in {column}; field_image: {column} would put it there."
    return (Note("image_left_out", text),)


def _read_columns(
    row: Mapping[str, object], row_format: RowFormat, shows_image: bool
) -> Sequence[Message]:
    question, answer = _find_columns(row, row_format, shows_image)
    columns = (question, "input", answer) if question == "instruction" else (question, answer)
    texts = []
    for column in columns:
        value = row.get(column, "") if column in ("input", "") else row[column]
        if value is not None and not isinstance(value, str):
            raise RowProblem(
                f"The column {column} is not text.",
                f"It is {describe(value)}.",
                "Write it as a string.",
            )
        texts.append(value)
    asked = "\n\n".join(text for text in texts[:-1] if text)
    return [Message("user", asked), Message("assistant", texts[-1] or "")]


def _find_columns(
    row: Mapping[str, object], row_format: RowFormat, shows_image: bool
) -> tuple[str, str]:
    """The columns of the question, "" for an image with a caption alone, and of the answer."""
    asks, answers = row_format.field_question, row_format.field_answer
    for question, answer in _QUESTION_AND_ANSWER:
        pair = (asks or question, answers or answer)
        if all(row.get(column) is not None for column in pair):
            return pair
    if shows_image and asks is None:
        for answer in (answers,) if answers else _CAPTIONS:
            if row.get(answer) is not None:
                return "", answer
    raise RowProblem(
        "The row has no messages.",
        f"It has no {row_format.field_messages}; its columns are {describe_keys(row)}.",
        "Name the column in field_messages, or use columns such as question and answer, or name "
        "yours in field_question and field_answer.",
    )


def _read_effort(row: Mapping[str, object], row_format: RowFormat) -> str | None:
    effort = row.get("reasoning_effort")
    if effort is None:
        return row_format.reasoning_effort
    if isinstance(effort, str):
        return effort
    raise RowProblem(
        "The row's reasoning_effort is not a word.",
        f"It is {describe(effort)}.",
        "Write none or high, or delete the column.",
    )


def _thinks(message: Message) -> bool:
    if message.role != "assistant":
        return False
    if isinstance(message.content, str):
        return message.content.lstrip().startswith("<think>")
    return any(isinstance(part, Think) for part in message.content)
