"""One key of a config, explained: the text that `windtunnel explain` and the wizard's help show.

Older spellings and Axolotl's keys that are not acted on have an explanation too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from engine.config.axolotl import Level, Limit, limits, renamed
from engine.config.document import flow, key_path
from engine.config.finding import shown
from engine.config.keys import SECTIONS, DatasetConfig, section_title
from engine.config.rules import RunConfig
from engine.config.schema import allowed, describe, nearest_key, schema_at
from engine.errors import UserError

_FIELDS_OF: Mapping[Level, type[BaseModel]] = {"run": RunConfig, "dataset": DatasetConfig}


@dataclass(frozen=True, slots=True)
class Explanation:
    """What there is to say about one key."""

    key: str
    """datasets[].path for the keys of a dataset."""
    section: str
    meaning: str
    takes: str
    """Type and range in words: "a whole number, 1 or more"; empty where no value does anything."""
    allowed: tuple[str, ...]
    """The values, when there are only a few."""
    default: str
    """As YAML spells it, in words when it depends on other keys; empty where no value is read."""
    limit: str | None
    """What this engine does not act on, and what to do instead."""


def explain_key(key: str) -> list[Explanation]:
    """The key of that name: two when the run and a dataset both have it.

    `datasets.path` asks for a dataset's key alone. Raises UserError with the nearest key.
    """
    name = key.strip().replace("[]", "").replace("[0]", "")
    of_dataset = name.startswith(("datasets.", "test_datasets."))
    name = name.rpartition(".")[2] if of_dataset else name
    asked: list[tuple[Level, str]] = []
    if not of_dataset:
        asked.append(("run", renamed()[name].key if name in renamed() else name))
    asked.append(("dataset", name))
    found = [_explanation(level, key) for level, key in asked if _is_known(level, key)]
    if name in renamed() and not of_dataset:
        meaning = f"{name} is an older spelling of this key. {found[0].meaning}"
        found[0] = replace(found[0], meaning=meaning)
    if found:
        return found
    fields = frozenset(RunConfig.model_fields) | frozenset(DatasetConfig.model_fields)
    near = nearest_key(name, fields)
    raise UserError(
        f"{shown(name)} is not a key of a config.",
        "No key has that name.",
        f"Did you mean {near}?" if near else "`windtunnel schema` lists all keys.",
    )


def section_of(key: str) -> str:
    """The title of the section of a key that is written as in findings, datasets[0].path."""
    name = str(key_path(key)[0])
    if name in limits():
        return limits()[name].section
    return next(section_title(section) for section in SECTIONS if name in section.model_fields)


def _is_known(level: Level, key: str) -> bool:
    return key in _FIELDS_OF[level].model_fields or key in limits(level)


def _explanation(level: Level, key: str) -> Explanation:
    of_run, limit = level == "run", limits(level).get(key)
    field = _FIELDS_OF[level].model_fields.get(key)
    schema = schema_at((key,) if of_run else ("datasets", 0, key))
    ours = field is not None
    meaning = f"A key of Axolotl. {limit.meaning}" if limit and not ours else schema["description"]
    return Explanation(
        key=key if of_run else f"datasets[].{key}",
        section=section_of(key if of_run else "datasets"),
        meaning=meaning,
        takes=describe(schema) if ours else "",
        allowed=tuple(allowed(schema)) if ours else (),
        default=_default(field, schema) if field is not None else "",
        limit=None if limit is None else f"{_reach(limit)} {limit.why} {limit.fix}",
    )


def _default(field: FieldInfo, schema: Mapping[str, Any]) -> str:
    if field.is_required():
        return "none: it must be given"
    if "default_words" in schema:
        return str(schema["default_words"])
    return "not set" if field.default in (None, ()) else flow(field.default)


def _reach(limit: Limit) -> str:
    if limit.severity == "note":
        return "It has no effect here." if limit.whole else "Some values have no effect here."
    return "It is not supported yet." if limit.whole else "Some values are not supported yet."
