"""From a file's values, or `key=value` arguments, to a RunConfig: every problem found at once.

A file may spell things that RunConfig never sees: older names, empty values, keys of other tools,
secrets.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from engine.config.axolotl import limits, refuse_errors, renamed, unsupported
from engine.config.document import (
    Document,
    KeyPath,
    Value,
    key_path,
    key_text,
    load_document,
    parse_document,
    parse_value,
)
from engine.config.finding import ConfigError, Finding, problem, shown
from engine.config.keys import LARGEST_WHOLE, DatasetConfig
from engine.config.rules import WITHOUT_RULES, RunConfig, broken_rules
from engine.config.schema import allowed, describe, nearest_key, schema_at
from engine.errors import UserError

_KEYS = frozenset(RunConfig.model_fields)
_DATASET_KEYS = frozenset(DatasetConfig.model_fields)
_ARGUMENTS = "The command line"
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
    """Older spellings, and Axolotl's keys that are no part of `config`; an error stops `train`."""

    def findings(self) -> list[Finding]:
        """Everything to know about the file, in the order of its lines; errors stop `train`."""
        found = [*self.notes, *_with_lines(unsupported(self.config), self.document.line)]
        return sorted(found, key=lambda finding: finding.line or 0)

    def require_supported(self, *, sharded: bool = False) -> list[Finding]:
        """The same without errors. Raises ConfigError when training would not do what it says.

        With `sharded` a config for several GPUs passes: it can be planned, and not run.
        """
        found = self.findings()
        refuse_errors(self.document.name, found, sharded=sharded)
        return found

    def override(self, assignments: Sequence[str]) -> "ConfigFile":
        """The file with `key=value` arguments applied to what it says; its text stays.

        Raises UserError with every problem, as reading a file does.
        """
        if not assignments:
            return self
        config, notes = _assign(self.config, assignments)
        given = {assignment.partition("=")[0] for assignment in assignments}
        kept = [note for note in self.notes if note.key not in given]
        return replace(self, config=config, notes=(*kept, *notes))


def read_config(path: Path | str) -> ConfigFile:
    """Read a config file. Raises UserError with every problem and its line."""
    return _read(load_document(Path(path)))


def parse_config(text: str, name: str = "config.yml") -> ConfigFile:
    """Read a config from text, for example from an editor; `name` is used in errors."""
    return _read(parse_document(text, name))


