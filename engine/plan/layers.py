"""What layers and images cost: the widths of a model, bytes a token, and the vision tower's share.

The figures of the decoder's layers are profiled, not derived, and are data, presets/memory.yml,
with their origin: `python -m tests.research.layer_memory` makes them anew for the versions of
constraints.txt, and a test profiles layers again and compares. `python -m
tests.research.expert_memory` prints those of the trainer's layer of experts. The tower's are
counted from its shapes alone, which is why a plan with images has a wider range.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import NamedTuple

from engine.catalog import Architecture, ModuleTable
from engine.catalog.modules import ending
from engine.config import RunConfig
from engine.data.statistics import Statistics
from engine.files import read_preset
from engine.plan.device import Place
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
        name = ending(row.module)
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


def tokens_of_one_image(place: Place, image_tokens: int) -> int:
    """What one image can have of the `image_tokens` of a forward pass, in tokens.

    No more than all images of the row that has most: what they have one by one is not counted.
    """
    row = place.statistics.most_image_tokens if place.statistics else image_tokens
    return min(largest_image_tokens(place.architecture), row, image_tokens)


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


@dataclass(frozen=True, slots=True)
class Widths:
    """The sizes of a language model that decide what a step keeps."""

    layers: int
    hidden: int
    intermediate: int
    """Of the MLP; with experts, of all that one token passes through."""
    attention: int
    """Queries plus keys, of all heads."""
    vocabulary: int
    expert_rows: int
    """Experts that one token passes through; 0 without experts, as the next two."""
    expert_matrix: int
    """Numbers of the larger matrix of one expert."""
    expert_stack: int
    """Numbers of the larger fused tensor of one layer, all experts together."""
    repeated: int = 0
    """Keys and values once each head of queries has its own; 0 where it has them anyway."""
    queries: int = 0
    """Of all heads."""
    cached: int = 0
    """Numbers that a token leaves in the cache of one layer: keys and values; of latent attention
    the compressed state, from which both are computed anew."""
    latent: bool = False
    """Whether attention is of that kind."""

    def cut(self, tensor: int, expert: int = 1) -> "Widths":
        """The widths of one of `tensor` cards that share each matrix, and of `expert` that have
        other experts."""
        heads = 1 if self.latent else tensor
        return replace(
            self,
            intermediate=self.intermediate // tensor,
            attention=self.attention // heads,
            queries=self.queries // heads,
            repeated=self.repeated // heads,
            expert_matrix=self.expert_matrix // tensor,
            expert_stack=self.expert_stack // (tensor * expert),
        )

    @property
    def head(self) -> int:
        """Numbers of the head, tied or not."""
        return self.hidden * self.vocabulary


@lru_cache(maxsize=32)
def widths(table: ModuleTable) -> Widths:
    """The widths of a table's language model, from the shapes of its first layer."""
    layers = hidden = vocabulary = 0
    projections = ("q_proj", "q_b_proj", "k_proj", "v_proj", "kv_a_proj_with_mqa", "kv_b_proj")
    sizes = dict.fromkeys((*projections, "gate_proj"), 0)
    routed = chosen = matrix = stack = 0
    for row in table.parameters:
        name = ending(row.module)
        if row.group == "embedding":
            vocabulary, hidden = row.shape
        elif row.group == "norm" and name == "input_layernorm":
            layers += 1
        elif row.group in ("attention", "mlp") and name in sizes:
            sizes[name] = max(sizes[name], row.shape[0])
        elif row.name.endswith("experts.gate_up_proj"):
            experts, outputs, inputs = row.shape
            chosen = int(experts * table.routed_share)
            routed, matrix, stack = chosen * outputs // 2, outputs * inputs, row.count
    return Widths(
        layers=layers,
        hidden=hidden,
        intermediate=sizes["gate_proj"] + routed,
        attention=sizes["q_proj"] + sizes["q_b_proj"] + sizes["k_proj"] + sizes["kv_b_proj"],
        vocabulary=vocabulary,
        expert_rows=chosen,
        expert_matrix=matrix,
        expert_stack=stack,
        queries=max(sizes["q_proj"], sizes["q_b_proj"]),
        latent=sizes["kv_b_proj"] > 0,
        cached=sizes["k_proj"] + sizes["v_proj"] + sizes["kv_a_proj_with_mqa"],
        repeated=2 * sizes["q_proj"] if sizes["q_proj"] > sizes["k_proj"] > 0 else 0,
    )


def recomputed_layers(config: RunConfig, sizes: Widths) -> int:
    """Layers, from the first on, that a step computes a second time instead of keeping them."""
    if not config.gradient_checkpointing:
        return 0
    return min(config.checkpointed_layers or sizes.layers, sizes.layers)


