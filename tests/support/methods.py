"""Ways to train, each with what stock transformers does in its place."""

from dataclasses import dataclass
from typing import Any

from tests.support import stock


@dataclass(frozen=True, slots=True)
class Method:
    """How a run trains, and what stock transformers is told for its base weights."""

    keys: dict[str, Any]
    tolerance: float
    """Of the loss and of the norm, relative."""
    stock: dict[str, Any]
    logits: float = 1e-3
    """How near the logits of the saved adapter are in stock PEFT, relative, in the norm."""


NF4: dict[str, Any] = {"adapter": "qlora", "load_in_4bit": True, "bf16": True}
ON_EXPERTS: dict[str, Any] = {
    "lora_target_modules": r"model\..*layers\.\d+\.(self_attn|mlp\.shared_experts)\.\w+_(proj|mqa)",
    "lora_target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
METHODS = {
    "full": Method({}, 1e-5, stock.FLOAT32),
    "full bfloat16": Method({"bf16": True}, 0.01, stock.BFLOAT16),
    "LoRA": Method({"adapter": "lora"}, 1e-5, stock.FLOAT32),
    "LoRA bfloat16": Method({"adapter": "lora", "bf16": True}, 0.01, stock.BFLOAT16),
    "int8 LoRA": Method({"adapter": "lora", "load_in_8bit": True, "bf16": True}, 0.01, stock.INT8),
    "NF4 LoRA": Method(NF4, 0.01, stock.NF4),
    "LoRA on experts": Method({"adapter": "lora"} | ON_EXPERTS, 1e-5, stock.FLOAT32),
    "NF4 LoRA on NF4 experts": Method(
        NF4 | {"quantize_moe_experts": True} | ON_EXPERTS, 0.01, stock.NF4, logits=0.1
    ),
}
"""The last one's arithmetic is not the same: stock PEFT rounds W + BA of an expert to bfloat16,
ours adds two products, and a token at a router's edge goes to another expert then."""
