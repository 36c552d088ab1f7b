"""Measures what one layer of a step costs, and writes the coefficients of `plan.layers`.

`python -m tests.research.layer_memory` makes presets/memory.yml. It runs the real transformers
layers with real PEFT adapters and real bitsandbytes modules on fake tensors: shapes and lifetimes
are exact, nothing is computed, no GPU is needed. Two layers of several shapes and lengths give the
peak of a training step over its resting state; least squares gives bytes a token for each width of
the layer. The worst residual is kept beside them.
"""

import gc
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Ministral3Config, Ministral3ForCausalLM

from engine.config import RunConfig
from engine.plan.layers import Widths, inference_bytes, kept_bytes, transient_bytes
from engine.train.attention import TORCH_VARLEN, register_backends
from engine.train.forward import checkpoint_activations, hidden_states
from engine.train.lora import leave_inputs_alone
from tests.support.card_bytes import CardBytes, as_on_cuda
from tests.support.live_bytes import LiveBytes

PAGE = Path(__file__).parents[2] / "presets" / "memory.yml"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
HEAD = """\
# What one layer of a dense model costs, in bytes a token for each unit of a width: of the MLP's
# intermediate size, the hidden size, queries plus keys, the adapter's rank; and `weight`, in bytes
# a number of the MLP's matrix. moment: transient, what a layer adds to its own backward pass when
# it is computed again from its input; kept, what it keeps for that pass without checkpointing, and
# flash kept, the same with a card's kernel for attention, which repeats no keys and values;
# inference, a forward pass without gradients. worst: the furthest that one of the profiled layers
# is from it. Nothing here is fitted to a measured run: transformers' layers with PEFT and
# bitsandbytes were run on tensors without contents, in the shapes of Ministral 3 3B and 8B, the 24B
# models and Medium 3.5.
origin:
  command: python -m tests.research.layer_memory
  date: {date}
  versions: {{{versions}}}
layers:
"""

LAYERS = 2
VOCABULARY = 256
"""Small, so that embedding and loss vanish beside the layers."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Widths of one dense layer."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int = 128

    @property
    def attention(self) -> int:
        """Width of the queries plus that of keys and values."""
        return (self.heads + self.kv_heads) * self.head_dim


SHAPES = (
    Shape(3072, 9216, 32, 8),
    Shape(4096, 14336, 32, 8),
    Shape(5120, 32768, 32, 8),
    Shape(12288, 28672, 96, 8),
)
"""Ministral 3 3B and 8B, the 24B models, Medium 3.5."""
LENGTHS = (2048, 6144)
RANKS = (16, 64)


@dataclass(frozen=True, slots=True)
class Regime:
    """What of a run decides the cost of its layers."""

    name: str
    dtype: torch.dtype
    lora: bool
    dropout: float = 0.0
    quantized: bool = False
    kept: bool = False
    """Without checkpointing: what a layer keeps from its forward to its backward pass."""
    inference: bool = False
    """A forward pass without gradients."""
    flash: bool = False
    """With a card's kernel for attention, which keeps keys and values as they are."""

    @property
    def moment(self) -> str:
        """What of a layer the regime measures, as presets/memory.yml calls it."""
        kept = "flash kept" if self.flash else "kept"
        return kept if self.kept else "inference" if self.inference else "transient"

    @property
    def width(self) -> str:
        """The type of the products."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    @property
    def method(self) -> str:
        """What is trained, over which base."""
        if not self.lora:
            return "full"
        return "dropout" if self.dropout else "4-bit" if self.quantized else "lora"


REGIMES = (
    Regime("bf16 lora", torch.bfloat16, lora=True),
    Regime("bf16 lora, 4-bit base", torch.bfloat16, lora=True, quantized=True),
    Regime("bf16 lora, dropout", torch.bfloat16, lora=True, dropout=0.05),
    Regime("bf16 full", torch.bfloat16, lora=False),
    Regime("fp32 lora", torch.float32, lora=True),
    Regime("fp32 lora, dropout", torch.float32, lora=True, dropout=0.05),
    Regime("fp32 full", torch.float32, lora=False),
    Regime("bf16 lora, kept", torch.bfloat16, lora=True, kept=True),
    Regime("bf16 full, kept", torch.bfloat16, lora=False, kept=True),
    Regime("bf16 lora, flash kept", torch.bfloat16, lora=True, kept=True, flash=True),
    Regime("bf16 full, flash kept", torch.bfloat16, lora=False, kept=True, flash=True),
    Regime("fp32 lora, kept", torch.float32, lora=True, kept=True),
    Regime("fp32 full, kept", torch.float32, lora=False, kept=True),
    Regime("bf16 lora, inference", torch.bfloat16, lora=True, inference=True),
    Regime("fp32 lora, inference", torch.float32, lora=True, inference=True),
)


class _Product(torch.autograd.Function):
    """bitsandbytes' product by what it allocates: the weight in 16 bits, in the backward pass."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, packed: torch.Tensor, out: int) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.width, ctx.out = states.shape[-1], out
        return states.new_empty((*states.shape[:-1], out))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = gradients
        return gradient @ gradient.new_empty((ctx.out, ctx.width)), None, None


