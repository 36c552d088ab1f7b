"""YAML text: plain values out with the line of every key, every syntax error, and values in again.

Only null, booleans, numbers, text, lists and mappings are read, so no tag of a file can make an
object. Values are spelled so that Axolotl's reader, PyYAML, which is YAML 1.1, reads the same:
there `2e-5` and `1e-05` are text and `no` is false.
"""

import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.resolver import implicit_resolvers

from engine.config.axolotl import renamed
from engine.config.finding import ConfigError, Finding, shown
from engine.errors import UserError
from engine.visible import visible

KeyPath: TypeAlias = tuple[str | int, ...]
Value: TypeAlias = "bool | int | float | str | list[Value] | dict[str, Value] | None"

# The largest Mistral example has 90 lines; these only stop a file that was made to hurt.
_MAX_BYTES = 1 << 20
_MAX_NODES = 20_000
_MAX_DEPTH = 30
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True)
class Document:
    """A config file that could be read as YAML; `values` are what it says, unchecked."""

    name: str
    """Its path, or the name under which errors speak of it."""
    text: str
    values: dict[str, Value]
    nodes: dict[KeyPath, Node] = field(repr=False)
    """The node of every value, by its path from the root; () is the root."""
    lines: dict[KeyPath, int] = field(repr=False)
    """The line of every key and list item, counted from 1."""
    problems: tuple[Finding, ...] = ()
    """What the text has besides: keys that stand there twice, tags that ask for objects."""

    def line(self, key: str) -> int | None:
        """Line of `key`, written as in findings (datasets[0].path), or of what encloses it.

        Of a key that stands here in an older spelling, the line of that.
        """
        path = (key,) if (key,) in self.lines else key_path(key)
        while path and path not in self.lines:
            path = path[:-1]
        if path:
            return self.lines[path]
        older = (old for old, new in renamed().items() if new.key == key_path(key)[0])
        return next((self.lines[old,] for old in older if (old,) in self.lines), None)

    def reason(self, key: str) -> str:
        """The reason of a key, as `with_reason` writes it: beside it, or above where it is too long
        for that. Empty where there is none; a title above is none."""
        number, node = self.lines.get((key,)), self.nodes.get((key,))
        if number is None or node is None:
            return ""
        lines = self.text.splitlines()
        line, end = lines[number - 1], node.end_mark
        one_line = isinstance(node, ScalarNode) and end.line == number - 1
        beside = line[end.column :] if one_line else line.partition(":")[2]
        if beside.strip().startswith("#"):
            return beside.strip().lstrip("# ")
        above = list(takewhile(lambda each: each.startswith("# "), reversed(lines[: number - 1])))
        for count in range(len(above), 0, -1):
            text = " ".join(each[2:] for each in reversed(above[:count]))
            if with_reason([line], text)[:-1] == above[:count][::-1]:
                return text
        return ""


def key_path(key: str) -> KeyPath:
    """("datasets", 0, "path") for datasets[0].path."""
    parts = key.replace("]", "").replace("[", ".").split(".")
    return tuple(int(part) if part.isdecimal() and len(part) < 10 else part for part in parts)


def key_text(path: KeyPath) -> str:
    """datasets[0].path for ("datasets", 0, "path")."""
    text = ""
    for part in (visible(part, one_line=True) if isinstance(part, str) else part for part in path):
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def load_document(path: Path) -> Document:
    """Read a config file. Raises UserError when it is missing, no UTF-8 text or no YAML mapping."""
    name = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(
            f"{name} was not found.",
            "There is no file of that name.",
            "Check the path. README shows a config; `windtunnel schema` lists all keys.",
        ) from None
    except OSError as error:
        raise UserError(
            f"{name} cannot be read.",
            f"The system says: {error.strerror}.",
            "Name a config file that you may read.",
        ) from error
    if len(data) > _MAX_BYTES:
        raise UserError(
            f"{name} is larger than 1 MiB.",
            "No config is; perhaps this is a dataset or a model.",
            "Name the YAML file that holds the config.",
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{name}, line {line}: this is not UTF-8 text.",
            "A config is a text file; perhaps the editor saved it as UTF-16 or Latin-1.",
            "Save the file as UTF-8.",
        ) from None
    return parse_document(text, name)


def parse_document(text: str, name: str) -> Document:
    """Read YAML (or JSON) text. Raises UserError with the line of a mistake."""
    reader = YAML(typ="safe", pure=True)
    try:
        _limit_size(text, name)
        root = reader.compose(text)
    except MarkedYAMLError as error:
        raise _syntax_error(error, text, name) from None
    except YAMLError as error:
        raise UserError(
            f"{name} holds a character that YAML does not allow.",
            f"It is {shown(str(error).splitlines()[0])}.",
            "Remove the control character.",
        ) from None
    if not isinstance(root, MappingNode):
        found = {SequenceNode: "a list", ScalarNode: "plain text"}.get(type(root), "empty")
        raise UserError(
            f"{name} is no config: it is {found}.",
            "A config is a mapping: one `key: value` on each line.",
            "Start with `base_model: ` and the model to train.",
        )
    walk = _Walk(name, reader)
    values = walk.mapping(root, ())
    return Document(name, text, values, walk.nodes, walk.lines, tuple(walk.problems))


