"""What the layers of a step cost: the widths of a model, and bytes a token for each of them.

Separate from `memory` because these figures are measured, not derived: `python -m
tests.make.layer_memory` runs transformers' layers with PEFT and bitsandbytes on fake tensors, at
the versions of constraints.txt, and prints them with their worst residual; `python -m
tests.make.expert_memory` does so for the trainer's layer of experts.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from engine.catalog import ModuleTable
from engine.config import RunConfig


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


@lru_cache(maxsize=32)
def widths(table: ModuleTable) -> Widths:
    """The widths of a table's language model, from the shapes of its first layer."""
    layers = hidden = vocabulary = 0
    sizes = dict.fromkeys(("q_proj", "q_b_proj", "k_proj", "kv_b_proj", "gate_proj"), 0)
    routed = chosen = matrix = stack = 0
    for row in table.parameters:
        name = row.module.rpartition(".")[2]
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
    )


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


# What one layer adds to its own backward pass, checkpointed, and what it keeps without: figures of
# `python -m tests.make.layer_memory` with torch 2.13.0, transformers 5.23.0 and peft 0.21.2, over
# four models, two lengths and two ranks. The worst of them is off by 4.3 %.
_TRANSIENT = {
    ("bf16", "lora"): LayerCost(12.15, 15.19, 8.99, 57.06, 0.0),
    ("bf16", "4-bit"): LayerCost(10.61, 18.51, 7.83, 48.12, 1.62),
    ("bf16", "dropout"): LayerCost(12.01, 40.95, 11.37, 67.25, 0.0),
    ("bf16", "full"): LayerCost(10.61, 22.83, 7.75, 0.0, 1.57),
    ("fp32", "lora"): LayerCost(24.18, 18.30, 17.62, 27.95, 0.0),
    ("fp32", "4-bit"): LayerCost(24.18, 18.30, 17.62, 27.95, 4.0),
    ("fp32", "dropout"): LayerCost(23.88, 65.41, 22.72, 25.12, 0.0),
    ("fp32", "full"): LayerCost(21.06, 33.40, 14.98, 0.0, 3.22),
}
_KEPT = {
    ("bf16", "lora"): LayerCost(7.99, 13.12, 7.21, 66.90, 0.0),
    ("bf16", "full"): LayerCost(7.99, 16.12, 7.92, 0.0, 0.0),
    ("fp32", "lora"): LayerCost(15.99, 16.27, 15.79, 27.69, 0.0),
    ("fp32", "full"): LayerCost(15.99, 24.25, 15.81, 0.0, 0.0),
}


def transient_bytes(config: RunConfig, sizes: Widths, tokens: int, base_bytes: int) -> int:
    """What the one layer needs whose backward pass is running, recomputed from its input."""
    width = "bf16" if base_bytes == 2 else "fp32"
    if config.adapter is None:
        return _TRANSIENT[width, "full"].bytes(sizes, tokens, 0)
    quantized = config.load_in_4bit or config.load_in_8bit
    cost = _TRANSIENT[width, "4-bit" if quantized else "lora"]
    return cost.bytes(sizes, tokens, config.lora_r) + _dropout_bytes(config, sizes, tokens, width)


def kept_bytes(config: RunConfig, sizes: Widths, tokens: int, base_bytes: int) -> int:
    """What each layer keeps from its forward to its backward pass without checkpointing."""
    width = "bf16" if base_bytes == 2 else "fp32"
    if config.adapter is None:
        return _KEPT[width, "full"].bytes(sizes, tokens, 0)
    kept = _KEPT[width, "lora"].bytes(sizes, tokens, config.lora_r)
    return kept + _dropout_bytes(config, sizes, tokens, width)


def _dropout_bytes(config: RunConfig, sizes: Widths, tokens: int, width: str) -> int:
    """Each adapted layer keeps its thinned input beside the input."""
    if not config.lora_dropout:
        return 0
    more, plain = _TRANSIENT[width, "dropout"], _TRANSIENT[width, "lora"]
    rank = config.lora_r
    return more.bytes(sizes, tokens, rank) - plain.bytes(sizes, tokens, rank)


# Rows of the hidden width that a layer of experts holds for each expert of a token, beside the
# MLP's own terms: in its backward pass, and from its forward to its backward pass. An adapter on
# the experts adds one, and itself once in the type of the products. Figures of `python -m
# tests.make.expert_memory`; the worst of them is off by 1.1 %.
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


def inference_bytes(config: RunConfig, sizes: Widths, tokens: int, base_bytes: int) -> int:
    """What one layer holds in a forward pass without gradients."""
    return tokens * base_bytes * (3 * sizes.intermediate + 6 * sizes.hidden + 2 * sizes.attention)
