"""Pixels of a run's images, decoded ahead of the step that needs them.

Decoding is the one part of a batch that takes long: threads do it while the model computes (Pillow
lets go of the interpreter), and what was decoded is kept while there is room. Which images a batch
holds is decided there, and is the same without any of this.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.catalog import Architecture
from engine.chat.images import ImageSpec, pixels
from engine.data.prepared import Prepared, StoredImage
from engine.errors import UserError

Pixels: TypeAlias = NDArray[np.float32]
"""One image, normalised, (3, height, width)."""
IMAGE_TOKEN = 10
"""`[IMG]` of every Tekken vocabulary: the model puts one merged patch in each one's place."""
CACHE_BYTES = 512 * 2**20
"""Decoded images that are kept: eighteen of the largest, 1540 pixels a side."""
DECODERS = 4
"""Threads. One decodes a photograph of 12 megapixels in about 0.15 s."""


class ImagePixels:
    """Decoded images by their number in one prepared store; the least recently used go first."""

    def __init__(self, spec: ImageSpec, cache_bytes: int = CACHE_BYTES) -> None:
        self._spec = spec
        self._cache_bytes = cache_bytes
        self._held: OrderedDict[int, tuple[Future[Pixels], int]] = OrderedDict()
        self._held_bytes = 0
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")

    def prefetch(self, images: Iterable[StoredImage]) -> None:
        """Begin to decode `images`, as many as there is room for, and return at once."""
        ahead = 0
        for image in images:
            ahead += self._size_bytes(image)
            if ahead > self._cache_bytes:
                return
            self._start(image)

    def read(self, image: StoredImage) -> Pixels:
        """The pixels of one image; waits for its decoder."""
        return self._start(image).result()

    def _start(self, image: StoredImage) -> Future[Pixels]:
        if image.number in self._held:
            self._held.move_to_end(image.number)
            return self._held[image.number][0]
        future = self._decoders.submit(pixels, image.content, image.rows, image.columns, self._spec)
        size = self._size_bytes(image)
        self._held[image.number] = (future, size)
        self._held_bytes += size
        while self._held_bytes > self._cache_bytes and len(self._held) > 1:
            _, (_, freed) = self._held.popitem(last=False)
            self._held_bytes -= freed
        return future

    def _size_bytes(self, image: StoredImage) -> int:
        return 3 * 4 * image.rows * image.columns * self._spec.side**2


def join(images: Sequence[Pixels]) -> dict[str, Tensor]:
    """Images of several sizes as one batch, for `forward.image_features`; empty without images.

    `pixels` float32, one image behind the other, so that a small one costs no more beside a large
    one; `image_sizes` int64 (images, 2), each one's height and width.
    """
    if not images:
        return {}
    sizes = np.array([image.shape[1:] for image in images], np.int64)
    flat = np.concatenate([image.reshape(-1) for image in images])
    return {"pixels": torch.from_numpy(flat), "image_sizes": torch.from_numpy(sizes)}


def pad(
    pixels: Tensor, sizes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32
) -> Tensor:
    """The images of `join` as a vision tower reads them: (images, 3, largest height, largest
    width), zero behind each image's own edges."""
    parts: Sequence[Tensor] = pixels.split([3 * height * width for height, width in sizes])
    if len(parts) == 1:
        one: Tensor = parts[0].view(1, 3, *sizes[0]).to(dtype)
        return one
    height, width = (max(size[k] for size in sizes) for k in (0, 1))
    padded = pixels.new_zeros((len(parts), 3, height, width), dtype=dtype)
    for place, part, (high, wide) in zip(padded, parts, sizes, strict=True):
        place[:, :high, :wide] = part.view(3, high, wide)
    return padded


def refuse_unread(architecture: Architecture, prepared: Prepared) -> None:
    """Refuse rows with images for a model that would not read them as they were tokenized.

    Raises UserError for a text model, and where the tokenizer's patches are not the model's.
    """
    spec = prepared.image_spec
    if spec is None:
        return
    config = architecture.config
    vision = config.get("vision_config")
    if not vision:
        raise UserError(
            "The dataset has images, and this model reads none.",
            f"{architecture.class_name} has no vision tower.",
            "Choose a model that reads images (`windtunnel models` lists them), or leave out the "
            "rows with images.",
        )
    patch, merge = vision.get("patch_size", 16), config.get("spatial_merge_size", 2)
    token = config.get("image_token_index", config.get("image_token_id", IMAGE_TOKEN))
    if (patch, merge, token) != (spec.patch, spec.merge, IMAGE_TOKEN):
        raise UserError(
            "The tokenizer and the model do not cut images alike.",
            f"The tokenizer makes a token of {spec.merge} x {spec.merge} patches of {spec.patch} "
            f"pixels with the id {IMAGE_TOKEN}, the model of {merge} x {merge} patches of {patch} "
            f"with the id {token}.",
            "Use the tokenizer that came with the model.",
        )
    largest, side = vision.get("image_size", 1024), patch * merge
    if math.ceil(spec.longest / side) * side > largest:
        raise UserError(
            f"The tokenizer makes images of up to {spec.longest} pixels a side.",
            f"The model's vision tower has positions for {largest} and would repeat them.",
            f"Write image_size: {largest // side * side} into the config, or use the tokenizer "
            "that came with the model.",
        )
