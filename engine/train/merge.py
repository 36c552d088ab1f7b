"""A run's adapter put into the weights of its base: a model folder that needs no adapter.

The original weights are read, never the 4-bit ones that a QLoRA run computed with, and one matrix
at a time: memory does not grow with the model. Names on disk stay the base's own, so that whatever
loads the base loads this.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from errno import ENOENT
from functools import lru_cache
from math import sqrt
from os import strerror
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from engine.catalog import Architecture, read_architecture, with_overrides
from engine.config import RunConfig, read_config
from engine.errors import UserError, WorkError
from engine.files import said, sync, sync_all, way_out
from engine.pattern import PatternError, find_matches
from engine.publish.card import write_card
from engine.runs import RunFolder
from engine.train.checkpoint import copy_companions, newest_result
from engine.train.fetch import locate_base
from engine.train.quantize import Fp8Layout, find_layout, unquantized
from engine.train.seal import Say
from engine.train.slices import Whole, list_wholes
from engine.train.weight_files import (
    DTYPES,
    SHARD_BYTES,
    BytesProgress,
    Entry,
    StoredTensor,
    list_tensors,
    write_shards,
)
from engine.units import GIB
from engine.visible import visible

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?")
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
"""Values of init_lora_weights that leave the base weights as they are."""
_SPARE_BYTES = 256 * 2**20
"""Left free on the disk, for the small files and for whoever else writes there."""


@dataclass(slots=True)
class Change:
    """What an adapter does to one base weight; keys are names in the adapter's file."""

    module: str
    """As PEFT names it, for patterns of alpha."""
    experts: int | None = None
    """How many share the tensors, where the weight is a stack."""
    keys: dict[str, str] = field(default_factory=dict)
    """lora_A, lora_B and lora_magnitude_vector, or `whole` for a weight that is replaced."""


class Adapter:
    """An adapter folder, matched to the weights of its base."""

    def __init__(self, folder: Path, base: Mapping[str, StoredTensor], tied: Mapping[str, str]):
        """Read `folder`; `base` has the base's tensors by their names in memory, `tied` the names
        that share one of them.

        Raises UserError for an adapter of a kind that is not LoRA's, WorkError where it cannot be
        read or does not fit the base.
        """
        self.folder = folder
        try:
            self.config: dict[str, Any] = json.loads((folder / CONFIG).read_text("utf-8"))
            self._stored = list_wholes(folder, WEIGHTS)
            self._shapes = {name: whole.shape for name, whole in self._stored.items()}
            if not self._shapes:
                raise FileNotFoundError(ENOENT, strerror(ENOENT))
        except (OSError, ValueError, SafetensorError) as error:
            raise _unreadable(folder, error) from error
        _refuse_other_kinds(folder, self.config)
        self.changes: dict[str, Change] = {}
        """By the base weight's name in memory."""
        names = {**base, **{name: base[source] for name, source in tied.items()}}
        for key in self._shapes:
            name, change, part = self._place(key, names)
            self.changes.setdefault(name, change).keys[part] = key
        for name, change in self.changes.items():
            self._check(name, change, names[name])

    def merged(self, name: str, weight: Tensor, expert: int | None) -> Tensor:
        """The float32 base weight `name`, or one `expert` of a stack, with the adapter in it.

        W + s B A (Hu et al., arXiv 2106.09685), s = alpha / r or alpha / sqrt(r) (arXiv
        2312.03732); with DoRA each row scaled to its trained length (arXiv 2402.09353). PEFT keeps
        all experts in one pair: A is (experts * r, inputs), expert by expert; B is (outputs,
        r * experts) with the expert counted fastest.
        """
        change = self.changes[name]
        found = {part: _read(self._stored[key]) for part, key in change.keys.items()}
        if "whole" in found:
            return (found["whole"] if expert is None else found["whole"][expert]).float()
        a, b = found["lora_A"], found["lora_B"]
        if expert is not None and change.experts:
            rank = a.shape[0] // change.experts
            a, b = a[expert * rank : (expert + 1) * rank], b[:, expert :: change.experts]
        out = torch.addmm(weight, b.float(), a.float(), alpha=self._scaling(change, len(a)))
        if "lora_magnitude_vector" in found:
            length = found["lora_magnitude_vector"].float()
            out *= (length / torch.linalg.vector_norm(out, dim=1)).unsqueeze(1)
        return out

    def _place(self, key: str, base: Mapping[str, StoredTensor]) -> tuple[str, Change, str]:
        """Which base weight a tensor of the file belongs to, and as what."""
        own = key.removeprefix(_PREFIX)
        if own in base:
            return own, Change(own), "whole"
        if found := _PARTS.fullmatch(own):
            module, part = found[1], found[2]
            if f"{module}.weight" in base:
                return f"{module}.weight", Change(module), part
            stack = self._find_stack(key, module, part, base)
            if stack:
                return stack, Change(module, base[stack].shape[0]), part
        raise WorkError(
            f"The adapter in {self.folder} does not fit its base model: "
            f"{visible(own, one_line=True)} has no counterpart there.",
            "Merged without it, the model would answer as none that was trained.",
            "Check that base_model in the run's config.yml is the model that it was trained on.",
        )

    def _find_stack(
        self, key: str, module: str, part: str, base: Mapping[str, StoredTensor]
    ) -> str | None:
        """The stack of experts that a tensor is for: PEFT names two pairs of one module by how
        often they are wrapped, so that only the shapes show which is which."""
        module = re.sub(r"(\.base_layer)+$", "", module)
        pair = [key.replace(f".{part}.", f".{other}.") for other in ("lora_A", "lora_B")]
        shapes = [self._shapes.get(each, ()) for each in pair]
        for name, stored in base.items():
            if name.rpartition(".")[0] == module and len(stored.shape) == 3:
                _, outputs, inputs = stored.shape
                if shapes[0][1:] == (inputs,) and shapes[1][:1] == (outputs,):
                    return name
        return None

    def _check(self, name: str, change: Change, stored: StoredTensor) -> None:
        shapes = {part: self._shapes[key] for part, key in change.keys.items()}
        if "whole" in shapes:
            fits = shapes["whole"] == stored.shape
        else:
            experts = change.experts or 1
            outputs, inputs = stored.shape[-2:]
            a, b = shapes.get("lora_A", (0, 0)), shapes.get("lora_B", (0, 0))
            fits = a[0] == b[1] and (b[0], a[1]) == (outputs, inputs) and a[0] % experts == 0
            fits = fits and a[0] > 0 and shapes.get("lora_magnitude_vector", b[:1]) == b[:1]
        if not fits:
            raise WorkError(
                f"The adapter in {self.folder} does not fit its base model at "
                f"{visible(name, one_line=True)}.",
                f"The base has {list(stored.shape)} there, the adapter "
                f"{[list(shape) for shape in shapes.values()]}.",
                "Check that base_model in the run's config.yml is the model that it was trained "
                "on.",
            )

    def _scaling(self, change: Change, rank: int) -> float:
        patterns = self.config.get("alpha_pattern") or {}
        modules = tuple(each.module for each in self.changes.values())
        try:
            named = [
                key
                for key in patterns
                if change.module in find_matches(rf"(.*\.)?({key})$", modules, "start")
            ]
        except PatternError as error:
            raise WorkError(
                f"The adapter in {self.folder} has an alpha_pattern that is not read.",
                visible(str(error), one_line=True),
                "Write its keys as plain names in adapter_config.json.",
            ) from error
        alpha = float(patterns[named[0]] if named else self.config["lora_alpha"])
        return alpha / (sqrt(rank) if self.config.get("use_rslora") else rank)


