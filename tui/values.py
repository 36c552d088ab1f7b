"""A typed value on its way into the draft.

Apart from the Plan page and from the plain questions so that both take and refuse the same texts,
in the words of a config file.
"""

import json

from engine.config import FULL, NONE, override, require_supported
from engine.errors import UserError
from tui.draft import Draft


def set_value(draft: Draft, key: str, text: str) -> None:
    """Take a typed value into the draft; where it cannot be kept the draft stays as it was.

    Raises UserError for a value that the config refuses or that contradicts another.
    """
    given = "null" if text in (FULL, NONE) else text
    assignments = [f"{key}={given}"]
    if key == "adapter":
        assignments.append(f"load_in_4bit={json.dumps(text == 'qlora')}")
    before, kept = draft.config(), dict(draft.changes)
    if key == "val_set_size" and "test_datasets" not in draft.changes:
        # A share of the rows takes the place of the sets that a recipe holds out.
        before = before.model_copy(update={"test_datasets": ()})
    after = override(before, assignments)
    require_supported(after)
    try:
        for name in before.model_fields_set | after.model_fields_set:
            value = getattr(after, name)
            if name == key or value != getattr(before, name):
                draft.change(name, value)
        draft.advice()
    except UserError:
        draft.changes = kept
        raise
