"""Which datasets the page offers before anything is typed, and how a typed path is completed.

Only names are looked at here; no file is opened.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from engine.data.sources import KNOWN_ENDINGS, READERS, SAMPLE_PREFIX, ending_of, list_samples

_NEWEST: Final = 3
_DEEPEST: Final = 3
# A home folder may hold a million files; what lies in the first few thousand is offered.
_LOOKED_AT: Final = 5000


@dataclass(frozen=True, slots=True)
class Source:
    """One line of the page: a dataset with its `path`, or a place whose path is still typed."""

    kind: Literal["sample", "file", "typed", "hub"]
    title: str
    note: str
    path: str = ""


def list_sources(newest: list[str]) -> list[Source]:
    """Samples, the newest files, a path to type, the hub."""
    return [
        *(
            Source(
                "sample",
                f"{SAMPLE_PREFIX} {sample.name}",
                f"{sample.rows:,} {sample.description}",
                SAMPLE_PREFIX + sample.name,
            )
            for sample in list_samples()
        ),
        *(Source("file", name, "newest here", name) for name in newest),
        Source("typed", "file or folder", KNOWN_ENDINGS),
        Source("hub", "huggingface.co", "org/name; asks before it connects"),
    ]


def find_newest(folder: Path) -> list[str]:
    """The newest .jsonl files at most three folders below, as paths that start at `folder`."""
    found = []
    for looked_at, (path, changed) in enumerate(_walk(str(folder), _DEEPEST)):
        if path.endswith((".jsonl", ".jsonl.gz")):
            found.append((changed, os.path.relpath(path, folder)))
        if looked_at >= _LOOKED_AT:
            break
    return [name for _, name in sorted(found, reverse=True)[:_NEWEST]]


def _walk(folder: str, depth: int) -> Iterator[tuple[str, float]]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith((".", "_")) or entry.name in ("node_modules", "venv"):
            continue
        try:
            if entry.is_file():
                yield entry.path, entry.stat().st_mtime
            elif depth and entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path, depth - 1)
        except OSError:
            continue


def complete_path(text: str, folder: Path) -> tuple[str, list[str]]:
    """`text` as far as the names on the disk agree, and the names that it may become.

    A folder ends in a slash. Relative paths start at `folder`; `~` stays as it was typed.
    """
    head, tail = os.path.split(text)
    place = folder / os.path.expanduser(head)
    try:
        entries = sorted(os.scandir(place), key=lambda entry: entry.name)
    except (OSError, ValueError):
        return text, []
    names = [
        entry.name + "/" if entry.is_dir() else entry.name
        for entry in entries
        if entry.name.startswith(tail)
        and (tail.startswith(".") or not entry.name.startswith("."))
        and (entry.is_dir() or ending_of(Path(entry.name)) in READERS)
    ]
    common = os.path.commonprefix(names)  # noqa: RUF071 (characters, as they are typed)
    return (os.path.join(head, common) if common else text), names
