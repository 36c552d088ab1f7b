"""An optimizer's state to disk and back, on any number of ranks.

Each rank's optimizer sees plain tensors over its own rows of each parameter, and so is its state.
bitsandbytes' moments of 8 bits have a scale for each block of 256 of a rank's own numbers: where
other ranks' rows would cut through a block, a moment goes on in 32 bits, with the same values.
"""

import itertools
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from engine.train.ranks import Ranks
from engine.train.slices import Slice, Whole, first_row, list_wholes, place_of

OPTIMIZER = "optimizer.safetensors"
BLOCK = 256
"""Numbers of an 8-bit moment with one scale (arXiv 2110.02861), counted from a rank's first."""
MOMENTS = ("state1", "state2")
"""bitsandbytes' names; the scales of each are absmax1 and absmax2, its table qmap1 and qmap2."""
Named: TypeAlias = Sequence[tuple[str, nn.Parameter]]
"""The trained parameters as the model has them."""
WIDENED_AT_ONCE = 2**20
"""Numbers of a moment that are looked up together."""


def optimizer_slices(
    named: Named, optimizer: Optimizer, ranks: Ranks
) -> tuple[dict[str, Slice], dict[str, Any]]:
    """An optimizer's own tensors by `parameter|key`, and the rest of its state as JSON values."""
    slices: dict[str, Slice] = {}
    values: dict[str, Any] = {}
    own = _by_name(optimizer)
    for name, parameter in named:
        for key, value in optimizer.state.get(own[name], {}).items():
            if isinstance(value, Tensor):
                start = _start(key, value, parameter, own[name], ranks)
                slices[f"{name}|{key}"] = Slice(value, start or 0, shared=start is None)
            else:
                values[f"{name}|{key}"] = value
    return slices, values


def _by_name(optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The parameters as the optimizer sees them."""
    groups = optimizer.param_groups
    return {n: p for g in groups for n, p in zip(g["names"], g["params"], strict=True)}


def _start(
    key: str, value: Tensor, parameter: nn.Parameter, own: nn.Parameter, ranks: Ranks
) -> int | None:
    """Where a rank's part of the state begins in the whole; None where all ranks have the same."""
    if not isinstance(parameter, DTensor):
        return None
    if key.startswith("absmax"):
        own_place = place_of(parameter, ranks)
        firsts = [first_row(parameter, ranks, place) for place in range(own_place + 1)]
        row = prod(parameter.shape[1:])
        counts = (last - first for first, last in itertools.pairwise(firsts))
        return sum(-(-count * row // BLOCK) for count in counts)
    return first_row(parameter, ranks) if value.shape == own.shape else None


def restore_optimizer(
    named: Named, optimizer: Optimizer, folder: Path, values: Mapping[str, Any], ranks: Ranks
) -> None:
    """Put a saved state back without the type casts of `load_state_dict` and without a copy."""
    own, wholes = _by_name(optimizer), list_wholes(folder, OPTIMIZER)
    held = dict(named)
    optimizer.state.clear()
    for full_name, whole in wholes.items():
        name, key = full_name.rsplit("|", 1)
        parameter, state = own[name], optimizer.state[own[name]]
        sharded = held[name].shape != parameter.shape
        start = first_row(held[name], ranks) if sharded else 0
        if key in MOMENTS and f"{name}|absmax{key[-1]}" in wholes:
            absmax, qmap = (wholes[f"{name}|{part}{key[-1]}"] for part in ("absmax", "qmap"))
            _restore_moment(optimizer, parameter, key, (whole, absmax, qmap), start)
        elif not key.startswith(("absmax", "qmap")):
            by_row = sharded and whole.shape == held[name].shape
            shape = parameter.shape if by_row else torch.Size(whole.shape)
            room = _room(optimizer, parameter, key, shape, whole.dtype)
            whole.read(room, start if by_row else 0)
            state[key] = room
    for full_name, value in values.items():
        name, key = full_name.rsplit("|", 1)
        optimizer.state[own[name]][key] = value


def _restore_moment(
    optimizer: Optimizer,
    parameter: nn.Parameter,
    key: str,
    saved: tuple[Whole, Whole, Whole],
    start: int,
) -> None:
    """A moment of 8 bits, with its scales and its table, as it was; in 32 bits where a block is
    cut, or where a rank had so few numbers that they were in 32 bits before."""
    whole, scales, table = saved
    state, stop = optimizer.state[parameter], start + len(parameter)
    row, device = prod(parameter.shape[1:]), parameter.device
    code = table.load()
    of_file = {part.file: part for part in scales.parts}
    found = list(whole.within(start, stop))
    narrow = all(part.entry.dtype == torch.uint8 for part, _, _ in found) and not any(
        (first - part.start) * row % BLOCK
        or (first - start) * row % BLOCK
        or (last < stop and (last - start) * row % BLOCK)
        for part, first, last in found
    )
    dtype = torch.uint8 if narrow else torch.float32
    state[key] = room = _room(optimizer, parameter, key, parameter.shape, dtype)
    if narrow:
        whole.read(room, start)
        own = torch.empty(-(-parameter.numel() // BLOCK))
        for part, first, last in found:
            block, count = (first - part.start) * row // BLOCK, -(-(last - first) * row // BLOCK)
            place = (first - start) * row // BLOCK
            of = of_file[part.file]
            of.read(of.start + block, own[place : place + count])
        state[f"absmax{key[-1]}"], state[f"qmap{key[-1]}"] = own.to(device), code.to(device)
        return
    for part, first, last in found:
        if part.entry.dtype != torch.uint8:
            part.read(first, room[first - start : last - start])
            continue
        of = of_file[part.file]
        own = torch.empty(of.entry.shape)
        of.read(of.start, own)
        for at in range(first, last, max(1, WIDENED_AT_ONCE // row)):
            out = room[at - start : min(last, at + max(1, WIDENED_AT_ONCE // row)) - start]
            bits = torch.empty(out.shape, dtype=torch.uint8)
            part.read(at, bits)
            begins = (at - part.start) * row
            blocks = torch.arange(begins, begins + bits.numel()) // BLOCK
            out.copy_((code[bits.flatten().long()] * own[blocks]).view(out.shape))


def _room(
    optimizer: Optimizer, parameter: nn.Parameter, key: str, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """Memory for a part of the state, where the optimizer keeps it: a moment's may be paged."""
    if getattr(optimizer, "is_paged", False) and key in MOMENTS:
        # Zeroed by the device, which bitsandbytes waits for: the CPU may write into it.
        paged: Tensor = optimizer.get_state_buffer(parameter, dtype=dtype)  # type: ignore[attr-defined]
        return paged
    # torch keeps `step` of a plain AdamW on the CPU; the fused one keeps it with the rest.
    fused = optimizer.defaults.get("fused")
    device = parameter.device if shape or fused else "cpu"
    return torch.empty(shape, dtype=dtype, device=device)
