"""A typed value on its way into the draft.

Every printer takes and refuses the same texts, as a config file does.
"""

import json
from typing import Final

from engine.catalog import Architecture
from engine.config import FULL, NONE, RunConfig, override, require_supported, spell
from engine.errors import UserError
from engine.wizard.draft import Draft

EXPERTS: Final = "experts"
"""lora_target_parameters as the page says it: the adapter sits on every expert."""


def expert_tensors(architecture: Architecture) -> list[str]:
    """How a config names the model's fused expert tensors; empty where it has none."""
    names = (row.name for row in architecture.table.parameters if row.group == "experts")
    return list(dict.fromkeys(".".join(name.split(".")[-3:]) for name in names))


def spelled(key: str, config: RunConfig) -> str:
    """A value of a config as it is shown, and as `set_value` takes it."""
    value = getattr(config, key)
    if key == "lora_target_parameters":
        return EXPERTS if value else NONE
    return spell(key, value)


def set_value(draft: Draft, key: str, text: str) -> None:
    """Take a typed value into the draft; where it cannot be kept the draft stays as it was.

    Raises UserError for a value that the config refuses or that contradicts another.
    """
    given = "null" if text in (FULL, NONE) else text
    if key == "lora_target_parameters" and text == EXPERTS:
        given = json.dumps(expert_tensors(draft.architecture()))
    assignments = [f"{key}={given}"]
    if key == "adapter":
        assignments.append(f"load_in_4bit={json.dumps(text == 'qlora')}")
    kept = dict(draft.changes)
    try:
        _set(draft, key, assignments)
    except UserError as error:
        draft.changes = kept
        # Without the place of the value: it was typed here.
        what = error.what.removeprefix("The command line: ").removeprefix("The config: ")
        raise UserError(what, error.why, error.fix) from None


def _set(draft: Draft, key: str, assignments: list[str]) -> None:
    before = draft.config()
    if key == "val_set_size" and "test_datasets" not in draft.changes:
        # A share of the rows takes the place of the sets that a recipe holds out.
        before = before.model_copy(update={"test_datasets": ()})
    after = override(before, assignments)
    require_supported(after)
    for name in before.model_fields_set | after.model_fields_set:
        value = getattr(after, name)
        if name == key or value != getattr(before, name):
            draft.change(name, value)
    draft.advice()
