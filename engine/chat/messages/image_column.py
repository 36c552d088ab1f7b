"""Images in a column beside the messages, and their places among the texts.

How many there are, and where they belong, can only be said when all messages are read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from engine.chat.messages.content import parse_json
from engine.chat.messages.conversation import Image, Message, Part, RowProblem, Text
from engine.chat.messages.image import PLACEHOLDER, read_image

_PLACEHOLDER_TEXT = "<image>"


def read_images(value: object, column: str) -> tuple[Image, ...]:
    """The images of a column: one, a list of them, or the JSON text of a list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value, column, None)
    several = value if isinstance(value, list | tuple) else [value]
    return tuple(read_image(each, None) for each in several)


def place_images(
    messages: Sequence[Message], images: Sequence[Image], column: str
) -> Sequence[Message]:
    """The messages with the images of the row's `column` in their places, in order.

    A place is a chunk {"type": "image"} or, where there is a column, `<image>` in a text of the
    user; without any the images come before the first text of the user.
    """
    written = [_mark_places(message) if images else message for message in messages]
    places = sum(part == PLACEHOLDER for message in written for part in _parts(message))
    if not images and not places:
        return messages
    if images and not places:
        return _put_first(written, images, column)
    if places != len(images):
        raise RowProblem(
            f"The row has {len(images)} images and {places} places for them.",
            f'A place is {{"type": "image"}} or {_PLACEHOLDER_TEXT}.',
            "Make the numbers equal, or leave the places out: images then come first.",
        )
    left = iter(images)
    return [_fill(message, left) for message in written]


def _parts(message: Message) -> tuple[Part, ...]:
    return () if isinstance(message.content, str) else message.content


def _fill(message: Message, left: Iterator[Image]) -> Message:
    parts = _parts(message)
    if PLACEHOLDER not in parts:
        return message
    return replace(
        message, content=tuple(next(left) if part == PLACEHOLDER else part for part in parts)
    )


def _mark_places(message: Message) -> Message:
    """`<image>` in the texts of a user message as placeholders; the line ends around it go."""
    if message.role != "user":
        return message
    content = message.content
    parts: list[Part] = []
    for part in (Text(content),) if isinstance(content, str) else content:
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
    if any(isinstance(part, Image) for message in messages for part in _parts(message)):
        raise RowProblem(
            "The row gives images twice.",
            f"Its messages hold images of their own, and so does the column {column}.",
            "Keep one of them, or name another column in field_image.",
        )
    for index, message in enumerate(messages):
        if message.role == "user":
            content = message.content
            text = content if not isinstance(content, str) else (Text(content),) if content else ()
            shown = replace(message, content=(*images, *text))
            return [*messages[:index], shown, *messages[index + 1 :]]
    raise RowProblem(
        "The row has images and no user message.",
        f"They are in the column {column}, and only a user shows images.",
        "Add the question that they belong to.",
    )
