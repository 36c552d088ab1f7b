"""Whether the model of a run can be asked on a device: its weights alone, without what trains them.

Separate from `memory`, which counts a training run: nothing of what trains is there to answer.
"""

from engine.catalog import Architecture
from engine.config import RunConfig
from engine.errors import DOES_NOT_FIT, UserError
from engine.plan.device import Device
from engine.plan.memory import Stack, moment_parts, on_device
from engine.units import gib

ANSWERING = Stack("answering", tower="on the device")
"""A question may come with an image, whatever the run's rows had."""


def answering_bytes(config: RunConfig, architecture: Architecture, device: Device) -> int:
    """What has to be free on `device` to hold the run's model, and one long answer's cache."""
    parts = moment_parts(config, architecture, device, "generation", stack=ANSWERING)
    return on_device(sum(parts.values()) - parts.get("optimizer", 0), device)


def refuse_answering(config: RunConfig, architecture: Architecture, device: Device) -> None:
    """Raises UserError with exit status 3 where the run's model does not fit on `device`."""
    needed = answering_bytes(config, architecture, device)
    if needed <= device.can_give_bytes:
        return
    four_bit = config.load_in_4bit or config.adapter is None
    smaller = "" if four_bit else ", or train with adapter: qlora, whose weights are in 4 bits"
    raise UserError(
        f"The model does not fit: {gib(needed)} are needed to ask it.",
        f"{device.name} can give {gib(device.can_give_bytes)} of {gib(device.total_bytes)}.",
        f"Ask it on a larger GPU{smaller}; --anyway tries it all the same.",
        exit_status=DOES_NOT_FIT,
    )
