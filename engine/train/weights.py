"""What is trained, and its way to disk and back.

The finished adapter or model is the same thing as the one inside a checkpoint: for LoRA it is
PEFT's own layout, also for adapted experts, and for a full fine-tune the trained tensors by name.
"""

import copy
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.catalog import find_model, model_names
from engine.config import RunConfig
from engine.errors import WorkError
from engine.train.companions import copy_companions
from engine.train.experts import stock_names
from engine.train.forward import Model, unwrapped
from engine.train.weight_files import (
    entries_of,
    in_pieces,
    list_entries,
    list_tensors,
    read_tensors,
    write_shards,
    write_tensors,
)

TRAINED = "trained.safetensors"


def trained_parameters(model: Model) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of everything that receives a gradient, in the model's own order."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def trained_tensors(model: Model) -> dict[str, Tensor]:
    """What is trained by the name that it has on disk; the tensors are the model's own."""
    if isinstance(model, PeftModel):
        names = stock_names(model)
        # Left to itself, PEFT asks the hub whether the base's vocabulary was resized.
        found = get_peft_model_state_dict(model, save_embedding_layers=False)
        return {_stock_name(name, names): tensor for name, tensor in found.items()}
    return {name: p.detach() for name, p in trained_parameters(model)}


def _stock_name(name: str, experts: Mapping[str, str]) -> str:
    module, separator, rest = name.partition(".lora_")
    return experts.get(module, module) + separator + rest


def save_trained(model: Model, folder: Path, config: RunConfig) -> None:
    """Write the trained tensors into `folder`: an adapter in PEFT's layout, or `TRAINED`."""
    write_tensors(folder / _file_name(model), trained_tensors(model))
    if isinstance(model, PeftModel):
        settings = copy.copy(model.peft_config["default"])
        settings.base_model_name_or_path = _public_name(config.base_model)
        settings.inference_mode = True
        settings.save_pretrained(str(folder))


def _public_name(base_model: str) -> str:
    """What other programs call the base: for a name of the catalog, its repository on the hub."""
    hub_id = find_model(base_model).hub_id if base_model in model_names() else None
    return hub_id or base_model


def load_trained(model: Model, folder: Path) -> None:
    """Put what `save_trained` wrote back, bit for bit. WorkError when a name or shape differs."""
    path, own = folder / _file_name(model), trained_tensors(model)
    saved = {each.name: each.shape for each in list_entries(path)} if path.is_file() else {}
    wrong = [k for k in own if saved.get(k) != own[k].shape]
    wrong += [k for k in saved if k not in own]
    if wrong:
        raise WorkError(
            f"The weights in {folder} belong to another model: {wrong[0]} has no counterpart.",
            "The config was changed since they were saved, so they cannot be put back.",
            "Undo the change to the config, or train into a new output_dir.",
        )
    read_tensors(path, lambda entry: own[entry.name])


def _file_name(model: Model) -> str:
    return SAFETENSORS_WEIGHTS_NAME if isinstance(model, PeftModel) else TRAINED


def export_trained(model: Model, folder: Path, base: Path, config: RunConfig) -> Path:
    """Write the finished adapter (`adapter/`) or model (`model/`) of a run; returns its folder.

    Beside it go the tokenizer that the run used and the base's licence, and beside a model all that
    stock transformers reads, so that the folder works on its own. Raises WorkError where there is
    no room; an earlier one is untouched then.
    """
    target = folder / ("model" if config.adapter is None else "adapter")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        if config.adapter is None:
            _write_model(unwrapped(model), partial, base)
        else:
            save_trained(model, partial, config)
        copy_companions(base, partial, config, whole=config.adapter is None)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)  # or a full disk has no room for `ended`
        raise WorkError(
            f"The finished {target.name} could not be written to {folder}.",
            f"The system says: {error.strerror or error}.",
            "Free disk space, then resume: the last checkpoint has all that was learned.",
        ) from error
    return target


def _write_model(model: PreTrainedModel, folder: Path, base: Path) -> None:
    """A whole model by the names that its base has on disk; a tied head only as the embedding."""
    model.save_pretrained(folder, state_dict={})  # its configs alone
    stored = list_tensors(base)
    own = {name: p.detach() for name, p in model.named_parameters()}
    named = {stored[name].name if name in stored else name: t for name, t in own.items()}
    write_shards(folder, entries_of(named), lambda entry: in_pieces(named[entry.name]))
