"""Mixture-of-experts layers that can be quantized and adapted: Mistral 4's.

transformers holds all experts of a layer in two fused tensors, which bitsandbytes leaves in 16 bits
and which PEFT adapts by forming every expert's whole update. Here they are linear layers over rows
sorted by expert.

grouped  all experts' matrices as one linear layer, plain or in NF4
layer    the layer of experts, and where it takes transformers' place
adapter  LoRA on it, in the tensor layout of PEFT's own
routing  the router's balance as an addition to the loss
"""

from engine.train.experts.adapter import (
    EXPERT_LAYERS,
    LoraGrouped,
    adapt,
    stock_names,
)
from engine.train.experts.grouped import (
    Experts,
    GroupedLinear,
    GroupedNF4,
    GroupedStack,
    Groups,
    balance_loss,
    balance_weight,
    expert_modules,
    replace_experts,
    watch_routers,
)

__all__ = [
    "EXPERT_LAYERS",
    "Experts",
    "GroupedLinear",
    "GroupedNF4",
    "GroupedStack",
    "Groups",
    "LoraGrouped",
    "adapt",
    "balance_loss",
    "balance_weight",
    "expert_modules",
    "replace_experts",
    "stock_names",
    "watch_routers",
]
