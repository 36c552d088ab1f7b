"""`train CONFIG key=value`: single values changed from the command line.

A value here has no file and no line, only the argument itself.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from engine.config.document import KeyPath, Value, key_path, parse_value
from engine.config.finding import Finding, problem, shown
from engine.errors import UserError

FULL = "full"
"""What people call a run without an adapter; the config says it by leaving the key out."""
NONE = "none"
_KEY = re.compile(r"[A-Za-z_]\w*(?:\[\d+\])?(?:\.[A-Za-z_]\w*(?:\[\d+\])?)*")


def assigned(
    values: dict[str, Any], assignments: Sequence[str]
) -> tuple[dict[str, Any], list[Finding]]:
    """`values` with `key=value` arguments put into them, and what is wrong with the arguments.

    Values are typed as in YAML. `datasets[0].path=x` reaches into a list (one past its end adds an
    entry), and `key=` unsets a key.
    """
    problems = []
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        try:
            if not equals or not _KEY.fullmatch(key):
                raise UserError(
                    f"The argument {shown(assignment)} sets no key.",
                    "An argument behind the config changes one of its values.",
                    "Write it as key=value, for example learning_rate=1e-4.",
                )
            _put(values, key_path(key), parse_value(text), assignment)
        except UserError as error:
            problems.append(problem("argument", key, error.what, error.why, error.fix))
    return values, problems


def spell(key: str, value: object) -> str:
    """A value as sentences and `key=value` write it; `full` is a run without an adapter."""
    if value is None:
        return FULL if key == "adapter" else NONE
    if isinstance(value, bool):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def assignment(key: str, value: object) -> str:
    """`key=value` as `override` reads it back."""
    return f"{key}={'' if value is None else spell(key, value)}"


def _put(values: dict[str, Any], path: KeyPath, value: Value, assignment: str) -> None:
    place: Any = values
    for part, following in zip(path, (*path[1:], None), strict=True):
        last = following is None
        if isinstance(part, int):
            if not isinstance(place, list) or part > len(place):
                raise _no_place(assignment)
            if part == len(place):
                place.append({})
        elif not isinstance(place, dict):
            raise _no_place(assignment)
        if last:
            place[part] = value
        elif isinstance(place, dict) and place.get(part) is None:
            place[part] = [] if isinstance(following, int) else {}
        place = place[part]


def _no_place(assignment: str) -> UserError:
    return UserError(
        f"The argument {shown(assignment)} has no place in this config.",
        "Lists are counted from 0 without gaps, and only lists and mappings have parts.",
        "Look at the config for the names and the number of entries.",
    )
