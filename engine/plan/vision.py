"""What images cost beside their tokens: the vision tower's share of a step.

Separate from `layers`, whose figures are measured: these are counted from the shapes of the tower
alone, which is why a plan with images has a wider range.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from engine.catalog import Architecture, ModuleTable
from engine.config import RunConfig
from engine.plan.statistics import Statistics
from engine.plan.targets import trains_eyes

PATCHES_AT_ONCE = 4096
"""Patches that go through the vision tower together, where one image has no more: their mask takes
at most 64 MiB."""


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


def largest_image_tokens(architecture: Architecture) -> int | None:
    """Tokens of the largest image that the model's tokenizer makes; None where none is known."""
    card = architecture.card
    if card is None or card.tokenizer.image is None:
        return None
    patch, longest, merge = card.tokenizer.image
    side = math.ceil(longest / (patch * merge))
    return side * (side + 1)


def image_tokens_at_once(
    config: RunConfig, table: ModuleTable, tokens: int, statistics: Statistics | None
) -> int:
    """Image tokens among the `tokens` of the forward pass that has most of them.

    Rows of unknown data are all image where the config says that they have images, as Axolotl's
    configs do with `processor_type`. Packed sequences have their usual share, and at least the row
    with the most; without packing a batch can be made of such rows.
    """
    if tower_of(table) is None:
        return 0
    if statistics is None:
        return tokens if config.processor_type else 0
    share = math.ceil(tokens * statistics.image_tokens / max(1, statistics.total_tokens))
    rows = 1 if config.sample_packing else config.micro_batch_size
    return min(tokens, max(share, rows * statistics.most_image_tokens))


def tower_works(config: RunConfig, table: ModuleTable, statistics: Statistics | None) -> bool:
    """Whether a run needs the vision tower: for images in its rows, or because it is trained."""
    if tower_of(table) is None:
        return False
    images = bool(config.processor_type) if statistics is None else statistics.image_tokens > 0
    return images or trains_eyes(table, config)


def tower_bytes(
    config: RunConfig, table: ModuleTable, image_tokens: int, base_bytes: int
) -> tuple[int, int]:
    """(kept from the forward to the backward pass, held while a part of the tower runs).

    A frozen tower keeps nothing but the pixels, as decoded and in the model's type. A trained one
    keeps a state a layer with gradient checkpointing, everything without.
    """
    tower = tower_of(table)
    if tower is None or not image_tokens:
        return 0, 0
    patches = image_tokens * tower.merged
    at_once = min(patches, PATCHES_AT_ONCE)
    # Of a layer: its input, both norms, queries, keys, values, the heads' output and the MLP.
    one = (8 * tower.hidden + 3 * tower.intermediate) * base_bytes
    held = at_once * (one + 3 * at_once)  # three bytes a pair for the mask, as for packed rows
    pixels = patches * 3 * tower.patch**2 * (4 + base_bytes)
    if not trains_eyes(table, config):
        return pixels, held
    kept = tower.hidden * base_bytes if config.gradient_checkpointing else one
    return pixels + patches * tower.layers * kept, held
