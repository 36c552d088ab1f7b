"""Which packages of the training stack are installed, and which of the missing ones are worth it.

Versions come from the packages' metadata and nothing is imported: that would take seconds, and the
wizard must never load torch. What suits a machine follows from the generations of its GPUs.
"""

import sys
from dataclasses import dataclass

from engine.hardware.machine import Machine
from engine.hardware.requirements import install_command, installed

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
    if machine.torch_cuda == "":
        return tuple(found)  # nothing for a GPU works with it
    majors = {gpu.compute_capability[0] for gpu in machine.usable_gpus if gpu.compute_capability}
    if majors and min(majors) >= 8 and machine.stack["flash-attn"] is None:
        why = "Attention that knows packed rows; torch's own does too and is used without it."
        # Its build reads the torch that is installed, which pip hides from a build by default.
        command = install_command("fa2", "--no-build-isolation")
        found.append(Missing("fa2", ("flash-attn",), why, command))
    if majors and majors <= {9, 10} and machine.stack["flash-attn-4"] is None:
        why = "Attention made for Hopper and Blackwell data-centre cards; a pre-release."
        if 9 in majors:
            why += " On Hopper its backward pass has to be built from source."
        found.append(Missing("fa4", ("flash-attn-4",), why, install_command("fa4")))
    return tuple(found)
