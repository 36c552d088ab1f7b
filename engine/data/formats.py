"""One row after another out of a file, by its format.

A row here is any JSON object; what is wrong with it as a conversation is for `engine.chat`. A line
that cannot be read becomes a problem with its number and reading goes on; only damage that hides
the rest of a file (a cut gzip, a broken Parquet footer, a JSON array that stops being JSON) ends
it, as a `UserError`. Memory is bounded by one row.
"""

import codecs
import csv
import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from engine.chat.conversation import RowProblem
from engine.chat.message import IMAGE_ENDINGS
from engine.errors import UserError

# A conversation with a dozen base64 photos stays below this; a file without line ends does not.
ROW_LIMIT_BYTES = 64 * 2**20
_BLOCK_BYTES = 2**18
_PARQUET_BATCH_ROWS = 256
# Of rows that hold bytes, such as images.
_PARQUET_BATCH_BYTE_ROWS = 16
_JSON_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row as it was found; exactly one of `row` and `problem` is set.

    `line` counts from 1 inside `file`: the line on which the row starts, or in Parquet and hub
    sets its number. `read_bytes` is how far into all files of the dataset it ends; a reader counts
    its own file alone.
    """

    line: int
    row: dict[str, Any] | None
    problem: RowProblem | None
    read_bytes: int
    file: str = ""


Reader = Callable[[Path], Iterator[SourceRow]]


def ending_of(path: Path) -> str:
    """The file's ending in lower case, `.jsonl.gz` being one ending."""
    endings = [ending.lower() for ending in path.suffixes]
    return "".join(endings[-2 if endings[-1:] == [".gz"] else -1 :])


def parse_object(line: bytes) -> dict[str, Any] | RowProblem:
    """One JSON object, or why the line is not one."""
    try:
        value = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        return _not_utf8(f"Byte {error.start + 1} of the line is {error.reason}.")
    except json.JSONDecodeError as error:
        return RowProblem(
            "The line is not JSON.",
            f"Column {error.pos + 1}: {error.msg}.",
            "Repair or delete the line: a row is one JSON object on one line.",
        )
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 1,000 nested lists
        return RowProblem("The line cannot be read.", f"{error}.", "Repair or delete it.")
    return value if isinstance(value, dict) else _not_an_object(value)


def _found(line: int, parsed: dict[str, Any] | RowProblem, read_bytes: int) -> SourceRow:
    if isinstance(parsed, RowProblem):
        return SourceRow(line, None, parsed, read_bytes)
    return SourceRow(line, parsed, None, read_bytes)


def _not_an_object(value: object) -> RowProblem:
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return RowProblem(
        "The row is not a JSON object.",
        f"It is {names.get(type(value), 'a number')}.",
        'Write it as an object, such as {"messages": [...]}.',
    )


def _not_utf8(why: str) -> RowProblem:
    return RowProblem("The row is not UTF-8 text.", why, "Save the file as UTF-8.")


def _holds_no_utf8(text: str) -> bool:
    """Whether `surrogateescape` left bytes in a text."""
    return not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text)


def _too_long() -> RowProblem:
    return RowProblem(
        "The row is too long.",
        f"It is longer than {ROW_LIMIT_BYTES // 2**20} MiB.",
        "Split it, or keep images in files beside the dataset; check that lines end.",
    )


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} is damaged and cannot be read to its end.",
        why,
        "Repair it or fetch it again; as .jsonl a bad row would cost only itself.",
    )


def _open(path: Path) -> IO[bytes]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(
            f"{path} cannot be opened.", f"{error.strerror}.", "Check who may read it."
        ) from error
    if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        file.close()
        raise UserError(
            f"{path} is not UTF-8 text.",
            "It starts like UTF-16, which some editors and spreadsheets write.",
            "Save it as UTF-8.",
        )
    file.seek(0)
    return file


def read_json_lines(path: Path) -> Iterator[SourceRow]:
    """Rows of a .jsonl or .jsonl.gz file. Blank lines, a BOM and CRLF are nothing wrong."""
    with _open(path) as raw:
        if path.suffix.lower() != ".gz":
            yield from _json_lines(raw, raw)
            return
        try:
            with gzip.open(raw) as lines:
                yield from _json_lines(lines, raw)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise _damaged(path, f"The compressed stream breaks off: {error}.") from error