class LayerCost(NamedTuple):
    """Bytes a token for each unit of a width, and bytes a number of the largest weight."""

    intermediate: float
    hidden: float
    attention: float
    rank: float
    weight: float

    def bytes(self, sizes: Widths, tokens: int, rank: int) -> int:
        """Of one layer, for `tokens` tokens at once."""
        a_token = (
            self.intermediate * sizes.intermediate
            + self.hidden * sizes.hidden
            + self.attention * sizes.attention
            + self.rank * rank
        )
        return int(tokens * a_token + self.weight * sizes.hidden * sizes.intermediate)


@cache
def _costs() -> Mapping[tuple[str, str, str], LayerCost]:
    """presets/memory.yml by moment, type of the products, and what is trained over which base."""
    return {
        (entry["moment"], entry["type"], entry["method"]): LayerCost(
            *(float(entry[name]) for name in LayerCost._fields)
        )
        for entry in read_preset("memory.yml")["layers"]
    }


def _cost(moment: str, base_bytes: int, method: str) -> LayerCost:
    return _costs()[moment, "bf16" if base_bytes == 2 else "fp32", method]


def transient_bytes(config: RunConfig, sizes: Widths, tokens: int, base_bytes: int) -> int:
    """What the one layer needs whose backward pass is running, recomputed from its input."""
    if config.adapter is None:
        return _cost("transient", base_bytes, "full").bytes(sizes, tokens, 0)
    quantized = config.load_in_4bit or config.load_in_8bit
    method = "4-bit" if quantized and base_bytes == 2 else "lora"
    found = _cost("transient", base_bytes, method).bytes(sizes, tokens, config.lora_r)
    if quantized and base_bytes == 4:
        # In float32 that moment has no dequantized weight among its terms: one is added whole.
        found += base_bytes * sizes.hidden * sizes.intermediate
    return found + _dropout_bytes(config, sizes, tokens, base_bytes)


def kept_bytes(
    config: RunConfig, sizes: Widths, tokens: int, base_bytes: int, *, flash: bool = False
) -> int:
    """What each layer keeps from its forward to its backward pass without checkpointing.

    With `flash` attention is a card's kernel in 16 bits, which repeats no keys and values.
    """
    moment = "flash kept" if flash else "kept"
    if config.adapter is None:
        return _cost(moment, base_bytes, "full").bytes(sizes, tokens, 0)
    kept = _cost(moment, base_bytes, "lora").bytes(sizes, tokens, config.lora_r)
    return kept + _dropout_bytes(config, sizes, tokens, base_bytes)


def inference_bytes(config: RunConfig, sizes: Widths, tokens: int, base_bytes: int) -> int:
    """What one layer holds in a forward pass without gradients, at an evaluation or an answer."""
    found = _cost("inference", base_bytes, "lora").bytes(sizes, tokens, config.lora_r)
    if config.load_in_4bit or config.load_in_8bit:
        found += base_bytes * sizes.hidden * sizes.intermediate
    return found


def _dropout_bytes(config: RunConfig, sizes: Widths, tokens: int, base_bytes: int) -> int:
    """Each adapted layer keeps its thinned input beside the input."""
    if not config.lora_dropout:
        return 0
    more = _cost("transient", base_bytes, "dropout")
    plain = _cost("transient", base_bytes, "lora")
    return more.bytes(sizes, tokens, config.lora_r) - plain.bytes(sizes, tokens, config.lora_r)


# Rows of the hidden width that a layer of experts holds for each expert of a token, beside the
# MLP's own terms: in its backward pass, and from its forward to its backward pass. An adapter on
# the experts adds one, and itself once in the type of the products. Figures of `python -m
# tests.research.expert_memory`; the worst of them is off by 1.1 %.
_EXPERT_STATES, _EXPERT_STATES_KEPT = 4, 1


def expert_bytes(
    config: RunConfig, sizes: Widths, tokens: int, base_bytes: int, adapter_parameters: int
) -> tuple[int, int]:
    """(what a layer of experts keeps for its backward pass, what that pass holds), beside a dense
    layer of the same width.

    `adapter_parameters` is the adapter's size on one layer's experts. NF4 experts are dequantized
    one at a time; where the experts themselves are trained, the gradient of a fused tensor is whole
    before it is added to the others.
    """
    adapted = 1 if adapter_parameters else 0
    row = sizes.expert_rows * tokens * sizes.hidden
    kept = (_EXPERT_STATES_KEPT + adapted) * row + adapter_parameters
    held = (_EXPERT_STATES + adapted) * row + adapter_parameters
    if config.quantize_moe_experts:
        held += sizes.expert_matrix
    elif config.adapter is None:
        held += sizes.expert_stack
    return kept * base_bytes, held * base_bytes
