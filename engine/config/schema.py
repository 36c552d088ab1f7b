"""The JSON schema of a config, and what a key takes in words: "a whole number, 1 or more".

An error about a value and `explain` say those words, from the same schema that editors read.
"""

import difflib
import functools
from collections.abc import Mapping
from typing import Any

from engine.config.axolotl import Limit, elsewhere, limits, renamed
from engine.config.document import KeyPath
from engine.config.rules import RunConfig

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
            if key not in required and not _accepts_null(entry):
                _allow_null(entry)
    return schema


def _accepts_null(entry: Schema) -> bool:
    return any(option.get("type") == "null" for option in entry.get("anyOf", ()))


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
    """A schema in words."""
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
        return "a list of datasets" if "$ref" in item else f"a list{_of(item)}"
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
    """The schema of what `part` names inside `node`."""
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


def _of(item: Schema) -> str:
    return f" of {_plain(item)}" if item.get("type") else ""


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
