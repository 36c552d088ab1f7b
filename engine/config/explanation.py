"""One key of a config, explained: the text that `windtunnel explain` and the wizard's help show.

Separate from the keys because older spellings, other tools' names and what is not acted on have an
explanation too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.config.data_keys import DatasetConfig
from engine.config.finding import shown
from engine.config.limits import DATASET_LIMITS, LIMITS, Limit
from engine.config.other_keys import CHANGING, DATASET_CHANGING, HARMLESS, RENAMED
from engine.config.reading import nearest_key
from engine.config.run import SECTIONS, RunConfig, section_title
from engine.config.section import Section
from engine.config.words import allowed, schema_at, words
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
    """Type and range in words: "a whole number, 1 or more"."""
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
    elif name in RunConfig.model_fields and not of_dataset:
        found.append(_of_run(name))
    if name in DatasetConfig.model_fields:
        found.append(_explanation(DatasetConfig, name, "Data", ("datasets", 0), DATASET_LIMITS))
    if found:
        return found
    raise _not_ours(name)


def _of_run(key: str) -> Explanation:
    section = next(section for section in SECTIONS if key in section.model_fields)
    return _explanation(RunConfig, key, section_title(section), (), LIMITS)


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
        takes=words(schema),
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


def _not_ours(key: str) -> UserError:
    if key in HARMLESS:
        return UserError(
            f"{key} is a key of Axolotl that has no effect here.",
            "It changes how a run is computed or reported there, not what is learned.",
            "It can stay in a file that Axolotl reads too.",
        )
    if key in CHANGING or key in DATASET_CHANGING:
        return UserError(
            f"{key} is a key of Axolotl that Windtunnel does not support.",
            "A config that sets it is refused, because it changes what is learned.",
            "Axolotl's own documentation explains it.",
        )
    near = nearest_key(
        key, frozenset(RunConfig.model_fields) | frozenset(DatasetConfig.model_fields)
    )
    return UserError(
        f"{shown(key)} is not a key of a config.",
        "No key has that name.",
        f"Did you mean {near}?" if near else "`windtunnel schema` lists all keys.",
    )
