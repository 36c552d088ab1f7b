"""From a file's values to a RunConfig: every problem found at once, each with its line.

Separate from the model because a file may spell things that the model never sees: older names,
empty values, keys of other tools, secrets.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from engine.config.data_keys import DatasetConfig
from engine.config.document import Document, KeyPath, Value, load_document, parse_document
from engine.config.finding import ConfigError, Finding, problem, shown
from engine.config.other_keys import CHANGING, DATASET_CHANGING, ELSEWHERE, HARMLESS, RENAMED
from engine.config.rules import broken_rules
from engine.config.run import WITHOUT_RULES, RunConfig
from engine.config.support import require_supported, unsupported
from engine.config.words import allowed, schema_at, words
from engine.visible import visible

_KEYS = frozenset(RunConfig.model_fields)
_DATASET_KEYS = frozenset(DatasetConfig.model_fields)
_SOURCES = ("datasets", "test_datasets")

_SECRET_KEY = re.compile(
    r"(?:^|_)(?:api_?key|secret|secret_key|password|passwd|access_key|private_key"
    r"|(?:access|auth|hf|hub|api|github)_token)$|^token$"
)
_SECRET_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bgithub_pat_\w{20,}|\bAKIA[0-9A-Z]{16}\b|\bwandb_v\d_\w{20,}|://[^/\s:@]+:[^/\s@]+@"
)


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A config that was read: what it means, the text it came from, what to know about it."""

    config: RunConfig
    document: Document
    notes: tuple[Finding, ...]
    """Older spellings, and keys that were left out because they change nothing here."""

    def findings(self) -> list[Finding]:
        """Everything to know about the file, in the order of its lines; errors stop `train`."""
        found = [*self.notes, *unsupported(self.config, self.document)]
        return sorted(found, key=lambda finding: finding.line or 0)

    def require_supported(self) -> list[Finding]:
        """The same without errors. Raises ConfigError when training would not do what it says."""
        found = [*self.notes, *require_supported(self.config, self.document)]
        return sorted(found, key=lambda finding: finding.line or 0)


def read_config(path: Path | str) -> ConfigFile:
    """Read a config file. Raises UserError with every problem and its line."""
    return _read(load_document(Path(path)))


def parse_config(text: str, name: str = "config.yml") -> ConfigFile:
    """Read a config from text, for example from an editor; `name` is used in errors."""
    return _read(parse_document(text, name))


def _read(document: Document) -> ConfigFile:
    config, notes = check_values(document.values, document.name, document.line)
    return ConfigFile(config, document, tuple(notes))


def check_values(
    values: Mapping[str, Value], name: str, line: Callable[[str], int | None]
) -> tuple[RunConfig, list[Finding]]:
    """The config that `values` describe, with notes. Raises ConfigError with every problem.

    `line` gives the line of a key that is written as in findings, datasets[0].path.
    """
    check = _Check(dict(values))
    config = check.run()
    found = [replace(finding, line=line(finding.key)) for finding in check.found]
    if config is None:
        raise ConfigError(name, [finding for finding in found if finding.severity == "error"])
    return config, found


@dataclass(slots=True)
class _Check:
    values: dict[str, Value]
    found: list[Finding] = field(default_factory=list)

    def run(self) -> RunConfig | None:
        """The config, or None when a problem was found."""
        self.found += _secrets(self.values, ())
        secret = {finding.key for finding in self.found}
        self.values = {key: value for key, value in self.values.items() if key not in secret}
        self.modernize()
        self.values = cast("dict[str, Value]", _without_empty(self.values))
        self.sort_out(self.values, _KEYS, "")
        for key in _SOURCES:
            sources = self.values.get(key)
            for index, source in enumerate(sources if isinstance(sources, list) else ()):
                if isinstance(source, dict):
                    self.sort_out(source, _DATASET_KEYS, f"{key}[{index}].")
        return self.validate()

    def modernize(self) -> None:
        """Older spellings become today's."""
        for old, (new, value) in RENAMED.items():
            given = self.values.pop(old, None)
            if given is None or (value is not None and given in (False, "false")):
                continue
            if self.values.get(new) is not None:
                what = f"{old} and {new} are both set."
                self.found.append(
                    problem("set-twice", old, what, "They are the same key.", f"Remove {old}.")
                )
                continue
            self.values[new] = given if value is None else value
            now = f"{new}: {shown(self.values[new]) if value is None else value}"
            self.found.append(
                Finding(
                    "older-name",
                    "note",
                    old,
                    None,
                    f"{old} is an older spelling.",
                    f"It is read as {now}.",
                    f"Write {now}.",
                )
            )

    def sort_out(self, values: dict[str, Value], known: frozenset[str], prefix: str) -> None:
        """Take out the keys that are no fields, each with a finding."""
        for key in [key for key in values if key not in known]:
            value = values.pop(key)
            if not prefix and key in HARMLESS:
                if value:
                    what = f"{key} has no effect."
                    why = "It is a key of Axolotl that changes no result here."
                    fix = "It can stay in a file that Axolotl reads too."
                    self.found.append(Finding("no-effect", "note", key, None, what, why, fix))
            elif key not in (DATASET_CHANGING if prefix else CHANGING):
                self.found.append(_unknown(key, known, prefix))
            elif value:
                what = f"{prefix}{key} is not supported."
                why = "It is a key of Axolotl that changes what is learned, and is not acted on."
                fix = "Remove it, or run this file with Axolotl."
                self.found.append(problem("not-supported", f"{prefix}{key}", what, why, fix))

    def validate(self) -> RunConfig | None:
        """Types first, then the rules over all keys whose values could be read."""
        unread: set[str] = set()
        try:
            config = RunConfig.model_validate(self.values, context=WITHOUT_RULES)
        except ValidationError as error:
            details = error.errors(include_url=False)
            problems = list(_type_problems(details, self.values))
            self.found += problems
            unread = {re.split(r"[.\[]", finding.key)[0] for finding in problems}
            rest = {key: value for key, value in self.values.items() if key not in unread}
            rest.setdefault("base_model", "unread")
            config = RunConfig.model_validate(rest, context=WITHOUT_RULES)
        self.found += broken_rules(config, frozenset(unread))
        if any(finding.severity == "error" for finding in self.found):
            return None
        return config


