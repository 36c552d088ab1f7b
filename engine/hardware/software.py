"""Which packages of the training stack are installed, and which of the missing ones are worth it.

Versions come from the packages' metadata and nothing is imported: that would take seconds, and the
wizard must never load torch. What suits a machine follows from the generations of its GPUs.
"""

import sys
from dataclasses import dataclass

from engine.hardware.attention import worth_installing
from engine.hardware.machine import Machine
from engine.hardware.requirements import install_command, installed
from engine.hardware.torch_build import torch_problem

_TRAINING = (
    *("torch", "transformers", "peft", "bitsandbytes", "datasets", "cut-cross-entropy"),
    *("safetensors", "accelerate", "pillow"),
)
_ATTENTION = ("flash-attn", "flash-attn-3", "flash-attn-4")
_PACKAGES = (*_TRAINING, "triton", *_ATTENTION, "mistral-common")
_LINUX_ONLY = ("cut-cross-entropy",)


@dataclass(frozen=True, slots=True)
class Missing:
    """Packages that this machine could use and does not have, and the command that adds them."""

    extra: str
    """The extra of windtunnel that brings them."""
    packages: tuple[str, ...]
    why: str
    command: str
    needed: bool = True
    """Whether something cannot be done without them; else they make it faster."""


def read_stack() -> dict[str, str | None]:
    """The version of each package, None where it is not installed."""
    return {package: installed(package) for package in _PACKAGES}


def missing_packages(machine: Machine) -> tuple[Missing, ...]:
    """What to install, in this order; empty where nothing that suits the machine is missing."""
    found = []
    training = tuple(
        package
        for package in _TRAINING
        if machine.stack[package] is None
        and (package not in _LINUX_ONLY or sys.platform == "linux")
    )
    if training:
        why = "Training needs them; preview, plan and config work without."
        found.append(Missing("train", training, why, install_command("train")))
    if any(torch_problem(machine, gpu) for gpu in machine.usable_gpus):
        return tuple(found)  # nothing for a GPU works with this torch
    cards = [gpu.compute_capability for gpu in machine.usable_gpus if gpu.compute_capability]
    best = worth_installing(cards)
    if best and not any(machine.stack.get(each) for each in (best.package, *best.overwritten_by)):
        why = f"{best.title}: faster attention on these cards; a run works without it."
        found.append(Missing("fa4", (best.package,), why, install_command("fa4"), False))
    return tuple(found)
