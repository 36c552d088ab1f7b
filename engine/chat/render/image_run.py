"""What both renderers do with an image: its grid, and its place in a message of the user.

Separate because `fast` and `exact` share nothing else but the conversation.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.chat.images import grid, read_size
from engine.chat.messages import Image, Part, RowProblem, Text
from engine.chat.render.kinds import RenderedImage

if TYPE_CHECKING:
    from engine.chat.tokenizer.chat_tokenizer import ChatTokenizer


def measure(image: Image, tokenizer: "ChatTokenizer", source: int) -> RenderedImage:
    """The image with its grid. Raises RowProblem where it was not looked up or is no image."""
    if isinstance(image.content, str):
        raise RowProblem(
            "The image was not looked up.",
            f"It is only named: {image.content[:100]}.",
            "Prepare the dataset from its file, so that the image is read from its folder.",
            source,
        )
    assert tokenizer.image is not None
    width, height = image.size or read_size(image.content)
    return RenderedImage(image.content, *grid(width, height, tokenizer.image))


def image_first(parts: Sequence[Part]) -> Sequence[Part]:
    """An image that ends a message of texts comes first, as in mistral-common's encoders."""
    if (
        len(parts) > 1
        and isinstance(parts[-1], Image)
        and all(isinstance(part, Text) for part in parts[:-1])
    ):
        return [parts[-1], *parts[:-1]]
    return parts
