"""Random configs for the property tests: every key, values of every type that YAML trips over."""

import functools
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from engine.config import RunConfig, config_schema
from engine.config.axolotl import renamed
from engine.config.finding import ConfigError
from engine.config.reading import check_values

TRICKY = (
    *("yes", "no", "on", "off", "null", "~", "true", "1e5", "2e-4", "0x10", "012", "1:30"),
    *("2024-01-01", "a: b", "a:b", "a #b", "# c", " x ", "-", "- a", "'", '"', "\\d+", "=", "<<"),
    *("&a", "*a", "!x", "%", "@x", "`x`", "[a]", "{a}", "a,b", "...", "---", "?"),
    *("|", ">", "a\\'b"),
    *("é", "日本", "👍🏽", "\u2028", "\x85", "a\n\nb ", "\t", "\x00", "\x7f", "\ufeff", "a\r\nb"),
)
TEXTS = st.one_of(
    st.sampled_from(TRICKY), st.text(max_size=40), st.text("abcxyz/._- ", min_size=1, max_size=150)
)


def from_schema(entry: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a JSON schema allows."""
    if "anyOf" in entry:
        return st.one_of([from_schema(option) for option in entry["anyOf"]])
    if "enum" in entry:
        return st.sampled_from(entry["enum"])
    if "const" in entry:
        return st.just(entry["const"])
    if "$ref" in entry:
        return datasets()
    kind = entry.get("type")
    if kind == "null":
        return st.none()
    if kind == "boolean":
        return st.booleans()
    if kind == "integer":
        return st.integers(entry.get("minimum", -5), 10**9)
    if kind == "number":
        low = entry.get("minimum", entry.get("exclusiveMinimum"))
        high = entry.get("maximum", entry.get("exclusiveMaximum"))
        return st.floats(
            low,
            high,
            exclude_min="exclusiveMinimum" in entry,
            exclude_max="exclusiveMaximum" in entry,
            allow_nan=False,
            allow_infinity=False,
        )
    if kind == "string":
        return TEXTS
    if kind == "array":
        return st.lists(from_schema(entry.get("items", {})), max_size=3)
    if kind == "object":
        inner = entry.get("additionalProperties")
        inner = inner if isinstance(inner, Mapping) else {}
        names = st.integers(0, 10**6).map(str) if "patternProperties" in entry else TEXTS
        return st.dictionaries(names, from_schema(inner), max_size=3)
    return st.one_of(st.integers(), TEXTS, st.lists(st.booleans(), max_size=2))


@functools.cache
def _by_key(definition: str) -> dict[str, st.SearchStrategy[Any]]:
    schema = config_schema()["$defs"][definition] if definition else config_schema()
    given = ("path", "base_model", *renamed())
    return {k: from_schema(v) for k, v in schema["properties"].items() if k not in given}


@st.composite
def _some_of(draw: st.DrawFn, definition: str, most: int) -> dict[str, Any]:
    strategies = _by_key(definition)
    chosen = draw(st.lists(st.sampled_from(sorted(strategies)), max_size=most, unique=True))
    return {name: draw(strategies[name]) for name in chosen}


@st.composite
def datasets(draw: st.DrawFn) -> dict[str, Any]:
    return {"path": draw(TEXTS), **draw(_some_of("DatasetConfig", most=4))}


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    """A valid config. Keys that break a rule are taken out again, as the error names them."""
    values: dict[str, Any] = {
        "base_model": "mistralai/Ministral-3-3B-Instruct-2512",
        **draw(_some_of("", most=12)),
    }
    while True:
        try:
            return check_values(values, "drawn", lambda key: None)[0]
        except ConfigError as error:
            for finding in error.findings:
                values.pop(finding.key.partition("[")[0].partition(".")[0], None)
            values.setdefault("base_model", "x")
