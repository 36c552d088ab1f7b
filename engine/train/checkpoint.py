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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

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
from engine.files import said, sweep, sync, sync_all, way_out, write_sums, write_whole
from engine.runs.folder import (
    LATEST,
    RunFolder,
    list_checkpoints,
    read_mark,
    require_unchanged,
)
from engine.train.device import pick_device
from engine.train.experts import stock_names
from engine.train.forward import Model, unwrapped
from engine.train.moments import OPTIMIZER, optimizer_slices, restore_optimizer
from engine.train.ranks import LONE, Ranks
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
from engine.train.slices import (
    file_of,
    gathered,
    list_wholes,
    slice_of,
    write_slices,
)
from engine.train.weight_files import (
    entries_of,
    list_tensors,
    write_file,
    write_shards,
    write_tensors,
)
from engine.visible import visible

TRAINED = "trained.safetensors"
T = TypeVar("T")
Written: TypeAlias = tuple[dict[str, str], list[Any]]
"""What a rank wrote: digests by file, and the optimizer's class with what of it is no tensor."""


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


def save_trained(
    model: Model, folder: Path, config: RunConfig, ranks: Ranks = LONE
) -> dict[str, str]:
    """Write this rank's rows of the trained tensors into `folder`: an adapter in PEFT's layout, or
    `TRAINED`; returns the digest of its file with tensors, by its name."""
    slices = {name: slice_of(tensor, ranks) for name, tensor in trained_tensors(model).items()}
    if ranks.is_first:
        _write_settings(model, folder, config)
    return write_slices(folder, _file_name(model), slices, ranks)


def _write_settings(model: Model, folder: Path, config: RunConfig) -> None:
    """How an adapter is put on its base, as PEFT reads it; nothing for a model."""
    if isinstance(model, PeftModel):
        settings = copy.copy(model.peft_config["default"])
        named = config.base_model in model_names()
        hub_id = find_model(config.base_model).hub_id if named else None
        settings.base_model_name_or_path = hub_id or config.base_model
        settings.inference_mode = True
        settings.save_pretrained(str(folder))


def load_trained(model: Model, folder: Path, ranks: Ranks = LONE) -> None:
    """Put what any number of ranks saved back, bit for bit, each rank its own rows of it.

    WorkError when a name or shape differs.
    """
    own, saved = trained_tensors(model), list_wholes(folder, _file_name(model))
    wrong = [k for k in own if k not in saved or saved[k].shape != own[k].shape]
    wrong += [k for k in saved if k not in own]
    if wrong:
        raise WorkError(
            f"The weights in {folder} belong to another model: {wrong[0]} has no counterpart.",
            "The config was changed since they were saved, so they cannot be put back.",
            "Undo the change to the config, or train into a new output_dir.",
        )
    for name, tensor in own.items():
        part = slice_of(tensor, ranks)
        saved[name].read(part.tensor, part.start)


def _file_name(model: Model) -> str:
    return SAFETENSORS_WEIGHTS_NAME if isinstance(model, PeftModel) else TRAINED


def export_trained(
    model: Model, folder: Path, base: Path, config: RunConfig, ranks: Ranks = LONE
) -> Path:
    """Write the finished adapter (`adapter/`) or model (`model/`) of a run; returns its folder.

    The first rank writes what the others send it, a piece of a tensor at a time. Beside it goes all
    that others need for the folder to work on its own. Raises WorkError, on all ranks, where there
    is no room; an earlier one is untouched then.
    """
    target = folder / ("model" if config.adapter is None else "adapter")
    partial = target.with_name(target.name + ".partial")
    tensors = trained_tensors(model)
    if config.adapter is None:
        tensors = _as_stored(unwrapped(model), base)

    def write() -> None:
        if ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        with gathered(tensors, ranks) as pieces:
            if pieces is None:
                return
            if config.adapter is None:
                unwrapped(model).save_pretrained(partial, state_dict={})  # its configs alone
                digests = write_shards(partial, entries_of(tensors), pieces)
            else:
                _write_settings(model, partial, config)
                name = _file_name(model)
                digests = {name: write_file(partial / name, entries_of(tensors), pieces)}
        copy_companions(base, partial, config, whole=config.adapter is None)
        write_sums(partial, digests)
        sync_all(partial)
        if target.is_symlink():
            target.unlink()  # what it names stays
        elif target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        sync(folder)

    try:
        together(ranks, write)
    except OSError as error:
        if ranks.is_first:  # or a full disk has no room for `ended`
            shutil.rmtree(partial, ignore_errors=True)
        raise WorkError(
            f"The finished {target.name} could not be written to {folder}.",
            f"The system says: {said(error)}.",
            f"{way_out(error)}, then resume: the last checkpoint has all that was learned.",
        ) from error
    return target


def _as_stored(model: PreTrainedModel, base: Path) -> dict[str, Tensor]:
    """A whole model by the names that its base has on disk; a tied head only as the embedding."""
    stored = list_tensors(base)
    own = {name: p.detach() for name, p in model.named_parameters()}
    return {stored[name].name if name in stored else name: t for name, t in own.items()}