@lru_cache(maxsize=2)  # the pair of a stack is asked for once an expert
def _read(stored: Whole) -> Tensor:
    try:
        return stored.load()
    except OSError as error:
        raise _unreadable(stored.parts[0].file.parent, error) from error


def _refuse_other_kinds(folder: Path, config: Mapping[str, Any]) -> None:
    start = config.get("init_lora_weights", True)
    if config.get("peft_type") != "LORA":
        kind = f"of the kind {visible(str(config.get('peft_type')), one_line=True)}"
    elif config.get("lora_bias") or config.get("fan_in_fan_out"):
        kind = "with lora_bias or fan_in_fan_out"
    elif start not in _PLAIN_STARTS:
        kind = f"that began as {visible(str(start), one_line=True)}, which changes the base weights"
    else:
        return
    raise UserError(
        f"The adapter in {folder} cannot be merged: it is one {kind}.",
        "Only LoRA, rsLoRA and DoRA on unchanged base weights are merged here.",
        "Serve the adapter beside its base model instead.",
    )


def _unreadable(folder: Path, error: Exception) -> WorkError:
    said = getattr(error, "strerror", None) or (str(error).splitlines() or ["damaged"])[0]
    return WorkError(
        f"The adapter in {folder} cannot be read.",
        f"{visible(str(said), one_line=True).rstrip('.')}.",
        "Resume the run, so that it writes the adapter again.",
    )


