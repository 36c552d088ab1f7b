"""Weights in 4 and 8 bits: which linears hold them, and the ways in which they go wrong silently.

The linears are replaced while they are still empty, and each weight is quantized on its way from
the file to its device.
"""

import logging
from typing import Any

import torch
from bitsandbytes.functional import int8_vectorwise_quant
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.config import RunConfig
from engine.errors import WorkError
from engine.plan.trainer import is_kept, kept_modules

MOST_NUMBERS = 2**31 - 1
"""Of one tensor: bitsandbytes' kernels count with 32 bits, and a larger one would wrap around. All
experts' gate and up matrices of a layer of Mistral Small 4 are 2^31 numbers together."""
OUTLIER_THRESHOLD = 6.0
"""Inputs beyond it are multiplied in 16 bits (LLM.int8(), arXiv 2208.07339)."""

# One warning a product, on something that is meant: bfloat16 inputs are quantized from float16.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def swap_linears(model: PreTrainedModel, config: RunConfig, dtype: torch.dtype) -> int:
    """Replace the linears of an empty model that the config wants quantized; returns how many.

    4 bits are NF4 with double quantization (QLoRA, arXiv 2305.14314), 8 bits are LLM.int8(). The
    model is marked as PEFT expects it.
    """
    if not (config.load_in_4bit or config.load_in_8bit):
        return 0
    kept = kept_modules(config)
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not is_kept(name, kept)
    }
    for name, module in linears.items():
        with torch.device("meta"):
            swapped = _four_bit(module, dtype) if config.load_in_4bit else _eight_bit(module)
        swapped.requires_grad_(False)
        model.set_submodule(name, swapped)
    marked: Any = model
    marked.is_loaded_in_4bit, marked.is_loaded_in_8bit = config.load_in_4bit, config.load_in_8bit
    return len(linears)


def _four_bit(linear: nn.Linear, compute_dtype: torch.dtype) -> Linear4bit:
    module = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute_dtype,
        compress_statistics=True,
        quant_type="nf4",
    )
    # With AVX512-BF16 a forward without gradients repacks the weight in place, and the next
    # training step goes through a kernel that has no autograd: gradients were measured up to 109 %
    # wrong after one evaluation, with a warning only.
    module.support_avx512bf16_for_cpu = False
    return module


class FlatLinear8bit(Linear8bitLt):
    """bitsandbytes' layer for inputs of any shape: its own product takes two or three dimensions.

    Mistral 4 expands its keys and values from four.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        rows: Tensor = super().forward(inputs.flatten(0, -2))
        return rows.view(*inputs.shape[:-1], rows.shape[-1])


def _eight_bit(linear: nn.Linear) -> FlatLinear8bit:
    return FlatLinear8bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        has_fp16_weights=False,
        threshold=OUTLIER_THRESHOLD,
    )


def require_countable(weight: Tensor) -> None:
    """Raises WorkError for a weight that bitsandbytes would quantize wrongly, without a word."""
    if weight.numel() > MOST_NUMBERS:
        raise WorkError(
            f"A weight of {weight.numel():,} numbers cannot be quantized.",
            f"bitsandbytes counts up to {MOST_NUMBERS:,} in one tensor and goes wrong beyond.",
            "Train with adapter: lora, whose base keeps its 16 bits.",
        )


def hold_quantized(module: Linear4bit | Linear8bitLt, weight: Tensor) -> None:
    """Give `module` its weight, (outputs, inputs), quantized on the device where it lies."""
    require_countable(weight)
    if isinstance(module, Linear4bit):
        packed: Any = Params4bit(weight, compress_statistics=True, quant_type="nf4", module=module)
        module.weight = packed.to(weight.device)
        return
    numbers, row_maxima, _ = int8_vectorwise_quant(weight.to(torch.float16))
    module.weight = Int8Params(numbers, requires_grad=False, CB=numbers, SCB=row_maxima)


def statistics(module: Linear4bit | Linear8bitLt) -> tuple[Tensor, ...]:
    """What a quantized linear holds beside its parameters."""
    weight: Any = module.weight
    if isinstance(module, Linear8bitLt):
        # The weight's own until the first forward, the module's after it.
        maxima: Any = module.state.SCB if weight.SCB is None else weight.SCB
        return (maxima,)
    state = weight.quant_state
    return (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
