"""Where a run computes, and in which precision."""

import torch

from engine.config import RunConfig
from engine.errors import WorkError
from engine.hardware import attention_backends
from engine.hardware.requirements import installed
from engine.launch import planned_device, without_its_card
from engine.plan import Device
from engine.plan.device import computes_in_bf16, refuse_bf16
from engine.runs import RunFolder


def pick_device() -> torch.device:
    """The first visible CUDA card, else this computer's CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def require_planned_device(run: RunFolder) -> None:
    """Raises UserError where the run's plan is for a card, and torch would compute on the CPU."""
    planned = planned_device(run)
    if planned.get("kind") == "cuda" and pick_device().type != "cuda":
        raise without_its_card(planned, f"The installed torch {torch.__version__} sees none.")


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
