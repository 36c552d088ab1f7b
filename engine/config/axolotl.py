"""Axolotl's keys as data: what axolotl_keys.yml says of those that this engine does not act on.

The names let an error say what a key is, instead of guessing a typo.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml import YAML

from engine.config.finding import Finding, shown

Level = Literal["run", "dataset"]

_FIX = {
    "note": "It can stay in a file that Axolotl reads too.",
    "error": "Remove it, or run this file with Axolotl.",
}


@dataclass(frozen=True, slots=True)
class Renamed:
    """An older spelling: the key it became, and the value that `true` stands for, if any."""

    key: str
    value: str | None = None


@dataclass(frozen=True, slots=True)
class Limit:
    """A key of which some values are not acted on, or none is; the file says what `unless` is."""

    section: str
    meaning: str | None
    """None for a field of the config, which says itself what it means."""
    severity: Literal["error", "note"]
    why: str
    fix: str
    unless: list[object] | None = field(hash=False)
    only: list[object] | None = field(hash=False)
    partly: bool
    """Whether a part of the value is acted on."""
    later: Literal["several GPUs", "trackers", "prompt formats"] | None
    """The part of Windtunnel that will act on a field. Several GPUs can be planned already."""

    @property
    def whole(self) -> bool:
        """Whether no value does anything; 1, and true where others change nothing, are none."""
        nothing = (True, 1) if self.severity == "note" else (1,)
        return (
            self.only is None
            and not self.partly
            and all(
                any(value == same and type(value) is type(same) for same in nothing)
                for value in self.unless or ()
            )
        )

    def applies(self, value: object) -> bool:
        """Whether this value is one that is not acted on."""
        if value is None:
            return False
        if self.only is not None:
            return value in self.only
        return bool(value) if self.unless is None else self._is_other(value)

    def _is_other(self, value: object) -> bool:
        assert self.unless is not None
        whole = any(isinstance(each, list) for each in self.unless)
        if isinstance(value, (dict, list)) and not whole:
            return any(self._is_other(part) for part in value)
        if isinstance(value, str):
            return not any(fnmatchcase(value, str(pattern)) for pattern in self.unless)
        return value not in self.unless

    def finding(self, key: str, value: object) -> Finding:
        """What is to be said of `key`, as it is written in findings, with this value."""
        error = self.severity == "error"
        what = f"{key}: {shown(value)} {'is not supported' if error else 'has no effect'}."
        id_ = "not-supported" if error else "no-effect"
        return Finding(id_, self.severity, key, None, what, self.why, self.fix)


def limits(level: Level = "run") -> Mapping[str, Limit]:
    """The keys on which this engine does not act, of the run or of an entry in `datasets`."""
    return _table()[level]


def renamed() -> Mapping[str, Renamed]:
    """Older spellings of a run's keys."""
    return {old: Renamed(**new) for old, new in _file()["renamed"].items()}


def elsewhere() -> Mapping[str, str]:
    """Names that Hugging Face's trainers and other tools use, and the keys that they mean."""
    names: Mapping[str, str] = _file()["elsewhere"]
    return names


@functools.cache
def _file() -> dict[str, Any]:
    """The file; read when it is first needed, as it takes a twentieth of a second."""
    with Path(__file__).with_name("axolotl_keys.yml").open(encoding="utf-8") as file:
        content: dict[str, Any] = YAML(typ="safe", pure=True).load(file)
    return content


@functools.cache
def _table() -> Mapping[Level, Mapping[str, Limit]]:
    table: dict[Level, dict[str, Limit]] = {"run": {}, "dataset": {}}
    for group in _file()["limits"]:
        for key, meaning in group["keys"].items():
            table[group.get("of", "run")][key] = Limit(
                section=group["section"],
                meaning=meaning or group.get("means"),
                severity=group["effect"],
                why=group["why"],
                fix=group.get("fix", _FIX[group["effect"]]),
                unless=group.get("unless"),
                only=group.get("only"),
                partly=group.get("partly", False),
                later=group.get("later"),
            )
    return table
