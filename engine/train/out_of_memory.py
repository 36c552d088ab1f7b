"""Memory that ran out: which errors say so, what was held, which part grew, what makes room.

The errors come from the computer, from CUDA and from whatever library asked last; none of it needs
torch here. Only changes that alter no step to come are offered.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from msgspec import structs

from engine.catalog import Architecture
from engine.config import RunConfig, spell
from engine.errors import WorkError
from engine.events import Shortage
from engine.launch import change_config
from engine.plan import SAME_RESULT, Device, Place, changed, estimate, next_rung
from engine.plan.savers import IN_RAM
from engine.plan.step import WEIGHTS
from engine.runs import RunFolder
from engine.units import gib
from engine.visible import first_line, visible

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

_MESSAGES = (
    *("can't allocate memory", "not enough memory"),  # torch's allocator, a plain RuntimeError
    "Cannot allocate memory",  # the system's, where a file is mapped
    *("out of memory", "CUDA_ERROR_OUT_OF_MEMORY", "cudaErrorMemoryAllocation"),  # CUDA's
    "_STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN, cuSOLVER and cuSPARSE, which allocate on their own
)
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMG]iB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_GREW_SHARE = 0.02
"""Of the whole; a part that is less above the plan has not grown."""
_WORTH_SHARE = 0.02
"""Of the plan's peak; a change that saves less makes no room."""
ACTIVATIONS = "activations"
PREPARING, LOADING = "preparing the run", "loading the model"
"""Where memory runs out before a step: of a run's settings, only those of its weights matter."""
_OF_WEIGHTS = {key for saver in IN_RAM if saver.frozen for key in saver.keys}


class OutOfMemory(Exception):
    """Carries the event's facts out of the frames that held the memory."""

    def __init__(self, facts: Shortage) -> None:
        super().__init__(facts.where)
        self.facts = facts


def shortage_of(error: BaseException) -> Shortage | None:
    """What is known of the memory that a run's end is due to; None where it is not."""
    return error.__cause__.facts if isinstance(error.__cause__, OutOfMemory) else None


def take_rung(facts: Shortage, run: RunFolder) -> str:
    """Change the run's config as `facts` has it; the sentence that says so."""
    values = [f"{key}={value}" for key, value in facts.changes.items()]
    change_config(run, values)
    return f"memory ran out in {facts.where}: goes on with {' '.join(values)}, {facts.trade}"


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(part in str(error) for part in _MESSAGES)


def message_of(error: BaseException) -> str:
    """The first two sentences of what the system says, without the last full stop."""
    message = first_line(error).rpartition("DefaultCPUAllocator: ")[2]
    return ". ".join(message.split(". ")[:2]).rstrip(".")


def asked_bytes(error: BaseException) -> int | None:
    """What was asked for when memory ran out, as torch says it; None where it does not."""
    found = _ASKED.search(str(error))
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


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


def in_a_step(facts: Shortage, step: int, held: Mapping[str, int], longest: str) -> Shortage:
    """The same with what a run that was training held, by part, and the batch's longest row."""
    parts = dict(held)
    parts[ACTIVATIONS] = max(0, facts.held_bytes - sum(parts.values()))
    planned = facts.predicted_parts
    above = {name: size - planned.get(name, 0) for name, size in parts.items()} if planned else {}
    grew = max(above, key=lambda name: above[name], default="")
    if grew and above[grew] < _GREW_SHARE * facts.held_bytes:
        grew = ""
    return structs.replace(facts, step=step, parts=parts, grew=grew, longest=longest)


def with_next_rung(
    facts: Shortage, config: RunConfig, architecture: Architecture, device: Device
) -> Shortage:
    """The same with the next changes that make room and alter no result, where there are any."""
    only = SAME_RESULT & _OF_WEIGHTS if facts.where in (PREPARING, LOADING) else SAME_RESULT
    place = Place(architecture, device)
    least = _WORTH_SHARE * estimate(config, place).peak_allocated_bytes
    changes: dict[str, object] = {}
    saves, trade = 0, ""
    while saves < least:
        rung = next_rung(changed(config, changes), place, only=only)
        if rung is None:
            return facts
        changes |= rung.changes
        saves, trade = saves + rung.saves_bytes, rung.trade
    spelled = {key: spell(key, value) for key, value in changes.items()}
    return structs.replace(facts, changes=spelled, trade=trade, saves_bytes=saves)


def as_error(facts: Shortage, run: RunFolder) -> WorkError:
    """The three sentences for the person."""
    held = [f"{gib(facts.held_bytes)} were held"] if facts.held_bytes else []
    held += [f"{gib(facts.asked_bytes)} more were asked for"] if facts.asked_bytes else []
    what = f"Memory ran out in {facts.where}{': ' if held else ''}{' and '.join(held)}."
    why = "Nothing was predicted for this run."
    if facts.predicted_bytes is not None:
        why = f"{gib(facts.predicted_bytes)} were predicted for its fullest moment."
        if facts.grew:
            more = facts.parts[facts.grew] - facts.predicted_parts.get(facts.grew, 0)
            why += f" Furthest above that are the {facts.grew}, by {gib(more)}."
    if facts.longest:
        why += f" The longest row of the batch is {facts.longest}."
    where = visible(str(run.path), one_line=True)
    if not facts.changes and facts.where in (PREPARING, LOADING):
        fix = (
            "The model does not fit in this memory, whatever the batches: give the process more of "
            "it (close other programs, raise its limit), or train a smaller base_model or with "
            "adapter: qlora."
        )
        return WorkError(what, why, fix)
    if not facts.changes:
        fix = (
            "Train with a lower sequence_len or lora_r, with adapter: qlora, or on a larger GPU; "
            "`windtunnel estimate` shows what each part takes."
        )
        return WorkError(what, why, fix)
    values = " ".join(f"{key}={value}" for key, value in facts.changes.items())
    saves = f"{gib(facts.saves_bytes)} less, {facts.trade}"
    return WorkError(what, why, f"Go on with {saves}: `windtunnel resume {where} {values}`.")


def held_parts(
    parameters: Iterable["nn.Parameter"], optimizer: "Optimizer", base_bytes: int, *, adapted: bool
) -> dict[str, int]:
    """Bytes on the device by part, of what a run holds between two passes."""
    parameters = list(parameters)
    trainable = [p for p in parameters if p.requires_grad] if adapted else []
    state = (value for each in optimizer.state.values() for value in each.values())

    def size(tensors: Iterable[Any]) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    return {
        "weights": base_bytes,
        "adapter": size(trainable),
        "gradients": size(p.grad for p in parameters if p.grad is not None),
        "optimizer": size(value for value in state if hasattr(value, "untyped_storage")),
    }


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
