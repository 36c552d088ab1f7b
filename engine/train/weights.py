"""What is trained, and its way to disk and back.

Apart from `checkpoint` because the finished adapter or model is the same thing as the one inside a
checkpoint: for LoRA it is PEFT's own layout, for a full fine-tune the trained tensors by name.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.config import RunConfig
from engine.errors import WorkError

TRAINED = "trained.safetensors"


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of everything that receives a gradient, in the model's own order."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def save_trained(model: nn.Module, folder: Path, config: RunConfig) -> None:
    """Write the trained tensors into `folder`: an adapter in PEFT's layout, or `TRAINED`."""
    if config.adapter is None:
        tensors = {name: p.detach().contiguous() for name, p in trained_parameters(model)}
        save_file(tensors, folder / TRAINED)
        return
    settings = model.peft_config["default"]
    settings.base_model_name_or_path = config.base_model
    settings.save_pretrained(str(folder), inference_mode=True)
    tensors = {k: v.detach().contiguous() for k, v in get_peft_model_state_dict(model).items()}
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def load_trained(model: nn.Module, folder: Path, config: RunConfig) -> None:
    """Put what `save_trained` wrote back into `model`, bit for bit; WorkError when a name differs."""
    if config.adapter is not None:
        tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
        report = set_peft_model_state_dict(model, tensors)
        wrong = list(report.unexpected_keys) + [k for k in report.missing_keys if "lora_" in k]
    else:
        tensors = load_file(folder / TRAINED)
        parameters = dict(trained_parameters(model))
        wrong = sorted(set(tensors) ^ set(parameters))
        if not wrong:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(tensors[name])
    if wrong:
        raise WorkError(
            f"The weights in {folder} belong to another model: {wrong[0]} has no counterpart.",
            "The config was changed since they were saved, so they cannot be put back.",
            "Undo the change to the config, or train into a new output_dir.",
        )


def export_trained(model: nn.Module, folder: Path, base: Path, config: RunConfig) -> Path:
    """Write the finished adapter (`adapter/`) or model (`model/`) of a run; returns its folder.

    A full model gets its base's tokenizer beside it, so that the folder works on its own.
    """
    target = folder / ("model" if config.adapter is None else "adapter")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if config.adapter is None:
        model.save_pretrained(partial)
        for name in base.glob("*tekken*.json"):
            shutil.copy2(name, partial / name.name)
    else:
        save_trained(model, partial, config)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    return target


def same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Equal names, shapes, types and bits (NaNs of equal bits are equal)."""
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype
        and left[k].shape == right[k].shape
        and torch.equal(left[k].view(torch.uint8), right[k].view(torch.uint8))
        for k in left
    )