def override(config: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """`config` with `key=value` arguments applied.

    Raises UserError with every problem, as reading a file does, also where one of Axolotl's keys is
    not supported.
    """
    changed, notes = _assign(config, assignments)
    refuse_errors(_ARGUMENTS, notes)
    return changed


def _assign(config: RunConfig, assignments: Sequence[str]) -> tuple[RunConfig, list[Finding]]:
    given = config.model_dump(mode="json", exclude_unset=True)
    values, problems = assigned(given, assignments)
    return check_values(values, _ARGUMENTS, lambda key: None, problems, unsupported(config))


def _read(document: Document) -> ConfigFile:
    config, notes = check_values(document.values, document.name, document.line, document.problems)
    return ConfigFile(config, document, tuple(notes))


def check_values(
    values: Mapping[str, Value],
    name: str,
    line: Callable[[str], int | None],
    problems: Sequence[Finding] = (),
    known: Sequence[Finding] = (),
) -> tuple[RunConfig, list[Finding]]:
    """The config that `values` describe, with notes. Raises ConfigError with every problem.

    `line` gives the line of a key that is written as in findings, datasets[0].path; `problems` are
    those that its text has, such as a key that stands there twice. Among the notes are errors, by
    which Axolotl's keys are not supported. Where there is another problem, they are raised with it,
    and all else that is not supported but what is `known`.
    """
    check = _Check(dict(values), list(problems), known)
    config = check.run()
    found = _with_lines(check.found, line)
    if config is None:
        raise ConfigError(name, [finding for finding in found if finding.severity == "error"])
    return config, found


def _with_lines(findings: Iterable[Finding], line: Callable[[str], int | None]) -> list[Finding]:
    return [
        finding if finding.line is not None else replace(finding, line=line(finding.key))
        for finding in findings
    ]


@dataclass(slots=True)
class _Check:
    values: dict[str, Value]
    found: list[Finding]
    """Every problem and every note."""
    known: Sequence[Finding]
    unread: set[str] = field(default_factory=set)
    """Keys whose values are not the file's, because they could not be read."""

    def run(self) -> RunConfig | None:
        self.unread = {finding.key for finding in self.found}
        self.found += _secrets(self.values, ())
        secret = {finding.key for finding in self.found if finding.id == "secret"}
        self.unread |= secret
        self.values = {key: value for key, value in self.values.items() if key not in secret}
        self.modernize()
        self.values = cast("dict[str, Value]", _without_empty(self.values))
        self.sort_out(self.values, _KEYS, "")
        for key in _SOURCES:
            sources = self.values.get(key)
            for index, source in enumerate(sources if isinstance(sources, list) else ()):
                if isinstance(source, dict):
                    self.sort_out(source, _DATASET_KEYS, f"{key}[{index}].")
        config = self.validate()
        broken = any(
            finding.severity == "error" and finding.id != "not-supported" for finding in self.found
        )
        if not broken:
            return config
        not_supported = [each for each in unsupported(config) if each not in self.known]
        self.found += self.of_read_keys(not_supported)
        return None

    def modernize(self) -> None:
        self.read_fsdp1()
        if self.values.keys() <= _KEYS:
            return
        for old, now in renamed().items():
            given = self.values.pop(old, None)
            if given is None or (now.value is not None and given in (False, "false")):
                continue
            new = now.key
            if self.values.get(new) is not None:
                what = f"{old} and {new} are both set."
                self.found.append(
                    problem("set-twice", old, what, "They are the same key.", f"Remove {old}.")
                )
                continue
            self.values[new] = given if now.value is None else now.value
            reads = f"{new}: {now.value or shown(given)}"
            what, why = f"{old} is an older spelling.", f"It is read as {reads}."
            note = Finding("older-name", "note", old, None, what, why, f"Write {reads}.")
            self.found.append(note)

    def read_fsdp1(self) -> None:
        """FSDP1's list of switches becomes FSDP2's config; its name for gradient checkpointing, the
        key that acts."""
        switches = self.values.pop("fsdp", None)
        settings = self.values.get("fsdp_config")
        if switches and settings is None:
            settings = self.values["fsdp_config"] = {"reshard_after_forward": True}
        if switches:
            self.tell_mapped("fsdp", "is FSDP1's list of switches", "fsdp_config, that is FSDP2")
        asks = isinstance(settings, dict) and any(
            settings.get(f"{prefix}activation_checkpointing") in (True, "true")
            for prefix in ("", "fsdp_")
        )
        if asks and self.values.get("gradient_checkpointing") is None:
            self.values["gradient_checkpointing"] = True
            own = "holds activation_checkpointing: true"
            self.tell_mapped("fsdp_config", own, "gradient_checkpointing: true")

    def tell_mapped(self, key: str, what: str, reads: str) -> None:
        fix = f"Write {reads.partition(',')[0]}, unless Axolotl reads the file too."
        self.found.append(
            Finding("mapped", "note", key, None, f"{key} {what}.", f"It is read as {reads}.", fix)
        )

    def sort_out(self, values: dict[str, Value], known: frozenset[str], prefix: str) -> None:
        """Take out the keys that are no fields, each with a finding."""
        for key in [key for key in values if key not in known]:
            value = values.pop(key)
            limit = limits("dataset" if prefix else "run").get(key)
            if limit is None:
                self.found.append(_unknown(key, known, prefix))
            elif limit.applies(value):
                self.found.append(limit.finding(f"{prefix}{key}", value))

    def validate(self) -> RunConfig:
        """Types first, then the rules over all keys whose values could be read."""
        try:
            config = RunConfig.model_validate(self.values, context=WITHOUT_RULES)
        except ValidationError as error:
            details = error.errors(include_url=False)
            problems = self.of_read_keys(_type_problems(details, self.values))
            self.found += problems
            self.unread |= {finding.key for finding in problems}
            config = RunConfig.model_validate(self.readable(), context=WITHOUT_RULES)
        self.found += self.of_read_keys(broken_rules(config, frozenset(self.unread)))
        return config

    def readable(self) -> dict[str, Value]:
        """The values without those that could not be read; what must be given is made up."""
        values = deepcopy(self.values)
        for key in self.unread:
            name, *inside = key_path(key)
            sources = values.get(str(name))
            if name not in _SOURCES or not inside or not isinstance(sources, list):
                values.pop(str(name), None)
            elif inside[0] in range(len(sources)):
                index = int(inside[0])
                source = sources[index]
                if len(inside) == 1 or not isinstance(source, dict):
                    sources[index] = {"path": "unread"}
                else:
                    source.pop(str(inside[1]), None)
                    source.setdefault("path", "unread")
        values.setdefault("base_model", "unread")
        return values

    def of_read_keys(self, findings: Iterable[Finding]) -> list[Finding]:
        """Those that judge what the file says, and not a value that could not be read."""
        parts = tuple(f"{key}{follows}" for key in self.unread for follows in ".[")
        return [
            finding
            for finding in findings
            if finding.key not in self.unread and not finding.key.startswith(parts)
        ]


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


def _unknown(key: str, known: frozenset[str], prefix: str) -> Finding:
    what = f"{shown(key)} is not a key{' of a dataset' if prefix else ''}."
    if not prefix and key in _DATASET_KEYS:
        why, fix = "It belongs to one dataset.", "Indent it under its entry in datasets."
    elif prefix and (key in _KEYS or key in limits()):
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
    key, must_be = key_text(path), describe(schema_at(path))
    if isinstance(value, int) and value > LARGEST_WHOLE:
        must_be += f", and at most {LARGEST_WHOLE:,}"
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
