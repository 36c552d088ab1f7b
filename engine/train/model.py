"""The base model, from its folder to a module that is safe to train.

Loading is where a model can be silently wrong: the class comes from config.json's own
`architectures`, and a weight that is missing or left over is refused, never randomly initialised.
The model is built empty and each tensor goes straight from its file to the
form in which the run holds it, so that loading takes little more room than the loaded model.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.initialization import no_tie_weights

from engine.catalog import Architecture, ModuleTable, read_architecture, with_overrides
from engine.config import RunConfig
from engine.errors import UserError
from engine.plan.trainer import refuse_other_formats
from engine.train.attention import pick_attention, use_attention
from engine.train.device import pick_device, pick_dtype
from engine.train.experts import GroupedLinear, replace_experts
from engine.train.offload import Placement
from engine.train.quantize import (
    Fp8Layout,
    find_layout,
    hold_empty,
    hold_quantized,
    statistics,
    swap_linears,
    unquantized,
)
from engine.train.weight_files import BytesProgress, StoredTensor, list_tensors
from engine.units import gib
from engine.visible import first_line, visible


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The weights of a loaded model."""

    weights: Mapping[tuple[str, str], int]
    """Numbers by the module table's group and by how they are held: NF4, int8, bfloat16."""
    from_fp8: int
    """Of them, converted from FP8 on the way."""
    held_bytes: int
    """On the device, with the statistics of what is quantized."""
    offloaded_bytes: int
    """In RAM, of what comes to the device for a while or not at all."""
    device: torch.device

    def sentence(self) -> str:
        """For the person: numbers by format, bytes, and what was converted."""
        formats = Counter[str]()
        for (_, held), count in self.weights.items():
            formats[held] += count
        parts = ", ".join(f"{_count(n)} in {held}" for held, n in formats.most_common())
        places = f"{gib(self.held_bytes)} on the GPU"
        if self.device.type == "cpu":
            places = f"{gib(self.held_bytes + self.offloaded_bytes)} in memory"
        elif self.offloaded_bytes:
            places += f", {gib(self.offloaded_bytes)} in RAM"
        text = f"{_count(sum(formats.values()))} weights: {parts}; {places}."
        if self.from_fp8:
            text += f" {_count(self.from_fp8)} of them were FP8 on the disk and were converted."
        return text


@dataclass(frozen=True, slots=True)
class Base:
    """A loaded base model and how it was loaded."""

    model: PreTrainedModel
    dtype: torch.dtype
    """Type of the weights that are not quantized, and of the arithmetic."""
    device: torch.device
    report: LoadReport
    vision_offloaded: bool = False
    """Whether the vision tower and the projector stayed in RAM and cannot be used."""
    unread: "Unread | None" = None
    """What is read when the model is divided, where it was loaded `empty`."""


@dataclass(frozen=True, slots=True)
class Unread:
    """The weights of a model that has its modules and no memory."""

    tensors: Mapping[str, StoredTensor]
    """By name in the bare model."""
    owners: Mapping[str, nn.Module]
    """The module of each: an adapter around it changes names and no modules."""
    layout: Fp8Layout