def parse_value(text: str) -> Value:
    """One value as YAML types it: `2e-4` is a number, nothing is None, `[a, b]` a list.

    Raises UserError when it is no YAML.
    """
    document = parse_document(f"value: {text}\n", f"The value {shown(text)}")
    if document.problems:
        raise ConfigError(document.name, document.problems)
    if len(document.values) > 1:
        raise UserError(
            f"The value {shown(text)} holds a line break.",
            "One argument sets one key.",
            "Put text with line breaks into the config file.",
        )
    return document.values["value"]


@dataclass(slots=True)
class _Walk:
    """From nodes to plain values, noting where each of them stands."""

    name: str
    reader: YAML
    problems: list[Finding] = field(default_factory=list)
    nodes: dict[KeyPath, Node] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    seen: int = 0

    def value(self, node: Node, path: KeyPath) -> Value:
        # An alias is the same node again: a few of them, nested, are billions of values.
        self.seen += 1
        if self.seen > _MAX_NODES or len(path) > _MAX_DEPTH:
            raise _too_deep(self.name)
        self.nodes[path] = node
        if isinstance(node, MappingNode):
            self.plain_tag(node, path, "map")
            return self.mapping(node, path)
        if isinstance(node, SequenceNode):
            self.plain_tag(node, path, "seq")
            return self.sequence(node, path)
        return self.scalar(node, path)

    def plain_tag(self, node: Node, path: KeyPath, *plain: str) -> None:
        if str(node.tag).removeprefix(_TAG) not in plain:
            what = f"The tag {shown(str(node.tag))} asks for a special object."
            self.add(path, node.start_mark.line + 1, what, "A config holds plain values only.")

    def mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Value]:
        self.nodes[path] = node
        values: dict[str, Value] = {}
        for key_node, value_node in self.pairs(node, path):
            line = key_node.start_mark.line + 1
            key = key_node.value
            if not isinstance(key, str):
                self.add(path, line, "A key is a list or a mapping.", "Keys are plain words.")
                continue
            if key in values:
                self.add(
                    (*path, key),
                    line,
                    f"{shown(key)} stands here a second time; the first is on line"
                    f" {self.lines[*path, key]}.",
                    "It is not clear which value is meant.",
                )
                continue
            self.lines[*path, key] = line
            values[key] = self.value(value_node, (*path, key))
        return values

    def pairs(self, node: MappingNode, path: KeyPath) -> Iterator[tuple[Node, Node]]:
        """Keys and values, those of `<<: *anchor` last and only where the mapping has none."""
        own = [(key, value) for key, value in node.value if key.tag != f"{_TAG}merge"]
        names = {key.value for key, _ in own if isinstance(key.value, str)}
        yield from own
        for key, value in node.value:
            if key.tag != f"{_TAG}merge":
                continue
            for source in value.value if isinstance(value, SequenceNode) else [value]:
                if not isinstance(source, MappingNode):
                    self.add(path, key.start_mark.line + 1, "`<<` names no mapping.", "")
                    continue
                for merged in source.value:
                    if isinstance(merged[0].value, str) and merged[0].value not in names:
                        names.add(merged[0].value)
                        yield merged

    def sequence(self, node: SequenceNode, path: KeyPath) -> list[Value]:
        values: list[Value] = []
        for index, item in enumerate(node.value):
            self.lines[*path, index] = item.start_mark.line + 1
            values.append(self.value(item, (*path, index)))
        return values

    def scalar(self, node: Node, path: KeyPath) -> Value:
        text: str = node.value
        kind = str(node.tag).removeprefix(_TAG)
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return text.lower() in ("true", "yes", "on", "y")
            if kind == "int":
                return int(self.reader.constructor.construct_yaml_int(node))
            if kind == "float":
                return float(self.reader.constructor.construct_yaml_float(node))
        except (ValueError, IndexError):  # `!!float ""`
            kind = "str"
        self.plain_tag(node, path, "str", "timestamp", "int", "float")
        if any("\ud800" <= character <= "\udfff" for character in text):
            what = "The text holds half of a character (a lone surrogate)."
            self.add(path, node.start_mark.line + 1, what, "It cannot be written again.")
        return text

    def add(self, path: KeyPath, line: int, what: str, why: str) -> None:
        fix = "Correct or remove this line."
        self.problems.append(Finding("yaml", "error", key_text(path), line, what, why, fix))


def _limit_size(text: str, name: str) -> None:
    """Refuse what would keep the reader busy: it needs seconds for 5,000 open brackets."""
    depth = 0
    for count, event in enumerate(YAML(typ="safe", pure=True).parse(text)):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > _MAX_DEPTH or count > _MAX_NODES:
            raise _too_deep(name)


def _too_deep(name: str) -> UserError:
    return UserError(
        f"{name} is nested too deeply or repeats itself too often.",
        "A config has a few levels and a few dozen values.",
        "Write the values out without anchors (&) and aliases (*).",
    )


