"""What is trained, and its way to disk and back.

Apart from `checkpoint` because the finished adapter or model is the same thing as the one inside a
checkpoint: for LoRA it is PEFT's own layout, for a full fine-tune the trained tensors by name.
"""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.config import RunConfig
from engine.errors import WorkError
from engine.train.forward import Model, unwrapped

TRAINED = "trained.safetensors"


def trained_parameters(model: Model) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of everything that receives a gradient, in the model's own order."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def trained_tensors(model: Model) -> dict[str, Tensor]:
    """What is trained by the name that it has on disk; the tensors are the model's own."""
    if isinstance(model, PeftModel):
        # Left to itself, PEFT asks the hub whether the base's vocabulary was resized.
        return dict(get_peft_model_state_dict(model, save_embedding_layers=False))
    return {name: p.detach() for name, p in trained_parameters(model)}


def save_trained(model: Model, folder: Path, config: RunConfig) -> None:
    """Write the trained tensors into `folder`: an adapter in PEFT's layout, or `TRAINED`."""
    tensors = {name: tensor.contiguous() for name, tensor in trained_tensors(model).items()}
    save_file(tensors, folder / _file_name(model), metadata={"format": "pt"})
    if isinstance(model, PeftModel):
        settings = copy.copy(model.peft_config["default"])
        settings.base_model_name_or_path = config.base_model
        settings.inference_mode = True
        settings.save_pretrained(str(folder))


def load_trained(model: Model, folder: Path) -> None:
    """Put what `save_trained` wrote back, bit for bit. WorkError when a name or shape differs."""
    path, own = folder / _file_name(model), trained_tensors(model)
    saved = load_file(path) if path.is_file() else {}
    wrong = [k for k in own if k not in saved or saved[k].shape != own[k].shape]
    wrong += [k for k in saved if k not in own]
    if wrong:
        raise WorkError(
            f"The weights in {folder} belong to another model: {wrong[0]} has no counterpart.",
            "The config was changed since they were saved, so they cannot be put back.",
            "Undo the change to the config, or train into a new output_dir.",
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def _file_name(model: Model) -> str:
    return SAFETENSORS_WEIGHTS_NAME if isinstance(model, PeftModel) else TRAINED


def export_trained(model: Model, folder: Path, base: Path, config: RunConfig) -> Path:
    """Write the finished adapter (`adapter/`) or model (`model/`) of a run; returns its folder.

    A full model gets its base's tokenizer beside it, so that the folder works on its own. Raises
    WorkError where there is no room; an earlier one is untouched then.
    """
    target = folder / ("model" if config.adapter is None else "adapter")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        if config.adapter is None:
            unwrapped(model).save_pretrained(partial)
            for name in base.glob("*tekken*.json"):
                shutil.copy2(name, partial / name.name)
        else:
            save_trained(model, partial, config)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)  # or a full disk has no room for `ended`
        raise WorkError(
            f"The finished {target.name} could not be written to {folder}.",
            f"The system says: {getattr(error, 'strerror', None) or error}.",
            "Free disk space, then resume: the last checkpoint has all that was learned.",
        ) from error
    return target
