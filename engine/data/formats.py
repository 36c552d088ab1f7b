"""How each kind of data file is read: one row after another, by the ending of its name.

A row here is any JSON object; what is wrong with it as a conversation is for `engine.chat`. A line
that cannot be read becomes a problem with its number and reading goes on; only damage that hides
the rest of a file (a cut gzip, a broken Parquet footer, a JSON array that stops being JSON) ends
it, as a `UserError`. Memory is bounded by one row.
"""

import csv
import glob
import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from engine.chat.conversation import RowProblem
from engine.chat.image_values import IMAGE_ENDINGS
from engine.data.content import (
    COMPRESSIONS,
    PASSED,
    ROW_LIMIT_BYTES,
    Opened,
    SourceRow,
    Wants,
    damaged,
    found,
    not_utf8,
    open_raw,
    open_text,
    too_long,
    too_many_values,
)
from engine.data.json_rows import holds_no_utf8, json_notes, read_json
from engine.data.tables import read_arrow, read_parquet
from engine.errors import UserError

Reader = Callable[[Path, Wants], Iterator[SourceRow]]
_HEADER_BYTES = 2**18


def ending_of(path: Path) -> str:
    """The file's ending in lower case, `.jsonl.gz` being one ending."""
    endings = [ending.lower() for ending in path.suffixes]
    return "".join(endings[-2 if endings[-1:] and endings[-1] in COMPRESSIONS else -1 :])


def file_notes(path: Path) -> tuple[str, ...]:
    """What a person should know of how a data file is read. Raises UserError as reading it does."""
    read = READERS.get(ending_of(path))
    if read is read_json:
        return json_notes(path)
    if read is None or read in (read_parquet, read_arrow):
        return ()
    with open_text(path) as opened:
        return opened.notes


class _Lines:
    """Lines of text for the csv module, no row of which is longer than a row may be."""

    def __init__(self, opened: Opened) -> None:
        self._text = io.TextIOWrapper(
            opened.stream, "utf-8-sig", errors="surrogateescape", newline=""
        )
        self.row_characters = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._text.readline(ROW_LIMIT_BYTES + 1)
        if not line:
            raise StopIteration
        self.row_characters += len(line)
        if self.row_characters > ROW_LIMIT_BYTES:
            while line and not line.endswith(("\n", "\r")):
                line = self._text.readline(_HEADER_BYTES)
            raise csv.Error(f"a row is longer than {ROW_LIMIT_BYTES // 2**20} MiB")
        if problem := too_many_values(line):
            raise csv.Error(problem.why[:-1])
        return line


def read_csv(path: Path, wants: Wants, separators: str = ",;\t") -> Iterator[SourceRow]:
    """Rows of a table in text under its header line; an empty cell is null, other cells are text.

    The separator is the first of `separators` that the header has.
    """
    csv.field_size_limit(ROW_LIMIT_BYTES)
    with open_text(path) as opened:
        first = opened.stream.peek(_HEADER_BYTES).partition(b"\n")[0].decode("utf-8", "replace")
        separator = next((mark for mark in separators if mark in first), separators[0])
        lines = _Lines(opened)
        reader = csv.reader(lines, delimiter=separator)
        header = _csv_header(path, reader)
        line = reader.line_num + 1
        while True:
            lines.row_characters = 0
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield found(line, _not_csv(f"{error}."), opened.raw.tell())
            else:
                if "".join(cells).strip() and not wants():
                    yield PASSED
                elif "".join(cells).strip():
                    yield found(line, _csv_row(header, cells), opened.raw.tell())
            line = reader.line_num + 1


def _csv_header(path: Path, reader: Iterator[list[str]]) -> list[str]:
    try:
        header = next((cells for cells in reader if "".join(cells).strip()), [])
    except csv.Error as error:
        raise damaged(path, f"Its header line is not CSV: {error}.") from error
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
        if holds_no_utf8(cell):
            return not_utf8(f"A byte in its {name} is not.")
    return {name: cell or None for name, cell in zip(header, cells, strict=True)}


def _not_csv(why: str) -> RowProblem:
    return RowProblem(
        "The row is not CSV like the header.",
        why,
        "Quote cells that hold separators or line breaks, and double the quotes inside them.",
    )


def read_caption(path: Path, _wants: Wants) -> Iterator[SourceRow]:
    """A row for each image of the same name as the .txt file: the image and its caption."""
    size = path.stat().st_size
    images = [
        other.name
        for other in sorted(path.parent.glob(f"{glob.escape(path.stem)}.*"))
        if other.stem == path.stem and other.name.lower().endswith(IMAGE_ENDINGS)
    ]
    with open_raw(path) as file:
        text = file.read(ROW_LIMIT_BYTES + 1)
    if len(text) > ROW_LIMIT_BYTES:
        yield found(1, too_long(), size)
        return
    try:
        caption = text.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        yield found(1, not_utf8(f"Byte {error.start + 1} is {error.reason}."), size)
    else:
        for image in images:
            yield found(1, {"image": image, "caption": caption}, size)


def read_image_without_caption(path: Path, _wants: Wants) -> Iterator[SourceRow]:
    """The problem of an image in a folder where others have captions."""
    problem = RowProblem(
        "The image has no caption.",
        f"There is no {path.stem}.txt beside it.",
        "Write the caption into that file, or take the image out of the folder.",
    )
    yield found(1, problem, path.stat().st_size)


def _text_readers() -> dict[str, Reader]:
    plain: dict[str, Reader] = {
        **dict.fromkeys((".jsonl", ".ndjson", ".json"), read_json),
        ".csv": read_csv,
        ".tsv": partial(read_csv, separators="\t"),
    }
    return {name + end: read for end in ("", *COMPRESSIONS) for name, read in plain.items()}


READERS: dict[str, Reader] = {
    **_text_readers(),
    ".parquet": read_parquet,
    **dict.fromkeys((".arrow", ".feather"), read_arrow),
}
KNOWN_ENDINGS = (
    ".jsonl, .ndjson, .json, .csv, .tsv, each also with .gz or .zst, .parquet and .arrow"
)
# Only in a folder of images: `_files_of` finds them there and nowhere else.
CAPTION_READERS: dict[str, Reader] = {
    ".txt": read_caption,
    **dict.fromkeys(IMAGE_ENDINGS, read_image_without_caption),
}
