"""Everything that a run needs to go on as if it had never stopped, written so that no kill hurts.

A checkpoint is a folder that appears under its name only when it is complete: written as
`step-N.partial`, every file synced, read back, renamed; then `LATEST` moves. Tensors are
safetensors and the rest is JSON: nothing here can run code when it is opened.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.config import RunConfig
from engine.errors import WorkError
from engine.files import sweep, sync, write_whole
from engine.runs.newest_result import LATEST
from engine.train.forward import Model
from engine.train.weight_files import Entry, list_entries, read_tensors, write_tensors
from engine.train.weights import load_trained, save_trained, trained_parameters

OPTIMIZER, RANDOM, STATE = "optimizer.safetensors", "random.safetensors", "state.json"


@dataclass(slots=True)
class Position:
    """Where a run is: what a checkpoint holds beside tensors."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens seen since step 0, padding left out."""
    best_loss: float | None = None
    best_step: int | None = None
    fingerprint: str = ""
    """Hash of what decides the order of the batches; a checkpoint of another order is refused."""
    loss_chunk_bytes: int = 0
    """Logits that the loss held at once; 0 where that was not written down."""


def optimizer_tensors(
    model: Model, optimizer: Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by `parameter|key`, and as JSON values for the rest.

    The tensors are the optimizer's own.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, parameter in trained_parameters(model):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}|{key}"] = value
            else:
                values[f"{name}|{key}"] = value
    return tensors, values


def restore_optimizer(
    model: Model, optimizer: Optimizer, file: Path, values: dict[str, Any]
) -> None:
    """Put a saved state back without the type casts of `load_state_dict`, and without a copy."""
    parameters = dict(trained_parameters(model))
    optimizer.state.clear()

    def place(entry: Entry) -> Tensor:
        name, key = entry.name.rsplit("|", 1)
        room = _room(optimizer, parameters[name], key, entry)
        optimizer.state[parameters[name]][key] = room
        return room

    read_tensors(file, place)
    for full_name, value in values.items():
        name, key = full_name.rsplit("|", 1)
        optimizer.state[parameters[name]][key] = value


def _room(optimizer: Optimizer, parameter: nn.Parameter, key: str, entry: Entry) -> Tensor:
    """Memory for a part of the state, where the optimizer keeps it: a moment's may be paged."""
    if getattr(optimizer, "is_paged", False) and key in ("state1", "state2"):
        # Zeroed by the device, which bitsandbytes waits for: the CPU may write into it.
        paged: Tensor = optimizer.get_state_buffer(parameter, dtype=entry.dtype)  # type: ignore[attr-defined]
        return paged
    # torch keeps `step` of a plain AdamW on the CPU; the fused one keeps it with the rest.
    device = parameter.device if entry.shape or _fused(optimizer) else "cpu"
    return torch.empty(entry.shape, dtype=entry.dtype, device=device)


def _state_kind(optimizer_class: str) -> str:
    """What an optimizer's state is like: a paged one's differs only in where it lies."""
    return optimizer_class.removeprefix("Paged")


def _fused(optimizer: Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))


def rng_state() -> dict[str, Tensor]:
    """The state of torch's generators, CPU and every visible card."""
    state = {"cpu": torch.get_rng_state()}
    for index in range(torch.cuda.device_count()):
        state[f"cuda:{index}"] = torch.cuda.get_rng_state(index)
    return state


