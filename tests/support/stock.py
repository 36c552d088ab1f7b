"""The yardstick: stock transformers and PEFT, one row at a time, as a person would write it."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.chat.render import Kind, LabelRule
from engine.train.attention import use_attention
from engine.train.batches import Rows, collate, pad
from engine.train.experts import GroupedNF4
from engine.train.forward import Model, half_precision, head_of, hidden_states
from tests.support.tiny import VOCABULARY, edit_config

KEPT = ["lm_head", "model.vision_tower", "model.multi_modal_projector"]
"""Names as they begin in memory: transformers quantizes the tower of a mere `vision_tower`."""


def seen(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a stock model is given of a batch."""
    given = {"input_ids": tensors["input_ids"]}
    if "pixels" in tensors:
        sizes = tensors["image_sizes"]
        given |= {"pixel_values": pad(tensors["pixels"], sizes.tolist()), "image_sizes": sizes}
    return given


def quantized(**keys: Any) -> dict[str, Any]:
    """What stock transformers is told to quantize a bfloat16 model with bitsandbytes."""
    settings = transformers.BitsAndBytesConfig(llm_int8_skip_modules=KEPT, **keys)
    return {"dtype": torch.bfloat16, "quantization_config": settings}


FLOAT32: dict[str, Any] = {"dtype": torch.float32}
BFLOAT16: dict[str, Any] = {"dtype": torch.bfloat16}
INT8 = quantized(load_in_8bit=True)
NF4 = quantized(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


def open_model(folder: Path, keys: dict[str, Any]) -> Any:
    """The folder's model as transformers loads it, fit for gradients on a CPU."""
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    model = getattr(transformers, name).from_pretrained(folder, **keys)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # its kernel has no gradients
        if isinstance(module, Linear8bitLt):
            _flatten(module)
    return model


def _flatten(module: Linear8bitLt) -> None:
    """Hand the layer two dimensions: it fails on the four of latent attention."""
    stock: Any = module.forward

    def forward(inputs: Tensor) -> Tensor:
        rows: Tensor = stock(inputs.flatten(0, -2))
        return rows.view(*inputs.shape[:-1], -1)

    module.forward = forward  # type: ignore[assignment]


def open_adapter(model: Any, folder: Path) -> Any:
    """The model with the adapter of `folder`, ready to train."""
    return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True)


def take_nf4_experts(stock: Any, model: Model) -> None:
    """Give stock experts, which bitsandbytes leaves alone, the numbers that NF4 leaves of them."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, GroupedNF4):
                own = name.removeprefix("base_model.model.").removesuffix(".base_layer")
                for expert in range(module.num_experts):
                    stock.get_parameter(own)[expert] = module.matrix(expert)


def take_step(model: Any, rows: Rows) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the model's own `model(input_ids, labels)`, row by row."""
    total, learned = 0.0, 0
    with half_precision(model):
        for row in range(len(rows)):
            tensors = row_of(rows, row)
            count = int((tensors["labels"] != -100).sum())
            loss = model(**seen(tensors), labels=tensors["labels"], use_cache=False).loss * count
            loss.backward()
            total, learned = total + loss.item(), learned + count
    named = model.named_parameters()
    return total / learned, {n: p.grad.float() / learned for n, p in named if p.grad is not None}


def row_of(rows: Rows, row: int) -> dict[str, Tensor]:
    """One row as a batch."""
    return collate(rows, [[row]], LabelRule()).tensors


def logits(model: Any, tensors: dict[str, Tensor]) -> Tensor:
    """Of every token of a batch, by the model's own forward pass."""
    with torch.no_grad(), half_precision(model):
        found: Tensor = model.eval()(**seen(tensors)).logits.float()
    return found


def logits_of_ours(model: Model, tensors: dict[str, Tensor]) -> Tensor:
    """The same by the forward pass of a run."""
    model.eval()
    with torch.no_grad(), half_precision(model):
        return (hidden_states(model, tensors) @ head_of(model).T).float()


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative, in the norm."""
    return float((found - expected).norm() / expected.norm())


def write_dequantized(source: Path, folder: Path) -> Path:
    """What the FP8 model in `source`, of one scale a matrix or expert, means: in float32."""
    tensors = load_file(source / "model.safetensors")
    plain = {
        name: tensor.float() * tensors[f"{name}_scale_inv"]
        if tensor.dtype == torch.float8_e4m3fn
        else tensor
        for name, tensor in tensors.items()
        if not name.endswith(("_scale_inv", "activation_scale"))
    }
    folder.mkdir()
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    edit_config(folder, quantization_config=None)
    return folder


def norm_of(tensors: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([t.flatten().double() for t in tensors.values()]).norm())


def stock_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The folder's model as transformers loads it, not quantized."""
    return open_model(folder, {"dtype": dtype})


def stock_step(model: Any, rows: Rows, prefix: str = "") -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of transformers' own `model(input_ids, labels)`, row by row."""
    total, learned = 0.0, 0
    for index in range(len(rows)):
        ids = torch.from_numpy(rows.ids(index).astype(np.int64))[None]
        learns = torch.from_numpy(rows.kinds(index) >= Kind.TEXT)[None]
        count = int(learns.sum())
        loss = model(input_ids=ids, labels=ids.masked_fill(~learns, -100)).loss * count
        loss.backward()
        total, learned = total + loss.item(), learned + count
    named = model.named_parameters()
    found = {prefix + n: p.grad / learned for n, p in named if p.grad is not None}
    return total / learned, found


CUT = "flash_attention_torch"
SIZES = ([13, 20, 7], [25, 15])


def positions(sizes: tuple[list[int], ...] = SIZES) -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in sizes])


@cache
def tokens() -> Tensor:
    return torch.randint(20, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))


def tiny(architecture: dict[str, Any], backend: str, **keys: Any) -> Any:
    model_class = getattr(transformers, architecture["architectures"][0])
    config = model_class.config_class.from_dict(architecture | keys)
    use_attention(config, backend)
    torch.manual_seed(0)
    return model_class(config).train()


def states(model: Any, ids: Tensor, where: Tensor) -> Tensor:
    found = model.model(input_ids=ids, position_ids=where, use_cache=False).last_hidden_state
    assert isinstance(found, Tensor)
    return found
