"""Grids and pixels of images against mistral-common, and every file that is refused."""

import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers import image as stock
from PIL import Image

from engine.chat.conversation import RowProblem
from engine.chat.images import (
    IMAGE_LIMIT_BYTES,
    IMAGE_LIMIT_PIXELS,
    ImageSpec,
    check_image,
    grid,
    pixels,
    read_size,
)
from tests.support.pictures import SIZES, file_of, picture, png

SPEC = ImageSpec(14, 1540, 2)
SIDES = st.integers(1, 9000)


class Sized:
    """All that mistral-common's formula asks of a picture."""

    def __init__(self, *size: int) -> None:
        self.size = size


@settings(max_examples=1500, deadline=None, database=None)
@given(SIDES, SIDES, st.sampled_from([(14, 1540, 2), (16, 1024, 1), (14, 56, 2), (14, 1540, 1)]))
def test_the_grid_is_mistral_commons(width, height, numbers):
    encoder = stock.ImageEncoder(stock.ImageConfig(*numbers), stock.SpecialImageIDs(10, 12, 13))
    image: Any = Sized(width, height)
    columns, rows = encoder._image_to_num_tokens(image)
    assert grid(width, height, ImageSpec(*numbers)) == (rows, columns)


def test_an_extreme_shape_keeps_a_row():
    assert grid(8000, 2, SPEC) == (1, 55)


def test_a_grid_that_transformers_would_round_down():
    # Pixtral's processor floors 1540 * 1299 / 2100 = 952.6 to 952 pixels: 34 rows.
    assert grid(2100, 1299, SPEC) == (35, 55)
    assert pixels(png(2100, 1299), 35, 55, SPEC).shape == (3, 980, 1540)


@pytest.mark.parametrize("size", SIZES)
def test_pixels_fill_the_grid(size: tuple[int, int]):
    rows, columns = grid(*size, SPEC)
    found = pixels(png(*size), rows, columns, SPEC)
    assert found.shape == (3, rows * 28, columns * 28)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous


def test_pixels_are_normalized_as_mistral_common_does():
    image = picture(56, 84)
    expected = stock.normalize(np.array(image, np.float32), stock.DATASET_MEAN, stock.DATASET_STD)
    assert np.allclose(pixels(file_of(image), 3, 2, SPEC), expected, atol=1e-6)


def test_the_algorithm_decides_how_an_image_is_resized():
    content = png(100, 100)
    one, other = (pixels(content, 2, 2, ImageSpec(14, 56, 2, w)) for w in ("bilinear", "lanczos"))
    assert not np.allclose(one, other)


def alike(content: bytes, expected: Image.Image, tolerance: float = 1e-5) -> bool:
    found, target = (pixels(each, 2, 2, SPEC) for each in (content, file_of(expected)))
    return bool(np.abs(found - target).max() <= tolerance)


class TestModes:
    def test_transparency_becomes_white(self):
        glass = Image.new("RGBA", (56, 56), (255, 0, 0, 0))
        assert alike(file_of(glass), Image.new("RGB", (56, 56), "white"))

    @pytest.mark.parametrize(("mode", "kind"), [("P", "PNG"), ("L", "PNG"), ("CMYK", "TIFF")])
    def test_other_modes_are_read_as_mistral_common_reads_them(self, mode, kind):
        image = picture(56, 56).convert(mode)
        assert alike(file_of(image, kind), stock._convert_to_rgb(image))

    def test_16_bit_grey_is_scaled_not_clipped(self):
        deep = Image.fromarray(np.full((56, 56), 128 * 257, np.uint16))
        assert alike(file_of(deep), Image.new("RGB", (56, 56), (128, 128, 128)))

    def test_the_first_frame_of_an_animation_counts(self):
        frames = [Image.new("RGB", (56, 56), colour) for colour in ("red", "blue")]
        content = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
        assert check_image(content) == (56, 56)
        assert alike(content, frames[0])

    def test_a_rotation_in_the_exif_is_not_applied_as_in_mistral_common(self):
        exif = Image.Exif()
        exif[0x0112] = 6
        content = file_of(picture(60, 40), "JPEG", exif=exif)
        assert read_size(content) == (60, 40)


def huge_png(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000)))


REFUSED = {
    "empty": (b"", "cannot be read", "empty"),
    "text": (b"a cat", "cannot be read", "begin like none"),
    "svg": (b"<svg xmlns='x'/>", "cannot be read", "SVG"),
    "a web page": (b"<!DOCTYPE html><p>404", "cannot be read", "web page"),
    "a program for a printer": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "cannot be read", "begin like"),
    "many pixels": (huge_png(10_000, 9_000), "too many pixels", "10000 x 9000"),
    "a bomb": (huge_png(60_000, 60_000), "too many pixels", "far more"),
    "many bytes": (bytes(IMAGE_LIMIT_BYTES + 1), "too many bytes", "20 MB"),
    "cut PNG": (png(400, 400)[:2000], "damaged", "Decoding"),
    "cut JPEG": (file_of(picture(400, 400), "JPEG")[:2000], "damaged", "Decoding"),
}


@pytest.mark.parametrize(("content", "what", "why"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_whole_image_is_refused_in_sentences(content, what, why):
    with pytest.raises(RowProblem) as caught:
        check_image(content)
    assert what in caught.value.what
    assert why in caught.value.why
    for sentence in (caught.value.what, caught.value.why, caught.value.fix):
        assert sentence.endswith(".")
    with pytest.raises(RowProblem):
        pixels(content, 2, 2, SPEC)


def test_the_limits_themselves_pass():
    side = int(IMAGE_LIMIT_PIXELS**0.5)
    assert read_size(huge_png(side, side)) == (side, side)
    whole = png()
    assert check_image(whole + bytes(IMAGE_LIMIT_BYTES - len(whole))) == (60, 40)
