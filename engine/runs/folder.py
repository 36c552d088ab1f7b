"""Where runs live and how one is found again by its name.

A folder of Windtunnel's own holds them unless a config says otherwise; runs elsewhere are entered
in an index there, so that a name is enough from any directory. Nothing here deletes or overwrites.
"""

import contextlib
import difflib
import errno
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import platformdirs

from engine.errors import UserError, WorkError
from engine.files import PRIVATE, SUMS, changed_file
from engine.units import counted
from engine.visible import visible

HOME_VARIABLE: Final = "WINDTUNNEL_RUNS"

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_CHECKPOINT: Final = re.compile(r"step-[0-9]+")
LATEST: Final = "LATEST"
"""File in `checkpoints/` with the name of the newest one."""
_MARKS: Final = ("lock", "events.jsonl", "config.yml")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths of one run; the folder itself need not exist yet."""

    path: Path
    """Absolute."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        """What to do, as YAML; written before the trainer starts."""
        return self.path / "config.yml"

    @property
    def plan(self) -> Path:
        """The memory estimate and the reasons, as JSON."""
        return self.path / "plan.json"

    @property
    def events(self) -> Path:
        """What happened, one JSON object a line; written by the trainer alone."""
        return self.path / "events.jsonl"

    @property
    def events_bytes(self) -> int:
        """How long `events` is by now; 0 before the first."""
        return self.events.stat().st_size if self.events.exists() else 0

    @property
    def history(self) -> Path:
        """What the events add up to so far; made anew from them where it is missing."""
        return self.path / "history.msgpack"

    @property
    def log(self) -> Path:
        """What the trainer and its libraries printed."""
        return self.path / "engine.log"

    def rank_log(self, rank: int) -> Path:
        """The same of one of several processes; the first one's is `log`."""
        return self.path / f"engine-{rank}.log" if rank else self.log

    @property
    def lock(self) -> Path:
        """Locked by the trainer as long as it lives."""
        return self.path / "lock"

    @property
    def control(self) -> Path:
        """Commands to the trainer, one JSON object a line; written by everybody else."""
        return self.path / "control.jsonl"

    @property
    def data(self) -> Path:
        """Prepared arrays."""
        return self.path / "data"

    @property
    def checkpoints(self) -> Path:
        """`step-N` folders, with LATEST and BEST."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The result of a LoRA or QLoRA run."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The result of a full run."""
        return self.path / "model"


def run_home(option: str | Path | None = None) -> Path:
    """The folder that holds `runs/` and the index: `--runs`, else $WINDTUNNEL_RUNS, else the
    platform's data folder. It need not exist."""
    chosen = option or os.environ.get(HOME_VARIABLE)
    return _absolute(chosen) if chosen else platformdirs.user_data_path("windtunnel", False)


def create_run(
    name: str,
    *,
    output_dir: str | Path | None = None,
    home: str | Path | None = None,
    resume: bool = False,
) -> RunFolder:
    """A folder for a run, made if it is not there.

    `output_dir` is taken as it is; without one the run gets `runs/<name>` under `run_home(home)`,
    with -2, -3 and so on behind a name that is taken. With `resume` the folder is that of an
    existing run, and no number is added.

    Raises UserError where the name has other characters than letters, digits, dot, dash and
    underscore, where the folder holds a run and `resume` is not set, or where there is none to
    resume; WorkError where the folder cannot be made.
    """
    base = run_home(home)
    if output_dir is not None:
        run = RunFolder(_absolute(output_dir))
        if resume:
            _require_run(run)
        else:
            _refuse_used(run)
            _make(run)
    elif resume:
        run = RunFolder(base / "runs" / _checked(name))
        _require_run(run)
    else:
        run = _make_unique(base / "runs", _checked(name))
    for each in {base, run_home()}:
        _enter_in_index(each, run)
    return run


Stamp = tuple[int, int]
"""Size of a run's events in bytes and when they were last written, in nanoseconds."""


def list_runs(home: str | Path | None = None) -> list[RunFolder]:
    """The runs under `run_home(home)` and those in its index, the latest written first."""
    return [run for run, _ in stamped_runs(home)]


def stamped_runs(home: str | Path | None = None) -> list[tuple[RunFolder, Stamp]]:
    """`list_runs` with the stamp of each: no file of a run is opened."""
    base = run_home(home)
    found: dict[str, RunFolder] = {}
    with contextlib.suppress(OSError):
        real = os.path.realpath(base / "runs")
        for entry in os.scandir(base / "runs"):
            if entry.is_dir():
                at = os.path.realpath(entry.path) if entry.is_symlink() else f"{real}/{entry.name}"
                found[at] = RunFolder(Path(entry.path))
    for path in _indexed(base):
        found.setdefault(os.path.realpath(path), RunFolder(path))
    stamped = [(run, stamp) for run in found.values() if (stamp := _stamp(run))]
    return sorted(stamped, key=lambda each: each[1][1], reverse=True)


