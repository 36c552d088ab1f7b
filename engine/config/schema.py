"""What a key is: the JSON schema for editors, and in words for `explain`, help and errors."""

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from engine.config.axolotl import Level, Limit, elsewhere, limits, renamed
from engine.config.document import KeyPath, flow, key_path
from engine.config.finding import shown
from engine.config.keys import SECTIONS, DatasetConfig, section_title
from engine.config.rules import RunConfig
from engine.errors import UserError

Schema = Mapping[str, Any]


@functools.cache
def config_schema() -> dict[str, Any]:
    """The JSON schema of a config file; a key may also be left empty, which means unset.

    It offers what works. Keys that are read and do nothing are marked: `deprecated` is JSON
    Schema's word; `deprecationMessage`, which editors show as a warning, and `doNotSuggest`, by
    which they offer the key to nobody, are what yaml-language-server and VS Code read.
    """
    schema = _fields_schema()
    properties = schema["properties"]
    dataset = schema["$defs"]["DatasetConfig"]["properties"]
    for entries, known in ((properties, limits()), (dataset, limits("dataset"))):
        for key, limit in known.items():
            if limit.meaning is not None:
                entries[key] = {"description": limit.meaning} | _marks(limit)
            elif limit.whole:
                entries[key] |= _marks(limit)
    for old, new in renamed().items():
        about = f"Older spelling of {new.key}."
        mark = {"deprecated": True, "deprecationMessage": f"Write {new.key}."}
        properties[old] = {"description": about} | mark
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _marks(limit: Limit) -> dict[str, object]:
    if limit.severity == "note":
        return {"deprecated": True, "doNotSuggest": True}
    message = f"It is not supported. {limit.why} {limit.fix}"
    return {"deprecated": True, "deprecationMessage": message}


def _fields_schema() -> dict[str, Any]:
    schema = RunConfig.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        required = section.get("required", ())
        for key, entry in section["properties"].items():
            entry.pop("title", None)
            if "description" in entry:
                entry["description"] = " ".join(entry["description"].split())
            null = any(option.get("type") == "null" for option in entry.get("anyOf", ()))
            if key not in required and not null:
                _allow_null(entry)
    return schema


def _allow_null(entry: dict[str, Any]) -> None:
    beside = ("description", "default", "default_words")
    option = {name: entry.pop(name) for name in list(entry) if name not in beside}
    options = option["anyOf"] if set(option) == {"anyOf"} else [option]
    entry["anyOf"] = [*options, {"type": "null"}]


def schema_at(path: KeyPath) -> Schema:
    """The schema of the value at `path`; empty where there is none."""
    node: Schema = config_schema()
    for part in path:
        node = _step(node, part)
    return node


def describe(entry: Schema) -> str:
    values = allowed(entry)
    if values:
        return " or ".join(values) if len(values) < 3 else f"one of {', '.join(values)}"
    if "anyOf" in entry:
        options = [describe(option) for option in entry["anyOf"] if option.get("type") != "null"]
        return " or ".join(options)
    if "$ref" in entry:
        return "a mapping with path and the other keys of a dataset"
    kind = entry.get("type")
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _range(entry)
    if kind == "string":
        return "text"
    if kind == "array":
        item = entry.get("items", {})
        of = f" of {_plain(item)}" if item.get("type") else ""
        return "a list of datasets" if "$ref" in item else f"a list{of}"
    if kind == "object":
        item = entry.get("additionalProperties", {})
        return f"a mapping of names to {_plain(item)}"
    return "a value"


def allowed(entry: Schema) -> list[str]:
    """The values of a key that takes only a few, as YAML spells them; empty when it takes more."""
    options = entry.get("anyOf", [entry])
    found: list[str] = []
    for option in options:
        if option.get("type") == "boolean":
            found += ["true", "false"]
        elif "enum" in option or "const" in option:
            found += [str(value) for value in option.get("enum", [option.get("const")])]
        elif option.get("type") != "null":
            return []
    return found


def _step(node: Schema, part: str | int) -> Schema:
    if "$ref" in node:
        node = config_schema()["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    for option in (node, *node.get("anyOf", ())):
        inner = option.get("items") if isinstance(part, int) else option.get("properties")
        found = inner if isinstance(part, int) else (inner or {}).get(part)
        found = found or option.get("additionalProperties")
        if isinstance(found, Mapping):
            return found
    return {}


def _range(entry: Schema) -> str:
    low, above = entry.get("minimum"), entry.get("exclusiveMinimum")
    high, below = entry.get("maximum"), entry.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    if low is not None and below is not None:
        return f" from {low:g} to below {below:g}"
    if low is not None:
        return f", {low:g} or more"
    return "" if above is None else f" above {above:g}"


def _plain(item: Schema | bool) -> str:
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind == "array":
        return "lists of text"
    return {"string": "text", "integer": "whole numbers"}.get(str(kind), "values")


def nearest_key(key: str, known: frozenset[str]) -> str | None:
    """The key that was probably meant."""
    plain = key.strip().lower().replace("-", "_")
    if plain in known:
        return plain
    others = elsewhere()
    if others.get(plain) in known:
        return others[plain]
    close = difflib.get_close_matches(plain, [*known, *others], n=3, cutoff=0.6)
    names = [name if name in known else others[name] for name in close]
    return next((name for name in names if name in known), None)


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
    found = [
        _explanation(level, key)
        for level, key in asked
        if key in _FIELDS_OF[level].model_fields or key in limits(level)
    ]
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
