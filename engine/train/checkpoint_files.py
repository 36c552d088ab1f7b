"""The safetensors files of a model folder: what they hold by the model's own names, read in turns.

Apart from `model` because reading has one rule of its own: at no time is more than one tensor, or
one expert of a stack, mapped into memory. Names on disk are those of any release of transformers;
here they become the names in memory.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import UserError
from engine.visible import visible

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PREFIXES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
"""Order of a Mistral 3 model's names on disk -> in memory; a file may have either."""
_ITEM_BYTES = {"F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file, not read yet."""

    file: Path
    name: str
    """On disk."""
    shape: tuple[int, ...]
    dtype: str
    """In safetensors' words: BF16, F8_E4M3."""

    @property
    def size_bytes(self) -> int:
        """On disk; 0 for a type that no weight has."""
        return prod(self.shape) * _ITEM_BYTES.get(self.dtype, 0)

    @property
    def is_fp8(self) -> bool:
        """Whether its numbers mean nothing without a scale."""
        return self.dtype == "F8_E4M3"

    @property
    def is_weight(self) -> bool:
        """Whether it holds plain numbers or FP8: packed formats hold integers."""
        return self.dtype in _ITEM_BYTES

    def read(self, index: int | None = None) -> Tensor:
        """All of it, or entry `index` of its first dimension."""
        # Opened anew for each: pages that were read stay mapped, and counted, until the file is
        # closed.
        try:
            with safe_open(self.file, framework="pt") as file:
                if index is None:
                    found: Tensor = file.get_tensor(self.name)
                else:
                    found = file.get_slice(self.name)[index]
        except (OSError, SafetensorError) as error:
            raise _unreadable(self.file.parent, error) from error
        return found


def list_tensors(folder: Path) -> Mapping[str, StoredTensor]:
    """Every tensor of the folder's model by its name in memory, in the order of the files.

    Raises UserError where a file is missing, cut off or no safetensors file, and where two tensors
    have the same name in memory.
    """
    found: dict[str, StoredTensor] = {}
    try:
        for path in _files(folder):
            with safe_open(path, framework="np") as file:
                for name in file.offset_keys():
                    part = file.get_slice(name)
                    tensor = StoredTensor(path, name, tuple(part.get_shape()), part.get_dtype())
                    if found.setdefault(_name_in_memory(name), tensor) is not tensor:
                        raise UserError(
                            f"The checkpoint in {folder} holds {visible(name, one_line=True)} "
                            "twice.",
                            "Nothing says which of the two the model was trained with.",
                            "Download it again.",
                        )
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder, error) from error
    return found


def read_tensor(tensor: StoredTensor) -> Tensor:
    """The tensor, still mapped from its file: copy it, and the mapping ends with it."""
    return tensor.read()


def read_slice(tensor: StoredTensor, index: int) -> Tensor:
    """Entry `index` of the first dimension."""
    return tensor.read(index)


def _files(folder: Path) -> Iterator[Path]:
    if (folder / _SINGLE).exists() or not (folder / _INDEX).exists():
        yield folder / _SINGLE
        return
    try:
        listed = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted(set(listed))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"{_INDEX} is damaged") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise OSError(f"{_INDEX} names files outside the folder")
        yield folder / name


def _name_in_memory(name: str) -> str:
    for on_disk, in_memory in _PREFIXES.items():
        if name.startswith(on_disk):
            return in_memory + name.removeprefix(on_disk)
    return name


def _unreadable(folder: Path, error: Exception) -> UserError:
    words = getattr(error, "strerror", None) or (str(error).splitlines() or ["no reason given"])[0]
    return UserError(
        f"The weights in {folder} cannot be read.",
        f"{visible(str(words), one_line=True).rstrip('.')}.",
        "Download the model again, as safetensors files.",
    )
