"""Files that are written whole or not at all, and reports that come now and then."""

import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.files import said, sweep, way_out, write_whole
from engine.pace import every
from engine.runs import RunFolder
from engine.runs.folder import LineReader, lines_backwards


def test_a_file_is_replaced_and_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_bytes(b"old")
    path.chmod(0o600)
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["config.yml"]


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_content_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "config.yml"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, operation, refuse)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["config.yml"]


@pytest.mark.parametrize(
    ("number", "way"),
    [
        (errno.ENOSPC, "Free disk space"),
        (errno.EROFS, "Let this user write there"),
        (errno.ELOOP, "Move away what stands there instead"),
        (errno.EIO, "See that its disk is there and works"),
        (None, "Free disk space"),
    ],
)
def test_the_advice_is_about_what_the_system_refused(number: int | None, way: str) -> None:
    assert way_out(OSError(number, "no") if number else OSError("no")) == way


@pytest.mark.parametrize(
    "read", [lambda path: LineReader(path).read(), lambda path: next(lines_backwards(path, 9))]
)
def test_a_folder_in_the_place_of_the_events_is_named(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    (events := RunFolder(tmp_path).events).mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        read(events)
    assert said(caught.value) == f"Is a directory: {str(events)!r}"
    assert way_out(caught.value) == "Move away what stands there instead"


def test_writers_at_the_same_moment_each_write_it_whole(tmp_path: Path) -> None:
    """Two threads have one process number, as two computers on one disk may have."""
    path = tmp_path / "config.yml"
    texts = [bytes([number]) * 50_000 for number in range(8)]
    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(lambda text: write_whole(path, text), texts))
    assert path.read_bytes() in texts
    assert os.listdir(tmp_path) == ["config.yml"]


def test_what_a_kill_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    for name in (".LATEST.4711-0a1b2c3d", ".hidden", "LATEST", "step-1.2"):
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert set(os.listdir(tmp_path)) == {".hidden", "LATEST", "step-1.2"}


def test_a_report_is_due_at_first_and_after_its_time() -> None:
    always, rarely = every(0), every(3600)
    assert [always(), always(), always()] == [True, True, True]
    assert [rarely(), rarely(), rarely()] == [True, False, False]
