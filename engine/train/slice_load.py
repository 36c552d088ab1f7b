"""Weights of a model that several ranks hold together: each rank reads its own rows, and no more.

The model is built without memory, gets its adapter and is divided while it is still empty; then
each part is read, or made of what is read, with the bits that one rank would hold there. So RAM
and cards never have more than one copy between them, and one tensor's rows of each rank beside it.
"""

from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from engine.config import RunConfig
from engine.train.checkpoint import load_trained
from engine.train.experts import GroupedLinear, LoraGrouped
from engine.train.forward import Model
from engine.train.lora import put_on_training
from engine.train.model import Base, Unread, load_base
from engine.train.quantize import Read, quantize_part, statistics
from engine.train.ranks import SHARD, Ranks
from engine.train.shard import local_part, shard
from engine.train.slices import first_row
from engine.train.weight_files import BytesProgress, StoredTensor

READ_AT_ONCE = 2**22
"""Numbers of a weight that lie beside their place in the model while they are read: each rank's add
up in the RAM of a node."""


def load_divided(
    folder: Path,
    config: RunConfig,
    ranks: Ranks,
    progress: BytesProgress = lambda done, total: None,
    *,
    images: bool = True,
) -> tuple[Base, Model]:
    """The base in `folder` and the model as it trains, divided over `ranks`. All as `load_base` and
    `put_on_training`; `progress` hears of this rank's bytes."""
    base = load_base(folder, config, progress, images=images, empty=_reads_slices(config, ranks))
    torch.manual_seed(config.seed)  # the adapter's first values do not depend on what was loaded
    model = shard(put_on_training(base, folder, config), config, ranks)
    return _fill(base, model, config, ranks, progress), model


def _reads_slices(config: RunConfig, ranks: Ranks) -> bool:
    """Whether each rank reads its own rows alone.

    DoRA starts from the length of each row of the base, which PEFT wants before it is divided.
    """
    return ranks.shards > 1 and not config.peft_use_dora


@torch.no_grad()
def _fill(
    base: Base,
    model: Model,
    config: RunConfig,
    ranks: Ranks,
    progress: BytesProgress,
) -> Base:
    """Give `model`, `base`'s with its adapter and divided, this rank's rows of its weights.

    `progress` hears of this rank's bytes. Returns the base with a report of what this rank holds.
    Nothing is done where the base was not loaded empty.
    """
    unread = base.unread
    if unread is None:
        return base
    apply: Any = model._apply  # as `to_empty`, which would take the adapter's values, too
    apply(lambda t: torch.empty_like(t, device=base.device) if t.is_meta else t)
    copies = _copies(model)
    total, done = sum(t.size_bytes for t in unread.tensors.values()) // ranks.shards, 0
    for name, tensor in unread.tensors.items():
        own = name.rpartition(".")[2]
        module = unread.owners[name]
        for each in (module, *copies.get(id(module), ())):
            _fill_weight(each, own, (name, tensor), unread, base, ranks)
        done += tensor.size_bytes // ranks.shards
        progress(min(done, total), total)
    if config.lora_model_dir:  # what it trained beside the adapter was no place for it until now
        load_trained(model, Path(config.lora_model_dir), ranks)
    quantized = [m for m in model.modules() if isinstance(m, Linear4bit | Linear8bitLt)]
    tensors = {id(t): local_part(t) for t in chain(model.parameters(), model.buffers())}
    held = sum(t.nbytes for t in chain(tensors.values(), *map(statistics, quantized)))
    return replace(base, report=replace(base.report, held_bytes=held), unread=None)


def _copies(model: Model) -> dict[int, list[nn.Module]]:
    """What PEFT copied of the base to train it beside the adapter, by the module copied."""
    found: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            found[id(module.original_module)] = list(module.modules_to_save.values())
    return found


def _fill_weight(
    module: nn.Module,
    own: str,
    stored: tuple[str, StoredTensor],
    unread: Unread,
    base: Base,
    ranks: Ranks,
) -> None:
    """Read or make this rank's rows of one weight."""
    name, tensor = stored
    read_part = partial(unread.layout.read, name, tensor, base.device, base.dtype)
    held = getattr(module, own)
    held = held.base_layer if isinstance(held, LoraGrouped) else held
    if isinstance(held, GroupedLinear):
        first, count = _rows(held.weight, ranks)
        held.take_part(map(read_part, range(first, first + count)), base.device, count)
        return
    first, count = _rows(held, ranks)
    part = local_part(held.detach())
    if isinstance(module, Linear4bit | Linear8bitLt) and own == "weight":
        read: Read = lambda start, stop: read_part(slice(start, stop))  # noqa: E731
        quantize_part(module, part, first, read, partial(_largest, ranks=ranks))
    elif len(tensor.shape) == 3:  # expert by expert: one at a time is FP8 and wide
        for place in range(count):
            part[place] = read_part(first + place)
    else:
        step = max(1, READ_AT_ONCE * count // max(1, part.numel()))
        for place in range(0, count, step):
            stop = min(count, place + step)
            part[place:stop] = read_part(slice(first + place, first + stop))


def _rows(held: Tensor, ranks: Ranks) -> tuple[int, int]:
    """The first of this rank's rows, and their number."""
    return first_row(held, ranks), len(local_part(held.detach()))


def _largest(values: Tensor, ranks: Ranks) -> Tensor:
    """The largest of each number over the ranks of this copy."""
    assert ranks.mesh is not None
    dist.all_reduce(values, dist.ReduceOp.MAX, group=ranks.mesh.get_group(SHARD))
    return values
