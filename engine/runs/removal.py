"""Takes a run away and keeps its config: what a run did can be done again, from one small file.

Only runs in Windtunnel's own folder are removed. One that a person put elsewhere (`output_dir`)
may share its folder with files that are nobody's to delete.
"""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from engine.errors import UserError, WorkError
from engine.runs.folder import RunFolder, run_home
from engine.runs.lock import RunLock
from engine.visible import visible


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