def find_run(name_or_path: str | Path, home: str | Path | None = None) -> RunFolder:
    """The run of that name, or the run in that folder.

    Raises UserError where there is none (naming the nearest) or more than one of that name.
    """
    text = os.fspath(name_or_path)
    at_path = RunFolder(_absolute(text))
    if os.sep in text or text.startswith("~"):
        _require_run(at_path)
        return at_path
    runs = list_runs(home)
    named = [run for run in runs if run.name == text]
    if len(named) == 1:
        return named[0]
    if named:
        raise UserError(
            f"{len(named)} runs are called {visible(text, one_line=True)}.",
            "They are in " + " and ".join(visible(str(run.path)) for run in named) + ".",
            "Give the folder instead of the name.",
        )
    if text and _is_run(at_path):
        return at_path
    near = difflib.get_close_matches(text, [run.name for run in runs], n=1, cutoff=0.5)
    raise UserError(
        f"There is no run called {visible(text, one_line=True)!r}.",
        f"Known under {visible(str(run_home(home)))}: {counted(len(runs), 'run')}."
        + (f" The nearest name is {visible(near[0], one_line=True)}." if near else ""),
        "List them with `windtunnel runs`, or give the run's folder.",
    )


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def _checked(name: str) -> str:
    if _NAME.fullmatch(name):
        return name
    raise UserError(
        f"A run cannot be called {visible(name, one_line=True)!r}.",
        "A name is a folder and a word of a command: letters, digits, dot, dash and underscore, at "
        "most 100, the first a letter or a digit.",
        "Choose another name, or set output_dir to any folder.",
    )


def _is_run(run: RunFolder) -> bool:
    return any(os.path.exists(run.path / mark) for mark in _MARKS)


def _require_run(run: RunFolder) -> None:
    if not _is_run(run):
        raise UserError(
            f"{visible(str(run.path), one_line=True)} holds no run.",
            "A run's folder has a config.yml, and events.jsonl once it was started.",
            "List the runs with `windtunnel runs`.",
        )


def _refuse_used(run: RunFolder) -> None:
    """A folder with only a config.yml waits to be started; one with history is somebody's work."""
    try:
        has_checkpoints = os.path.isdir(run.checkpoints) and bool(os.listdir(run.checkpoints))
        has_events = os.path.exists(run.events) and os.path.getsize(run.events) > 0
    except OSError as error:
        raise _cannot_make(run.path, error) from error
    if has_checkpoints or has_events:
        shown = visible(str(run.path), one_line=True)
        raise UserError(
            f"{shown} already holds a run.",
            "A second run there would mix its events and checkpoints with those of the first.",
            f"Set another output_dir, or go on with that run: windtunnel resume {shown}",
        )


def _cannot_make(path: Path, error: Exception) -> WorkError:
    return WorkError(
        f"The folder {visible(str(path), one_line=True)} cannot be made or read.",
        f"The system says: {error}.",
        "Set output_dir or --runs to a folder that you may write to.",
    )


def _make(run: RunFolder) -> None:
    try:
        run.path.mkdir(PRIVATE, parents=True, exist_ok=True)
        run.lock.touch()
    except (OSError, ValueError) as error:
        raise _cannot_make(run.path, error) from error


def _make_unique(folder: Path, name: str) -> RunFolder:
    number = 1
    while True:
        run = RunFolder(folder / (name if number == 1 else f"{name}-{number}"))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            run.path.mkdir(PRIVATE)  # fails for all but one of several that ask at once
            run.lock.touch()
        except FileExistsError as error:
            if not folder.is_dir():
                raise _cannot_make(folder, error) from error
            number += 1
        except OSError as error:
            raise _cannot_make(run.path, error) from error
        else:
            return run


def _stamp(run: RunFolder) -> Stamp | None:
    """None where the folder holds no run; without events, the time of the folder."""
    with contextlib.suppress(OSError):
        return stamp_of(run)
    with contextlib.suppress(OSError):
        return (0, os.stat(run.path).st_mtime_ns) if _is_run(run) else None
    return None


def stamp_of(run: RunFolder) -> Stamp:
    """Raises OSError where there are no events."""
    found = os.stat(run.events)
    return found.st_size, found.st_mtime_ns


def _indexed(home: Path) -> Iterator[Path]:
    reader = LineReader(home / "index.jsonl")
    with contextlib.suppress(OSError):
        while lines := reader.read():
            for line in lines:
                with contextlib.suppress(ValueError, RecursionError):
                    record = json.loads(line)
                    path = record.get("path") if isinstance(record, dict) else None
                    if isinstance(path, str) and os.path.isabs(path):
                        yield Path(path)


def _enter_in_index(home: Path, run: RunFolder) -> None:
    """Remember a run that lies elsewhere. A home that cannot be written to is no reason to fail."""
    if run.path.parent == home / "runs" or run.path in _indexed(home):
        return
    with contextlib.suppress(OSError):
        home.mkdir(parents=True, exist_ok=True)
        append_line(home / "index.jsonl", {"path": str(run.path)})


