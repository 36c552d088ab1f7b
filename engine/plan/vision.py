"""What images cost beside their tokens: the vision tower's share of a step.

Counted from the shapes of the tower alone, which is why a plan with images has a wider range.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from engine.catalog import Architecture, ModuleTable
from engine.config import RunConfig
from engine.data.statistics import Statistics
from engine.plan.targets import trains_vision
from engine.plan.trainer import PATCHES_AT_ONCE

IMAGE_PIXELS = 1024
"""A side of the largest image where a config leaves it to transformers (PixtralVisionConfig)."""


@dataclass(frozen=True, slots=True)
class Tower:
    """The sizes of a vision tower that decide what a step keeps."""

    layers: int
    hidden: int
    intermediate: int
    merged: int
    """Patches of one image token."""
    patch: int
    """Pixels of a patch's side."""

    @property
    def token_pixels(self) -> int:
        """Of the side of what one image token shows."""
        return self.patch * math.isqrt(self.merged)


@lru_cache(maxsize=32)
def tower_of(table: ModuleTable) -> Tower | None:
    """The tower of a table's model; None for a text model."""
    layers = hidden = intermediate = merged = patch = 0
    for row in table.parameters:
        name = row.module.rpartition(".")[2]
        if row.group == "vision" and name == "patch_conv":
            hidden, patch = row.shape[0], row.shape[-1]
        elif row.group == "vision" and name == "gate_proj":
            layers, intermediate = layers + 1, row.shape[0]
        elif row.group == "projector" and name == "merging_layer":
            merged = row.shape[1] // row.shape[0]
    return Tower(layers, hidden, intermediate, merged, patch) if hidden else None


def largest_image_tokens(architecture: Architecture) -> int:
    """Tokens of the largest image that a model takes; 0 for a text model.

    A row of patches ends in a token of its own.
    """
    tower = tower_of(architecture.table)
    if tower is None:
        return 0
    pixels: int = architecture.config.get("vision_config", {}).get("image_size", IMAGE_PIXELS)
    side = math.ceil(pixels / tower.token_pixels)
    return side * (side + 1)


def tokens_of_one_image(
    architecture: Architecture, image_tokens: int, statistics: Statistics | None
) -> int:
    """What one image can have of the `image_tokens` of a forward pass, in tokens.

    No more than all images of the row that has most: what they have one by one is not counted.
    """
    row = statistics.most_image_tokens if statistics else image_tokens
    return min(largest_image_tokens(architecture), row, image_tokens)


def image_share(config: RunConfig, statistics: Statistics | None) -> float:
    """Of all tokens, those of images; unknown rows are all image where the config says that they
    have images, as Axolotl's configs do with `processor_type`."""
    if statistics is None:
        return 1.0 if config.processor_type else 0.0
    return statistics.image_tokens / max(1, statistics.total_tokens)


def patches_of(image_tokens: int, tower: Tower) -> int:
    """Patches of one square image, whose rows each end in a token of its own."""
    return (image_tokens - math.isqrt(image_tokens)) * tower.merged


def image_tokens_at_once(
    config: RunConfig, table: ModuleTable, tokens: int, statistics: Statistics | None
) -> int:
    """Image tokens among the `tokens` of the forward pass that has most of them.

    Packed sequences have their usual share, and at least the row with the most; without packing a
    batch can be made of such rows.
    """
    if tower_of(table) is None:
        return 0
    usual = math.ceil(tokens * image_share(config, statistics))
    rows = 1 if config.sample_packing else config.micro_batch_size
    most = rows * statistics.most_image_tokens if statistics else 0
    return min(tokens, max(usual, most))


def tower_works(config: RunConfig, table: ModuleTable, statistics: Statistics | None) -> bool:
    """Whether a run needs the vision tower: for images in its rows, or because it is trained."""
    if tower_of(table) is None:
        return False
    return image_share(config, statistics) > 0 or trains_vision(table, config)


def tower_bytes(
    config: RunConfig, table: ModuleTable, image_tokens: int, largest: int, base_bytes: int
) -> tuple[int, int]:
    """(kept from the forward to the backward pass, held while a part of the tower runs).

    `largest` is what one image has of the tokens. A frozen tower keeps nothing but the pixels as
    they were decoded, and has those that it sees in its own type as well. A trained one keeps a
    state a layer with gradient checkpointing, everything without.
    """
    tower = tower_of(table)
    if tower is None or not image_tokens:
        return 0, 0
    patches = image_tokens * tower.merged
    lone = patches_of(largest, tower)
    at_once = min(patches, max(PATCHES_AT_ONCE, lone))
    # Of a layer: its input, both norms, queries, keys, values, the heads' output and the MLP.
    one = (8 * tower.hidden + 3 * tower.intermediate) * base_bytes
    # Read where it lies by a tower in float32, unless several are padded to one size.
    own = 0 if at_once == lone and base_bytes == 4 else 3 * tower.patch**2 * base_bytes
    held = at_once * (own + one + base_bytes * at_once)  # the mask: a number of its type a pair
    pixels = patches * 3 * tower.patch**2 * 4
    if not trains_vision(table, config):
        return pixels, held
    kept = tower.hidden * base_bytes if config.gradient_checkpointing else one
    return pixels + patches * tower.layers * kept, held