def _syntax_error(error: MarkedYAMLError, text: str, name: str) -> UserError:
    mark = error.problem_mark or error.context_mark
    number = mark.line if mark else 0
    source = text.splitlines()
    line = source[number] if number < len(source) else ""
    what = f"{name}, line {number + 1}: this is not YAML."
    why = f"The line reads {shown(line.strip())}."
    reason = error.problem or error.context or "the structure is broken"
    if "another document" in reason:
        return UserError(what, "A second document starts here.", "Keep one, without `---` between.")
    if "\\t" in reason:
        return UserError(what, "It is indented with a tab.", "Indent with spaces.")
    if "mapping values" in reason:
        fix = (
            "Indent it like the line above, and put text that holds a colon and a space in quotes."
        )
    elif "alias" in reason:
        fix = "Put text that starts with * in quotes."
    elif "cannot start any token" in reason:
        fix = "Put text that starts with such a character in quotes."
    elif "end of stream" in reason or "','" in reason:
        fix = "Close the quote or bracket that was opened here or above."
    else:
        fix = "Look for a missing quote, bracket or colon here or in the line above."
    return UserError(what, f"{why} The reader says: {reason}.", fix)


WIDTH = 100
HEADER = "# A Windtunnel config. The comment beside a value is its reason."

_PLAIN = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./@+=%~ -]*(?<! )")
_PLAIN_COLONS = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./@+=%~ -]*(?::[A-Za-z0-9_./@+=%~-]+)+")


def scalar(value: object, *, flow: bool = False) -> str:
    """One value on one line; inside brackets (`flow`) more text is quoted."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, int):
        return str(value)
    text = str(value)
    if _is_plain(text, flow):
        return text
    if "\\" in text and "'" not in text and text.isprintable():
        return f"'{text}'"
    return _quoted(text)


def _number(value: float) -> str:
    digits, _, exponent = repr(value).partition("e")
    if not exponent:
        return digits
    # YAML 1.1 wants a dot before the exponent and a sign in it.
    return f"{digits if '.' in digits else digits + '.0'}e{int(exponent):+d}"


def _is_plain(text: str, flow: bool) -> bool:
    shape = _PLAIN.fullmatch(text) or (not flow and _PLAIN_COLONS.fullmatch(text))
    # A text that any YAML version would take for a number, a date or a boolean needs quotes.
    return bool(shape) and not any(pattern.match(text) for _, _, pattern, _ in implicit_resolvers)


def _quoted(text: str) -> str:
    inside = json.dumps(text, ensure_ascii=False)[1:-1]
    return '"' + "".join(c if c.isprintable() else _escape(c) for c in inside) + '"'


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def flow(value: object, *, json_like: bool = False) -> str:
    """Any value on one line, in brackets where it has parts; `json_like` quotes every text."""
    if isinstance(value, Mapping):
        parts = [
            f"{flow(name, json_like=json_like)}: {flow(item, json_like=json_like)}"
            for name, item in value.items()
        ]
        return "{" + ", ".join(parts) + "}"
    if isinstance(value, str):
        return _quoted(value) if json_like else scalar(value, flow=True)
    if isinstance(value, Sequence):
        return "[" + ", ".join(flow(item, json_like=json_like) for item in value) + "]"
    return scalar(value)


def entry(key: str, value: object, indent: int = 0) -> list[str]:
    """The lines of `key: value`. Mappings inside lists get lines of their own."""
    margin = " " * indent
    head = f"{margin}{scalar(key)}:"
    if value is None:
        return [head]
    if isinstance(value, str) or not isinstance(value, (Mapping, Sequence)):
        return [f"{head} {scalar(value)}"]
    one_line = f"{head} {flow(value)}"
    nested = value and all(isinstance(item, Mapping) for item in value)
    if not nested and (len(one_line) <= WIDTH or not value or isinstance(value, Mapping)):
        return [one_line]
    lines = [head]
    for item in value:
        if isinstance(item, Mapping) and item:
            inner = [line for name in item for line in entry(str(name), item[name], indent + 4)]
            lines += [f"{margin}  - {inner[0].lstrip()}", *inner[1:]]
        else:
            lines.append(f"{margin}  - {flow(item)}")
    return lines


def comment_text(reason: str) -> str:
    """A reason on one line, with nothing that YAML or a terminal would not take."""
    text = " ".join(visible(reason).split())
    return "".join(c if c.isprintable() or c in "\u200c\u200d" else "�" for c in text)


def comment_lines(reason: str, indent: int = 0) -> list[str]:
    """A reason as comment lines of its own."""
    margin = f"{' ' * indent}# "
    return [f"{margin}{line}" for line in textwrap.wrap(comment_text(reason), WIDTH - len(margin))]


def with_reason(lines: Sequence[str], reason: str | None, indent: int = 0) -> list[str]:
    """`lines` of an entry with their reason: beside the first when it fits, above when not."""
    if not reason or not comment_text(reason):
        return list(lines)
    beside = f"{lines[0]}  # {comment_text(reason)}"
    if len(beside) <= WIDTH:
        return [beside, *lines[1:]]
    return [*comment_lines(reason, indent), *lines]
