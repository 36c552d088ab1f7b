"""What is trained, and all that a run needs to go on as if it had never stopped, to disk and back.

For LoRA what is trained has PEFT's own layout, also for adapted experts; for a full fine-tune it is
the trained tensors by name. A checkpoint is a folder that appears under its name only when it is
complete: written as `step-N.partial`, every file synced, read back, renamed; then `LATEST` moves.
`seal` says whether one is still whole.
Tensors are safetensors and the rest is JSON: nothing here can run code when it is opened.
"""

import copy
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from engine.catalog import find_model, find_repository, model_names
from engine.chat.tokenizer import open_tokenizer, write_tekken
from engine.config import RunConfig
from engine.errors import UserError, WorkError
from engine.files import sweep, sync, write_sums, write_whole
from engine.runs.folder import (
    LATEST,
    RunFolder,
    list_checkpoints,
    read_mark,
    require_unchanged,
)
from engine.train.experts import stock_names
from engine.train.forward import Model, unwrapped
from engine.train.seal import (
    Checkpoint,
    Damaged,
    Position,
    Say,
    named_whole,
    newest_whole,
    read_checkpoint,
    write_state,
)
from engine.train.weight_files import (
    Entry,
    entries_of,
    in_pieces,
    list_entries,
    list_tensors,
    read_tensors,
    write_shards,
    write_tensors,
)
from engine.visible import visible

TRAINED = "trained.safetensors"


def trained_parameters(model: Model) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of everything that receives a gradient, in the model's own order."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def trained_tensors(model: Model) -> dict[str, Tensor]:
    """What is trained by the name that it has on disk; the tensors are the model's own."""
    if isinstance(model, PeftModel):
        experts, named = stock_names(model), {}
        # Left to itself, PEFT asks the hub whether the base's vocabulary was resized.
        found = get_peft_model_state_dict(model, save_embedding_layers=False)
        for name, tensor in found.items():
            module, separator, rest = name.partition(".lora_")
            named[experts.get(module, module) + separator + rest] = tensor
        return named
    return {name: p.detach() for name, p in trained_parameters(model)}


def save_trained(model: Model, folder: Path, config: RunConfig) -> dict[str, str]:
    """Write the trained tensors into `folder`: an adapter in PEFT's layout, or `TRAINED`; returns
    the digest of the file with tensors, by its name."""
    name = _file_name(model)
    digests = {name: write_tensors(folder / name, trained_tensors(model))}
    if isinstance(model, PeftModel):
        settings = copy.copy(model.peft_config["default"])
        named = config.base_model in model_names()
        hub_id = find_model(config.base_model).hub_id if named else None
        settings.base_model_name_or_path = hub_id or config.base_model
        settings.inference_mode = True
        settings.save_pretrained(str(folder))
    return digests


def load_trained(model: Model, folder: Path) -> None:
    """Put what `save_trained` wrote back, bit for bit. WorkError when a name or shape differs."""
    path, own = folder / _file_name(model), trained_tensors(model)
    saved = {each.name: each.shape for each in list_entries(path)} if path.is_file() else {}
    wrong = [k for k in own if saved.get(k) != own[k].shape]
    wrong += [k for k in saved if k not in own]
    if wrong:
        raise WorkError(
            f"The weights in {folder} belong to another model: {wrong[0]} has no counterpart.",
            "The config was changed since they were saved, so they cannot be put back.",
            "Undo the change to the config, or train into a new output_dir.",
        )
    read_tensors(path, lambda entry: own[entry.name])


def _file_name(model: Model) -> str:
    return SAFETENSORS_WEIGHTS_NAME if isinstance(model, PeftModel) else TRAINED


def export_trained(model: Model, folder: Path, base: Path, config: RunConfig) -> Path:
    """Write the finished adapter (`adapter/`) or model (`model/`) of a run; returns its folder.

    Beside it goes all that others need for the folder to work on its own. Raises WorkError where
    there is no room; an earlier one is untouched then.
    """
    target = folder / ("model" if config.adapter is None else "adapter")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        if config.adapter is None:
            digests = _write_model(unwrapped(model), partial, base)
        else:
            digests = save_trained(model, partial, config)
        copy_companions(base, partial, config, whole=config.adapter is None)
        write_sums(partial, digests)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)  # or a full disk has no room for `ended`
        raise WorkError(
            f"The finished {target.name} could not be written to {folder}.",
            f"The system says: {error.strerror or error}.",
            "Free disk space, then resume: the last checkpoint has all that was learned.",
        ) from error
    return target


def _write_model(model: PreTrainedModel, folder: Path, base: Path) -> dict[str, str]:
    """A whole model by the names that its base has on disk; a tied head only as the embedding."""
    model.save_pretrained(folder, state_dict={})  # its configs alone
    stored = list_tensors(base)
    own = {name: p.detach() for name, p in model.named_parameters()}
    named = {stored[name].name if name in stored else name: t for name, t in own.items()}
    return write_shards(folder, entries_of(named), lambda entry: in_pieces(named[entry.name]))


BEST = "BEST"
OPTIMIZER, RANDOM = "optimizer.safetensors", "random.safetensors"


