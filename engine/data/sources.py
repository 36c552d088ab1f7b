"""Which files a dataset names, and one row after another out of them.

A row here is any JSON object; what is wrong with it as a conversation is for `engine.chat`. A line
that cannot be read becomes a problem with its number and reading goes on; only damage that hides
the rest of a file (a cut gzip, a broken Parquet footer, a JSON array that stops being JSON) ends
it, as a `UserError`. Memory is bounded by one row.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.chat.conversation import RowProblem
from engine.chat.message import IMAGE_ENDINGS
from engine.config import DatasetConfig
from engine.data import readers
from engine.data.readers import RawRow
from engine.data.samples import SAMPLE_PREFIX, locate_sample
from engine.errors import UserError

Reader = Callable[[Path], Iterator[RawRow]]

READERS: dict[str, Reader] = {
    ".jsonl": readers.read_json_lines,
    ".jsonl.gz": readers.read_json_lines,
    ".json": readers.read_json,
    ".csv": readers.read_csv,
    ".parquet": readers.read_parquet,
}
KNOWN_ENDINGS = ", ".join(READERS)
# Only in a folder of images: `_files_of` finds them there and nowhere else.
_CAPTION_READERS: dict[str, Reader] = {
    ".txt": readers.read_caption,
    **dict.fromkeys(IMAGE_ENDINGS, readers.read_image_without_caption),
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row as it was found; exactly one of `row` and `problem` is set.

    `line` counts from 1 inside `file`: the line on which the row starts, or in Parquet and hub
    sets its number. `read_bytes` is how far into all files of the dataset it ends.
    """

    line: int
    row: dict[str, Any] | None
    problem: RowProblem | None
    file: str
    read_bytes: int


