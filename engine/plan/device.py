"""The one place on which a run computes: how much memory it can give, after what others use and a
margin; and with a model and rows, what a config is planned for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from engine.catalog import Architecture, ModuleTable
from engine.data.statistics import Statistics
from engine.hardware import Gpu, Machine
from engine.units import GIB, gib
from engine.visible import visible

GPU_MARGIN = 0.05
"""Share of a card's memory that a plan leaves alone: what a display or another program takes while
the run lasts."""
BF16_CAPABILITY = (8, 0)
"""Compute capability from which on a card has bfloat16. torch.cuda.is_bf16_supported() is no
measure: it says yes of older cards too, which emulate it."""
BESIDE_SHARE = 0.75
"""Of what the chosen card can give, that another has to give to be used beside it."""
RAM_MARGIN = 0.10
"""The same of this computer's memory, which everything else shares."""
LEAST_RAM_MARGIN_BYTES = 2 * GIB
"""What a system and its desktop take of a small computer's."""


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or this computer's CPU with its memory."""

    name: str
    kind: Literal["cuda", "cpu"]
    total_bytes: int
    can_give_bytes: int
    """Total less what others use less the margin."""
    compute_capability: tuple[int, int] | None = None
    uuid: str | None = None
    planned: bool = False
    """A card that is not here."""
    card: str = ""
    """Its name as the driver says it."""
    others: tuple["Device", ...] = ()
    """Further cards of its kind in this computer, as free as it is; who can give most comes first.
    """
    left_out: tuple[str, ...] = ()
    """Cards of its kind that a run would not use, each with the reason."""
    unused: int = 0
    """Cards of its kind that the person leaves to others."""
    nodes: int = 1
    """Computers like this one."""
    unified: bool = False
    """Its memory is the computer's own."""
    used_by: str = ""
    """What takes memory of it already, by name and size; empty where nothing does."""
    ram_bytes: int | None = None
    """What this computer's own memory can give; None where that is not known."""
    stack: Mapping[str, str | None] | None = None
    """Installed packages by name; None where that was not looked up."""

    @property
    def count(self) -> int:
        """Cards in this computer that a run can use together."""
        return 1 + len(self.others)

    @property
    def cards(self) -> int:
        """The same of all computers."""
        return self.count * self.nodes

    def among(self, cards: int) -> "Device":
        """This one as a rank of `cards` has to see it: with what the fullest of them can give."""
        least = min((self, *self.others)[:cards], key=lambda each: each.can_give_bytes)
        return replace(self, can_give_bytes=least.can_give_bytes)

    @property
    def has_ram_beside(self) -> bool:
        """Whether this computer's memory is another than the device's own."""
        return self.kind == "cuda" and not self.unified

    @property
    def computes_bf16(self) -> bool:
        """Whether bfloat16 products are native: from Ampere on; assumed of unknown cards."""
        capability = self.compute_capability or BF16_CAPABILITY
        return self.kind == "cuda" and capability >= BF16_CAPABILITY


@dataclass(frozen=True, slots=True)
class Place:
    """What a config is planned for."""

    architecture: Architecture
    device: Device
    statistics: Statistics | None = None
    """Of the rows; those of unknown data have `sequence_len` tokens."""

    @property
    def table(self) -> ModuleTable:
        return self.architecture.table


def gpu_device(gpu: Gpu, machine: Machine) -> Device:
    """`gpu` as a plan sees it, with the others of its kind: all ranks of a run take the same of
    their cards, so that one which gives little would hold all back.

    A card whose memory is unknown can give nothing.
    """
    chosen = _alone(gpu, machine)
    alike = [each for each in machine.usable_gpus if each.name == gpu.name and each != gpu]
    least = BESIDE_SHARE * chosen.can_give_bytes
    free, left_out = [], []
    for each in alike:
        other = _alone(each, machine)
        if other.can_give_bytes >= least:
            free.append(other)
        else:
            left_out.append(f"GPU {each.index}, {other.used_by} in use")
    free.sort(key=lambda other: -other.can_give_bytes)
    return replace(chosen, others=tuple(free), left_out=tuple(left_out), nodes=machine.nodes)


def _alone(gpu: Gpu, machine: Machine) -> Device:
    total = gpu.memory_total_bytes or 0
    free = total if gpu.memory_free_bytes is None else gpu.memory_free_bytes
    return Device(
        name=gpu.short_name,
        kind="cuda",
        total_bytes=total,
        can_give_bytes=max(0, int(free - total * GPU_MARGIN)),
        compute_capability=gpu.compute_capability,
        uuid=None if machine.assumed else gpu.uuid,
        planned=machine.assumed,
        card=gpu.name,
        unified=gpu.unified,
        used_by=_used_by(gpu),
        ram_bytes=None if machine.assumed else _ram_bytes(machine),
        stack=machine.stack,
    )


def cpu_device(machine: Machine) -> Device:
    """This computer without a GPU."""
    return Device(
        name="this computer's CPU",
        kind="cpu",
        total_bytes=machine.ram_total_bytes,
        can_give_bytes=_ram_bytes(machine),
        ram_bytes=_ram_bytes(machine),
        stack=machine.stack,
    )


def _ram_bytes(machine: Machine) -> int:
    """Of all memory and not of what is free now: a plan is the same from one minute to the next.

    Whether it is free is asked where a run starts: `refuse_busy_memory`.
    """
    total = machine.ram_total_bytes
    return max(0, total - max(int(total * RAM_MARGIN), LEAST_RAM_MARGIN_BYTES))


def best_device(machine: Machine) -> Device:
    """The usable GPU that can give the most memory, else the CPU."""
    devices = [gpu_device(gpu, machine) for gpu in machine.usable_gpus]
    return max(devices, key=lambda device: device.can_give_bytes, default=cpu_device(machine))


def _used_by(gpu: Gpu) -> str:
    """Other programs by name and size, the display among them; nothing below 1 % of the card."""
    used = gpu.memory_used_bytes or 0
    if used < (gpu.memory_total_bytes or 0) // 100:
        return ""
    known = sorted(gpu.processes or (), key=lambda process: -(process.memory_bytes or 0))
    names = [
        f"{visible(p.command or f'process {p.pid}', one_line=True)[:40]} {gib(p.memory_bytes)}"
        for p in known
        if p.memory_bytes
    ]
    return f"{gib(used)}" + (f" ({', '.join(names[:3])})" if names else "")


def device_document(device: Device) -> dict[str, Any]:
    """Where a plan is for; sizes in bytes."""
    names = ("name", "kind", "uuid", "total_bytes", "can_give_bytes", "planned")
    return {name: getattr(device, name) for name in names}


def devices_document(device: Device, cards: int) -> dict[str, Any]:
    """Where a plan for `cards` ranks is for: `device` is the first card's, `devices` all of this
    computer's, and `nodes` how many such computers there are."""
    here = (device, *device.others)[:cards]
    nodes = -(-cards // len(here)) if device.nodes > 1 else 1
    several = {"devices": [device_document(each) for each in here], "nodes": nodes}
    return {"device": device_document(device)} | (several if cards > 1 else {})
