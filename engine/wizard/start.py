"""A run from a draft or from a config file: why it cannot start, its folder, its saved config."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engine.config import (
    RunConfig,
    parse_config,
    read_config,
    require_supported,
    write_config,
)
from engine.data.sources import with_absolute_paths
from engine.errors import UserError
from engine.hardware import Machine, missing_packages
from engine.launch import launch, require_torch
from engine.plan import Device, Estimate
from engine.plan.trainer import refuse_bf16
from engine.runs import RunFolder, create_run
from engine.units import gib
from engine.visible import visible
from engine.wizard.draft import Draft

_NEEDED: Final = frozenset({"torch", "transformers", "peft", "safetensors"})
"""Without one of them no run begins; the others are for some methods only."""


def why_not(draft: Draft) -> UserError | None:
    """Why the draft's run cannot start on this computer, None where it can. Starts nothing."""
    try:
        _require_startable(draft)
    except UserError as error:
        return error
    return None


def start_run(draft: Draft, *, home: Path | None = None) -> RunFolder:
    """Start the draft's run, detached: it outlives the wizard and the terminal.

    Its folder is the config's `output_dir`, else one of the draft's name (with -2, -3 and so on
    where that is taken) under `run_home(home)`. Relative paths start at the working directory.
    Raises UserError for what `why_not` says and for a name that cannot be used, WorkError where
    the folder or the trainer cannot be made.
    """
    _require_startable(draft)
    config = with_absolute_paths(draft.config(), Path.cwd())
    text, plan = draft.config_text(config), draft.plan()
    run = create_run(draft.run_name(), output_dir=config.output_dir, home=home)
    launch(run, detach=True, config=text, plan=plan)
    return run


@dataclass(frozen=True, slots=True)
class Created:
    """A run that can be launched."""

    run: RunFolder
    config: str
    """Text of its config.yml."""
    resume: bool
    checkpoint: str | None
    """Name of the checkpoint to go on from, None for the newest."""


def create(
    file: Path, changes: Sequence[str], home: Path | None, name: str | None = None
) -> Created:
    """The run folder for a config file and its changes.

    Paths in the config are relative to its file; in the run folder they are absolute. Raises
    UserError where the config or the folder cannot be used.
    """
    given = read_config(file).override(changes)
    given.require_supported()
    config = with_absolute_paths(given.config, file.absolute().parent)
    start_from = config.resume_from_checkpoint
    run = create_run(
        name or run_name(file),
        output_dir=config.output_dir,
        home=home,
        resume=bool(start_from),
    )
    checkpoint = Path(start_from).name if isinstance(start_from, str) else None
    if checkpoint and not (run.checkpoints / checkpoint).is_dir():
        raise UserError(
            f"{visible(str(run.path), one_line=True)} has no checkpoint {visible(checkpoint)}.",
            "resume_from_checkpoint names one of the run's own folder.",
            "Set it to true for the newest, or to the name of one in its checkpoints folder.",
        )
    return Created(run, write_config(config, document=given.document), bool(start_from), checkpoint)


def run_name(file: Path) -> str:
    """A run's name from its config's: what a folder's name cannot hold becomes a dash."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-._")[:80] or "run"


def save_config(draft: Draft, path: Path) -> Path:
    """Write the draft's config, whole or not at all, over what is there; gives the absolute path.

    Its own paths start at its folder: written elsewhere than in the working directory, they become
    absolute. Raises UserError where an answer is missing, WorkError where it cannot be written.
    """
    path = path.expanduser().absolute()
    config = draft.config()
    if path.parent != Path.cwd():
        config = with_absolute_paths(config, Path.cwd())
    file = parse_config(draft.config_text(config), path.name)
    write_config(file.config, path=path, document=file.document)
    return path


def free_config_path(draft: Draft) -> Path:
    """Where a draft's config is saved unless told otherwise: a new file of the run's name."""
    name, number = draft.run_name(), 1
    path = Path(f"{name}.yml")
    while path.exists():
        number += 1
        path = Path(f"{name}-{number}.yml")
    return path


def _require_startable(draft: Draft) -> None:
    advice = draft.advice()
    device = draft.device
    assert device is not None
    if not advice.config.datasets:
        raise UserError(
            "No dataset is chosen.", "A run learns from rows.", "Choose one on the Data page."
        )
    if advice.not_trained:
        raise UserError(
            f"{visible(draft.architecture().name, one_line=True)} is not trained yet.",
            advice.not_trained,
            "Save the config, or choose another model.",
        )
    if device.planned:
        raise UserError(
            f"{visible(device.name, one_line=True)} is planned for and not here.",
            "A run starts on the computer that has it.",
            "Save the config, copy config.yml to the machine and run: windtunnel train config.yml",
        )
    require_supported(advice.config)
    _require_new(advice.config)
    refuse_bf16(advice.config, device)
    _require_fit(advice.estimate, device)
    if draft.machine is not None:
        _require_stack(draft.machine, device)


def _require_new(config: RunConfig) -> None:
    if config.resume_from_checkpoint:
        raise UserError(
            "This config goes on with a run that is there already.",
            "It sets resume_from_checkpoint, and the wizard starts new runs.",
            "Run it with: windtunnel train config.yml; or remove resume_from_checkpoint.",
        )


def _require_fit(needs: Estimate, device: Device) -> None:
    if needs.verdict == "does not fit":
        raise UserError(
            f"It does not fit: {gib(needs.device_bytes)} are needed.",
            f"{visible(device.name, one_line=True)} can give {gib(needs.can_give_bytes)} of"
            f" {gib(device.total_bytes)}.",
            "Plan has an answer that makes it fit, or choose a smaller model.",
            exit_status=3,
        )


def _require_stack(machine: Machine, device: Device) -> None:
    for missing in missing_packages(machine):
        absent = [package for package in missing.packages if package in _NEEDED]
        if absent:
            raise UserError(
                "The training stack is not installed.",
                f"Training needs {', '.join(absent)}; preview, plan and config work without.",
                f"Install it, then start: {missing.command}",
            )
    require_torch(machine, device.uuid)
