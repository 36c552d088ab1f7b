"""The pictures of `windtunnel demo --vision`: coloured shapes, drawn anew from a seed.

Drawn and not shipped, so that the demo takes the way of any dataset with images: files in a folder
and conversations that name them. Its sets decide what the demo's scores mean.
"""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from PIL.Image import Image

Pair: TypeAlias = tuple[str, str]
"""A colour and a shape."""

SIDE = 56
"""Pixels: two rows of two image tokens, the fewest that still tell where a thing is."""
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS = ((120, 140, 160), (150, 150, 130), (110, 120, 120), (170, 160, 170))
UNSEEN: tuple[Pair, ...] = (
    ("red", "cross"),
    ("green", "triangle"),
    ("blue", "circle"),
    ("yellow", "square"),
)
"""Pairs of which no drawing is trained, though each colour and each shape is."""
SEEN: tuple[Pair, ...] = tuple(
    pair
    for pair in ((colour, shape) for colour in COLOURS for shape in SHAPES)
    if pair not in UNSEEN
)
QUESTION = "What is drawn here?"
TRAINED, HELD_OUT = 1200, 100
"""Drawings that are trained, and those of each held-out set: as many of every pair."""


def write_drawings(folder: Path, seed: int = 0) -> None:
    """Write the sets of the vision demo below `folder`, each a JSONL file and its PNG images.

    `train`; `new_drawings` of the same pairs; `shuffled_pixels`, the same conversations with all
    pixels of all their drawings mixed, so that none shows anything; `unseen_pairs`.
    """
    pairs = random.Random(seed)
    train = list(_draw_all(SEEN, TRAINED, pairs))
    new = list(_draw_all(SEEN, HELD_OUT, pairs))
    unseen = list(_draw_all(UNSEEN, HELD_OUT, pairs))
    shuffled = [
        (pair, image)
        for (pair, _), image in zip(new, shuffle_pixels([i for _, i in new], seed), strict=True)
    ]
    for name, drawings in (
        ("train", train),
        ("new_drawings", new),
        ("shuffled_pixels", shuffled),
        ("unseen_pairs", unseen),
    ):
        _write_set(folder, name, drawings)


def _draw_all(
    pairs: Sequence[Pair], count: int, rng: random.Random
) -> Iterator[tuple[Pair, "Image"]]:
    """`count` drawings that take the pairs in turn, in an order of their own."""
    drawn = [(pairs[n % len(pairs)]) for n in range(count)]
    rng.shuffle(drawn)
    for pair in drawn:
        yield pair, draw(*pair, rng)


def draw(colour: str, shape: str, rng: random.Random) -> "Image":
    """One large shape near the middle; its size, place, shade and background vary."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE, SIDE), rng.choice(BACKGROUNDS))
    canvas = ImageDraw.Draw(image)
    radius = rng.uniform(0.30, 0.42) * SIDE
    x, y = (SIDE / 2 + rng.uniform(-0.06, 0.06) * SIDE for _ in range(2))
    red, green, blue = (min(255, max(0, v + rng.randint(-15, 15))) for v in COLOURS[colour])
    fill = (red, green, blue)
    whole = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        canvas.ellipse(whole, fill)
    elif shape == "square":
        canvas.rectangle(whole, fill)
    elif shape == "triangle":
        canvas.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill)
    else:
        arm = 0.35 * radius
        canvas.rectangle((x - arm, y - radius, x + arm, y + radius), fill)
        canvas.rectangle((x - radius, y - arm, x + radius, y + arm), fill)
    return image


def shuffle_pixels(images: Sequence["Image"], seed: int) -> Iterator["Image"]:
    """As many images of the same pixels, each at a place drawn from all places of all of them."""
    import numpy as np
    from PIL import Image

    pixels = np.stack([np.asarray(image) for image in images])
    flat = pixels.reshape(-1, 3)
    mixed = np.random.default_rng(seed).permutation(flat).reshape(pixels.shape)
    return (Image.fromarray(values) for values in mixed)


def _write_set(folder: Path, name: str, drawings: Iterable[tuple[Pair, "Image"]]) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as rows:
        for number, ((colour, shape), image) in enumerate(drawings, start=1):
            file = f"{name}/{number:04}.png"
            image.save(folder / file)
            content = [
                {"type": "image_url", "image_url": {"url": file}},
                {"type": "text", "text": QUESTION},
            ]
            answer = f"A {colour} {shape}."
            row = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            rows.write(json.dumps({"messages": row}) + "\n")
