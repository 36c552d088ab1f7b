"""Weights in fewer bits, held in NF4 or int8 and read from FP8, and how they go wrong silently.

Linears are replaced while they are still empty, and each weight is quantized on its way from the
file to its device. FP8 numbers that are read without their scale are finite, plausible, and
thousands of times too large. Their layouts are those of Mistral's repositories (one scale a matrix,
or one an expert) and of block-wise ones.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from bitsandbytes.autograd._functions import matmul
from bitsandbytes.functional import (
    QuantState,
    get_4bit_type,
    int8_vectorwise_quant,
    quantize_4bit,
    quantize_blockwise,
)
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.config import RunConfig
from engine.errors import UserError, WorkError
from engine.plan.trainer import is_kept, kept_modules
from engine.train.weight_files import StoredTensor
from engine.visible import visible

NF4_BLOCK = 64
"""Weights that share one scale (QLoRA, arXiv 2305.14314)."""
NESTED_BLOCK = 256
"""Scales that share one scale of scales."""
MOST_NUMBERS = 2**31 - 1
"""Of one tensor: bitsandbytes' kernels count with 32 bits, and a larger one would wrap around. All
experts' gate and up matrices of a layer of Mistral Small 4 are 2^31 numbers together."""
OUTLIER_THRESHOLD = 6.0
"""Inputs beyond it are multiplied in 16 bits (LLM.int8(), arXiv 2208.07339)."""

# One warning a product, on something that is meant: bfloat16 inputs are quantized from float16.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def swap_linears(model: PreTrainedModel, config: RunConfig, dtype: torch.dtype) -> None:
    """Replace the linears of an empty model that the config wants quantized.

    4 bits are NF4 with double quantization (QLoRA, arXiv 2305.14314), 8 bits are LLM.int8(). The
    model is marked as PEFT expects it.
    """
    if not (config.load_in_4bit or config.load_in_8bit):
        return
    kept = kept_modules(config)
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or is_kept(name, kept):
            continue
        with torch.device("meta"):
            swapped = _four_bit(module, dtype) if config.load_in_4bit else _eight_bit(module)
        swapped.requires_grad_(False)
        model.set_submodule(name, swapped)
    marked: Any = model
    marked.is_loaded_in_4bit, marked.is_loaded_in_8bit = config.load_in_4bit, config.load_in_8bit


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
        flat, state = inputs.flatten(0, -2), self.state
        if self._apart:
            state.is_training, state.CB = self.training, self.weight.data
            rows: Tensor = matmul(flat, self.weight, bias=self.bias, state=state)
        else:
            rows = super().forward(flat)
        return rows.view(*inputs.shape[:-1], rows.shape[-1])

    def hold_apart(self) -> None:
        """Make the numbers a plain parameter, which FSDP divides; each row's largest stays whole.

        bitsandbytes keeps both on the parameter, which FSDP replaces by one of its own.
        """
        weight: Any = self.weight
        self.state.SCB, self._apart = weight.SCB, True
        self.weight = nn.Parameter(weight.data, requires_grad=False)

    _apart = False


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


