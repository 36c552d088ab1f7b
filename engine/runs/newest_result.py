"""Where a run's newest result lies: its export, else its newest checkpoint."""

from pathlib import Path

from engine.config import RunConfig
from engine.errors import UserError
from engine.runs.folder import RunFolder
from engine.visible import visible

LATEST = "LATEST"
"""File in `checkpoints/` with the name of the newest one."""


def newest_result(run: RunFolder, config: RunConfig) -> Path:
    """The folder of the finished adapter or model, or of the newest checkpoint.

    Raises UserError where nothing was saved yet.
    """
    exported = run.model if config.adapter is None else run.adapter
    if exported.is_dir():
        return exported
    try:
        name = (run.checkpoints / LATEST).read_text("utf-8").strip()
    except OSError:
        name = ""
    newest = run.checkpoints / name
    if not name.startswith("step-") or not newest.is_dir():
        shown = visible(run.name, one_line=True)
        raise UserError(
            f"The run {shown} has saved nothing yet.",
            "There is neither a finished result nor a checkpoint in its folder.",
            f"Wait for its first save; `windtunnel watch {shown}` shows how far it is.",
        )
    return newest