def together(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """What `work` returns on each rank, JSON; where the system refuses it on one, OSError on all.

    All end it together.
    """
    found, failed = None, None
    try:
        found = work()
    except OSError as error:
        failed = error
    said = ranks.gather([found, failed and (failed.strerror or str(failed))])
    if failed is not None:
        raise failed
    for rank, (_, elsewhere) in enumerate(said):
        if elsewhere is not None:
            raise OSError(f"on rank {rank}, {elsewhere}")
    return [each for each, _ in said]


BEST = "BEST"
RANDOM = "random.safetensors"


def rng_state() -> dict[str, Tensor]:
    """The state of torch's generators: the CPU's, and that of this process's card."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda:0"] = torch.cuda.get_rng_state(pick_device())
    return state


def restore_rng_state(state: dict[str, Tensor]) -> None:
    """Put the generators back; a card that this machine lacks is skipped."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda:0" in state:
        torch.cuda.set_rng_state(state["cuda:0"], pick_device())


class Checkpoints:
    """The checkpoints of `run`. `say` hears of each that is passed over.

    All ranks call the same in the same order; the first one alone makes, names and removes folders.
    """

    def __init__(
        self,
        run: RunFolder,
        config: RunConfig,
        say: Say = lambda text: None,
        ranks: Ranks = LONE,
    ) -> None:
        self._run, self._config, self._say, self._ranks = run, config, say, ranks
        self.root = run.checkpoints
        if ranks.is_first:
            self._tidy()
        ranks.barrier()

    def _tidy(self) -> None:
        """Make the folder, and end what a kill left half done."""
        root = self.root
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

        Raises WorkError, on all ranks, where it is damaged, or all are.
        """
        found, refused = None, None
        if self._ranks.is_first:
            try:
                found = named_whole(self._run, name) if name else newest_whole(self._run, self._say)
            except WorkError as error:
                refused = error
        said = [found and found.folder.name, refused and [refused.what, refused.why, refused.fix]]
        chosen, sentences = self._ranks.gather(said)[0]
        if sentences:
            raise refused or WorkError(*sentences)
        if found is None and chosen:  # the first rank has compared its files
            found = read_checkpoint(self.root / chosen, compare=False)
        return found

    def best(self) -> Path | None:
        """The checkpoint with the lowest evaluation loss, where it is whole."""
        found = self._whole_best() if self._ranks.is_first else None
        name = self._ranks.gather(found and found.name)[0]
        return self.root / name if name else None

    def _whole_best(self) -> Path | None:
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

        def begin() -> None:
            if self._ranks.is_first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()

        try:
            together(self._ranks, begin)
            written = together(self._ranks, lambda: self._write(partial, model, optimizer))
            together(self._ranks, lambda: self._finish(partial, written, position))
        except OSError as error:
            if self._ranks.is_first:  # or a full disk has no room for `ended`
                shutil.rmtree(partial, ignore_errors=True)
            raise WorkError(
                f"The checkpoint of step {position.step} could not be written to {self.root}.",
                f"The system says: {said(error)}.",
                f"{way_out(error)}, or choose another output_dir; the run resumes from the "
                "checkpoint before.",
            ) from error
        return target

    def _write(self, partial: Path, model: Model, optimizer: Optimizer) -> Written:
        """What this rank writes: its rows, and its random generators."""
        ranks = self._ranks
        digests = save_trained(model, partial, self._config, ranks)
        slices, values = optimizer_slices(list(trained_parameters(model)), optimizer, ranks)
        digests |= write_slices(partial, OPTIMIZER, slices, ranks)
        own = file_of(RANDOM, ranks.rank, ranks.world_size)
        digests[own] = write_tensors(partial / own, rng_state())
        return digests, [type(optimizer).__name__, values if ranks.is_first else {}]

    def _finish(self, partial: Path, written: Sequence[Written], position: Position) -> None:
        """Seal what all ranks wrote, and let it take its name: the first rank's work."""
        if not self._ranks.is_first:
            return
        digests = {name: own for each, _ in written for name, own in each.items()}
        config = self._config.model_dump(mode="json", exclude_none=True)
        name, values = written[0][1]
        write_state(partial, position, (name, values), config, digests)
        sync_all(partial)
        target = partial.with_suffix("")
        replaced = target.with_name(target.name + ".old")
        if target.exists():
            os.rename(target, replaced)
        os.rename(partial, target)
        sync(self.root)
        write_whole(self.root / LATEST, target.name.encode())
        if position.best_step == position.step:
            write_whole(self.root / BEST, target.name.encode())
        shutil.rmtree(replaced, ignore_errors=True)
        self._prune()

    def go_on_from(self, folder: Path, position: Position) -> None:
        """Make `folder`, whose position this is, the newest, and BEST the best that it knows.

        A run that went back stays there when it is killed again; and a kill between the two marks
        of `save` leaves no BEST that the run itself has left behind.
        """
        if not self._ranks.is_first:
            return
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
        load_trained(model, found.folder, self._ranks)
        named = list(trained_parameters(model))
        restore_optimizer(named, optimizer, found.folder, found.optimizer, self._ranks)
        self._restore_random(found)
        return replace(found.position)

    def _restore_random(self, found: Checkpoint) -> None:
        """Put this rank's generators back; a rank that the run had not yet begins anew."""
        rank, saved = self._ranks.rank, len(list(found.folder.glob("random*.safetensors")))
        if rank < saved:
            restore_rng_state(load_file(found.folder / file_of(RANDOM, rank, saved)))
        else:
            torch.manual_seed(hash((self._config.seed, found.position.step, rank)))

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