def _json_lines(lines: IO[bytes] | gzip.GzipFile, raw: IO[bytes]) -> Iterator[SourceRow]:
    number = 0
    while line := lines.readline(ROW_LIMIT_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > ROW_LIMIT_BYTES and not line.endswith(b"\n"):
            while (rest := lines.readline(_BLOCK_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield _found(number, _too_long(), raw.tell())
        elif line and not line.isspace():
            yield _found(number, parse_object(line), raw.tell())


def read_json(path: Path) -> Iterator[SourceRow]:
    """Rows of a .json file: an array, `{"data": [array]}`, or JSON lines under this name.

    Streams too. Where the text stops being JSON there is no next row to find: `UserError`.
    """
    with _open(path) as raw:
        if _starts_with_a_row(raw):
            yield from _json_lines(raw, raw)
        else:
            yield from _JsonArray(path, raw).rows()


def _starts_with_a_row(raw: IO[bytes]) -> bool:
    start = len(codecs.BOM_UTF8) if raw.read(3) == codecs.BOM_UTF8 else 0
    raw.seek(start)
    opens = raw.read(1) == b"{"
    raw.seek(start)
    row = parse_object(raw.readline(ROW_LIMIT_BYTES)) if opens else None
    raw.seek(0)
    return isinstance(row, dict) and not isinstance(row.get("data"), list)


class _JsonArray:
    """The elements of a JSON array, decoded one by one from a text buffer that grows on demand."""

    def __init__(self, path: Path, raw: IO[bytes]) -> None:
        self._path = path
        self._raw = raw
        # Undecodable bytes become lone surrogates, so that one bad string spoils only its row.
        self._bytes_to_text = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._line = 1
        self._ended = False

    def rows(self) -> Iterator[SourceRow]:
        if self._peek() == "":
            return
        self._enter()
        if self._peek() == "]":
            return
        while True:
            self._peek()
            line = self._line
            value, text = self._element()
            if _holds_no_utf8(text):
                parsed: dict[str, Any] | RowProblem = _not_utf8("A byte in it is not.")
            else:
                parsed = value if isinstance(value, dict) else _not_an_object(value)
            yield _found(line, parsed, self._raw.tell())
            if self._expect(",]", "a comma or the end of the array") == "]":
                return

    def _enter(self) -> None:
        """Past the `[` of the file, or of "data" in its object."""
        if self._expect("[{", "an array of rows") == "[":
            return
        while True:
            self._peek()
            key, _ = self._element()
            self._expect(":", "a colon")
            if key == "data":
                self._expect("[", 'an array under "data"')
                return
            self._peek()
            self._element()
            self._expect(",", 'another key, "data", with an array of rows')

    def _expect(self, marks: str, name: str) -> str:
        mark = self._peek()
        if mark == "" or mark not in marks:
            raise self._broken(f"{name} was expected")
        self._at += 1
        return mark

    def _element(self) -> tuple[Any, str]:
        """The JSON value at the cursor, and its text."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._grow():
                    continue
                self._pass(error.pos)
                raise self._broken(error.msg) from error
            except (ValueError, RecursionError) as error:
                raise self._broken(str(error)) from error
            # A number at the end of the buffer may go on in the next block.
            if end == len(self._text) and self._grow():
                continue
            text = self._text[self._at : end]
            self._pass(end)
            return value, text

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
        """Reads as much again as is waiting, so that a long row is not scanned at every block."""
        waiting = len(self._text) - self._at
        if self._ended or waiting > ROW_LIMIT_BYTES:
            return False
        block = self._raw.read(max(_BLOCK_BYTES, waiting))
        self._ended = not block
        self._text = self._text[self._at :] + self._bytes_to_text.decode(block, final=not block)
        self._at = 0
        return bool(block)

    def _broken(self, why: str) -> UserError:
        return _damaged(self._path, f"Line {self._line}: {why}.")


def read_csv(path: Path) -> Iterator[SourceRow]:
    """Rows of a .csv file under its header line; an empty cell is null, other cells are text.

    The separator is the comma, or the semicolon or tab where the header has no comma.
    """
    csv.field_size_limit(ROW_LIMIT_BYTES)
    with _open(path) as raw:
        first = raw.readline(_BLOCK_BYTES).decode("utf-8", "replace")
        raw.seek(0)
        separator = next((mark for mark in ",;\t" if mark in first), ",")
        text = io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter=separator)
        header = _csv_header(path, reader)
        line = reader.line_num + 1
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield _found(line, _not_csv(f"{error}."), raw.tell())
            else:
                if "".join(cells).strip():
                    yield _found(line, _csv_row(header, cells), raw.tell())
            line = reader.line_num + 1


def _csv_header(path: Path, reader: Iterator[list[str]]) -> list[str]:
    try:
        header = next((cells for cells in reader if "".join(cells).strip()), [])
    except csv.Error as error:
        raise _damaged(path, f"Its header line is not CSV: {error}.") from error
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise UserError(
            f"{path} has two columns of the name {twice[0]}.",
            "Only one of them could be read.",
            "Rename or delete one in the header line.",
        )
    return header


def _csv_row(header: list[str], cells: list[str]) -> dict[str, Any] | RowProblem:
    if len(cells) != len(header):
        return _not_csv(f"It has {len(cells)} cells and the header has {len(header)}.")
    for name, cell in zip(header, cells, strict=True):
        if _holds_no_utf8(cell):
            return _not_utf8(f"A byte in its {name} is not.")
    return {name: cell or None for name, cell in zip(header, cells, strict=True)}


def _not_csv(why: str) -> RowProblem:
    return RowProblem(
        "The row is not CSV like the header.",
        why,
        "Quote cells that hold separators or line breaks, and double the quotes inside them.",
    )


def read_caption(path: Path) -> Iterator[SourceRow]:
    """A row for each image of the same name as the .txt file: the image and its caption."""
    size = path.stat().st_size
    images = [
        other.name
        for other in sorted(path.parent.glob(f"{glob.escape(path.stem)}.*"))
        if other.stem == path.stem and other.name.lower().endswith(IMAGE_ENDINGS)
    ]
    with _open(path) as file:
        text = file.read(ROW_LIMIT_BYTES + 1)
    if len(text) > ROW_LIMIT_BYTES:
        yield _found(1, _too_long(), size)
        return
    try:
        caption = text.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        yield _found(1, _not_utf8(f"Byte {error.start + 1} is {error.reason}."), size)
    else:
        for image in images:
            yield _found(1, {"image": image, "caption": caption}, size)


def read_image_without_caption(path: Path) -> Iterator[SourceRow]:
    """The problem of an image in a folder where others have captions."""
    problem = RowProblem(
        "The image has no caption.",
        f"There is no {path.stem}.txt beside it.",
        "Write the caption into that file, or take the image out of the folder.",
    )
    yield _found(1, problem, path.stat().st_size)


def read_parquet(path: Path) -> Iterator[SourceRow]:
    """Rows of a .parquet file; `line` is the row's number.

    Nulls inside a row are dropped at every depth: Arrow gives each record of a column the keys of
    all of them and fills the absent ones with null.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            size, count, number = path.stat().st_size, max(1, file.metadata.num_rows), 0
            many = "binary" not in str(file.schema_arrow)
            batch_rows = _PARQUET_BATCH_ROWS if many else _PARQUET_BATCH_BYTE_ROWS
            for batch in file.iter_batches(batch_rows, use_threads=False):
                for index in range(batch.num_rows):
                    number += 1
                    yield _found(number, _parquet_row(batch, index), size * number // count)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, f"It is not readable as Parquet: {error}.") from error


def _parquet_row(batch: Any, index: int) -> dict[str, Any] | RowProblem:
    try:
        (row,) = batch.slice(index, 1).to_pylist()
    except UnicodeDecodeError as error:
        return _not_utf8(f"Byte {error.start + 1} of a text in it is {error.reason}.")
    kept = without_nulls(row)
    return kept if isinstance(kept, dict) else _not_an_object(kept)


def without_nulls(value: Any) -> Any:
    """`value` without the dict entries that are None, at every depth."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


READERS: dict[str, Reader] = {
    ".jsonl": read_json_lines,
    ".jsonl.gz": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
KNOWN_ENDINGS = ", ".join(READERS)
# Only in a folder of images: `_files_of` finds them there and nowhere else.
CAPTION_READERS: dict[str, Reader] = {
    ".txt": read_caption,
    **dict.fromkeys(IMAGE_ENDINGS, read_image_without_caption),
}
