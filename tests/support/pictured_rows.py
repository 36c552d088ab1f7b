"""Rows with real images for the trainer's tests: PNG files, and the tokens that stand for them."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.chat.conversation import Conversation
from engine.chat.images import ImageSpec, grid
from engine.chat.render import Kind, Rendered, RenderedImage
from engine.data.arrays import ArrayWriter, Interval, block_of
from engine.data.prepared import Prepared, StoredImage
from engine.data.rows import RenderedRow
from engine.train.batches import Rows
from tests.support.tiny import VISION, VOCABULARY, with_vision

SPEC = ImageSpec(patch=14, longest=112, merge=2)
IMG, IMG_BREAK, IMG_END = 10, 12, 13


def seeing(text: dict[str, Any], **vision: Any) -> dict[str, Any]:
    """A tiny model over `text` that sees images of up to 112 pixels a side."""
    return {**with_vision(text), "vision_config": {**VISION, "image_size": SPEC.longest, **vision}}


def picture(width: int, height: int, seed: int = 0) -> RenderedImage:
    """A PNG of random pixels with its grid."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return RenderedImage(file.getvalue(), *grid(width, height, SPEC))


def stored(image: RenderedImage, number: int = 0) -> StoredImage:
    return StoredImage(image.content, image.rows, image.columns, number)


def run_of(image: RenderedImage) -> list[int]:
    """The ids of an image's tokens."""
    ids = ([IMG] * image.columns + [IMG_BREAK]) * image.rows
    return [*ids[:-1], IMG_END]


@dataclass(frozen=True, slots=True)
class Pictured:
    """A row: <s>, then for each image its tokens and three of a question, an answer, </s>."""

    images: tuple[RenderedImage, ...]
    answer_tokens: int = 4
    seed: int = 0

    def rendered(self) -> Rendered:
        ids, kinds = [1], [Kind.BOS]
        words = np.random.default_rng(self.seed).integers(20, VOCABULARY, 400).tolist()
        for image in (*self.images, None):
            found = run_of(image) if image else []
            ids += [*found, *(words.pop() for _ in range(3))]
            kinds += [Kind.IMAGE] * len(found) + [Kind.USER] * 3
        ids += [*(words.pop() for _ in range(self.answer_tokens)), 2]
        kinds += [Kind.TEXT] * self.answer_tokens + [Kind.EOS]
        return Rendered(
            np.array(ids, np.uint32),
            np.array(kinds, np.uint8),
            np.zeros(len(ids), np.int32),
            self.images,
        )


def write_pictured(folder: Path, rows: Sequence[Pictured]) -> Rows:
    """The rows as prepared arrays, read back; each whole and in this order."""
    return write_rendered(folder, [row.rendered() for row in rows])


def write_rendered(folder: Path, rows: Sequence[Rendered]) -> Rows:
    """The same from arrays that need not be right."""
    writer = ArrayWriter(folder, Interval())
    for line, rendered in enumerate(rows, start=1):
        row = RenderedRow(line, line, "rows.jsonl", 0, 0, None, Conversation(()), rendered)
        writer.add(block_of([row]))
    writer.finish("by hand", SPEC)
    prepared = Prepared(folder)
    return Rows(prepared, np.arange(len(prepared), dtype=np.int64), prepared.lengths)


MIXED = (
    Pictured((picture(56, 28, 1),), seed=1),
    Pictured((), seed=2),
    Pictured((picture(100, 57, 2), picture(30, 80, 3)), seed=3, answer_tokens=7),
    Pictured((picture(112, 112, 4),), seed=4, answer_tokens=2),
    Pictured((picture(57, 57, 5),), seed=5),
)
"""Text and images mixed, several sizes, two images in a row; 57 pixels are three tokens where
mistral-common rounds and two where transformers would."""
