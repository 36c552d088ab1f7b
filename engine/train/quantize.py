"""NF4 weights: what bitsandbytes is asked for, and the two ways in which it goes wrong silently.

Apart from `model` because 4-bit is optional and its guards must run before the first forward.
"""

import torch
from torch import nn
from transformers import BitsAndBytesConfig

KEPT = ("lm_head", "model.vision_tower", "model.multi_modal_projector")
"""Modules that stay in the base precision: bitsandbytes itself would skip the head only.
transformers reads each as the start or the end of a full name, never as a part of it."""


def nf4(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantization (QLoRA, arXiv 2305.14314): 0.516 byte a weight."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=list(KEPT),
    )


def keep_gradients_on_cpu(model: nn.Module) -> int:
    """Turn off bitsandbytes' repacked CPU weights; returns how many layers were switched.

    With AVX512-BF16 a forward without gradients repacks each 4-bit weight in place, and the next
    training step goes through a kernel that has no autograd: gradients were measured up to 109 %
    wrong after one evaluation, with a warning only.
    """
    from bitsandbytes.nn.modules import Linear4bit

    switched = 0
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            switched += 1
    return switched
