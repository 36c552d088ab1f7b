"""What the bytes of a data file are, whatever its name says: unpacked, decoded, or refused.

Every file is opened here, so that a fault of the whole file is one sentence and not one for each
line. What can be read without a guess is read, and a note says how.
"""

import codecs
import gzip
import io
import re
import shlex
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from engine.chat.conversation import RowProblem
from engine.errors import UserError

# A conversation with a dozen base64 photos stays below this; a file without line ends does not.
ROW_LIMIT_BYTES: Final = 48 * 2**20
# Each becomes an object of some 100 bytes.
ROW_LIMIT_VALUES: Final = 2**20
BLOCK_BYTES: Final = 2**18
SPEAKERS: Final = frozenset({"role", "from"})
"""Keys that say who speaks, and so that an object is a message."""
_HEAD_BYTES: Final = 2**16
COMPRESSIONS: Final = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}
_UTF32: Final = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_UTF16: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_ALONE: Final = re.compile(rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])")
_MARKUP: Final = re.compile(rb"\s*<(!doctype|html|\?xml|head|body)\b", re.IGNORECASE)
_REFUSED: Final = (
    (b"PK\x03\x04", "a zip archive", "Unpack it ({unpack}) and name a file from it; save a table"
     " of a spreadsheet as .csv."),
    (b"%PDF-", "a PDF document", "Write the conversations in it into a .jsonl file."),
    (b"version https://git-lfs", "a Git LFS pointer: the data itself was not downloaded",
     "Run `git lfs pull` in its folder, or download the file again."),
    (b"BZh", "compressed with bzip2", "Unpack it: bunzip2 {name}."),
    (b"\xfd7zXZ\0", "compressed with xz", "Unpack it: unxz -k {name}."),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "Unpack it and name a file from it."),
    (b"Rar!", "a RAR archive", "Unpack it and name a file from it."),
    (b"PAR1", "a Parquet file", "Give it the name that it has by its content, ending in .parquet."),
    (b"ARROW1", "an Arrow file", "Give it the name that it has by its content, ending in .arrow."),
    (b"SQLite format 3", "an SQLite database", "Write its table into a .csv or .jsonl file."),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row as it was found; exactly one of `row` and `problem` is set, neither in `PASSED`.

    `line` counts from 1 inside `file` what `unit` says: the line on which the row starts, or, in
    tables, hub sets and JSON that is one line, the rows. `read_bytes` is how far into all files of
    the dataset it ends; a reader counts its own file alone.
    """

    line: int
    row: dict[str, Any] | None
    problem: RowProblem | None
    read_bytes: int
    file: str = ""
    unit: Literal["line", "row"] = "line"


PASSED: Final = SourceRow(0, None, None, 0)
"""A row that nobody wants: where it ends was found, and no more."""

Wants: TypeAlias = Callable[[], bool]
"""Whether the next row is wanted. A reader may make one that is not, where that costs little."""


def every_row() -> bool:
    return True


def found(
    line: int,
    parsed: dict[str, Any] | RowProblem,
    read_bytes: int,
    unit: Literal["line", "row"] = "line",
) -> SourceRow:
    """A row, or the problem that stands for it."""
    if isinstance(parsed, RowProblem):
        return SourceRow(line, None, parsed, read_bytes, unit=unit)
    row = {name: _as_messages(value) for name, value in parsed.items()}
    return SourceRow(line, row, None, read_bytes, unit=unit)


def _as_messages(value: Any) -> Any:
    """A list of objects where `datasets` keeps a list of messages as an object of lists."""
    if not isinstance(value, dict) or not SPEAKERS & value.keys():
        return value
    lengths = {len(each) if isinstance(each, list) else -1 for each in value.values()}
    if len(lengths) != 1 or -1 in lengths:
        return value
    return [
        {name: each[at] for name, each in value.items() if each[at] is not None}
        for at in range(lengths.pop())
    ]


def not_an_object(value: object) -> RowProblem:
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return RowProblem(
        "The row is not a JSON object.",
        f"It is {names.get(type(value), 'a number')}.",
        'Write it as an object, such as {"messages": [...]}.',
    )


def not_utf8(why: str) -> RowProblem:
    return RowProblem("The row is not UTF-8 text.", why, "Save the file as UTF-8.")


def too_long(why: str = "") -> RowProblem:
    return RowProblem(
        "The row is too long.",
        why or f"It is longer than {ROW_LIMIT_BYTES // 2**20} MiB.",
        "Split it, or keep images in files beside the dataset; check that lines end.",
    )


def too_many_values(text: bytes | str) -> RowProblem | None:
    """The problem of a row's text from which more objects would be made than memory is for."""
    if len(text) < ROW_LIMIT_VALUES:
        return None
    if isinstance(text, bytes):
        values = text.count(b",") + text.count(b"[") + text.count(b"{")
    else:
        values = text.count(",") + text.count("[") + text.count("{")
    if values <= ROW_LIMIT_VALUES:
        return None
    return too_long(f"It has {values:,} commas and brackets, and {ROW_LIMIT_VALUES:,} are allowed.")


def damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} is damaged and cannot be read to its end.",
        why,
        "Repair it or fetch it again; as .jsonl a bad row would cost only itself.",
    )


@dataclass(frozen=True, slots=True)
class Opened:
    """A file as UTF-8 bytes; `raw` is the file itself, whose position says how far one is."""

    stream: io.BufferedReader
    raw: io.BufferedReader
    notes: tuple[str, ...]


def open_raw(path: Path) -> io.BufferedReader:
    """The file. Raises UserError where it may not be read."""
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(
            f"{path} cannot be opened.", f"{error.strerror}.", "Check who may read it."
        ) from error


