"""What a run that memory ran out for can tell: what was held, which part grew, what makes room.

Separate from `shortage`, which only knows the error: here are the plan of the run, what it held,
and the next rung of the ladder. Only changes that alter no step to come are offered.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.catalog import Architecture
from engine.config import RunConfig, spell
from engine.errors import WorkError
from engine.events import Shortage
from engine.hardware import read_machine
from engine.plan import SAME_RESULT, Device, best_device, cpu_device, next_rung
from engine.plan.memory import WEIGHTS
from engine.runs import RunFolder
from engine.train.shortage import asked_bytes
from engine.units import gib
from engine.visible import visible

if TYPE_CHECKING:
    from engine.train.batches import StepBatch
    from engine.train.loop import Training

_GREW_SHARE = 0.02
"""A part that is above the plan by less of the whole is not said to have grown."""
ACTIVATIONS = "activations"


class MemoryRanOut(Exception):
    """What `Shortage` tells, out of the frames that held the memory."""

    def __init__(self, told: Shortage) -> None:
        super().__init__(told.where)
        self.told = told


def describe(error: BaseException, where: str, held_bytes: int, run: RunFolder) -> Shortage:
    """What is known wherever it happened: what was held, what was asked for, what was planned."""
    plan = read_estimate(run)
    return Shortage(
        step=0,
        where=where,
        held_bytes=held_bytes,
        asked_bytes=asked_bytes(error),
        predicted_bytes=plan.get("peak_allocated_bytes"),
        predicted_parts=_grouped(plan.get("parts", {})),
    )


def in_a_step(told: Shortage, training: "Training", number: int, batch: "StepBatch") -> Shortage:
    """The same with what a run that was training held, by part."""
    parts = dict(_held(training))
    parts[ACTIVATIONS] = max(0, told.held_bytes - sum(parts.values()))
    planned = told.predicted_parts
    above = {name: size - planned.get(name, 0) for name, size in parts.items()} if planned else {}
    grew = max(above, key=lambda name: above[name], default="")
    if not grew or above[grew] < _GREW_SHARE * told.held_bytes:
        grew = ""
    lengths = [(int(training.rows.lengths[row]), row) for row in batch.rows]
    tokens, row = max(lengths, default=(0, 0))
    longest = f"{training.rows.place(row)}, {tokens:,} tokens" if lengths else ""
    return replace(told, step=number, parts=parts, grew=grew, longest=longest)


def with_way_out(
    told: Shortage, config: RunConfig, architecture: Architecture, device: Device
) -> Shortage:
    """The same with the next change that saves memory and alters no result."""
    rung = next_rung(config, architecture, device, only=SAME_RESULT)
    if rung is None:
        return told
    changes = {key: spell(key, value) for key, value in rung.changes.items()}
    return replace(told, changes=changes, trade=rung.trade, saves_bytes=rung.saves_bytes)


def sentences(told: Shortage, run: RunFolder) -> WorkError:
    """The three sentences for the person."""
    held = [f"{gib(told.held_bytes)} were held"] if told.held_bytes else []
    held += [f"{gib(told.asked_bytes)} more were asked for"] if told.asked_bytes else []
    what = f"Memory ran out in {told.where}{': ' if held else ''}{' and '.join(held)}."
    why = "Nothing was predicted for this run."
    if told.predicted_bytes is not None:
        why = f"{gib(told.predicted_bytes)} were predicted for its fullest moment."
        if told.grew:
            more = told.parts[told.grew] - told.predicted_parts.get(told.grew, 0)
            why += f" Furthest above that are the {told.grew}, by {gib(more)}."
    if told.longest:
        why += f" The longest row of the batch is {told.longest}."
    where = visible(str(run.path), one_line=True)
    if not told.changes:
        smaller = (
            "Train with a lower sequence_len or lora_r, with adapter: qlora, or on a larger GPU"
        )
        return WorkError(what, why, f"{smaller}; `windtunnel estimate` shows what each part takes.")
    values = " ".join(f"{key}={value}" for key, value in told.changes.items())
    saves = f"{gib(told.saves_bytes)} less, {told.trade}"
    return WorkError(what, why, f"Go on with {saves}: `windtunnel resume {where} {values}`.")


def _held(training: "Training") -> Iterator[tuple[str, int]]:
    """Bytes on the device by part, of what a run holds between two passes."""
    named = list(training.model.named_parameters())
    adapted = training.config.adapter is not None
    moving = sum(_size(p) for _, p in named if p.requires_grad) if adapted else 0
    yield "weights", training.base.report.held_bytes
    yield "adapter", moving
    yield "gradients", sum(_size(p.grad) for _, p in named if p.grad is not None)
    state = (value for each in training.optimizer.state.values() for value in each.values())
    yield "optimizer", sum(_size(value) for value in state if hasattr(value, "untyped_storage"))


def _size(tensor: Any) -> int:
    return int(tensor.untyped_storage().nbytes())


def _grouped(parts: Mapping[str, int]) -> dict[str, int]:
    """A plan's parts under the names of what a run can tell apart."""
    found: dict[str, int] = {}
    for name, size in parts.items():
        group = "weights" if name in WEIGHTS else name
        group = group if group in ("weights", "adapter", "gradients", "optimizer") else ACTIVATIONS
        found[group] = found.get(group, 0) + size
    return found


def read_estimate(run: RunFolder) -> Mapping[str, Any]:
    """The estimate in plan.json; empty where there is none."""
    try:
        found = json.loads(run.plan.read_text("utf-8"))["estimate"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    whole = isinstance(found, dict) and isinstance(found.get("peak_allocated_bytes"), int)
    return found if whole and isinstance(found.get("parts"), dict) else {}


def device_of_the_run() -> Device:
    """The device as a plan sees it, with all of its memory.

    To be asked for before a run takes any: the driver is asked in a thread, which needs some too.
    """
    machine = read_machine()
    device = best_device(machine) if machine.usable_gpus else cpu_device(machine)
    return replace(device, can_give_bytes=device.total_bytes)
