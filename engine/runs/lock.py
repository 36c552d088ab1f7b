"""The one proof that a trainer lives: an flock that its process holds from start to end.

The kernel gives the lock back however the process dies. A process id proves nothing: it answers for
a zombie, for a stranger with the same number after a reboot, and not at all from another machine.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from engine.errors import UserError, WorkError
from engine.files import said, way_out
from engine.runs.folder import RunFolder, run_home
from engine.visible import visible

LAUNCH_VARIABLE: Final = "WINDTUNNEL_LAUNCH"
"""Environment variable by which a launcher recognises that its own child took the lock."""

_PATIENCE_SECONDS: Final = 30.0  # for those who only look, on a machine that is short of time

_HELD: set[int] = set()


def _close_in_child() -> None:
    """A forked data worker shares the lock; one that outlives the trainer would keep it locked."""
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_close_in_child)


@dataclass(frozen=True, slots=True)
class Claim:
    """Who took the lock last; written into the lock file by its holder."""

    launch: str = ""
    """Value of WINDTUNNEL_LAUNCH in the holder's environment."""
    since: float = 0.0
    """Unix seconds when the lock was taken."""
    events_bytes: int = 0
    """How long events.jsonl was then: what is behind it is this launch's, whatever its clock."""


class RunLock:
    """Held by the trainer for life: `with RunLock(run) as lock`, before any heavy import.

    Entering raises UserError where another process holds it, WorkError where the folder cannot be
    locked at all. The descriptor is closed in every child, by exec and by fork.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._descriptor = -1

    def __enter__(self) -> "RunLock":
        try:
            self._descriptor = os.open(self._run.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            _HELD.add(self._descriptor)
            self._take()
            self._sign()
        except BlockingIOError as error:
            self._close()
            raise in_use(self._run) from error
        except OSError as error:
            self._close()
            raise WorkError(
                f"The run {visible(self._run.name, one_line=True)} cannot be locked.",
                f"The system says: {error}.",
                "Put the run on a disk with free space that supports file locks.",
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor in _HELD:  # not in a forked child, where the number may be another file
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._close()

    def _take(self) -> None:
        """Wait for those who only look: `is_locked` holds a shared lock for a moment.

        Where that moment is not to blame, a shared lock is refused too: a trainer is there.
        """
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            time.sleep(0.005)

    def _sign(self) -> None:
        """Over what is there, not after emptying it: at no moment is there no claim to read."""
        launch = os.environ.get(LAUNCH_VARIABLE, "")
        claim = Claim(launch, time.time(), self._run.events_bytes)
        line = json.dumps(asdict(claim)).encode("ascii") + b"\n"
        if os.pwrite(self._descriptor, line, 0) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _close(self) -> None:
        if self._descriptor in _HELD:
            _HELD.discard(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1


def in_use(run: RunFolder) -> UserError:
    """The error of a second trainer on the same folder, and of whoever would start one."""
    shown = visible(run.name, one_line=True)
    return UserError(
        f"The run {shown} is already running.",
        "Its folder is locked by the process that trains there.",
        f"Stop it first (windtunnel stop {shown}), or start a run with another name.",
    )


def unreadable(run: RunFolder, error: OSError) -> WorkError:
    """The error of a run whose files are there and cannot be read."""
    return WorkError(
        f"The run {visible(run.name, one_line=True)} cannot be read.",
        f"The system says: {said(error)}.",
        f"{way_out(error)}, or look as the user who started the run.",
    )


def is_locked(run: RunFolder) -> bool:
    """Whether a process holds the run's lock.

    Raises WorkError where the lock file is there and cannot be opened.
    """
    try:
        descriptor = os.open(run.lock, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(run, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def read_claim(run: RunFolder) -> Claim:
    """Who took the lock last, whether or not it is still held; an empty claim where nobody did."""
    try:
        record = json.loads(run.lock.read_bytes().partition(b"\n")[0])
        launch, since, size = (record[each] for each in ("launch", "since", "events_bytes"))
        return Claim(str(launch), float(since), int(size))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return Claim()


@dataclass(frozen=True, slots=True)
class Contents:
    """What a removal would take away."""

    saves: int
    total_bytes: int


def measure(run: RunFolder) -> Contents:
    """How many checkpoints a run has and what all of its files take. Reads the whole folder.

    Raises UserError where the run lies in a folder that is not ours to remove, WorkError where it
    cannot be read.
    """
    _require_ours(run)
    try:
        return Contents(len(list(run.checkpoints.glob("step-*"))), _size(run.path))
    except OSError as error:
        raise _failed(run, error) from error


def remove(run: RunFolder) -> Path | None:
    """Take a run away; gives the place of its config in the trash, None where it had none.

    Raises UserError where the run is alive or not ours to remove, WorkError where a file cannot be
    taken away.
    """
    _require_ours(run)
    try:
        with RunLock(run):
            kept = _keep_config(run)
            shutil.rmtree(run.path)
    except OSError as error:
        raise _failed(run, error) from error
    return kept


def _require_ours(run: RunFolder) -> None:
    home = os.path.realpath(run_home() / "runs")
    if os.path.dirname(os.path.realpath(run.path)) == home and not run.path.is_symlink():
        return
    shown = visible(str(run.path), one_line=True)
    raise UserError(
        f"The run {visible(run.name, one_line=True)} lies in a folder that somebody chose.",
        f"{shown} may hold other files than those of the run.",
        "Remove the folder yourself when nothing in it is needed.",
    )


def _keep_config(run: RunFolder) -> Path | None:
    if not run.config.is_file():
        return None
    trash = run_home() / "runs" / ".trash"
    trash.mkdir(exist_ok=True)
    stamp = time.strftime("%Y-%m-%d-%H%M%S")
    return Path(shutil.copyfile(run.config, trash / f"{run.name}-{stamp}.yml"))


def _size(path: Path) -> int:
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(_size(each) for each in path.iterdir())


def _failed(run: RunFolder, error: OSError) -> WorkError:
    return WorkError(
        f"The run {visible(run.name, one_line=True)} could not be removed.",
        f"The system says: {error}.",
        "See that its folder can be read and written, then remove it again.",
    )
