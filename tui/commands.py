"""The command lines that say what the pages say, for those that show one."""

from engine.config import DatasetConfig, assignment
from tui.draft import Draft, is_named_by_path


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
        cards = f" x{device.count}" if device.count > 1 else ""
        assume = ["--assume", device.name + cards]
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