def load_base(
    folder: Path,
    config: RunConfig,
    progress: BytesProgress = lambda done, total: None,
    tensors: Mapping[str, StoredTensor] | None = None,
    *,
    images: bool = True,
    empty: bool = False,
) -> Base:
    """Load the model of `folder` as the config asks: float32, bfloat16, int8 or NF4.

    FP8 weights are converted on the way. `tensors`, by their name in memory, take the place of the
    folder's own: `fitcheck` draws them. Without `images` a vision tower that is not trained stays
    off the device. `empty` leaves weights to `slice_load`. Raises UserError when the
    architecture is not one of Mistral's, when its files are quantized in another way or cannot be
    read, or when their weights and the architecture's do not match one to one.
    """
    device = pick_device()
    dtype = pick_dtype(config, device)
    architecture = with_overrides(read_architecture(folder), config.overrides_of_model_config)
    attention = pick_attention(config, architecture, device)
    refuse_other_formats(folder, architecture.config)
    tensors = list_tensors(folder) if tensors is None else tensors
    model = build_empty(architecture, folder, dtype, attention.backend)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    layout = find_layout(tensors, folder, architecture.config)
    missing = refuse_mismatch(folder, tensors, shapes, layout, model.all_tied_weights_keys)
    swap_linears(model, config, dtype)
    replace_experts(model, config, dtype)
    needed = {name: tensor for name, tensor in tensors.items() if name in shapes}
    converted = sum(torch.Size(tensors[name].shape).numel() for name in layout.weights)
    if empty:
        model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
        return _empty_base(model, needed, layout, (dtype, device), architecture.table, converted)
    placement = Placement(model, architecture.table, config, device, images=images)
    _fill(model, needed, layout, placement, dtype, progress)
    model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
    for name, buffer in list(model.named_buffers()):
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, buffer.to(placement.device_of(name)))
    placement.finish()
    model.eval()
    report = describe_load(model, architecture.table, converted, device)
    return Base(model, dtype, device, report, placement.vision_offloaded)


def _empty_base(
    model: PreTrainedModel,
    tensors: Mapping[str, StoredTensor],
    layout: Fp8Layout,
    held: tuple[torch.dtype, torch.device],
    table: ModuleTable,
    converted: int,
) -> Base:
    """The model without memory, each weight in the form in which it will be held."""
    dtype, device = held
    for module in model.modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            hold_empty(module)
    for name, buffer in list(model.named_buffers()):
        if not buffer.is_meta:
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(owner), own, buffer.to(device))
    model.eval()
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in tensors}
    report = LoadReport(count_weights(model, table), converted, 0, 0, device)
    return Base(model, dtype, device, report, unread=Unread(tensors, owners, layout))


def build_empty(
    architecture: Architecture, folder: Path, dtype: torch.dtype, attention: str
) -> PreTrainedModel:
    """The model with its parameters on the meta device and its buffers, such as rotary, real."""
    model_class = getattr(transformers, architecture.class_name)
    # Not from the file: there a stranger may choose kernels; here those keys are gone.
    settings = model_class.config_class.from_dict(unquantized(architecture.config))
    parts = [getattr(settings, name, None) for name in settings.sub_configs]
    for config in (settings, *parts):
        if config is not None:
            config.dtype = dtype
    settings.name_or_path = str(folder)
    use_attention(settings, attention)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights(include_buffers=False), no_tie_weights():
            model: PreTrainedModel = model_class(settings)
    except ImportError as error:
        raise UserError(
            "The model cannot be loaded as the config asks.",
            f"{first_line(error)}.",
            "Remove attn_implementation, so that an installed one is chosen, or install what is "
            "missing.",
        ) from error
    finally:
        torch.set_default_dtype(before)
    if (folder / "generation_config.json").is_file():
        model.generation_config = _read_generation_config(folder, model.generation_config)
    return model


def _read_generation_config(folder: Path, default: GenerationConfig) -> GenerationConfig:
    """The folder's own, which a finished model is saved with; the model's where it is damaged."""
    try:
        content = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        return GenerationConfig.from_dict(content)
    except (ValueError, TypeError, AttributeError, RecursionError, OSError):
        return default


