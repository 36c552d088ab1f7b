"""The layer of experts over grouped linear layers, and where it takes transformers' own place.

A full fine-tune, and an adapter beside experts that stay as they are, keep transformers' own
layer.
"""

import torch
from torch import Tensor, nn
from transformers.models.mistral4.modeling_mistral4 import Mistral4Experts

from engine.config import RunConfig
from engine.train.experts.grouped import GroupedLinear, GroupedNF4, GroupedStack, Groups


class Experts(nn.Module):
    """Same numbers as transformers' Mistral4Experts, from grouped linear layers."""

    def __init__(self, stock: Mistral4Experts, form: type[GroupedLinear], dtype: torch.dtype):
        super().__init__()
        self.num_experts = stock.num_experts
        hidden, width = stock.hidden_dim, stock.intermediate_dim
        self.gate_up_proj = form(self.num_experts, hidden, 2 * width, dtype)
        self.down_proj = form(self.num_experts, width, hidden, dtype)
        self.act_fn = stock.act_fn

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Hidden states (tokens, width) through each token's experts, (tokens, k), weighted.

        Summed token by token, in no order that depends on the device's scheduling.
        """
        tokens, chosen = top_k_index.shape
        sorted_experts, order = top_k_index.reshape(-1).sort(stable=True)
        groups = Groups(sorted_experts, self.num_experts)
        gate, up = self.gate_up_proj(hidden[order // chosen], groups).chunk(2, dim=-1)
        rows: Tensor = self.down_proj(self.act_fn(gate) * up, groups)
        rows = rows * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        summed = rows[places].view(tokens, chosen, -1).sum(dim=1)
        return summed.type_as(hidden)


def replace_experts(model: nn.Module, config: RunConfig, dtype: torch.dtype) -> int:
    """Put `Experts` where transformers' experts are; returns how many layers were changed.

    With `quantize_moe_experts` they are held in NF4. Otherwise they stay in `dtype`, also beside
    `load_in_4bit`, as in Axolotl, and only those that get an adapter are replaced. The new ones
    have no memory yet: each `GroupedLinear` is filled by its `take`.
    """
    if config.quantize_moe_experts:
        form: type[GroupedLinear] = GroupedNF4
    elif config.adapter and config.lora_target_parameters:
        form = GroupedStack
    else:
        return 0
    found = [name for name, module in model.named_modules() if isinstance(module, Mistral4Experts)]
    for name in found:
        stock = model.get_submodule(name)
        assert isinstance(stock, Mistral4Experts)
        model.set_submodule(name, Experts(stock, form, dtype))
    return len(found)


def expert_modules(model: nn.Module) -> tuple[str, ...]:
    """Names of the grouped linear layers."""
    return tuple(
        name for name, module in model.named_modules() if isinstance(module, GroupedLinear)
    )
