"""A run's adapter put into the weights of its base: a model folder that needs no adapter.

The original weights are read, never the 4-bit ones that a QLoRA run computed with, and one matrix
at a time: memory does not grow with the model. Names on disk stay the base's own, so that whatever
loads the base loads this.
"""

import json
import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.catalog import Architecture, read_architecture, with_overrides
from engine.config import RunConfig, read_config
from engine.errors import UserError, WorkError
from engine.publish.card import write_card
from engine.runs import RunFolder
from engine.runs.newest_result import newest_result
from engine.train.adapter_files import Adapter
from engine.train.checkpoint import copy_companions
from engine.train.fetch import locate_base
from engine.train.fp8 import Fp8Layout, find_layout, read_matrix
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

_SPARE_BYTES = 256 * 2**20
"""Left free on the disk, for the small files and for whoever else writes there."""


def merge(
    run: RunFolder,
    target: Path,
    progress: BytesProgress = lambda done, total: None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the run's base model with its adapter merged into the new folder `target`.

    Weights keep the base's type; FP8 ones become bfloat16. Each product is computed in float32 and
    rounded once. Raises UserError where the run has nothing to merge or `target` is in use,
    WorkError where there is no room; `target` appears only when it is complete.
    """
    config = read_config(run.config).config
    if config.adapter is None:
        raise _nothing_to_merge(run)
    _refuse_used(target)
    folder = newest_result(run, config)
    base = locate_base(config, run.path)
    plan = _Merge(base, folder)
    _refuse_full_disk(target, plan.size_bytes)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_shards(partial, plan.tensors, plan.pieces, progress, shard_bytes)
        _write_beside(partial, plan, base, run, config)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise WorkError(
            f"The merged model could not be written to {visible(str(target), one_line=True)}.",
            f"The system says: {error.strerror or error}.",
            "Free disk space, or name a folder on another disk.",
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


class _Merge:
    """What is written, and how each tensor of it comes about."""

    def __init__(self, base: Path, adapter: Path) -> None:
        self.architecture: Architecture = read_architecture(base)
        stored = list_tensors(base)
        self._layout: Fp8Layout = find_layout(stored, base, self.architecture.config)
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

    @property
    def size_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.tensors)

    def pieces(self, entry: Entry) -> Iterator[Tensor]:
        """The merged numbers of one tensor: whole, or expert by expert."""
        name = self._names[entry.name]
        stored = self._stored[name]
        if len(stored.shape) == 3:
            for expert in range(stored.shape[0]):
                weight = self._read(name, expert)
                merged = self.adapter.merged_expert(name, expert, stored.shape[0], weight)
                yield merged.to(entry.dtype)
        elif name in self.adapter.changes:
            yield self.adapter.merged(name, self._read(name, None)).to(entry.dtype)
        else:
            yield self._read(name, None).to(entry.dtype)

    def _entry(self, name: str, stored: StoredTensor) -> Entry:
        return Entry(name, stored.shape, torch.bfloat16 if stored.is_fp8 else DTYPES[stored.dtype])

    def _read(self, name: str, expert: int | None) -> Tensor:
        """A tensor, or one expert of a stack; FP8 numbers as what they mean, float32."""
        stored = self._stored[name]
        if fp8 := self._layout.weights.get(name):
            return read_matrix(stored, fp8, torch.device("cpu"), torch.float32, expert)
        return stored.read(expert)


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
    base: Path, stored: dict[str, StoredTensor] | Any, layout: Fp8Layout, names: set[str]
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
    content = deepcopy(dict(built.config))
    for part in (content, content.get("text_config"), content.get("vision_config")):
        if isinstance(part, dict):
            part.pop("quantization_config", None)
            if plan.untied and "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    if plan.untied:
        content["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    copy_companions(base, folder, config, whole=True)
    write_card(run, folder)


def _refuse_used(target: Path) -> None:
    shown = visible(str(target), one_line=True)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            f"{shown} already holds something.",
            "A merged model is written into a folder of its own, and nothing is overwritten.",
            "Name a new folder with -o.",
        )


def _refuse_full_disk(target: Path, needed_bytes: int) -> None:
    there = target.parent
    while not there.exists():
        there = there.parent
    free_bytes = shutil.disk_usage(there).free
    if needed_bytes + _SPARE_BYTES > free_bytes:
        raise WorkError(
            f"The merged model does not fit on the disk of {visible(str(target), one_line=True)}.",
            f"It takes {needed_bytes / GIB:.1f} GiB, and {free_bytes / GIB:.1f} GiB are free.",
            "Free disk space, or name a folder on another disk.",
        )


def _nothing_to_merge(run: RunFolder) -> UserError:
    shown = visible(str(run.model), one_line=True)
    there = f"The whole model is in {shown}." if run.model.is_dir() else "It has not finished yet."
    return UserError(
        "There is nothing to merge: this run trains the model itself, no adapter.",
        there,
        "Use that folder as it is." if run.model.is_dir() else "Resume it, or wait for its end.",
    )
