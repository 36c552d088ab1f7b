"""Rows of JSON text, however it is laid out: an object a line, objects over lines, an array.

The layout is decided by the first two lines that are not blank, never by the file's name. Memory is
bounded by one row.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from engine.chat.conversation import RowProblem
from engine.data.content import (
    BLOCK_BYTES,
    PASSED,
    ROW_LIMIT_BYTES,
    SPEAKERS,
    Opened,
    SourceRow,
    Wants,
    damaged,
    found,
    not_an_object,
    not_utf8,
    open_text,
    too_long,
    too_many_values,
)
from engine.errors import UserError

_JSON_SPACE: Final = re.compile(r"[ \t\r\n]*")
_LINES: Final = (".jsonl", ".ndjson")
"""Endings that promise an object a line."""


def read_json(path: Path, wants: Wants) -> Iterator[SourceRow]:
    """Rows of JSON text. Blank lines, a BOM and CRLF are nothing wrong.

    Where the text of an array stops being JSON there is no next row to find: `UserError`.
    """
    with open_text(path) as opened:
        start = _read_start(opened)
        if start.layout == "lines":
            yield from _lines(opened, start, wants)
        else:
            yield from _JsonText(path, opened, start).rows()


def json_notes(path: Path) -> tuple[str, ...]:
    """What a person should know of how a file is read."""
    with open_text(path) as opened:
        start = _read_start(opened)
        layout = start.layout
        if layout == "objects" and _JsonText(path, opened, start).wraps_rows():
            layout = "document"
        promised = any(ending.lower() in _LINES for ending in path.suffixes[-2:])
        notes = {
            "array": "one JSON array, not an object a line; its elements are the rows",
            "objects": "objects that take several lines each; each is a row",
            "commas": "objects with commas between them; each is a row",
        }
        told = layout in notes and (promised or layout != "array")
        return (*opened.notes, *([notes[layout]] if told else []))


def parse_object(line: bytes) -> dict[str, Any] | RowProblem:
    """One JSON object, or why the line is not one."""
    if problem := too_many_values(line):
        return problem
    try:
        value = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        return not_utf8(f"Byte {error.start + 1} of the line is {error.reason}.")
    except json.JSONDecodeError as error:
        fix = "Repair or delete the line: a row is one JSON object on one line."
        if line.lstrip().startswith(b"{'"):
            fix = "It is written as Python prints it: write rows with json.dumps(row)."
        return RowProblem("The line is not JSON.", f"Column {error.pos + 1}: {error.msg}.", fix)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 1,000 nested lists
        return RowProblem("The line cannot be read.", f"{error}.", "Repair or delete it.")
    return value if isinstance(value, dict) else not_an_object(value)


@dataclass(frozen=True, slots=True)
class _Start:
    """The first two lines that are not blank, with the number of the first; "" where there is none.

    `between` are the blank lines in between. "document" is one object that is the whole file.
    """

    number: int
    first: bytes
    between: bytes
    second: bytes
    layout: Literal["lines", "array", "objects", "commas", "document"]


def _read_start(opened: Opened) -> _Start:
    number, between = 1, b""
    first = opened.stream.readline(ROW_LIMIT_BYTES + 1).removeprefix(codecs.BOM_UTF8)
    while first.isspace() or first == b"\n":
        first, number = opened.stream.readline(ROW_LIMIT_BYTES + 1), number + 1
    if len(first) > ROW_LIMIT_BYTES and not first.endswith(b"\n"):
        # One row of more than may be read, or the one line of an array.
        whole = first.lstrip()[:4096]
        layout: Any = "array" if whole[:1] == b"[" else "lines"
        return _Start(number, first, b"", b"", "document" if b'"data"' in whole else layout)
    second = opened.stream.readline(ROW_LIMIT_BYTES + 1)
    while second.isspace():
        between += second if len(between) < BLOCK_BYTES else b""
        second = opened.stream.readline(ROW_LIMIT_BYTES + 1)
    return _Start(number, first, between, second, _layout(first, second))


def _layout(
    first: bytes, second: bytes
) -> Literal["lines", "array", "objects", "commas", "document"]:
    opens, text = first.lstrip()[:1], first.decode("utf-8", "replace").rstrip()
    if opens not in (b"[", b"{"):
        return "lines"
    try:
        if too_many_values(first) is None:
            json.loads(text)
        if second:
            return "lines"
        return "array" if opens == b"[" else "document"
    except json.JSONDecodeError as error:
        goes_on = error.pos >= len(text) - 1 and not error.msg.startswith("Unterminated")
        if error.msg == "Extra data" and text[error.pos :] == ",":
            return "commas"
        if opens == b"[":
            return "array"
        return "objects" if goes_on and second and second[:1] != b"{" else "lines"
    except (ValueError, RecursionError):
        return "lines" if opens == b"{" else "array"


def _lines(opened: Opened, start: _Start, wants: Wants) -> Iterator[SourceRow]:
    lines, raw = opened.stream, opened.raw
    number, line, waiting = start.number, start.first, [start.second]
    while line:
        if len(line) > ROW_LIMIT_BYTES and not line.endswith(b"\n"):
            while (rest := lines.readline(BLOCK_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield found(number, too_long(), raw.tell())
        elif not line.isspace() and not wants():
            yield PASSED
        elif not line.isspace():
            parsed, line = parse_object(line), b""  # the row is in memory once
            yield found(number, parsed, raw.tell())
        number += 1
        if waiting and waiting[0]:
            line, number = waiting.pop(), number + start.between.count(b"\n")
        else:
            line = lines.readline(ROW_LIMIT_BYTES + 1)


class _JsonText:
    """JSON values decoded one by one from a text buffer that grows on demand."""

    def __init__(self, path: Path, opened: Opened, start: _Start) -> None:
        self._path = path
        self._opened = opened
        # Undecodable bytes become lone surrogates, so that one bad string spoils only its row.
        self._bytes_to_text = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._decoder = json.JSONDecoder()
        self._first = io.BytesIO(start.first + start.between + start.second)
        self._text = ""
        self._at = 0
        self._line = start.number
        self._ended = False

    def rows(self) -> Iterator[SourceRow]:
        """The elements of an array, or of "data" in an object; else the objects themselves."""
        if self._peek() == "{":
            line, first = self._line, self._first_object()
            if first is not None:
                yield self._found(line, *first)
                yield from self._objects()
                return
            yield from self._elements()
            self._leave()
        while mark := self._peek():
            if mark != "[":
                raise self._broken("more text follows where the rows end")
            self._at += 1
            yield from self._elements()

    def wraps_rows(self) -> bool:
        """Whether the first object holds the rows under "data"."""
        return self._first_object() is None

    def _found(self, line: int, value: Any, is_utf8: bool, unit: Any = "line") -> SourceRow:
        parsed = value if isinstance(value, dict) else not_an_object(value)
        if not is_utf8:
            parsed = not_utf8("A byte in it is not.")
        return found(line, parsed, self._opened.raw.tell(), unit)

    def _elements(self) -> Iterator[SourceRow]:
        """Up to the end of the array; counted as rows where a line holds more than one."""
        if self._peek() == "]":
            self._at += 1
            return
        row, unit = 0, ""
        while True:
            self._peek()
            row, line = row + 1, self._line
            value, is_utf8 = self._element()
            mark = self._expect(",]", "a comma or the end of the array")
            if mark == ",":
                self._peek()
            unit = unit or ("row" if mark == "," and self._line == line else "line")
            yield self._found(row if unit == "row" else line, value, is_utf8, unit)
            if mark == "]":
                return

    def _first_object(self) -> tuple[dict[str, Any], bool] | None:
        """The object at the cursor and whether it is UTF-8; None, and the cursor past the `[` of
        its rows, where "data" is a list of objects that are no messages."""
        row: dict[str, Any] = {}
        every = True
        self._expect("{", "an object")
        while self._peek() != "}":
            key, is_utf8 = self._element()
            every &= is_utf8
            self._expect(":", "a colon")
            if key == "data" and self._peek() == "[" and self._opens_rows():
                self._at += 1
                return None
            self._peek()
            row[str(key)], is_utf8 = self._element()
            every &= is_utf8
            if self._expect(",}", "a comma or the end of the object") == "}":
                return row, every
            self._peek()
        self._at += 1
        return row, every

    def _opens_rows(self) -> bool:
        ahead = 1
        try:
            while True:
                space = _JSON_SPACE.match(self._text, self._at + ahead)
                ahead = (space.end() if space else self._at + ahead) - self._at
                if self._at + ahead < len(self._text) or not self._grow():
                    break
            if self._text[self._at + ahead : self._at + ahead + 1] != "{":
                return False
            value, _ = self._decode(ahead)
        except (ValueError, RecursionError):
            return True
        return isinstance(value, dict) and not SPEAKERS & value.keys()

    def _leave(self) -> None:
        """Past the rest of the object that held the rows."""
        while self._expect(",}", "a comma or the end of the object") == ",":
            self._peek()
            self._element()
            self._expect(":", "a colon")
            self._peek()
            self._element()

    def _objects(self) -> Iterator[SourceRow]:
        """Objects one after another; a damaged one costs itself, where the next begins a line."""
        while mark := self._peek():
            if mark == ",":
                self._at += 1
                continue
            line = self._line
            try:
                value, end = self._decode()
            except (ValueError, RecursionError) as error:
                why = f"{getattr(error, 'msg', error)}."
                if isinstance(error, json.JSONDecodeError):
                    at = line + self._text.count("\n", self._at, error.pos)
                    why = f"Line {at}: {why}"
                fix = "Repair or delete the object that starts there."
                problem = RowProblem("The object is not JSON.", why, fix)
                yield found(line, problem, self._opened.raw.tell())
                self._skip_to_object()
            else:
                yield self._found(line, value, self._take(end))

    def _skip_to_object(self) -> None:
        while (at := self._text.find("\n{", self._at)) < 0:
            self._pass(max(self._at, len(self._text) - 1))
            if not self._grow():
                self._pass(len(self._text))
                return
        self._pass(at + 1)

    def _expect(self, marks: str, name: str) -> str:
        mark = self._peek()
        if mark == "" or mark not in marks:
            raise self._broken(f"{name} was expected")
        self._at += 1
        return mark

    def _element(self) -> tuple[Any, bool]:
        """The JSON value at the cursor, and whether its text is UTF-8."""
        try:
            value, end = self._decode()
        except json.JSONDecodeError as error:
            self._pass(error.pos)
            raise self._broken(error.msg) from error
        except (ValueError, RecursionError) as error:
            raise self._broken(str(error)) from error
        return value, self._take(end)

    def _take(self, end: int) -> bool:
        """Passes the text up to there; whether it is UTF-8. A long text is not copied for that."""
        is_utf8 = self._text.isascii() or not holds_no_utf8(self._text[self._at : end])
        self._pass(end)
        return is_utf8

    def _decode(self, ahead: int = 0) -> tuple[Any, int]:
        """The value so far ahead of the cursor, and where it ends."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at + ahead)
            except json.JSONDecodeError as error:
                # A word, a number or an escape that is cut starts a few characters before.
                near = error.pos >= len(self._text.rstrip()) - 16
                if (near or error.msg.startswith("Unterminated")) and self._grow():
                    continue
                raise
            # A number at the end of the buffer may go on in the next block.
            if end == len(self._text) and self._grow():
                continue
            return value, end

    def _peek(self) -> str:
        """The next character that is not a space, "" at the end of the file."""
        while True:
            space = _JSON_SPACE.match(self._text, self._at)
            self._pass(space.end() if space else self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._grow():
                return ""

    def _pass(self, position: int) -> None:
        self._line += self._text.count("\n", self._at, position)
        self._at = position

    def _grow(self) -> bool:
        """Reads as much again as is waiting, so that a long row is not scanned at every block.

        Raises ValueError where a row is longer than may be read.
        """
        waiting = len(self._text) - self._at
        if self._ended:
            return False
        self._text, self._at = self._text[self._at :], 0
        problem = too_long() if waiting > ROW_LIMIT_BYTES else too_many_values(self._text)
        if problem:
            raise ValueError(f"the row is too long. {problem.why[:-1]}")
        size = max(BLOCK_BYTES, waiting)
        block = self._first.read(size) or self._opened.stream.read(size)
        self._ended = not block
        self._text += self._bytes_to_text.decode(block, final=not block)
        return bool(block)

    def _broken(self, why: str) -> UserError:
        return damaged(self._path, f"Line {self._line}: {why}.")


def holds_no_utf8(text: str) -> bool:
    """Whether `surrogateescape` left bytes in a text."""
    return not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text)
