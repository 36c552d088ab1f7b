"""Adapters on the modules that the plan chose, and what of the model may move at all.

Apart from `model` because here a run can train nothing without a word: PEFT may reach other modules
than were chosen, and a frozen model has no gradient to complain about.
"""

import re
from collections.abc import Sequence

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from engine.catalog import Architecture
from engine.config import RunConfig
from engine.errors import UserError
from engine.plan.targets import choose_targets


def as_expression(names: Sequence[str]) -> str:
    """One regular expression for many layers: what PEFT stores beside an adapter.

    Layer numbers become `\\d+` only where every layer of that pattern is meant.
    """
    patterns = sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) for name in names})
    return "|".join(patterns)


def attach_lora(model: PreTrainedModel, architecture: Architecture, config: RunConfig) -> PeftModel:
    """Freeze `model` and put the config's adapter on it; the adapter's weights are float32.

    Raises UserError where PEFT adapted other modules than were chosen.
    """
    targets = choose_targets(architecture.table, config)
    expression = as_expression(targets)
    everything = {p.module for p in architecture.table.parameters if p.quantizable}
    covered = {name for name in everything if re.fullmatch(expression, name)}
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=expression if covered == set(targets) else list(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    model.requires_grad_(False)
    adapted = get_peft_model(model, settings)
    assert isinstance(adapted, PeftModel)
    leave_inputs_alone(adapted)
    reached = set(adapted.targeted_module_names)
    if reached != set(targets):
        missed = sorted(set(targets) ^ reached)
        raise UserError(
            f"The adapter did not land where it should: {missed[0]} and {len(missed) - 1} others.",
            "The loaded model is not built as its config.json says.",
            "Check that the model folder is complete and unchanged.",
        )
    return adapted


def leave_inputs_alone(model: nn.Module) -> None:
    """Keep PEFT from widening an adapted layer's input to the adapter's float32.

    A bfloat16 base runs under autocast, which narrows it again: the wide copy would be kept for the
    backward pass and serve nothing. For a float32 base nothing changes.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


def choose_trained(model: PreTrainedModel, config: RunConfig) -> PreTrainedModel:
    """Full fine-tune: let the chosen parameters move and freeze the rest.

    Without `unfrozen_parameters` all of the language model moves; the vision tower and its
    projector see no images in a text run and stay. Raises UserError for an expression that matches
    nothing.
    """
    wanted = config.unfrozen_parameters
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted is None and not _sees(name))
    for expression in wanted or ():
        pattern = re.compile(expression)
        matches = [p for name, p in model.named_parameters() if pattern.match(name)]
        if not matches:
            raise UserError(
                f"unfrozen_parameters: {expression} matches no parameter.",
                f"Names look like {next(model.named_parameters())[0]}.",
                "Correct the expression; `model.layers.*` means all layers of a text model.",
            )
        for parameter in matches:
            parameter.requires_grad_(True)
    return model


def _sees(name: str) -> bool:
    return "vision_tower" in name or "multi_modal_projector" in name
