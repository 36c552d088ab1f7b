"""Writes that a power cut, a kill or a full disk can leave undone, but not half done; and the data
that ships."""

import errno
import hashlib
import os
import secrets
from collections.abc import Container, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

PRIVATE = 0o700
"""Mode of a folder that holds rows, samples or configs: a cluster's other users read none of it,
whatever the modes of the files inside."""


def read_preset(*names: str) -> Any:
    """The YAML of the file of these names below `presets`."""
    # Imported here so that the wizard's first page does not wait for a YAML parser.
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).load(files("presets").joinpath(*names).read_text("utf-8"))


_WAYS_OUT: Final = {
    "Free disk space": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None),
    "Let this user write there": (errno.EACCES, errno.EPERM, errno.EROFS),
    "Move away what stands there instead": (
        *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP),
    ),
}


def way_out(error: OSError) -> str:
    """What a person does about it, as the beginning of a sentence."""
    ways = (way for way, numbers in _WAYS_OUT.items() if error.errno in numbers)
    return next(ways, "See that its disk is there and works")


def said(error: OSError) -> str:
    """What the system says, and of which file, its control characters escaped."""
    what = error.strerror or str(error)
    return f"{what}: {str(error.filename)!r}" if error.filename else what


def partial_name(path: Path) -> Path:
    """A hidden name beside `path` that no other writer takes, of this computer or of another on the
    same disk; `sweep` knows it."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, durable when this returns; a reader sees the old content or the new one, whole.

    A symbolic link stays one and its target is written; permissions stay. Raises OSError where the
    system refuses, and leaves the old content then.
    """
    target = path.resolve()
    beside = partial_name(target)
    mode = target.stat().st_mode & 0o777 if target.exists() else 0o666
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    sync(target.parent)


def digest(path: Path) -> str:
    """SHA-256 of a file in hexadecimal: 1.7 GB a second of one core where the CPU has instructions
    for it, against 0.9 with BLAKE2b. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


SUMS = "SHA256SUMS"


def write_sums(
    folder: Path, known: Mapping[str, str], unlisted: Container[str] = ("README.md",)
) -> None:
    """Write the digest of every file of `folder` into its SHA256SUMS, for us and `sha256sum -c`.

    Of a file in `known` it is that one. README.md is left out, being there to be edited.
    """
    names = sorted(path.name for path in folder.iterdir() if path.name not in unlisted)
    lines = (f"{known.get(name) or digest(folder / name)}  {name}\n" for name in names)
    write_whole(folder / SUMS, "".join(lines).encode())


def changed_file(folder: Path) -> str | None:
    """The first file of a folder that is not as its SHA256SUMS says; None where all are, or where
    there is no such list."""
    try:
        *lines, _ = (folder / SUMS).read_text("utf-8").split("\n")
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return SUMS
    if not lines:
        return SUMS
    for line in lines:
        saved, _, name = line.partition("  ")
        try:
            same = Path(name).name == name and digest(folder / name) == saved
        except (OSError, ValueError):
            same = False
        if not same:
            return name or SUMS
    return None


def sync_all(folder: Path) -> None:
    """Wait until a folder without folders in it, and all that its files hold, is on the disk."""
    for path in (*folder.iterdir(), folder):
        sync(path)


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
