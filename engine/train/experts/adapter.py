"""LoRA on the experts, one pair of small matrices for each.

The tensors have the layout of PEFT's own adapter on
fused parameters, so that what is trained here loads there; unlike there, no expert's update is ever
formed: two small products follow the large one.
"""

import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.train.experts.grouped import GroupedLinear, Groups, expert_modules, grouped_linear


class LoraGrouped(nn.Module, LoraLayer):
    """A grouped linear layer with rank r for each expert, as PEFT calls its layers.

    `lora_A` is (r x experts, inputs) with the experts one after another, `lora_B` is (outputs,
    r x experts) with the experts innermost: the layout of PEFT's ParamWrapper.
    """

    adapter_layer_names = ("lora_A", "lora_B")
    base_layer: GroupedLinear

    def __init__(
        self, base_layer: GroupedLinear, adapter_name: str, config: LoraConfig, **options: Any
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, options["r"], options["lora_alpha"], config)

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **_: Any
    ) -> None:
        """Add the matrices of one adapter, in float32; PEFT calls it."""
        base = self.base_layer
        ranks = r * base.num_experts
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_rslora[adapter_name], self.use_dora[adapter_name] = config.use_rslora, False
        self.lora_bias[adapter_name] = False
        self.lora_dropout[adapter_name] = nn.Identity()
        on_device: dict[str, Any] = {"bias": False, "device": base.device, "dtype": torch.float32}
        self.lora_A[adapter_name] = nn.Linear(base.in_features, ranks, **on_device)
        self.lora_B[adapter_name] = nn.Linear(ranks, base.out_features, **on_device)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """The adapter as A (experts, r, inputs) and B (experts, outputs, r)."""
        experts = self.base_layer.num_experts
        a = self.lora_A[adapter_name].get_parameter("weight")
        b = self.lora_B[adapter_name].get_parameter("weight")
        return a.view(experts, -1, a.shape[1]), b.view(len(b), -1, experts).permute(2, 0, 1)

    def acting(self) -> list[str]:
        """Names of the adapters that take part in a forward pass."""
        if self.disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.lora_A]

    def forward(self, rows: Tensor, groups: Groups) -> Tensor:
        result: Tensor = self.base_layer(rows, groups)
        for name in self.acting():
            a, b = (factor.to(result.dtype) for factor in self.factors(name))
            small = grouped_linear(rows, a, groups) * self.scaling[name]
            result = result + grouped_linear(small, b.contiguous(), groups)
        return result


EXPERT_LAYERS: dict[type[nn.Module], type[nn.Module]] = {GroupedLinear: LoraGrouped}
"""PEFT's table of layers that it does not know itself."""


def adapt(model: PreTrainedModel, settings: LoraConfig, experts: Sequence[str]) -> PeftModel:
    """`get_peft_model` that also adapts the grouped linear layers called `experts`.

    The settings that stay on the model, and are saved, are those with which stock PEFT puts the
    same adapter on transformers' own experts: `target_parameters`.
    """
    linears = settings.target_modules
    if experts:
        parameters = _shortest(experts, expert_modules(model))
        settings._register_custom_module(EXPERT_LAYERS)
        if isinstance(linears, str):
            settings.target_modules = "|".join([linears, *map(re.escape, experts)])
        else:
            settings.target_modules = [*(linears or ()), *experts]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type")  # of every layer of ours
        adapted = get_peft_model(model, settings)
    assert isinstance(adapted, PeftModel)
    if experts:
        stored: Any = adapted.peft_config["default"]
        stored.target_modules, stored.target_parameters = linears or [], parameters
    return adapted


def _shortest(experts: Sequence[str], every: Sequence[str]) -> list[str]:
    """Ends of names where the same layer of experts is adapted everywhere, else whole names."""
    found = []
    for end in sorted({".".join(name.rsplit(".", 3)[1:]) for name in experts}):
        meant = [name for name in every if name.endswith(f".{end}")]
        found += [end] if set(meant) <= set(experts) else [n for n in meant if n in experts]
    return found


def stock_names(model: nn.Module) -> dict[str, str]:
    """Names of the adapted expert layers here, and where stock PEFT keeps the same tensors.

    PEFT wraps the layer of experts once for each adapted parameter, in their order: the last one
    is outermost and each one before lies a `base_layer` deeper.
    """
    by_parent: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraGrouped):
            by_parent.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        name: parent + ".base_layer" * (len(names) - 1 - place)
        for parent, names in by_parent.items()
        for place, name in enumerate(names)
    }
