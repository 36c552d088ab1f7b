"""Where a run computes, in which precision, and what it takes of the memory there."""

import os
import resource
import sys
from dataclasses import replace

import torch

from engine.config import RunConfig
from engine.errors import WorkError
from engine.hardware import attention_backends, read_machine
from engine.hardware.packages import installed
from engine.launch import planned_cards, planned_device, without_its_card
from engine.plan import Device, best_device, cpu_device, device_document
from engine.plan.trainer import PROCESS_BYTES, computes_in_bf16, refuse_bf16
from engine.runs import RunFolder
from engine.visible import visible


def pick_device() -> torch.device:
    """This process's CUDA card, the first visible one where it is alone; else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def read_device() -> Device:
    """The device as a plan sees it, with all of its memory; asked for before a run takes any, since
    the driver is asked in a thread, which needs some too."""
    machine = read_machine()
    device = best_device(machine) if machine.usable_gpus else cpu_device(machine)
    return replace(device, can_give_bytes=device.total_bytes)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak bytes allocated on the card, or the process's peak resident bytes on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def held_memory_bytes(device: torch.device) -> int:
    """Bytes allocated on the card now; on a CPU what the process held at most, less what it takes
    before it loads anything."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return max(0, peak_memory_bytes(device) - PROCESS_BYTES)


def require_planned_device(run: RunFolder, here: Device) -> str | None:
    """Raises UserError where the run is planned for a card, and torch would compute on the CPU.

    Without a plan it is for `here`, the best device of this computer. Returns a sentence where
    torch computes on another card than the planned one.
    """
    planned = planned_device(run)
    asked_for = planned or device_document(here)
    if asked_for.get("kind") != "cuda":
        return None
    device = pick_device()
    if device.type != "cuda":
        raise without_its_card(asked_for, f"The installed torch {torch.__version__} sees none.")
    own, uuid = name_of(device), str(planned.get("uuid"))
    # A rank has a card of its own; torch names a MIG slice in another way.
    if not uuid.startswith("GPU-") or own in planned_cards(run):
        return None
    name = visible(torch.cuda.get_device_name(device), one_line=True)
    asked = visible(uuid, one_line=True)
    return f"the plan is for another card, {asked}: this run computes on {name}, {own}"


def name_of(device: torch.device) -> str:
    """How events name a device: cpu, or the card's UUID."""
    if device.type == "cpu":
        return device.type
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def pick_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """Type of the weights that are not quantized, and of the arithmetic.

    Raises UserError for `bf16: true` on a card without bfloat16, WorkError where torch does not
    compute it on a card that has it.
    """
    place = as_planned(device)
    refuse_bf16(config, place)
    if not computes_in_bf16(config, place):
        return torch.float32
    # By itself torch also says yes where it emulates bfloat16, as on a T4.
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise WorkError(
            f"torch {torch.__version__} does not compute in bfloat16 on {place.name}.",
            "The card has bfloat16, and the run is planned for it.",
            "`windtunnel doctor` says which torch to install; bf16: false trains in float32.",
        )
    return torch.bfloat16


def as_planned(device: torch.device) -> Device:
    """`device` as a plan sees it; its memory is left out."""
    packages = {backend.package for backend in attention_backends().values()}
    stack = {package: installed(package) for package in packages}
    if device.type == "cpu":
        return Device("this computer's CPU", "cpu", 0, 0, stack=stack)
    return Device(
        torch.cuda.get_device_name(device),
        "cuda",
        0,
        0,
        compute_capability=torch.cuda.get_device_capability(device),
        stack=stack,
    )
