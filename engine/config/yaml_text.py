"""How a value is spelled in YAML, so that YAML 1.1 and 1.2 readers read the same value.

Axolotl reads with PyYAML, which is YAML 1.1: there `2e-5` and `1e-05` are text and `no` is false.
"""

import json
import re
import textwrap
from collections.abc import Mapping, Sequence

from ruamel.yaml.resolver import implicit_resolvers

from engine.visible import visible

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
