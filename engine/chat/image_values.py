"""An image as rows spell it: a path, a URL, a data URL, bytes, an object with one of them.

None is opened: a path or a URL stays a name, for the data layer to look up in the folders that a
dataset may read.
"""

import base64
import binascii
import io
import re
from collections.abc import Mapping
from typing import Any, Final

from engine.chat.conversation import Image, RowProblem, describe

PLACEHOLDER: Final = Image("")
"""Stands where the next image of the row's column belongs."""
_KEYS = ("bytes", "base64", "url", "path", "image", "image_url", "image_path", "file_name")
_DATA_URL = re.compile(r"data:[^,;]*(?:;[^,;]*)*,", re.IGNORECASE)
IMAGE_ENDINGS: Final = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif"),
    *(".bmp", ".tif", ".tiff", ".avif"),
)
# Longer than any path or URL; base64 of the smallest useful image.
_NAME_CHARACTERS = 4096
_FIX = 'Write it as {"type": "image", "path": "pictures/cat.png"}, with url, or with base64.'


def read_image(value: object) -> Image:
    """One image: a path, a URL, a data URL, bytes, an object with one of them, a Pillow image.

    Raises RowProblem for anything else.
    """
    match value:
        case str():
            return Image(_read_name(value))
        case bytes() | bytearray() | memoryview():
            return Image(bytes(value))
        case Mapping():
            for key in _KEYS:
                inner = value.get(key)
                if not _is_nothing(inner):
                    if key == "base64" and isinstance(inner, str):
                        return Image(_decode(inner))
                    return read_image(inner)
    if hasattr(value, "save") and hasattr(value, "mode"):
        return Image(_encode(value))
    raise RowProblem("The image is not one.", f"It is {describe(value)}.", _FIX)


def read_image_chunk(chunk: Mapping[str, object]) -> Image:
    """The image of a content chunk; PLACEHOLDER where the chunk names none."""
    if all(_is_nothing(chunk.get(key)) for key in _KEYS):
        return PLACEHOLDER
    return read_image(chunk)


def _is_nothing(value: object) -> bool:
    return value is None or (isinstance(value, str | bytes | Mapping) and not value)


def _read_name(text: str) -> bytes | str:
    head = _DATA_URL.match(text)
    if head is not None:
        if not head.group().lower().endswith(";base64,"):
            raise RowProblem(
                "An image's data URL is not base64.", f"It begins {describe(text)}.", _FIX
            )
        return _decode(text)
    if not text.strip() or len(text) > _NAME_CHARACTERS:
        raise RowProblem(
            "The image is neither a path nor a URL.",
            f"It is a text of {len(text)} characters.",
            "If it is base64, write data:image/png;base64, in front of it."
            if text.strip()
            else _FIX,
        )
    return text


def _decode(text: str) -> bytes:
    head = _DATA_URL.match(text)
    try:
        letters = "".join((text[head.end() :] if head else text).split())
        return base64.b64decode(letters, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowProblem(
            "An image's base64 cannot be decoded.",
            f"{error}.",
            "Encode the image's file again.",
        ) from error


def _encode(picture: Any) -> bytes:
    file = io.BytesIO()
    try:
        picture.save(file, format="TIFF" if picture.mode in ("CMYK", "F") else "PNG")
    except Exception as error:  # Pillow's encoders and decoders raise some twenty types
        raise RowProblem(
            "The image of the row cannot be encoded.",
            f"{type(error).__name__}: {error}.",
            "Save it as a file and name that.",
        ) from error
    return file.getvalue()


def looks_like_image(value: object) -> bool:
    """Whether a column of any name holds an image, rather than a text or a number about one."""
    if isinstance(value, str):
        name = value.lower().partition("?")[0]
        return name.endswith(IMAGE_ENDINGS) or name.startswith("data:image/")
    if isinstance(value, Mapping):
        return any(not _is_nothing(value.get(key)) for key in ("bytes", "base64", "path", "url"))
    if isinstance(value, list | tuple):
        return bool(value) and all(map(looks_like_image, value))
    return isinstance(value, bytes) or (hasattr(value, "save") and hasattr(value, "mode"))
