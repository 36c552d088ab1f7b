"""Which modules a config's adapter lands on, and how large it is, before anything is loaded.

Separate from `memory` because here a run can learn nothing without a word: an entry that matches
no module, or one that would land in the vision tower, whose modules end in the same names. The
trainer puts its adapter on exactly these modules.
"""

import re
from functools import lru_cache
from math import prod
from typing import TypeAlias

from engine.catalog import ModuleTable, linear_targets
from engine.config import RunConfig
from engine.errors import UserError

Matches: TypeAlias = tuple[tuple[str, tuple[str, ...]], ...]
"""Each entry of a config's targets with the modules that it matches."""
ALL_LINEAR = "lora_target_linear"
"""The entry of `count_targets` for every linear layer."""


def choose_targets(table: ModuleTable, config: RunConfig) -> tuple[str, ...]:
    """Full names of the modules that get an adapter.

    A list in `lora_target_modules` matches ends of names, one text is a regular expression for the
    whole name, `lora_target_linear` adds every linear layer; all of them inside the language model
    only. Raises UserError for an entry that matches nothing.
    """
    found = dict.fromkeys(name for _, names in _matches(table, config) for name in names)
    if not found and not config.lora_target_parameters:
        raise UserError(
            "The adapter would sit on no module at all.",
            "lora_target_linear is false and lora_target_modules names nothing.",
            "Leave both out to adapt every linear layer.",
        )
    return tuple(found)


def count_targets(table: ModuleTable, config: RunConfig) -> dict[str, int]:
    """How many modules each entry of the config's targets matches.

    Raises UserError for an entry that matches nothing.
    """
    return {entry: len(names) for entry, names in _matches(table, config)}


def adapter_parameters(table: ModuleTable, config: RunConfig) -> int:
    """Numbers in the adapter: rank x (inputs + outputs) of each adapted module and expert."""
    entries = config.lora_target_parameters or ()
    stacks = (entries,) if isinstance(entries, str) else tuple(entries)
    return config.lora_r * (_edges(table, _matches(table, config)) + _stack_edges(table, stacks))


@lru_cache(maxsize=128)
def _edges(table: ModuleTable, matches: Matches) -> int:
    """Inputs plus outputs of all adapted modules."""
    chosen = {name for _, names in matches for name in names}
    return sum(sum(row.shape) for row in table.parameters if row.module in chosen)


@lru_cache(maxsize=32)
def _stack_edges(table: ModuleTable, endings: tuple[str, ...]) -> int:
    """The same of the fused expert tensors, (experts, outputs, inputs), that `endings` match."""
    return sum(
        row.shape[0] * (row.shape[1] + row.shape[2])
        for row in table.parameters
        if row.group == "experts" and row.name.endswith(endings)
    )


def trained_parameters(table: ModuleTable, config: RunConfig) -> int:
    """Numbers that move: the adapter's, or in a full fine-tune those that are not frozen.

    Without `unfrozen_parameters` a full fine-tune trains the language model; tower and projector
    see no images in a text run and stay.
    """
    if config.adapter:
        return adapter_parameters(table, config)
    expressions = config.unfrozen_parameters
    return _free_parameters(table, tuple(expressions) if expressions else None)


@lru_cache(maxsize=32)
def _free_parameters(table: ModuleTable, expressions: tuple[str, ...] | None) -> int:
    wanted = [re.compile(expression) for expression in expressions or ()]
    return sum(
        prod(row.shape)
        for row in table.parameters
        if not row.tied
        and (
            any(pattern.match(row.name) for pattern in wanted)
            if wanted
            else row.group not in ("vision", "projector")
        )
    )


def _matches(table: ModuleTable, config: RunConfig) -> Matches:
    entries = config.lora_target_modules
    named = tuple(entries) if isinstance(entries, list | tuple) else entries
    return _find(table, config.lora_target_linear, named)


# Kept, since every keystroke of the wizard makes a plan.
@lru_cache(maxsize=128)
def _find(table: ModuleTable, every: bool, named: str | tuple[str, ...] | None) -> Matches:
    modules = linear_targets(table)
    found = [(ALL_LINEAR, modules)] if every else []
    if isinstance(named, str):
        return (*found, (named, _match_expression(named, modules)))
    for ending in named or ():
        matches = tuple(n for n in modules if n == ending or n.endswith(f".{ending}"))
        if not matches:
            raise _no_match(ending, modules)
        found.append((ending, matches))
    return tuple(found)


def _match_expression(expression: str, modules: tuple[str, ...]) -> tuple[str, ...]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise UserError(
            f"lora_target_modules is not a regular expression: {expression}",
            f"{error.msg} at place {error.pos}.",
            "Correct it, or give a list of endings such as [q_proj, v_proj].",
        ) from error
    matches = tuple(name for name in modules if pattern.fullmatch(name))
    if not matches:
        raise _no_match(expression, modules)
    return matches


def _no_match(entry: str, modules: tuple[str, ...]) -> UserError:
    endings = sorted({name.rpartition(".")[2] for name in modules})
    return UserError(
        f"lora_target_modules: {entry} matches no module of the language model.",
        f"Its linear layers are called {', '.join(endings)}, under names such as {modules[0]}.",
        "Use those names, or leave lora_target_modules out to adapt all of them.",
    )