def optimizer_tensors(
    model: Model, optimizer: Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's own tensors by `parameter|key`, and the rest of its state as JSON values."""
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
    model: Model, optimizer: Optimizer, file: Path, values: Mapping[str, Any]
) -> None:
    """Put a saved state back without the type casts of `load_state_dict` and without a copy."""
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
    fused = optimizer.defaults.get("fused")
    device = parameter.device if entry.shape or fused else "cpu"
    return torch.empty(entry.shape, dtype=entry.dtype, device=device)


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
    """The checkpoints of `run`. `say` hears of each that is passed over."""

    def __init__(self, run: RunFolder, config: RunConfig, say: Say = lambda text: None) -> None:
        self._run, self._config, self._say = run, config, say
        self.root = root = run.checkpoints
        root.mkdir(parents=True, exist_ok=True)
        for replaced in root.glob("*.old"):
            # Killed between the two renames of `save`: the older one is the complete one.
            if not replaced.with_suffix("").exists():
                os.rename(replaced, replaced.with_suffix(""))
        sweep(root)
        for leftover in [*root.glob("*.partial"), *root.glob("*.old")]:
            shutil.rmtree(leftover, ignore_errors=True)

    def find(self, name: str | None = None) -> Checkpoint | None:
        """The checkpoint `name`, else the newest whole one; None where none was saved.

        Raises WorkError where it is damaged, or all are.
        """
        return named_whole(self._run, name) if name else newest_whole(self._run, self._say)

    def best(self) -> Path | None:
        """The checkpoint with the lowest evaluation loss, where it is whole."""
        name = read_mark(self.root, BEST)
        try:
            return read_checkpoint(self.root / name).folder if name else None
        except Damaged as error:
            self._say(f"{name}, the best one, is damaged and not gone back to: {error}")
        return None

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
            write_whole(self.root / LATEST, target.name.encode())
            if position.best_step == position.step:
                write_whole(self.root / BEST, target.name.encode())
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
        write_whole(self.root / LATEST, folder.name.encode())
        best = self.root / f"step-{position.best_step}"
        if best.is_dir():
            write_whole(self.root / BEST, best.name.encode())
        else:
            (self.root / BEST).unlink(missing_ok=True)

    def load(self, found: Checkpoint, model: Model, optimizer: Optimizer) -> Position:
        """Put the model, the optimizer and the random generators back to where `found` was.

        Raises WorkError when it was made with another model or optimizer.
        """
        made_by, here = found.optimizer_class, type(optimizer).__name__
        if made_by.removeprefix("Paged") != here.removeprefix("Paged"):  # only where it lies
            raise WorkError(
                f"The optimizer of {found.folder.name} is {made_by}, not {here}.",
                "The config was changed since it was saved, and one cannot go on with the state "
                "of the other.",
                "Undo the change to `optimizer`, or train into a new output_dir.",
            )
        load_trained(model, found.folder)
        restore_optimizer(model, optimizer, found.folder / OPTIMIZER, found.optimizer)
        restore_rng_state(load_file(found.folder / RANDOM))
        return replace(found.position)

    def _write(self, partial: Path, model: Model, optimizer: Optimizer, position: Position) -> None:
        digests = save_trained(model, partial, self._config)
        tensors, values = optimizer_tensors(model, optimizer)
        digests[OPTIMIZER] = write_tensors(partial / OPTIMIZER, tensors)
        digests[RANDOM] = write_tensors(partial / RANDOM, rng_state())
        config = self._config.model_dump(mode="json", exclude_none=True)
        write_state(partial, position, (type(optimizer).__name__, values), config, digests)

    def _prune(self) -> None:
        kept = {read_mark(self.root, LATEST), read_mark(self.root, BEST)}
        for name in list_checkpoints(self.root)[: -self._config.save_total_limit]:
            if name not in kept:
                shutil.rmtree(self.root / name, ignore_errors=True)


TOKENIZER_FILES = (
    "*tekken*.json",
    "tokenizer.json",
    "tokenizer.model*",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template*",
)
"""What other programs read a tokenizer from."""
MODEL_FILES = ("generation_config.json", "*processor_config.json", "SYSTEM_PROMPT*.txt")
"""What belongs to a whole model beside its config.json, its weights and its tokenizer. Not
params.json, by which servers look for the base's own consolidated weights."""


def copy_companions(base: Path, target: Path, config: RunConfig, *, whole: bool) -> None:
    """Copy into `target` the base's licence and the tokenizer that the run used, and beside a
    `whole` model all that stock transformers reads. Raises OSError where there is no room."""
    if whole:
        _copy(base, target, MODEL_FILES)
    _copy(base, target, ("LICENSE*",))
    if not config.tokenizer_config:
        _copy(base, target, TOKENIZER_FILES)
        return
    tekken: Any = open_tokenizer(config.tokenizer_config).tekken
    try:
        shutil.copyfile(tekken.file_path, target / "tekken.json")
    except ValueError:  # it has no file: it was made from the catalog's card
        name = config.tokenizer_config
        listed = find_repository(name)
        write_tekken((listed[0] if listed else find_model(name)).tokenizer, target / "tekken.json")


def _copy(source: Path, target: Path, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)


def newest_result(run: RunFolder, config: RunConfig, say: Say) -> Path:
    """The folder of the finished adapter or model, or of the newest whole checkpoint.

    `say` hears of a checkpoint that is passed over. Raises UserError where nothing was saved yet,
    WorkError where the result or every checkpoint is damaged.
    """
    exported = run.model if config.adapter is None else run.adapter
    shown = visible(run.name, one_line=True)
    if exported.is_dir():
        require_unchanged(run, exported)
        return exported
    found = newest_whole(run, say)
    if found is None:
        raise UserError(
            f"The run {shown} has saved nothing yet.",
            "There is neither a finished result nor a checkpoint in its folder.",
            f"Wait for its first save; `windtunnel watch {shown}` shows how far it is.",
        )
    return found.folder
