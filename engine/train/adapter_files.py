"""A saved adapter, read without its model: what each of its tensors adds to which base weight.

A merge builds no model, so that it needs no more memory than its largest matrix. The layout is
stock PEFT's, experts included.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import UserError, WorkError
from engine.train.weight_files import StoredTensor
from engine.visible import visible

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?")
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
"""Values of init_lora_weights that leave the base weights as they are."""


@dataclass(slots=True)
class Change:
    """What an adapter does to one base weight; keys are names in the adapter's file."""

    module: str
    """As PEFT names it, for patterns of alpha."""
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
            with safe_open(folder / WEIGHTS, framework="pt") as file:
                self._shapes = {k: tuple(file.get_slice(k).get_shape()) for k in file.offset_keys()}
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

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """The base weight `name` with the adapter in it, float32; the weight where none is.

        W + s B A (Hu et al., arXiv 2106.09685), s = alpha / r or alpha / sqrt(r) (arXiv
        2312.03732); with DoRA each row scaled to its trained length (arXiv 2402.09353).
        """
        change = self.changes.get(name)
        if change is None:
            return weight.float()
        if "whole" in change.keys:
            return self._read(change.keys["whole"]).float()
        a, b = (self._read(change.keys[part]).float() for part in ("lora_A", "lora_B"))
        out = torch.addmm(weight.float(), b, a, alpha=self._scaling(change, a.shape[0]))
        if "lora_magnitude_vector" in change.keys:
            length = self._read(change.keys["lora_magnitude_vector"]).float()
            out *= (length / torch.linalg.vector_norm(out, dim=1)).unsqueeze(1)
        return out

    def merged_expert(self, name: str, expert: int, experts: int, weight: Tensor) -> Tensor:
        """The same for one (outputs, inputs) matrix of a stack of `experts`.

        PEFT keeps all experts in one pair: A is (experts * r, inputs), expert by expert; B is
        (outputs, r * experts) with the expert counted fastest.
        """
        change = self.changes.get(name)
        if change is None:
            return weight.float()
        if "whole" in change.keys:
            return self._read(change.keys["whole"])[expert].float()
        a, b = (self._read(change.keys[part]) for part in ("lora_A", "lora_B"))
        rank = a.shape[0] // experts
        scaling = self._scaling(change, rank)
        own_a = a[expert * rank : (expert + 1) * rank].float()
        return torch.addmm(weight.float(), b[:, expert::experts].float(), own_a, alpha=scaling)

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
                return stack, Change(module), part
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
        while module.endswith(".base_layer"):
            module = module.removesuffix(".base_layer")
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
            experts = stored.shape[0] if len(stored.shape) == 3 else 1
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
        named = [key for key in patterns if re.match(rf"(.*\.)?({key})$", change.module)]
        alpha = float(patterns[named[0]] if named else self.config["lora_alpha"])
        return alpha / (sqrt(rank) if self.config.get("use_rslora") else rank)

    def _read(self, key: str) -> Tensor:
        return _read(self.folder / WEIGHTS, key)


@lru_cache(maxsize=2)  # the pair of a stack is asked for once an expert
def _read(path: Path, key: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor.clone()
    except (OSError, SafetensorError) as error:
        raise _unreadable(path.parent, error) from error


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
