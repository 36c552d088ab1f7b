"""What one step launches on a card, counted without one: `python -m tests.bench.step_counts`.

The trainer's own code runs the real model at full size on tensors without contents, with the
answers that it gets on a card, and each operator that reaches PyTorch's dispatcher is counted: one
kernel, or as many as `KERNELS` says, and none for a view or an empty tensor. Traffic is what an
operator reads and writes; that of matrix products and of attention is not counted.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from engine.catalog import read_architecture
from engine.plan.trainer import CHUNK_BYTES
from engine.train.forward import head_of, hidden_states
from engine.train.loss import Loss
from engine.units import GIB
from tests.research.oracle import build, cross_entropy, make_batch, materialize
from tests.support.card_bytes import INSIDES, as_on_cuda
from tests.support.machines import config

TOKENS = 4096
SHARED: dict[str, Any] = {
    "lora_r": 32,
    "sequence_len": TOKENS,
    "sample_packing": True,
    "bf16": True,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "8B LoRA, layers computed twice": (
        "ministral-3-8b",
        {"adapter": "lora", "load_in_4bit": False, "gradient_checkpointing": True},
    ),
    "8B LoRA": (
        "ministral-3-8b",
        {"adapter": "lora", "load_in_4bit": False, "gradient_checkpointing": False},
    ),
    "24B NF4": ("magistral-small-2507", {"adapter": "qlora", "gradient_checkpointing": True}),
    "Small 4 NF4 with experts": (
        "mistral-small-4",
        {
            "adapter": "qlora",
            "gradient_checkpointing": True,
            "quantize_moe_experts": True,
            "lora_target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
}
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "linear", "_grouped_mm")
KERNELS = {"_varlen_attn_backward": 3}
"""FlashAttention 2 prepares sums of rows, goes back, and narrows the queries' gradients."""
NOTHING = ("device", "detach", "_unsafe_view", "empty", "new_empty", "empty_like", "empty_strided")
"""Launched for these, and for views."""


class StepCounts(TorchDispatchMode):
    """Kernels and bytes of traffic by operator, and floating-point operations."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.traffic = Counter[str](), Counter[str]()
        self.flops = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        inside = INSIDES.get(function)
        name = function._schema.name.split("::")[1]
        if inside is not None and name not in KERNELS:
            with self:
                return inside(*args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        if name in NOTHING or _is_view(function):
            return result
        self.kernels[name] += KERNELS.get(name, 1)
        if name == "linear":
            self.flops += 2 * args[0].numel() * len(args[1])
        elif count := flop_registry.get(function.overloadpacket):
            self.flops += int(count(*args, **(kwargs or {}), out_val=result))
        if name not in PRODUCTS and "attn" not in name:
            leaves = tree_leaves((args, kwargs, result))
            read = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
            self.traffic[name] += sum(map(_touched, read.values()))
        return result


def _is_view(function: Any) -> bool:
    returned = [each.alias_info for each in function._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


def _touched(tensor: Tensor) -> int:
    """Bytes that lie apart: a dimension that only repeats is read from one place."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    numbers = 1
    for size, stride in sizes:
        numbers *= size if stride else min(size, 1)
    return numbers * tensor.element_size()


def count_step(name: str, keys: dict[str, Any]) -> StepCounts:
    """One forward and backward pass of 1 x `TOKENS` tokens of a catalog model, all learned."""
    architecture = read_architecture(name)
    settings = config(**SHARED | keys)
    with torch.device("meta"):
        model = build(architecture, settings, torch.bfloat16)
    with as_on_cuda(TOKENS, 1), FakeTensorMode(allow_non_fake_inputs=True):
        materialize(model, torch.bfloat16, vision_on_device=False)
        batch = make_batch(TOKENS, 1, ())
        model.train()
        with StepCounts() as counts:
            states = hidden_states(model, batch)
            loss = Loss(CHUNK_BYTES[0])
            cross_entropy(states, head_of(model), batch["labels"], loss).backward()
    return counts


def main() -> None:
    """Print each case's counts, and the operators that launch or move the most."""
    print(f"a forward and a backward pass of 1 x {TOKENS:,} tokens")
    print(f"{'':<32} {'kernels':>8} {'GiB':>8} {'TFLOP':>8}")
    for case, (name, keys) in CASES.items():
        counts = count_step(name, keys)
        kernels, traffic = counts.kernels.total(), counts.traffic.total() / GIB
        print(f"{case:<32} {kernels:>8,} {traffic:>8,.0f} {counts.flops / 1e12:>8,.0f}")
        most = sorted(counts.traffic, key=lambda each: -counts.traffic[each])[:6]
        for each in most:
            print(f"  {each:<30} {counts.kernels[each]:>8,} {counts.traffic[each] / GIB:>8,.0f}")


if __name__ == "__main__":
    main()
