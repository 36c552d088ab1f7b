"""One event as one line of JSON, and back, whatever the line holds.

msgspec reads the types of the fields off the dataclasses, so that the vocabulary is written once.
The JSON itself is the standard library's: msgspec's refuses half a surrogate pair, and a model may
write one.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, get_args, get_type_hints

from msgspec import ValidationError, convert

from engine.events.vocabulary import Event, Recorded

VERSION: Final = 1
"""`v` of every line. A reader skips lines of a higher one."""

_KINDS: Final[dict[str, type[Event]]] = {kind.__name__.lower(): kind for kind in get_args(Event)}
_NAMES: Final = {kind: name for name, kind in _KINDS.items()}


@dataclass(frozen=True, slots=True)
class _Envelope:
    v: int
    seq: int
    time: float
    type: str


_HINTS: Final = {kind: get_type_hints(kind) for kind in _NAMES}
_NUMBERS: Final = {
    kind: [name for name, hint in hints.items() if hint is float or get_args(hint) == (str, float)]
    for kind, hints in _HINTS.items()
}
"""The fields that hold floats, and never None."""


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
    numbers = {name: _with_nan(record[name]) for name in _NUMBERS[kind] if name in record}
    try:
        return convert({**record, **numbers}, kind)
    except ValidationError:
        return None


def parse_line(line: bytes) -> Recorded | None:
    """One line of `events.jsonl`; None for a type of a newer Windtunnel.

    Raises ValueError where the line is no whole event: torn, no JSON, or fields of a wrong type.
    """
    try:
        record = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deep for an event") from error
    envelope = convert(record, _Envelope)  # ValidationError is a ValueError
    if envelope.v > VERSION or envelope.type not in _KINDS:
        return None
    event = parse(record)
    if event is None:
        raise ValueError("a field of the event is missing or of the wrong type")
    return Recorded(envelope.seq, envelope.time, event)


def format_line(recorded: Recorded) -> bytes:
    """One line of `events.jsonl`, ASCII, with its line feed.

    Characters beyond ASCII are escaped, so that no text (half a surrogate pair, U+2028) can make
    a line that cannot be encoded or that another reader would split.
    """
    event = recorded.event
    record: dict[str, object] = {
        "v": VERSION,
        "seq": recorded.seq,
        "time": recorded.time,
        "type": _NAMES[type(event)],
    }
    for name in _HINTS[type(event)]:
        record[name] = _plain(getattr(event, name))
    return json.dumps(record, allow_nan=False).encode("ascii") + b"\n"


def _with_nan(value: Any) -> Any:
    """A number as JSON has it, or a mapping of them, with nan for `null`."""
    if isinstance(value, dict):
        return {key: _with_nan(each) for key, each in value.items()}
    return math.nan if value is None else value


def _plain(value: object) -> object:
    """A field as JSON has it: no number is `null`."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