def refuse_mismatch(
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    layout: Fp8Layout,
    tied: Mapping[str, str],
) -> list[str]:
    """Refuse weights that the files lack, and weights that the model has no place for.

    Returns the parameters that the files lack because they share another's memory: `tied`, by the
    parameter that they share. A weight that is missing would be trained from noise; a scale that is
    left over means 8-bit numbers read without it (measured: 5,675 times too large).
    """
    shared = {name for pair in tied.items() for name in pair if any(n in tensors for n in pair)}
    missing = [name for name in shapes if name not in tensors]
    extra = [n for n in tensors if n not in shapes and n not in layout.companions]
    other = [n for n in tensors if n in shapes and tensors[n].shape != shapes[n]]
    strange = [n for n in tensors if n in shapes and not tensors[n].is_weight]
    problems = {
        "lacks weights that the model needs": [n for n in missing if n not in shared],
        "holds scales that belong to no 8-bit weight": [n for n in extra if "scale" in n],
        "holds weights that the model has no place for": extra,
        "holds weights of another shape": other,
        "holds weights that are no floating-point numbers": strange,
    }
    for problem, names in problems.items():
        if names:
            # What the files hold is named as there; in memory a Mistral 3 model's names differ.
            stored = sorted(tensors[n].name if n in tensors else n for n in names)
            shown = ", ".join(visible(name, one_line=True) for name in stored[:3])
            shown += f" and {len(stored) - 3} more" if stored[3:] else ""
            raise UserError(
                f"The folder {folder} {problem}: {shown}.",
                "Training on it would train a broken model without a warning.",
                "Download it again, or point `base_model` at a complete bfloat16 model.",
            )
    return missing


def _fill(
    model: PreTrainedModel,
    tensors: Mapping[str, StoredTensor],
    layout: Fp8Layout,
    placement: Placement,
    dtype: torch.dtype,
    progress: BytesProgress,
) -> None:
    """Read each tensor and give it to the module that holds it, in the module's own form.

    What is to stay in RAM leaves the device before the next one is read.
    """
    done, total = 0, sum(tensor.size_bytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        owner, _, own = name.rpartition(".")
        module, device = model.get_submodule(owner), placement.device_of(name)
        read = partial(layout.read, name, tensor, device, dtype)
        if isinstance(module, Linear4bit | Linear8bitLt) and own == "weight":
            hold_quantized(module, read())
        elif isinstance(stack := getattr(module, own), GroupedLinear):
            stack.take(map(read, range(tensor.shape[0])), device)
        elif len(tensor.shape) == 3:  # expert by expert: one at a time is FP8 and wide
            weight = torch.empty(tensor.shape, dtype=dtype, device=device)
            for index in range(len(weight)):
                weight[index] = read(index)
            setattr(module, own, nn.Parameter(weight))
        else:
            setattr(module, own, nn.Parameter(read()))
        placement.settle(name)
        done += tensor.size_bytes
        progress(done, total)


def describe_load(
    model: nn.Module, table: ModuleTable, from_fp8: int, device: torch.device
) -> LoadReport:
    """Count what `model`, of `table`'s architecture, holds."""
    tensors = {id(t): t for t in chain(model.parameters(), model.buffers())}
    quantized = [m for m in model.modules() if isinstance(m, Linear4bit | Linear8bitLt)]
    held = offloaded = 0
    for tensor in chain(tensors.values(), *map(statistics, quantized)):
        if tensor.device == device and tensor.untyped_storage().nbytes():
            held += tensor.nbytes
        else:
            offloaded += tensor.nbytes
    return LoadReport(count_weights(model, table), from_fp8, held, offloaded, device)


def count_weights(model: nn.Module, table: ModuleTable) -> Counter[tuple[str, str]]:
    """Numbers of `model`, of `table`'s architecture, by group and by how they are held."""
    weights = Counter[tuple[str, str]]()
    for row in table.parameters:
        if row.count:
            weights[row.group, _held_as(model, row.name)] += row.count
    return weights


def _held_as(model: nn.Module, name: str) -> str:
    module = model.get_submodule(name.rpartition(".")[0])
    if name.endswith(".weight") and isinstance(module, Linear4bit | Linear8bitLt):
        return "NF4" if isinstance(module, Linear4bit) else "int8"
    held = getattr(module, name.rpartition(".")[2])
    if isinstance(held, nn.Module):  # a stack of experts as a module of its own
        kinds = {t.dtype for t in chain(held.parameters(), held.buffers())}
        return "NF4" if torch.uint8 in kinds else _dtype_name(next(iter(kinds)))
    return _dtype_name(held.dtype)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(numbers: int) -> str:
    """24.0B, 3.4M, 12.5K."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if numbers >= size:
            return f"{numbers / size:,.1f}{letter}"
    return str(numbers)