class FourBit(Linear4bit):
    """bitsandbytes' module, which PEFT recognises, around the product above."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = _Product.apply(x, self.weight, self.out_features)
        return product


def four_bit(layer: nn.Linear) -> nn.Module:
    """A module of the same shape whose weight is packed."""
    module = FourBit(layer.in_features, layer.out_features, bias=False, device="meta")
    module.weight = Params4bit(
        torch.empty((layer.weight.numel() // 2, 1), dtype=torch.uint8, device="meta"),
        requires_grad=False,
        bnb_quantized=True,
    )
    return module


def build(shape: Shape, layers: int, rank: int, regime: Regime) -> Any:
    """The model as our trainer makes it, on the meta device."""
    settings = Ministral3Config(  # type: ignore[call-arg]
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=True,
        attn_implementation=TORCH_VARLEN if regime.flash else "sdpa",
    )
    model: Any = Ministral3ForCausalLM(settings)
    model.to(regime.dtype)
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    names = [name for name, _ in linear if name != "lm_head"]
    if regime.quantized:
        for name, module in linear:
            if name in names:
                model.set_submodule(name, four_bit(module))
        model.is_loaded_in_4bit = True
    if not regime.kept:
        checkpoint_activations(model)
    if rank == 0:
        return model
    model.requires_grad_(False)
    lora = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=regime.dropout, target_modules=names)
    adapted = get_peft_model(model, lora)
    leave_inputs_alone(adapted)
    return adapted


def make_fake(model: nn.Module) -> None:
    """Give every parameter and buffer a fake tensor in place of its meta tensor."""
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        return made[id(tensor)]

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            module._parameters[name] = nn.Parameter(fake(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)


def step_bytes(shape: Shape, layers: int, tokens: int, rank: int, regime: Regime) -> int:
    """Peak of a step over weights and gradients. Rank 0 trains every weight."""
    register_backends()
    with torch.device("meta"):
        model = build(shape, layers, rank, regime)
    counter = CardBytes() if regime.flash else LiveBytes()
    card = as_on_cuda(tokens, 1) if regime.flash else nullcontext()
    with card, FakeTensorMode(allow_non_fake_inputs=True), counter:
        make_fake(model)
        model.train(not regime.inference)
        ids = torch.zeros((1, tokens), dtype=torch.long)
        batch = {"input_ids": ids, "position_ids": torch.arange(tokens)[None]}
        if regime.inference:
            gc.collect()
            resting = counter.peak = counter.now
            with torch.no_grad():
                hidden_states(model, batch)
            return counter.peak - resting
        for _ in range(2):
            gc.collect()
            # The gradients of the first round are at rest in the second.
            resting = counter.now
            counter.peak = counter.now
            states = hidden_states(model, batch)
            states.sum().backward()
            del states
        return counter.peak - resting


def layer_bytes(shape: Shape, tokens: int, rank: int, regime: Regime) -> int:
    """What one layer adds: kept for good, or for the time of its own backward pass."""
    peak = step_bytes(shape, LAYERS, tokens, rank, regime)
    if regime.kept:
        return (step_bytes(shape, 2 * LAYERS, tokens, rank, regime) - peak) // LAYERS
    width = torch.finfo(regime.dtype).bits // 8
    states = 1 if regime.inference else LAYERS
    return peak - states * tokens * shape.hidden * width


def samples(regime: "Regime") -> Iterator[tuple[list[int], int]]:
    """Rows of the least squares: what each coefficient multiplies, and the bytes."""
    for shape, tokens, rank in itertools.product(SHAPES, LENGTHS, RANKS if regime.lora else (0,)):
        terms = [tokens * shape.intermediate, tokens * shape.hidden, tokens * shape.attention]
        whole = regime.quantized or not (regime.lora or regime.kept or regime.inference)
        weight = shape.hidden * shape.intermediate if whole else 0
        yield [*terms, tokens * rank, weight], layer_bytes(shape, tokens, rank, regime)


def fit(regime: Regime) -> dict[str, Any]:
    """The coefficients of one regime, as an entry of presets/memory.yml."""
    rows = list(samples(regime))
    terms = np.array([row for row, _ in rows], dtype=float)
    measured = np.array([found for _, found in rows], dtype=float)
    used = terms.any(axis=0)
    found = np.zeros(terms.shape[1])
    # Relative errors: a small layer counts as much as a large one.
    relative = terms[:, used] / measured[:, None]
    found[used] = np.linalg.lstsq(relative, np.ones(len(rows)), rcond=None)[0]
    names = ("intermediate", "hidden", "attention", "rank", "weight")
    figures = {name: round(float(figure), 2) for name, figure in zip(names, found, strict=True)}
    worst = float(np.abs(terms @ found / measured - 1).max())
    key = {"moment": regime.moment, "type": regime.width, "method": regime.method}
    return key | figures | {"worst": round(worst, 3)}


def main() -> None:
    """Write presets/memory.yml, a line a regime."""
    versions = ", ".join(f"{name}: {version(name)}" for name in PACKAGES)
    lines = [HEAD.format(date=date.today(), versions=versions)]
    for regime in REGIMES:
        entry = ", ".join(f"{key}: {value}" for key, value in fit(regime).items())
        lines.append(f"  - {{{entry}}}\n")
        print(lines[-1], end="", flush=True)
    PAGE.write_text("".join(lines), encoding="utf-8")


def layer_against_plan(regime: Regime) -> tuple[float, float]:
    """Bytes of one layer by the plan's formula and as they are counted."""
    shape, tokens, rank = Shape(3072, 9216, 32, 8), 2048, 16
    config = RunConfig(
        base_model="any",
        adapter="qlora" if regime.quantized else "lora" if regime.lora else None,
        load_in_4bit=regime.quantized,
        lora_r=rank,
        lora_dropout=regime.dropout,
        gradient_checkpointing=not regime.kept,
        bf16=False,
        sequence_len=128,
    )
    sizes = Widths(1, shape.hidden, shape.intermediate, shape.attention, VOCABULARY, 0, 0, 0)
    formula: dict[str, Callable[..., float]] = {
        "kept": kept_bytes,
        "flash kept": partial(kept_bytes, flash=True),
        "inference": inference_bytes,
        "transient": transient_bytes,
    }
    planned = formula[regime.moment](config, sizes, tokens, regime.dtype.itemsize)
    return planned, layer_bytes(shape, tokens, rank if regime.lora else 0, regime)


if __name__ == "__main__":
    main()
