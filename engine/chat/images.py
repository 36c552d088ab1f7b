"""What an image is to a Mistral model: a grid of tokens, and the pixels behind it.

Both come from here, so that they always agree: the grid by mistral-common's formula, the pixels
resized to exactly that grid, where transformers' own processor would round another way. Only numpy
and Pillow are needed, and Pillow is imported when the first image is opened.
"""

import io
import warnings
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engine.chat.conversation import RowProblem
from engine.visible import first_line

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling

ImageBytes: TypeAlias = bytes | memoryview
Resample: TypeAlias = Literal["bilinear", "bicubic", "lanczos"]

IMAGE_LIMIT_BYTES = 20_000_000
# A quarter of a GiB as RGB: where Pillow, too, starts to suspect a decompression bomb.
IMAGE_LIMIT_PIXELS = 2**30 // 4 // 3
# Decoders that read nothing but the file: EPS, for one, would start a program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_NAMED_FORMATS = "JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF"
# CLIP's, as in mistral_common.tokens.tokenizers.image: DATASET_MEAN and DATASET_STD.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """How a model cuts images: pixels of a patch and of the longest side, patches merged a side.

    `resample` is how an image is brought to its grid.
    """

    patch: int
    longest: int
    merge: int
    resample: Resample = "bicubic"

    @property
    def side(self) -> int:
        """Pixels of an image token's side."""
        return self.patch * self.merge


def grid(width: int, height: int, spec: ImageSpec) -> tuple[int, int]:
    """(rows, columns) of the image tokens of an image of that many pixels.

    As mistral-common's `ImageEncoder._image_to_num_tokens`, which rounds where transformers'
    Pixtral processor floors.
    """
    ratio = max(height / spec.longest, width / spec.longest)
    if ratio > 1:
        # An extreme aspect ratio would otherwise round the shorter side to no pixel.
        width, height = max(round(width / ratio), 1), max(round(height / ratio), 1)
    return (height - 1) // spec.side + 1, (width - 1) // spec.side + 1


def read_size(content: ImageBytes) -> tuple[int, int]:
    """(width, height) in pixels, from the file's header; an EXIF rotation is not applied.

    Raises RowProblem where the bytes are no image that we read, are more than 20 MB, or hold more
    pixels than `IMAGE_LIMIT_PIXELS`.
    """
    with _open(content) as image:
        return image.size


def check_image(content: ImageBytes) -> tuple[int, int]:
    """As `read_size`, and raises RowProblem too where the file cannot be decoded to its end."""
    with _open(content) as image:
        size = image.size
        # A JPEG is read whole and decoded at an eighth of its size.
        image.draft(None, (1, 1))
        try:
            image.load()
        except Exception as error:  # Pillow's decoders raise some twenty types
            raise _undecodable(error) from error
    return size


def pixels(content: ImageBytes, rows: int, columns: int, spec: ImageSpec) -> NDArray[np.float32]:
    """The image as the vision tower takes it, float32 [3, rows * side, columns * side].

    RGB, transparency on white, normalized with the mean and deviation of CLIP as mistral-common
    does. Raises what `check_image` raises.
    """
    with _open(content) as image:
        try:
            rgb = _to_rgb(image)
        except Exception as error:  # as above
            raise _undecodable(error) from error
    size = (columns * spec.side, rows * spec.side)
    if rgb.size != size:
        rgb = rgb.resize(size, _resampling(spec.resample))
    values = np.asarray(rgb)
    table = _normalized()
    found = np.empty((3, size[1], size[0]), np.float32)
    for channel in range(3):
        np.take(table[channel], values[:, :, channel], out=found[channel])
    return found


@lru_cache
def _normalized() -> NDArray[np.float32]:
    """The normalized value of each byte of each channel, float32 [3, 256]."""
    values = np.arange(256, dtype=np.float32) / np.float32(255)
    mean, deviation = (np.array(each, np.float32)[:, None] for each in (_MEAN, _DEVIATION))
    return ((values - mean) / deviation).astype(np.float32)


@cache
def _resampling(name: Resample) -> "Resampling":
    from PIL.Image import Resampling

    return Resampling[name.upper()]


@cache
def _silence_pillow() -> None:
    from PIL import Image

    # The limit of pixels is checked here, in sentences.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def _open(content: ImageBytes) -> "Image":
    from PIL import Image

    _silence_pillow()
    if len(content) > IMAGE_LIMIT_BYTES:
        raise RowProblem(
            "The image has too many bytes.",
            f"It has {len(content) / 1e6:.1f} MB, and at most {IMAGE_LIMIT_BYTES // 10**6} MB are"
            " read.",
            "Save it smaller; a model sees no more than some 1,500 pixels a side.",
        )
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_many_pixels("far more") from error
    except Exception as error:  # as above
        raise _no_image(content) from error
    width, height = image.size
    if width * height > IMAGE_LIMIT_PIXELS:
        raise _too_many_pixels(f"{width} x {height}")
    if not width or not height:
        raise _no_image(content)
    return image


def _to_rgb(image: "Image") -> "Image":
    """As mistral-common's `_convert_to_rgb`, and 16 bits a channel scaled where that clips them."""
    from PIL import Image

    if image.mode == "RGB":
        return image.copy()
    if image.mode.startswith("I") or image.mode == "F":
        return _to_8_bits(image).convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "WHITE")
    white.paste(rgba, (0, 0), rgba)
    return white.convert("RGB")


def _to_8_bits(image: "Image") -> "Image":
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    # PNG and TIFF store grey in 16 bits; floats are taken as 0 to 1 where none is above.
    top = 65535.0 if image.mode != "F" else (1.0 if values.max() <= 1 else 255.0)
    return Image.fromarray(np.rint(np.clip(values / top, 0, 1) * 255).astype(np.uint8))


def _too_many_pixels(found: str) -> RowProblem:
    return RowProblem(
        "The image has too many pixels.",
        f"It has {found}, and at most {IMAGE_LIMIT_PIXELS / 1e6:.0f} million are decoded.",
        "Save it smaller; a model sees no more than some 1,500 pixels a side.",
    )


def _no_image(content: ImageBytes) -> RowProblem:
    start = bytes(content[:256]).lstrip()
    if not content:
        why = "It is empty."
    elif start.startswith((b"<svg", b"<?xml")):
        why = "It is a drawing in XML (SVG), which has no pixels."
    elif start[:5].lower() in (b"<!doc", b"<html"):
        why = "It is a web page."
    else:
        why = f"Its bytes begin like none of {_NAMED_FORMATS}."
    return RowProblem(
        "The image cannot be read.", why, "Save it as PNG or JPEG, or delete the row."
    )


def _undecodable(error: Exception) -> RowProblem:
    return RowProblem(
        "The image is damaged.",
        f"Decoding it ended in {first_line(error)[:200]}.",
        "Fetch or save it again, or delete the row.",
    )