@contextmanager
def open_text(path: Path) -> Iterator[Opened]:
    """The text of a file, unpacked and as UTF-8.

    Raises UserError for what holds no text in UTF-8 or marked UTF-16, and where the body meets the
    end of a damaged stream.
    """
    with open_raw(path) as raw:
        packed = next((end for end, magic in COMPRESSIONS.items() if _starts(raw, magic)), None)
        try:
            stream = _unpacked(raw, packed)
            head = stream.peek(_HEAD_BYTES)
            _refuse(path, head, packed)
            notes = []
            if packed and path.suffix.lower() != packed:
                how = {".gz": "gzip", ".zst": "zstd"}[packed]
                notes.append(f"compressed with {how}, which its name does not say; it is unpacked")
            elif not packed and path.suffix.lower() in COMPRESSIONS and head:
                notes.append("not compressed, whatever its name says; it is read as it is")
            if head.startswith(_UTF16):
                notes.append("UTF-16 text; it is read as that")
                stream = io.BufferedReader(_Recoded(stream), _HEAD_BYTES)
            yield Opened(stream, raw, tuple(notes))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise damaged(path, f"The compressed stream breaks off: {error}.") from error
        except UnicodeDecodeError as error:
            why = f"Its {error.encoding} text breaks off: {error.reason}."
            raise damaged(path, why) from error
        except OSError as error:
            raise damaged(path, f"It cannot be read: {error}.") from error


def require_start(path: Path, kind: str, *magics: bytes) -> None:
    """Raises UserError where a file does not start as its kind does, and says what it is."""
    with open_raw(path) as raw:
        head = raw.read(_HEAD_BYTES)
    if not head.startswith(magics):
        _refuse(path, head, None)
        raise UserError(
            f"{path} is not {kind}.",
            "It does not start as one." if head else "It is empty: 0 bytes.",
            "Fetch it again, or name it after what it holds.",
        )


def _starts(raw: io.BufferedReader, magic: bytes) -> bool:
    raw.seek(0)
    start = raw.read(len(magic))
    raw.seek(0)
    return start == magic


def _unpacked(raw: io.BufferedReader, packed: str | None) -> io.BufferedReader:
    if packed == ".gz":
        return io.BufferedReader(gzip.open(raw), _HEAD_BYTES)
    if packed == ".zst":
        import pyarrow

        unpacks = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
        return io.BufferedReader(unpacks, _HEAD_BYTES)
    return io.BufferedReader(raw, _HEAD_BYTES)


class _Recoded(io.RawIOBase):
    """UTF-16 as UTF-8."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._text = io.TextIOWrapper(stream, "utf-16", newline="")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # A character of UTF-16 takes up to 4 bytes in UTF-8.
        encoded = self._text.read(len(buffer) // 4).encode("utf-8")
        buffer[: len(encoded)] = encoded
        return len(encoded)


def _refuse(path: Path, head: bytes, packed: str | None) -> None:
    """Raises UserError for a file that holds no text, by how it starts."""
    name = shlex.quote(path.name)
    tells = [(what, fix) for magic, what, fix in _REFUSED if head.startswith(magic)]
    if any(head.startswith(magic) for magic in COMPRESSIONS.values()) and packed:
        tells.append(("compressed twice", "Unpack it once, and name the result."))
    if head[257:262] == b"ustar":
        tells.append(("a tar archive", "Unpack it (tar -xf {name}) and name a file from it."))
    if _MARKUP.match(head.removeprefix(codecs.BOM_UTF8)):
        fix = "Download the file itself: on huggingface.co its address has /resolve/, not /blob/."
        tells.append(("a web page, not the data that it shows", fix))
    for what, fix in tells:
        raise UserError(
            f"{path} is {what}.",
            "Its first bytes say so, whatever its name is.",
            fix.format(name=name, unpack=f"unzip {name}"),
        )
    if encoding := _other_encoding(head):
        unpack = {".gz": f"gzip -dc {name} | ", ".zst": f"zstd -dc {name} | "}.get(packed or "", "")
        source = "" if unpack else f" {name}"
        ending = "".join(path.suffixes[-2 if packed and len(path.suffixes) > 1 else -1 :][:1])
        raise UserError(
            f"{path} is not UTF-8 text.",
            f"It reads like {encoding}.",
            f"Convert it: {unpack}iconv -f {encoding} -t UTF-8{source} > utf8{ending}"
            " (or -f with the encoding that it was saved in).",
        )
    if b"\0" in head and not head.startswith(_UTF16):
        raise UserError(
            f"{path} holds no text.",
            f"Byte {head.index(0) + 1} is zero, as in programs, pictures and downloads that broke"
            " off.",
            "Name the file that holds the rows, or fetch it again.",
        )


def _other_encoding(head: bytes) -> str | None:
    """The encoding that is not UTF-8, by its name for iconv; None where it may be UTF-8."""
    if head.startswith(_UTF32):
        return "UTF-32"
    if head.startswith(_UTF16):
        return None
    even, odd = head[:2000:2], head[1:2000:2]
    for encoding, zeros, others in (("UTF-16LE", odd, even), ("UTF-16BE", even, odd)):
        if zeros.count(0) * 4 > len(zeros) * 3 and others.count(0) == 0:
            return encoding
    if head.isascii():
        return None
    letters = [letter for letter in head.decode("utf-8", "replace") if letter > "\x7f"]
    lines = [line for line in head.split(b"\n") if not line.isascii()]
    # One bad byte costs its row; a file whose every accent is bad was saved in another encoding.
    every = set(letters) == {"\ufffd"} and "\ufffd".encode() not in head
    return "WINDOWS-1252" if every and (len(_ALONE.findall(head)) > 1 or len(lines) > 1) else None