def list_checkpoints(folder: Path) -> list[str]:
    """The names `step-N` of the folders in a run's checkpoints/, by N."""
    found = (path.name for path in folder.glob("step-*") if path.is_dir())
    return sorted(filter(_CHECKPOINT.fullmatch, found), key=lambda name: int(name[5:]))


def read_mark(folder: Path, mark: str) -> str:
    """The checkpoint in `folder` that its LATEST or BEST names; empty where it names none there."""
    try:
        name = (folder / mark).read_text("utf-8").strip()
    except (OSError, ValueError):
        return ""
    return name if name in list_checkpoints(folder) else ""


def require_unchanged(run: RunFolder, result: Path) -> None:
    """Raises WorkError where a file of the run's finished adapter or model is not as it was
    written."""
    name = changed_file(result)
    if name is None:
        return
    shown, saved = visible(str(run.path), one_line=True), list_checkpoints(run.checkpoints)
    again = f"Write it again: `windtunnel resume {shown} --from {saved[-1] if saved else ''}`."
    raise WorkError(
        f"The finished {result.name} of {visible(run.name, one_line=True)} is damaged.",
        f"{visible(name, one_line=True)} is not as it was written.",
        (again if saved else "Put a copy back, or train again.")
        + f" If the change is yours, remove {SUMS}.",
    )


CHUNK_BYTES: Final = 1 << 22
"""At most this much is read at once: a run of a million steps does not arrive in one list."""

_BLOCK_BYTES: Final = 1 << 16
_MEMORY_BYTES: Final = 256  # about one `step` event: its time makes it unlike any other


def append_line(path: Path, record: Mapping[str, object]) -> None:
    """Add one line with one write, on a line of its own even after a torn one.

    Raises OSError where the file cannot be made or the disk is full.
    """
    line = json.dumps(record).encode("ascii") + b"\n"
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def _open_to_read(path: Path) -> int:
    """The system opens a folder too, and then fails without its name."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return descriptor


class Place(NamedTuple):
    """How far a file was read: the position, and the last bytes before it."""

    position: int = 0
    before: bytes = b""


class LineReader:
    """Reads the lines that were added to a file since the last time.

    Only whole lines come out; a torn last line waits until its line feed is there. The reader
    remembers the last bytes that it gave out: where the file no longer holds them at that place
    (it was cut, emptied or replaced, even by one with the same inode number) it begins again at
    the start.
    """

    def __init__(self, path: Path, place: Place | None = None, *, from_end: bool = False) -> None:
        self._path = path
        self._position, self._before = place or Place()
        if from_end:
            self._skip_whole_lines()

    @property
    def place(self) -> Place:
        return Place(self._position, self._before)

    def read(self, limit_bytes: int = CHUNK_BYTES) -> list[bytes]:
        """Whole lines without their line feeds, blank ones left out; empty when nothing is new.

        About `limit_bytes` are read, more where one line is longer. A file that is not there has
        no lines; any other OSError is the caller's.
        """
        try:
            descriptor = _open_to_read(self._path)
        except FileNotFoundError:
            return []
        try:
            start = self._position - len(self._before)
            if os.pread(descriptor, len(self._before), start) != self._before:
                self._position, self._before = 0, b""
            while True:
                data = os.pread(descriptor, limit_bytes, self._position)
                end = data.rfind(b"\n") + 1
                whole = data[:end]
                lines = [line for line in whole.split(b"\n") if line.strip()]
                self._position += end
                self._before = (self._before + whole)[-_MEMORY_BYTES:]
                if lines or len(data) < limit_bytes:
                    return lines
                if not end:  # one line is longer than what was read
                    limit_bytes *= 4
        finally:
            os.close(descriptor)

    def _skip_whole_lines(self) -> None:
        position = os.path.getsize(self._path) if self._path.exists() else 0
        if not position:
            return
        with self._path.open("rb") as file:
            while position:
                start = max(0, position - _BLOCK_BYTES)
                file.seek(start)
                found = file.read(position - start).rfind(b"\n")
                if found >= 0:
                    self._position = start + found + 1
                    break
                position = start
            kept = min(self._position, _MEMORY_BYTES)
            file.seek(self._position - kept)
            self._before = file.read(kept)


def lines_backwards(path: Path, limit_bytes: int) -> Iterator[bytes]:
    """Whole lines of the last `limit_bytes` of a file, the newest first, a torn last one left out.

    Blocks are read as they are asked for: the newest line of a file of any size costs one read.
    """
    try:
        descriptor = _open_to_read(path)
    except FileNotFoundError:
        return
    try:
        position = os.fstat(descriptor).st_size
        stop = max(0, position - limit_bytes)
        rest = b""
        torn = True
        while position > stop:
            start = max(stop, position - _BLOCK_BYTES)
            pieces = (os.pread(descriptor, position - start, start) + rest).split(b"\n")
            position = start
            rest = pieces.pop(0)
            if pieces and torn:
                pieces.pop()
                torn = False
            yield from reversed(pieces)
        if position == 0 and not torn:
            yield rest
    finally:
        os.close(descriptor)
