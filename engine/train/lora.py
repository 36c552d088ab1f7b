"""Adapters on the modules that the plan chose, and what of the model is trainable at all.

Here a run can train nothing without a word: PEFT may reach other modules than were chosen, a tied
head may come apart, and a frozen model has no gradient to complain about.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from engine.catalog import Architecture, read_architecture
from engine.config import RunConfig
from engine.errors import UserError
from engine.files import changed_file
from engine.plan.targets import choose_saved, choose_stacks, choose_targets, trainable_names
from engine.train.checkpoint import load_trained, trained_tensors
from engine.train.experts import adapt
from engine.train.forward import Model, checkpoint_activations, frozen_inputs, head_of
from engine.train.model import Base
from engine.train.optim import is_lora_matrix
from engine.train.slices import list_wholes
from engine.visible import visible

AGREEING = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "use_rslora": "peft_use_rslora",
    "use_dora": "peft_use_dora",
}
"""What an adapter to go on from must have in common with the run's own, by both names: with another
value the same weights mean another model."""
PLAIN: dict[str, tuple[object, ...]] = {
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "lora_bias": (False, None),
    "init_lora_weights": (True, False, "gaussian"),
}
"""PEFT's settings that this trainer does not have, with the values under which they do nothing."""


def as_expression(names: Sequence[str]) -> str:
    """One regular expression for many layers: what PEFT stores beside an adapter.

    Layer numbers become `\\d+` only where every layer of that pattern is meant.
    """
    patterns = sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) for name in names})
    return "|".join(patterns)


def put_on_training(base: Base, folder: Path, config: RunConfig) -> Model:
    """The model as it trains: an adapter on frozen weights, or the chosen weights trainable."""
    if config.gradient_checkpointing:
        offload_from = base.device if config.activation_offloading else None
        checkpoint_activations(base.model, config.checkpointed_layers, offload_from=offload_from)
    attach = choose_trained if config.adapter is None else attach_lora
    return attach(base.model, read_architecture(folder), config)


def attach_lora(model: PreTrainedModel, architecture: Architecture, config: RunConfig) -> PeftModel:
    """Freeze `model` and put the config's adapter on it; the adapter's weights are float32,
    or bfloat16 with `peft_autocast_adapter_dtype: false`.

    Modules of `lora_modules_to_save` are trained beside it in the base's own type, a tied pair as
    the one matrix that it is. With `lora_model_dir` the adapter starts with the weights there.
    Raises UserError where PEFT adapted other modules than were chosen, and where the adapter to go
    on from is another one.
    """
    targets = choose_targets(architecture.table, config)
    expression = as_expression(targets)
    everything = {p.module for p in architecture.table.parameters if p.quantizable}
    covered = {name for name in everything if re.fullmatch(expression, name)}
    saved = choose_saved(architecture.table, config)
    tied = any(row.tied for row in architecture.table.parameters)
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.peft_use_rslora,
        use_dora=config.peft_use_dora,
        init_lora_weights=config.peft_init_lora_weights,  # type: ignore[arg-type]
        target_modules=expression if covered == set(targets) else list(targets),
        modules_to_save=list(saved) or None,
        ensure_weight_tying=tied and bool(saved),
        bias="none",
        task_type="CAUSAL_LM",
    )
    model.requires_grad_(False)
    experts = choose_stacks(architecture.table, config)
    with frozen_inputs(model):
        adapted = adapt(model, settings, experts)
    narrow = config.peft_autocast_adapter_dtype is False
    for name, parameter in adapted.named_parameters():
        # DoRA's lengths stay: rounded, they would not be the base's.
        if narrow and is_lora_matrix(name):
            parameter.data = parameter.data.to(torch.bfloat16)
    if not narrow or head_of(model).dtype == torch.bfloat16:
        leave_inputs_alone(adapted)
    reached, chosen = set(adapted.targeted_module_names), {*targets, *experts}
    if reached != chosen:
        missed = sorted(chosen ^ reached)
        raise UserError(
            f"The adapter did not land where it should: {missed[0]} and {len(missed) - 1} others.",
            "The loaded model is not built as its config.json says.",
            "Check that the model folder is complete and unchanged.",
        )
    if config.lora_model_dir:
        go_on_from(adapted, Path(config.lora_model_dir))
    return adapted


def leave_inputs_alone(model: nn.Module) -> None:
    """Keep PEFT from widening an adapted layer's input to the adapter's float32.

    A bfloat16 base runs under autocast, which narrows it again: the wide copy would be kept for the
    backward pass and serve nothing. For a float32 base nothing changes, unless its adapter is in
    bfloat16: that one needs PEFT's cast.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


def go_on_from(model: PeftModel, folder: Path) -> None:
    """Give the adapter the weights of the one in `folder`, which has to be built the same way.

    Raises UserError with the first difference; nothing is changed then.
    """
    settings = _read_settings(folder)
    own = model.peft_config["default"].to_dict()
    for name, key in AGREEING.items():
        if settings.get(name, False) != own[name]:
            value = _shown(settings.get(name, False))
            raise UserError(
                f"The adapter in {folder} is built differently: its {key} is {value}.",
                f"This run's is {_shown(own[name])}: the same weights would mean another model.",
                f"Write {key}: {value}, or start from a new adapter without lora_model_dir.",
            )
    for name, plain in PLAIN.items():
        if settings.get(name, plain[0]) not in plain:
            raise UserError(
                f"The adapter in {folder} is built differently: its {name} is "
                f"{_shown(settings[name])}.",
                "This trainer's adapters have one rank and one alpha, beside unchanged base "
                "weights.",
                "Merge it into its base model and start from that, without lora_model_dir.",
            )
    names = set(trained_tensors(model))
    try:
        stored = list_wholes(folder, SAFETENSORS_WEIGHTS_NAME).keys()
    except (OSError, SafetensorError) as error:
        raise _no_adapter(folder, f"{SAFETENSORS_WEIGHTS_NAME} cannot be read") from error
    if names != stored:
        here, there = sorted(names - stored), sorted(stored - names)
        first = visible((there or here)[0].removeprefix("base_model.model."), one_line=True)
        where = "has" if there else "lacks"
        raise UserError(
            f"The adapter in {folder} sits on other modules: it {where} {first}.",
            f"{len(there)} of its tensors have no place in this run's adapter, and "
            f"{len(here)} of this run's are not in it.",
            "Write the lora_target_modules that it was trained with, or start without "
            "lora_model_dir.",
        )
    load_trained(model, folder)


def _shown(value: object) -> str:
    return visible(json.dumps(value), one_line=True)


def _read_settings(folder: Path) -> dict[str, Any]:
    if name := changed_file(folder):
        raise _no_adapter(folder, f"{visible(name, one_line=True)} is not as it was written")
    try:
        settings = json.loads((folder / CONFIG_NAME).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _no_adapter(folder, f"{CONFIG_NAME} cannot be read") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise _no_adapter(folder, f"{CONFIG_NAME} describes no LoRA adapter")
    return settings


def _no_adapter(folder: Path, why: str) -> UserError:
    return UserError(
        f"There is no adapter to go on from in {folder}.",
        f"{why}.",
        f"Name the folder that holds {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}, such as "
        "a run's adapter/, or remove lora_model_dir.",
    )


def choose_trained(
    model: PreTrainedModel, architecture: Architecture, config: RunConfig
) -> PreTrainedModel:
    """Full fine-tune: train the plan's `trainable_names` and freeze the rest.

    Raises UserError for an expression that matches nothing.
    """
    names = trainable_names(architecture.table, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return model