@dataclass(frozen=True, slots=True)
class Location:
    """Where a dataset's rows are: local files in reading order, or a hub id."""

    root: Path
    files: tuple[Path, ...]
    hub_id: str | None = None

    @property
    def folder(self) -> Path | None:
        """The folder that holds the dataset, where images of its rows are first looked up."""
        if self.hub_id is not None:
            return None
        return self.root if self.root.is_dir() else self.root.parent

    def name(self, file: Path) -> str:
        """The file's name as messages show it: relative to the folder that the dataset names."""
        return file.name if file == self.root else os.path.relpath(file, self.root)

    def stamps(self) -> tuple[tuple[int, ...], ...]:
        """(size, time of change, inode) of each file: what a change of its content alters."""
        found = [file.stat() for file in self.files]
        return tuple((stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in found)


def locate(dataset: DatasetConfig, folder: Path) -> Location:
    """The files that `dataset.path` names; relative paths start at `folder`.

    Raises `UserError` for a missing file, an unknown ending, a folder without a data file, what
    is neither a file nor a folder, and a `sample:NAME` that does not ship.
    """
    if not dataset.path.strip():
        raise UserError(
            "The path of a dataset is empty.",
            "It names no file, no folder and no hub id.",
            "Give one of them; `.` is the folder itself.",
        )
    # os.path, unlike pathlib, answers a name that no file system can hold with False.
    root = folder / os.path.expanduser(dataset.path)
    if dataset.path.startswith(SAMPLE_PREFIX) and not os.path.exists(root):
        path = locate_sample(dataset.path.removeprefix(SAMPLE_PREFIX))
        return Location(path, (path,))
    if os.path.isfile(root):
        _check_ending(root)
        return Location(root, (root,))
    if os.path.isdir(root):
        return Location(root, _files_of(root, dataset.data_files))
    if os.path.exists(root):
        raise UserError(
            f"{dataset.path} is neither a file nor a folder.",
            "Rows are read more than once, which a pipe or a device does not allow.",
            "Write the rows into a .jsonl file and name that.",
        )
    if _is_hub_id(dataset.path, folder):
        return Location(root, (), dataset.path)
    raise _missing(root, dataset.path)


def iterate_rows(dataset: DatasetConfig, folder: Path) -> Iterator[SourceRow]:
    """Every row of `dataset`, in order, as a stream.

    Raises what `locate` raises, and `UserError` when a file is damaged or no row was found.
    """
    location = locate(dataset, folder)
    if location.hub_id is not None:
        # Imported here: it starts a process, which a local file never needs.
        from engine.data.hub import read_hub

        stream: Iterator[SourceRow] = (
            SourceRow(raw.line, raw.row, raw.problem, location.hub_id, 0)
            for raw in read_hub(dataset)
        )
    else:
        stream = _local_rows(location)
    found = False
    for row in stream:
        found = True
        yield row
    if not found:
        raise UserError(
            f"{dataset.path} holds no rows.",
            "It was read to its end and every line is blank.",
            "Write one conversation a line, or name another file.",
        )


def _local_rows(location: Location) -> Iterator[SourceRow]:
    before = 0
    for file in location.files:
        name = location.name(file)
        for raw in _reader_of(file)(file):
            yield SourceRow(raw.line, raw.row, raw.problem, name, before + raw.read_bytes)
        before += file.stat().st_size


def ending_of(path: Path) -> str:
    """The file's ending in lower case, `.jsonl.gz` being one ending."""
    endings = [ending.lower() for ending in path.suffixes]
    return "".join(endings[-2:]) if endings[-1:] == [".gz"] else "".join(endings[-1:])


def _reader_of(path: Path) -> Reader:
    return READERS.get(ending_of(path)) or _CAPTION_READERS[path.suffix.lower()]


def _check_ending(path: Path) -> None:
    if ending_of(path) not in READERS:
        raise UserError(
            f"{path} is not a data file that we read.",
            f"Its name ends in {ending_of(path) or 'nothing'}; we read {KNOWN_ENDINGS}.",
            "Convert it to .jsonl (one JSON object a line), or rename it if it is one of these.",
        )


def _files_of(root: Path, data_files: list[str] | str | None) -> tuple[Path, ...]:
    if data_files:
        return _chosen_files(root, [data_files] if isinstance(data_files, str) else data_files)
    files = tuple(
        path
        for path in sorted(root.iterdir())
        if path.is_file() and not path.name.startswith(".") and ending_of(path) in READERS
    )
    if files:
        return files
    if captioned := _captioned_images(root):
        return captioned
    deeper = sorted(
        path.parent for path in root.glob("*/*") if path.is_file() and ending_of(path) in READERS
    )
    raise UserError(
        f"{root} holds no data file.",
        f"A dataset folder holds files ending in {KNOWN_ENDINGS}, or images with a caption of the"
        " same name in a .txt file; its subfolders are not read.",
        f"Name {deeper[0]} instead." if deeper else "Name another folder, or a file.",
    )


def _captioned_images(root: Path) -> tuple[Path, ...]:
    """The captions of a folder of images, with the images that lack one; none without a caption."""
    names = {path.name for path in root.iterdir() if not path.name.startswith(".")}
    images = sorted(name for name in names if name.lower().endswith(IMAGE_ENDINGS))
    files: dict[Path, None] = {}  # two images may share a caption
    for name in images:
        caption = f"{os.path.splitext(name)[0]}.txt"
        files[root / (caption if caption in names else name)] = None
    return tuple(files) if any(ending_of(file) == ".txt" for file in files) else ()


def _chosen_files(root: Path, names: list[str]) -> tuple[Path, ...]:
    for name in names:
        if not os.path.isfile(root / name):
            raise _missing(root / name, name)
        _check_ending(root / name)
    return tuple(root / name for name in names)


def _is_hub_id(text: str, folder: Path) -> bool:
    # "data/train.jsonl" and "data/chats" beside an existing data/ are local names gone wrong.
    if not _HUB_ID.fullmatch(text) or ending_of(Path(text)) in READERS:
        return False
    return not os.path.isdir((folder / text).parent)


def _missing(root: Path, given: str) -> UserError:
    parent = root.parent
    if not os.path.isdir(parent):
        return UserError(
            f"There is no {given}.",
            f"The folder {parent} does not exist.",
            "Check the path; a relative one in a config starts where the config is.",
        )
    names = sorted(path.name for path in parent.iterdir() if not path.name.startswith("."))
    near = difflib.get_close_matches(root.name, names, n=3, cutoff=0.5)
    near = near or [name for name in names if ending_of(Path(name)) in READERS][:3]
    return UserError(
        f"There is no {given}.",
        f"{parent} holds no file or folder of that name.",
        f"Did you mean {' or '.join(near)}?" if near else "Give the path of a file or folder.",
    )
