"""What ranks hold of a model that each of them read in part, to be compared with one rank's."""

import hashlib
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor
from torch.distributed.tensor import DTensor

from engine.train.forward import Model
from engine.train.quantize import statistics
from engine.train.ranks import Ranks
from engine.train.shard import local_bytes
from engine.train.slice_load import load_divided
from tests.support.tiny import settings


def loaded(ranks: Ranks, folder: str, keys: dict[str, Any]) -> dict[str, Any]:
    """The digest of every tensor of a model, and what each rank says of its load."""
    config = settings(folder, **keys)
    heard: list[tuple[int, int]] = []
    base, model = load_divided(Path(folder), config, ranks, lambda *done: heard.append(done))
    held = base.report.held_bytes
    return {
        "digests": digests(model),
        "right": held == sum(local_bytes(model).values()),
        "weights": sorted([*key, n] for key, n in base.report.weights.items()),
        "heard": list(heard[-1]),
    }


def digests(model: Model) -> dict[str, str]:
    """Of every parameter, buffer and statistic, whole."""
    found = {}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        whole: Any = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found[name] = _digest(whole)
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            for number, tensor in enumerate(statistics(module)):
                found[f"{name} {number}"] = _digest(tensor)
    return found


def _digest(tensor: Tensor) -> str:
    plain = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return (
        f"{list(tensor.shape)} {tensor.dtype} "
        + hashlib.sha256(bytes(plain.tolist())).hexdigest()[:16]
    )


def memory(ranks: Ranks, folder: str, keys: dict[str, Any], small: str) -> dict[str, int]:
    """Bytes of this rank's share of RAM before the model, and the most while it is read and after.

    As the kernel divides what is shared (PSS); sampled in step with the reading. A `small` model
    comes first, for all that is imported on the way.
    """
    loaded(ranks, small, keys)
    config = settings(folder, **keys)
    ranks.barrier()
    found = {"empty": _share_bytes(), "most": 0}

    def look(_done: int, _total: int) -> None:
        found["most"] = max(found["most"], _share_bytes())

    _model = load_divided(Path(folder), config, ranks, look)
    ranks.barrier()
    look(0, 0)
    ranks.barrier()
    return found


def _share_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
