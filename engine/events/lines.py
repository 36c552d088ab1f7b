"""One event as one line of JSON, and back, whatever the line holds.

The types of the fields are read off the dataclasses, so that the vocabulary is written once.
"""

import json
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import partial
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from engine.events.vocabulary import Event, Recorded

VERSION: Final = 1
"""`v` of every line. A reader skips lines of a higher one."""

_WRONG: Final = object()
_Check = Callable[[object], object]


def _read_float(value: object) -> object:
    if value is None:
        return math.nan
    if type(value) not in (int, float):
        return _WRONG
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        return _WRONG


def _read_mapping(check: _Check, value: object) -> object:
    if not isinstance(value, dict):
        return _WRONG
    read = {key: check(each) for key, each in value.items()}
    return _WRONG if _WRONG in read.values() else read


def _check_for(hint: Any) -> _Check:
    """The function that turns a JSON value into a field of type `hint`, or into `_WRONG`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is float:
        return _read_float
    if hint in (int, str, bool):
        # bool is a subclass of int in Python and another type in JSON.
        return lambda value: value if type(value) is hint else _WRONG
    if origin is Literal:
        return lambda value: value if type(value) is str and value in arguments else _WRONG
    if origin in (Union, types.UnionType):
        (inner,) = (_check_for(each) for each in arguments if each is not type(None))
        return lambda value: None if value is None else inner(value)
    if origin is tuple:
        return lambda value: (
            tuple(value)
            if isinstance(value, list) and all(type(each) is str for each in value)
            else _WRONG
        )
    if origin is Mapping:
        return partial(_read_mapping, _check_for(arguments[1]))
    raise TypeError(f"no reader for a field of type {hint}")


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    check: _Check
    required: bool


def _fields_of(kind: type[Any]) -> tuple[_Field, ...]:
    hints = get_type_hints(kind)
    return tuple(
        _Field(
            each.name,
            _check_for(hints[each.name]),
            each.default is MISSING and each.default_factory is MISSING,
        )
        for each in fields(kind)
    )


_KINDS: Final[dict[str, type[Event]]] = {kind.__name__.lower(): kind for kind in get_args(Event)}
_FIELDS: Final = {kind: _fields_of(kind) for kind in _KINDS.values()}
_NAMES: Final = {kind: name for name, kind in _KINDS.items()}


def parse(record: object) -> Event | None:
    """The event in one decoded JSON object, without its envelope.

    None where the object is none of the types known here, lacks a field, or has a field of the
    wrong type; fields that are not known are left out.
    """
    if not isinstance(record, dict):
        return None
    name = record.get("type")
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        return None
    values: dict[str, Any] = {}
    for each in _FIELDS[kind]:
        if each.name in record:
            value = each.check(record[each.name])
            if value is _WRONG:
                return None
            values[each.name] = value
        elif each.required:
            return None
    return kind(**values)


def parse_line(line: bytes) -> Recorded | None:
    """One line of `events.jsonl`; None for a type of a newer Windtunnel.

    Raises ValueError where the line is no whole event: torn, no JSON, or fields of a wrong type.
    """
    try:
        record = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deep for an event") from error
    if not isinstance(record, dict):
        raise ValueError("an event is a JSON object")
    version, seq, written = record.get("v"), record.get("seq"), _read_float(record.get("time"))
    if type(version) is not int or type(seq) is not int or not isinstance(written, float):
        raise ValueError("an event has v, seq and time")
    name = record.get("type")
    if not isinstance(name, str):
        raise ValueError("an event has a type")
    if version > VERSION or name not in _KINDS:
        return None
    event = parse(record)
    if event is None:
        raise ValueError("a field of the event is missing or of the wrong type")
    return Recorded(seq, written, event)


def format_line(recorded: Recorded) -> bytes:
    """One line of `events.jsonl`, ASCII, with its line feed.

    Characters beyond ASCII are escaped, so that no text (half a surrogate pair, U+2028) can make
    a line that cannot be encoded or that another reader would split.
    """
    kind = type(recorded.event)
    record: dict[str, object] = {
        "v": VERSION,
        "seq": recorded.seq,
        "time": recorded.time,
        "type": _NAMES[kind],
    }
    for each in _FIELDS[kind]:
        record[each.name] = _plain(getattr(recorded.event, each.name))
    return json.dumps(record, allow_nan=False).encode("ascii") + b"\n"


def _plain(value: object) -> object:
    """A field as JSON has it: no number is `null`."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
