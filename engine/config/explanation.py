"""One key of a config, explained: the text that `windtunnel explain` and the wizard's help show.

Older spellings and Axolotl's keys that are not acted on have an explanation too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.config.data_keys import DatasetConfig
from engine.config.document import key_path
from engine.config.finding import shown
from engine.config.keys import SECTIONS, section_title
from engine.config.limits import DATASET_LIMITS, LIMITS, Limit
from engine.config.other_keys import RENAMED, OtherKey, other_keys
from engine.config.reading import nearest_key
from engine.config.run import RunConfig
from engine.config.schema import allowed, describe, schema_at
from engine.config.section import Section
from engine.config.yaml_text import flow
from engine.errors import UserError


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
    """As YAML spells it, or in words when it depends on other keys."""
    limit: str | None
    """What this engine does not act on, and what to do instead."""


def explain_key(key: str) -> list[Explanation]:
    """The key of that name: two when the run and a dataset both have it.

    `datasets.path` asks for a dataset's key alone. Raises UserError with the nearest key.
    """
    name = key.strip().replace("[]", "").replace("[0]", "")
    of_dataset = name.startswith(("datasets.", "test_datasets."))
    name = name.rpartition(".")[2] if of_dataset else name
    found = []
    if name in RENAMED and not of_dataset:
        current = _of_run(RENAMED[name].key)
        meaning = f"{name} is an older spelling of this key. {current.meaning}"
        found.append(replace(current, meaning=meaning))
    elif not of_dataset and (name in RunConfig.model_fields or name in other_keys()):
        found.append(_of_run(name))
    if name in DatasetConfig.model_fields:
        found.append(_explanation(DatasetConfig, name, "Data", ("datasets", 0), DATASET_LIMITS))
    elif name in other_keys("dataset"):
        found.append(_other(f"datasets[].{name}", other_keys("dataset")[name]))
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
    if name in other_keys():
        return other_keys()[name].section
    return next(section_title(section) for section in SECTIONS if name in section.model_fields)


def _of_run(key: str) -> Explanation:
    if key in other_keys():
        return _other(key, other_keys()[key])
    return _explanation(RunConfig, key, section_of(key), (), LIMITS)


def _other(key: str, other: OtherKey) -> Explanation:
    meaning = f"A key of Axolotl. {other.meaning}"
    limit = f"{_reach(other.limit)} {other.limit.why} {other.limit.fix}"
    return Explanation(key, other.section, meaning, "", (), "not set", limit)


def _explanation(
    section: type[Section],
    key: str,
    title: str,
    path: tuple[str | int, ...],
    limits: Mapping[str, Limit],
) -> Explanation:
    schema = schema_at((*path, key))
    limit = limits.get(key)
    return Explanation(
        key=f"datasets[].{key}" if path else key,
        section=title,
        meaning=" ".join((section.model_fields[key].description or "").split()),
        takes=describe(schema),
        allowed=tuple(allowed(schema)),
        default=_default(section, key, schema),
        limit=None if limit is None else f"{_reach(limit)} {limit.why} {limit.fix}",
    )


def _default(section: type[Section], key: str, schema: Mapping[str, Any]) -> str:
    field = section.model_fields[key]
    if field.is_required():
        return "none: it must be given"
    if "default_words" in schema:
        return str(schema["default_words"])
    return "not set" if field.default in (None, ()) else flow(field.default)


def _reach(limit: Limit) -> str:
    every = limit.applies is bool
    if limit.severity == "note":
        return "It has no effect here." if every else "Some values have no effect here."
    return "It is not supported yet." if every else "Some values are not supported yet."