def merge(
    run: RunFolder,
    target: Path,
    progress: BytesProgress = lambda done, total: None,
    shard_bytes: int = SHARD_BYTES,
    say: Say = lambda text: None,
) -> Path:
    """Write the run's base model with its adapter merged into the new folder `target`.

    Weights keep the base's type; FP8 ones become bfloat16. Each product is computed in float32 and
    rounded once. `say` hears of a checkpoint that is passed over. Raises UserError where the run
    has nothing to merge or `target` is in use, WorkError where there is no room; `target` appears
    only when it is complete.
    """
    config = read_config(run.config).config
    if config.adapter is None:
        done = run.model.is_dir()
        shown = visible(str(run.model), one_line=True)
        raise UserError(
            "There is nothing to merge: this run trains the model itself, no adapter.",
            f"The whole model is in {shown}." if done else "It has not finished yet.",
            "Use that folder as it is." if done else "Resume it, or wait for its end.",
        )
    _refuse_used(target)
    folder = newest_result(run, config, say)
    base = locate_base(config, run.path)
    plan = _Merge(base, folder)
    _refuse_full_disk(target, sum(tensor.size_bytes for tensor in plan.tensors))
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_shards(partial, plan.tensors, plan.pieces, progress, shard_bytes)
        _write_beside(partial, plan, base, run, config)
        sync_all(partial)
        if target.exists():
            target.rmdir()
        partial.rename(target)
        sync(target.parent)
    except OSError as error:
        raise WorkError(
            f"The merged model could not be written to {visible(str(target), one_line=True)}.",
            f"The system says: {said(error)}.",
            f"{way_out(error)}, or name a folder on another disk.",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


class _Merge:
    """What is written, and how each tensor of it comes about."""

    def __init__(self, base: Path, adapter: Path) -> None:
        self.architecture = read_architecture(base)
        stored = list_tensors(base)
        self._layout = find_layout(stored, base, self.architecture.config)
        names = {p.name for p in self.architecture.table.parameters}
        _refuse_unknown(base, stored, self._layout, names)
        self._stored = {n: t for n, t in stored.items() if n not in self._layout.companions}
        tied = _tied_head(self.architecture)
        self.adapter = Adapter(adapter, self._stored, tied)
        self.untied = _untied(self.adapter, tied)
        kept = [n for n in self._stored if n not in tied or n in self.untied]
        self._names = {self._stored[n].name: n for n in kept}
        self.tensors = [self._entry(self._stored[n].name, self._stored[n]) for n in kept]
        for head in self.untied:
            if head not in self._stored:  # its numbers were the embedding's until now
                source = self._stored[tied[head]]
                self._stored[head] = source
                prefix = "language_model." if source.name.startswith("language_model.") else ""
                self._names[prefix + head] = head
                self.tensors.append(self._entry(prefix + head, source))

    def pieces(self, entry: Entry) -> Iterator[Tensor]:
        """The merged numbers of one tensor: whole, or expert by expert."""
        name = self._names[entry.name]
        stored, changed = self._stored[name], name in self.adapter.changes
        dtype = torch.float32 if changed else entry.dtype
        for expert in range(stored.shape[0]) if len(stored.shape) == 3 else (None,):
            weight = self._layout.read(name, stored, torch.device("cpu"), dtype, expert)
            merged = self.adapter.merged(name, weight, expert) if changed else weight
            yield merged.to(entry.dtype)

    def _entry(self, name: str, stored: StoredTensor) -> Entry:
        return Entry(name, stored.shape, torch.bfloat16 if stored.is_fp8 else DTYPES[stored.dtype])


def _tied_head(architecture: Architecture) -> dict[str, str]:
    """The head's name -> the embedding's, where the two are one tensor."""
    names = [p.name for p in architecture.table.parameters]
    heads = [p.name for p in architecture.table.parameters if p.tied]
    embedding = next(name for name in names if name.endswith("embed_tokens.weight"))
    return dict.fromkeys(heads, embedding)


def _untied(adapter: Adapter, tied: dict[str, str]) -> list[str]:
    """Heads that are no longer their embedding: one of the two was trained, and not with the other.

    Trained as one, the pair stays one, under whichever of its names the adapter has it.
    """
    if adapter.config.get("ensure_weight_tying"):
        for head, source in tied.items():
            if head in adapter.changes:
                adapter.changes.setdefault(source, adapter.changes[head])
        return []
    return [h for h, source in tied.items() if h in adapter.changes or source in adapter.changes]


def _refuse_unknown(
    base: Path, stored: Mapping[str, StoredTensor], layout: Fp8Layout, names: set[str]
) -> None:
    """Refuse a base whose files are not the numbers of its architecture."""
    left = [n for n in stored if n not in names and n not in layout.companions]
    packed = [n for n in stored if n in names and not stored[n].is_weight]
    for strange in (*left[:1], *packed[:1]):
        raise UserError(
            f"The base model in {base} cannot be merged into: "
            f"{visible(stored[strange].name, one_line=True)} is no weight of its architecture.",
            "A merge needs the original bfloat16 or FP8 weights; others are packed or incomplete.",
            "Point base_model in the run's config.yml at the model's BF16 or FP8 repository.",
        )


def _write_beside(
    folder: Path, plan: _Merge, base: Path, run: RunFolder, config: RunConfig
) -> None:
    built = with_overrides(plan.architecture, config.overrides_of_model_config)
    content = unquantized(built.config)
    if plan.untied:
        content["tie_word_embeddings"] = False
        for part in (content.get("text_config"), content.get("vision_config")):
            if isinstance(part, dict) and "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    copy_companions(base, folder, config, whole=True)
    write_card(run, folder)


def _refuse_used(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            f"{visible(str(target), one_line=True)} already holds something.",
            "A merged model is written into a folder of its own, and nothing is overwritten.",
            "Name a new folder with -o.",
        )


def _refuse_full_disk(target: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(next(p for p in target.parents if p.exists())).free
    if needed_bytes + _SPARE_BYTES > free_bytes:
        raise WorkError(
            f"The merged model does not fit on the disk of {visible(str(target), one_line=True)}.",
            f"It takes {needed_bytes / GIB:.1f} GiB, and {free_bytes / GIB:.1f} GiB are free.",
            "Free disk space, or name a folder on another disk.",
        )
