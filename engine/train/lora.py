"""Adapters: which modules get one, and what of the model may move at all.

Apart from `model` because here a run can train nothing without a word: a pattern that matches
nothing, or one that lands in the vision tower, whose modules end in the same names.
"""

import re
from collections.abc import Iterator, Sequence

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from engine.catalog import Architecture, ModuleTable, linear_targets
from engine.config import RunConfig
from engine.errors import UserError


def choose_targets(table: ModuleTable, config: RunConfig) -> tuple[str, ...]:
    """Full names of the modules that get an adapter.

    A list in `lora_target_modules` matches ends of names, one text is a regular expression for the
    whole name, `lora_target_linear` adds every linear layer; all of them inside the language model
    only. Raises UserError for an entry that matches nothing.
    """
    wanted = config.lora_target_modules or ()
    found = dict.fromkeys(linear_targets(table) if config.lora_target_linear else ())
    if isinstance(wanted, str):
        return tuple(found | dict.fromkeys(_match_expression(table, wanted)))
    for ending in wanted:
        matches = [
            name for name in linear_targets(table) if name == ending or name.endswith(f".{ending}")
        ]
        if not matches:
            raise _no_match(ending, table)
        found |= dict.fromkeys(matches)
    if not found:
        raise UserError(
            "The adapter would sit on no module at all.",
            "lora_target_linear is false and lora_target_modules names nothing.",
            "Leave both out to adapt every linear layer.",
        )
    return tuple(found)


def _match_expression(table: ModuleTable, expression: str) -> Iterator[str]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise UserError(
            f"lora_target_modules is not a regular expression: {expression}",
            f"{error.msg} at place {error.pos}.",
            "Correct it, or give a list of endings such as [q_proj, v_proj].",
        ) from error
    matches = [name for name in linear_targets(table) if pattern.fullmatch(name)]
    if not matches:
        raise _no_match(expression, table)
    return iter(matches)


def _no_match(entry: str, table: ModuleTable) -> UserError:
    endings = sorted({name.rpartition(".")[2] for name in linear_targets(table)})
    return UserError(
        f"lora_target_modules: {entry} matches no module of the language model.",
        f"Its linear layers are called {', '.join(endings)}, under names such as "
        f"{linear_targets(table)[0]}.",
        "Use those names, or leave lora_target_modules out to adapt all of them.",
    )


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
    reached = set(adapted.targeted_module_names)
    if reached != set(targets):
        missed = sorted(set(targets) ^ reached)
        raise UserError(
            f"The adapter did not land where it should: {missed[0]} and {len(missed) - 1} others.",
            "The loaded model is not built as its config.json says.",
            "Check that the model folder is complete and unchanged.",
        )
    return adapted


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