def hold_empty(module: Linear4bit | Linear8bitLt) -> None:
    """Give `module` a weight in its own form without memory, for several ranks to divide."""
    shape = (module.out_features, module.in_features)
    require_countable(torch.empty(shape, device="meta"))
    if isinstance(module, Linear4bit):
        size = (-(-shape[0] * shape[1] // 2), 1)
        empty = torch.empty(size, dtype=torch.uint8, device="meta")
        keys: Any = {"compress_statistics": True, "quant_type": "nf4", "bnb_quantized": True}
        module.weight = Params4bit(empty, requires_grad=False, module=module, **keys)
    else:
        numbers = torch.empty(shape, dtype=torch.int8, device="meta")
        module.weight = Int8Params(numbers, requires_grad=False)


Read: TypeAlias = Callable[[int, int], Tensor]
"""Rows of a weight, from the first to before the last."""
Merge: TypeAlias = Callable[[Tensor], Tensor]
"""The largest of each number over the ranks that hold one copy."""


def quantize_part(
    module: Linear4bit | Linear8bitLt, part: Tensor, first: int, read: Read, merge: Merge
) -> None:
    """Fill `part`, this rank's rows of `module`'s weight from row `first` of what is held on, with
    the bits that the whole weight has there, and give the module the statistics of all of it.

    In NF4 a row that is held is a byte, two numbers: a rank quantizes every block that its bytes
    are in. Scales are quantized in turn only when all of them are known, as they have one mean.
    """
    if isinstance(module, Linear8bitLt):
        maxima = torch.zeros(module.out_features, device=part.device)
        if len(part):
            numbers, own, _ = int8_vectorwise_quant(
                read(first, first + len(part)).to(torch.float16)
            )
            part.copy_(numbers)
            maxima[first : first + len(part)] = own
        state: Any = module.state
        state.SCB = merge(maxima)
        return
    width, count = module.in_features, module.out_features * module.in_features
    begin = 2 * first // NF4_BLOCK * NF4_BLOCK
    end = min(count, -(-2 * (first + len(part)) // NF4_BLOCK) * NF4_BLOCK)
    scales = torch.zeros(-(-count // NF4_BLOCK), device=part.device)
    dtype = module.compute_dtype
    if len(part):
        top = begin // width
        rows = read(top, -(-end // width))
        numbers = rows.flatten()[begin - top * width : end - top * width].contiguous()
        packed, plain = quantize_4bit(numbers, blocksize=NF4_BLOCK, quant_type="nf4")
        part.copy_(packed.view(-1, 1)[first - begin // 2 :][: len(part)])
        scales[begin // NF4_BLOCK :][: len(plain.absmax)] = plain.absmax
    scales = merge(scales)
    offset = scales.mean()
    narrow, nested = quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
    module.quant_state = QuantState(
        absmax=narrow,
        shape=torch.Size((module.out_features, width)),
        code=get_4bit_type("nf4", device=part.device),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=offset,
        state2=nested,
    )


def statistics(module: Linear4bit | Linear8bitLt) -> tuple[Tensor, ...]:
    """What a quantized linear holds beside its parameters."""
    held: Any = module
    if isinstance(module, Linear8bitLt):
        # The weight's own until the first forward, the module's after it.
        maxima: Any = getattr(held.weight, "SCB", None)
        return (held.state.SCB if maxima is None else maxima,)
    state = held.quant_state  # as the weight's own, which is gone once it is sharded
    return (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)


CHUNK_NUMBERS = 2**24
"""Numbers that are float32 at one time: 64 MiB."""


@dataclass(frozen=True, slots=True)
class Fp8Layout:
    """What of a model's files is FP8. Names are those in memory."""

    weights: Mapping[str, tuple[StoredTensor, tuple[int, int] | None]]
    """Scales, and the rows and columns that share one number: None for one scale a matrix."""
    companions: frozenset[str]
    """Scales, those of activations included: training computes activations unquantized."""

    def read(
        self,
        name: str,
        tensor: StoredTensor,
        device: torch.device,
        dtype: torch.dtype,
        index: int | slice | None = None,
    ) -> Tensor:
        """What a tensor's numbers mean, FP8 or not, or those of entry `index` of a stack, or of
        some rows of a matrix; a copy of the file's."""
        if name not in self.weights:
            return tensor.read(index).to(device, dtype, copy=True)
        stored, block = self.weights[name]
        skipped = 0
        if isinstance(index, slice) and block is not None:  # from where a row of blocks begins
            skipped = index.start % block[0]
            index = slice(index.start - skipped, index.stop)
        part = tensor.read(index)
        # In float32: 0-d, (E,), (rows, columns) of blocks, or (E, rows, columns).
        scale = stored.read().to(device, torch.float32, copy=True)
        if block is None:
            scale = scale.reshape(()) if scale.numel() == 1 else scale.flatten()
        if isinstance(index, slice) and block is not None:
            scale = scale[index.start // block[0] :]
        elif index is not None and scale.ndim:
            scale = scale[index]
        weight = torch.empty(part.shape, dtype=dtype, device=device)
        dequantize(part.to(device), scale, block, weight)
        return weight[skipped:]


def find_layout(
    tensors: Mapping[str, StoredTensor], folder: Path, config: Mapping[str, Any]
) -> Fp8Layout:
    """Pair every FP8 tensor with its scale; `config` is that of the model in `folder`.

    A scale that belongs to no FP8 tensor is in no pair: it is left over. Raises UserError for an
    FP8 tensor without a scale, or with one whose shape does not fit.
    """
    weights, companions, block = {}, set[str](), _block_size(config)
    for name, tensor in tensors.items():
        if not tensor.is_fp8:
            continue
        # The second spelling is that of Mistral's own format.
        names = (f"{name}_scale_inv", f"{name.removesuffix('weight')}qscale_weight")
        found = [scale for scale in names if scale in tensors]
        if not found:
            raise UserError(
                f"The folder {folder} holds 8-bit weights without their scale: "
                f"{visible(tensor.name, one_line=True)}.",
                "Read as they are, those numbers would be thousands of times too large.",
                "Download it again, or point `base_model` at the model's BF16 repository.",
            )
        weights[name] = tensors[found[0]], _block(tensor, tensors[found[0]], block)
        stem = name.removesuffix(".weight")
        activations = (f"{name}_activation_scale", f"{stem}.activation_scale", f"{stem}.qscale_act")
        companions |= {found[0], *(scale for scale in activations if scale in tensors)}
    return Fp8Layout(weights, frozenset(companions))


def _block_size(config: Mapping[str, Any]) -> list[int] | None:
    settings = config.get("quantization_config")
    block = settings.get("weight_block_size") if isinstance(settings, Mapping) else None
    fits = isinstance(block, list) and all(isinstance(n, int) and n > 0 for n in block)
    return block if fits else None


def _block(
    weight: StoredTensor, scale: StoredTensor, block: Sequence[int] | None
) -> tuple[int, int] | None:
    """Rows and columns of `weight` that one number of `scale` is for; None for a whole matrix."""
    stack, matrix = weight.shape[:-2], weight.shape[-2:]
    # (), (1,) and, for experts, (E,) and (E, 1, 1): one scale a matrix.
    if len(matrix) == 2 and scale.shape in ((), (1,), (1, 1), stack, (*stack, 1, 1)):
        return None
    grid = scale.shape[-2:]
    if len(matrix) == 2 and len(grid) == 2 and scale.shape[:-2] == stack and all(grid):
        guessed = [side // count for side, count in zip(matrix, grid, strict=True)]
        rows, columns = block if block and len(block) == 2 else guessed
        if rows > 0 < columns and grid == (-(-matrix[0] // rows), -(-matrix[1] // columns)):
            return rows, columns
    shown = visible(weight.name, one_line=True)
    raise UserError(
        f"The scale of {shown} in {weight.file.parent} has the shape {list(scale.shape)}.",
        f"That fits no way of scaling 8-bit weights of the shape {list(weight.shape)}.",
        "Point `base_model` at the model's BF16 repository.",
    )


def unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a model's config without what it says of its weights' format on disk."""
    content = deepcopy(dict(config))
    for part in (content, content.get("text_config"), content.get("vision_config")):
        if isinstance(part, dict):
            part.pop("quantization_config", None)
    return content


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int] | None, out: Tensor) -> None:
    """Write the numbers of an FP8 matrix into `out`, of the same shape and on the same device.

    `scale` is 0-d, or a number for each `block` of rows and columns. Each number is computed in
    float32 and rounded once.
    """
    rows = max(1, CHUNK_NUMBERS // weight.shape[1])
    if block is not None:
        rows = max(block[0], rows // block[0] * block[0])
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows].float()
        if block is None:
            part *= scale
        else:
            lines = scale[start // block[0] :][: -(-part.shape[0] // block[0])]
            wide = lines.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            part *= wide[: part.shape[0], : part.shape[1]]
        out[start : start + rows] = part