def restore_rng_state(state: dict[str, Tensor]) -> None:
    """Put the generators back; cards that this machine lacks are skipped."""
    torch.set_rng_state(state["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda:{index}" in state:
            torch.cuda.set_rng_state(state[f"cuda:{index}"], index)


class Checkpoints:
    """The checkpoints of one run, in `root`."""

    def __init__(self, root: Path, config: RunConfig) -> None:
        self.root = root
        self._config = config
        root.mkdir(parents=True, exist_ok=True)
        for replaced in root.glob("*.old"):
            # Killed between the two renames of `save`: the older one is the complete one.
            if not replaced.with_suffix("").exists():
                os.rename(replaced, replaced.with_suffix(""))
        sweep(root)
        for leftover in [*root.glob("*.partial"), *root.glob("*.old")]:
            shutil.rmtree(leftover, ignore_errors=True)

    def latest(self) -> Path | None:
        """The newest checkpoint: the one marked so, else the last step that is complete."""
        complete = (folder for folder in reversed(self._steps()) if is_complete(folder))
        return self._marked(LATEST) or next(complete, None)

    def best(self) -> Path | None:
        """The complete checkpoint with the lowest evaluation loss."""
        return self._marked("BEST")

    def save(self, model: Model, optimizer: Optimizer, position: Position) -> Path:
        """Write a checkpoint of `position` and move LATEST, and BEST where it is the best, to it.

        Raises WorkError when there is no room or when what was written cannot be read back; the
        checkpoints from before are untouched then.
        """
        target = self.root / f"step-{position.step}"
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            self._write(partial, model, optimizer, position)
            for path in (*partial.iterdir(), partial):
                sync(path)
            replaced = target.with_name(target.name + ".old")
            if target.exists():
                os.rename(target, replaced)
            os.rename(partial, target)
            sync(self.root)
            self._mark(LATEST, target)
            if position.best_step == position.step:
                self._mark("BEST", target)
            shutil.rmtree(replaced, ignore_errors=True)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)  # or a full disk has no room for `ended`
            raise WorkError(
                f"The checkpoint of step {position.step} could not be written to {self.root}.",
                f"The system says: {error.strerror or error}.",
                "Free disk space or choose another output_dir; the run resumes from the "
                "checkpoint before.",
            ) from error
        self._prune()
        return target

    def go_on_from(self, folder: Path, position: Position) -> None:
        """Make `folder`, whose position this is, the newest, and BEST the best that it knows.

        A run that went back stays there when it is killed again; and a kill between the two marks
        of `save` leaves no BEST that the run itself has left behind.
        """
        self._mark(LATEST, folder)
        best = self.root / f"step-{position.best_step}"
        if is_complete(best):
            self._mark("BEST", best)
        else:
            (self.root / "BEST").unlink(missing_ok=True)

    def load(self, folder: Path, model: Model, optimizer: Optimizer) -> Position:
        """Put the model, the optimizer and the random generators back to where `folder` was.

        Raises WorkError when it is damaged, or when it was made with another model or optimizer.
        """
        if not is_complete(folder):
            raise WorkError(
                f"The checkpoint {folder.name} cannot be read.",
                "A file of it is missing or was changed after it was saved.",
                "Resume from an earlier one with `--from step-N`.",
            )
        state = json.loads((folder / STATE).read_text("utf-8"))
        made_by = state.pop("optimizer_class")
        if _state_kind(made_by) != _state_kind(type(optimizer).__name__):
            raise WorkError(
                f"The optimizer of {folder.name} is {made_by}, not {type(optimizer).__name__}.",
                "The config was changed since it was saved, and one cannot go on with the state "
                "of the other.",
                "Undo the change to `optimizer`, or train into a new output_dir.",
            )
        load_trained(model, folder)
        restore_optimizer(model, optimizer, folder / OPTIMIZER, state.pop("optimizer"))
        restore_rng_state(load_file(folder / RANDOM))
        return Position(**state)

    def _write(self, partial: Path, model: Model, optimizer: Optimizer, position: Position) -> None:
        save_trained(model, partial, self._config)
        tensors, values = optimizer_tensors(model, optimizer)
        write_tensors(partial / OPTIMIZER, tensors)
        write_tensors(partial / RANDOM, rng_state())
        kind = type(optimizer).__name__
        state = {**asdict(position), "optimizer_class": kind, "optimizer": values}
        (partial / STATE).write_text(json.dumps(state), "utf-8")

    def _marked(self, mark: str) -> Path | None:
        try:
            folder = self.root / (self.root / mark).read_text("utf-8").strip()
        except FileNotFoundError:
            return None
        return folder if is_complete(folder) else None

    def _steps(self) -> list[Path]:
        """All checkpoints, by step."""
        found = [p for p in self.root.glob("step-*") if p.name.removeprefix("step-").isdecimal()]
        return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))

    def _mark(self, mark: str, target: Path) -> None:
        write_whole(self.root / mark, target.name.encode())

    def _prune(self) -> None:
        kept = {self.latest(), self.best()}
        for folder in self._steps()[: -self._config.save_total_limit]:
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)


def is_complete(folder: Path) -> bool:
    """Whether every file of a checkpoint is there, and as long as its own header says."""
    tensors = list(folder.glob("*.safetensors"))
    try:
        json.loads((folder / STATE).read_text("utf-8"))
        for file in tensors:
            list_entries(file)
    except (OSError, ValueError, SafetensorError):
        return False
    return {OPTIMIZER, RANDOM} < {file.name for file in tensors}
