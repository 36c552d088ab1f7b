"""The command lines that say what the pages say, for those that show one."""

from typing import Final

from engine.config import DatasetConfig, RunConfig, assignment
from engine.wizard.draft import RENDER_KEYS, WHICH_KEYS, Draft, is_named_by_path
from engine.wizard.machine import named_cards

_SAID_BY_FILE: Final = (WHICH_KEYS | RENDER_KEYS) - {"chat_template_kwargs"}
"""What decides a previewed row and has no flag."""


def check_command(draft: Draft, dataset: DatasetConfig) -> list[str]:
    """The words after `windtunnel` that report on the same rows; none where no command does.

    Those of an opened config are read as it says: with its image folder, its switches.
    """
    own = draft.own
    if own is not None and dataset in own.datasets:
        same = draft.path is not None and not draft.changes and draft.model == own.base_model
        return ["check", str(draft.path)] if same and len(own.datasets) == 1 else []
    words = ["check", dataset.path, "--model", draft.model or ""]
    return words if is_named_by_path(dataset) else []


def preview_command(draft: Draft, config: RunConfig, number: int) -> list[str]:
    """The words after `windtunnel` that print row `number` of `config` alike; none where only
    another file could."""
    (dataset, *more), path = config.datasets, draft.path
    own = draft.own or RunConfig(base_model=config.base_model, datasets=config.datasets)
    same = all(getattr(config, key) == getattr(own, key) for key in _SAID_BY_FILE)
    if draft.own is not None:
        words = ["preview", str(path)] if same and path else []
    else:
        named = same and not more and is_named_by_path(dataset)
        words = ["preview", dataset.path, "--model", config.base_model] if named else []
    words += ["--row", str(number)] if words else []
    if words and config.train_on_thinking != own.train_on_thinking:
        words.append("--think" if config.train_on_thinking else "--no-think")
    if config.chat_template_kwargs != own.chat_template_kwargs:
        effort = (config.chat_template_kwargs or {}).get("reasoning_effort")
        words = [*words, "--reasoning-effort", effort] if words and effort else []
    return words


def plan_command(draft: Draft) -> list[str]:
    """The words after `windtunnel`; none where no command says the same.

    The person's values come first: they are what has just changed.
    """
    if not all(map(_can_be_typed, draft.changes.values())):
        return []
    values = [assignment(*change) for change in draft.changes.items()]
    device = draft.device
    assume = []
    if device and device.planned:
        assume = ["--assume", named_cards(device)]
    if draft.own is not None:
        if draft.path is None or (draft.dataset and draft.dataset not in draft.own.datasets):
            return []
        if draft.model and draft.model != draft.own.base_model:
            values.append(assignment("base_model", draft.model))
        return ["estimate", str(draft.path), *values, *assume]
    if draft.dataset and not is_named_by_path(draft.dataset):
        return []
    data = ["--data", draft.dataset.path] if draft.dataset else []
    return ["recommend", *values, "--model", draft.model or "", *data, *assume]


def _can_be_typed(value: object) -> bool:
    """Whether `key=value` of a command line says it: one value, or a list of names."""
    if isinstance(value, list | tuple):
        return all(isinstance(each, str) for each in value)
    return value is None or isinstance(value, bool | int | float | str)
