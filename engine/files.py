"""Writes that a power cut, a kill or a full disk can leave undone, but not half done."""

import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, durable when this returns; a reader sees the old content or the new one, whole.

    A symbolic link stays one and its target is written; permissions stay. Raises OSError where the
    system refuses, and leaves the old content then.
    """
    target = path.resolve()
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    mode = target.stat().st_mode & 0o777 if target.exists() else 0o666
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    sync(target.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's own entries (names, renames), are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove what killed writes left in a folder that has one writer at a time."""
    for beside in folder.glob(".*.[0-9]*"):
        beside.unlink()