def _without_empty(value: Value) -> Value:
    """`fp16:` means that fp16 is not set."""
    if isinstance(value, dict):
        return {key: _without_empty(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_empty(item) for item in value]
    return value


def _secrets(value: Value, path: KeyPath) -> Iterator[Finding]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _secrets(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _secrets(item, (*path, index))
    elif isinstance(value, str) and value:
        named = isinstance(path[-1], str) and _SECRET_KEY.search(path[-1].lower())
        if named or _SECRET_VALUE.search(value):
            yield problem(
                "secret",
                key_text(path),
                f"{key_text(path)} holds a token or password.",
                "A config is copied into the run's folder and shared; whoever reads it could"
                " use the token.",
                "Remove it, replace the token, and give the new one in the environment (HF_TOKEN,"
                " WANDB_API_KEY) or with `hf auth login`.",
            )


def key_text(path: KeyPath) -> str:
    """datasets[0].path for ("datasets", 0, "path")."""
    text = ""
    for part in (visible(part, one_line=True) if isinstance(part, str) else part for part in path):
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def nearest_key(key: str, known: frozenset[str]) -> str | None:
    """The key that was probably meant."""
    plain = key.strip().lower().replace("-", "_")
    if plain in known:
        return plain
    if ELSEWHERE.get(plain) in known:
        return ELSEWHERE[plain]
    close = difflib.get_close_matches(plain, [*known, *ELSEWHERE], n=3, cutoff=0.6)
    names = [name if name in known else ELSEWHERE[name] for name in close]
    return next((name for name in names if name in known), None)


def _unknown(key: str, known: frozenset[str], prefix: str) -> Finding:
    what = f"{shown(key)} is not a key{' of a dataset' if prefix else ''}."
    if not prefix and key in _DATASET_KEYS:
        why, fix = "It belongs to one dataset.", "Indent it under its entry in datasets."
    elif prefix and (key in _KEYS or key in CHANGING or key in HARMLESS):
        why, fix = "It belongs to the run.", "Move it out of datasets, to the left margin."
    else:
        near = nearest_key(key, known)
        why = "A key that nobody reads would be ignored without a word."
        fix = f"Did you mean {near}?" if near else "Remove it; `windtunnel schema` lists the keys."
    return problem("unknown-key", f"{prefix}{key}", what, why, fix)


def _type_problems(errors: list[ErrorDetails], values: Mapping[str, Value]) -> Iterator[Finding]:
    """One problem for each value; a union reports every one of its options."""
    places: dict[KeyPath, bool] = {}
    for error in errors:
        if error["type"] == "default_factory_not_called":
            continue
        path, value = _place(error["loc"], values)
        if error["type"] == "missing":
            places[*path, str(error["loc"][-1])] = True
        elif value is not values:
            places[path] = False
    for path, missing in places.items():
        if any(other != path and other[: len(path)] == path for other in places):
            continue
        key = key_text(path)
        if missing:
            why, fix = _MISSING[str(path[-1])]
            yield problem("missing", key, f"{key} is missing.", why, fix)
        else:
            yield _wrong_value(path, _place(path, values)[1])


_MISSING = {
    "base_model": ("A run starts from a model.", "Add base_model: ministral-3-3b, for example."),
    "path": ("A dataset is read from somewhere.", "Add path: and a file, a folder or a hub id."),
}


def _wrong_value(path: KeyPath, value: Value) -> Finding:
    key, must_be = key_text(path), words(schema_at(path))
    name = [part for part in path if part in _KEYS or part in _DATASET_KEYS][-1]
    fix = f"`windtunnel explain {name}` says what it means."
    if must_be == "text":
        fix = "Put the text in quotes."
    elif must_be == "a list of datasets":
        fix = "Write `  - path: ` and a file, a folder or a hub id on the line below."
    elif must_be.startswith("a list") and not isinstance(value, (dict, list)):
        fix = "Put it in square brackets, or each item on its own line behind a dash."
    elif isinstance(value, str):
        choices = allowed(schema_at(path))
        near = [choice for choice in choices if len(value) > 2 and choice.startswith(value)]
        near += difflib.get_close_matches(value.lower(), choices, n=1)
        fix = f"Did you mean {near[0]}?" if near else fix
    return problem("bad-value", key, f"{key} is {shown(value)}.", f"It must be {must_be}.", fix)


def _place(loc: tuple[int | str, ...], values: Mapping[str, Value]) -> tuple[KeyPath, Value]:
    """The part of pydantic's location that is in the file: it names the options of unions too."""
    path: KeyPath = ()
    value: Value = cast("dict[str, Value]", values)
    for part in loc:
        inside = range(len(value)) if isinstance(value, list) else value
        if not isinstance(inside, (dict, range)) or part not in inside:
            continue
        value = cast("Any", value)[part]
        path = (*path, part)
    return path, value
