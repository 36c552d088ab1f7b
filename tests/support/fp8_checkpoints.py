"""FP8 checkpoints as Mistral publishes them, made of a bfloat16 one."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.tiny import edit_config

LARGEST = 448.0
"""The largest number that e4m3 holds."""


def quantize(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """An FP8 matrix or stack, and the scale of each block of rows and columns."""
    *stack, height, width = weight.shape
    grid = weight.float().reshape(*stack, height // rows, rows, width // columns, columns)
    scale = grid.abs().amax((-3, -1)) / LARGEST
    small = (grid / scale[..., :, None, :, None]).reshape(weight.shape)
    return small.to(torch.float8_e4m3fn), scale


def write_fp8(folder: Path, block: int | None = None) -> Path:
    """Rewrite the model in `folder`: layer matrices and experts in FP8, everything else as it was.

    One scale a matrix (0-d) or expert (E, 1, 1) beside the scale of its inputs; with `block`, one
    for that many rows and columns.
    """
    path = folder / "model.safetensors"
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(path).items():
        text = "layers" in name and "vision_tower" not in name
        if not text or weight.ndim < 2 or name.endswith("mlp.gate.weight"):
            tensors[name] = weight
            continue
        height, width = weight.shape[-2:]
        tensors[name], scale = quantize(weight, block or height, block or width)
        if block is None and weight.ndim == 2:
            scale = scale.reshape(())
        tensors[f"{name}_scale_inv"] = scale
        inputs = name.removesuffix(".weight") + "." if weight.ndim == 2 else f"{name}_"
        tensors[f"{inputs}activation_scale"] = torch.ones(weight.shape[0])
    save_file(tensors, path, {"format": "pt"})
    settings = {"quant_method": "fp8", "activation_scheme": "static"}
    size = [block, block] if block else None
    edit_config(folder, quantization_config={**settings, "weight_block_size": size})
    return folder
