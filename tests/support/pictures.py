"""Image files made on the spot."""

import io
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

SIZES = ((56, 28), (1, 1), (300, 200), (2100, 1299), (8000, 2), (1541, 1540))


def picture(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    """Smooth colours, so that resizing changes little."""
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(3 * x / width + 2 * y / height + each) for each in phase]
    return Image.fromarray(np.uint8(np.stack(waves, -1) * 100 + 127))


def file_of(image: Image.Image, kind: str = "PNG", **keys: Any) -> bytes:
    """The bytes of a file that holds the image."""
    file = io.BytesIO()
    image.save(file, kind, **keys)
    return file.getvalue()


@cache
def png(width: int = 60, height: int = 40, seed: int = 0) -> bytes:
    return file_of(picture(width, height, seed))
