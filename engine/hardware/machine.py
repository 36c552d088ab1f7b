"""What a computer is to a training run: its GPUs, memory, disk and installed packages.

What could not be found out is None or "unknown", never a guess, and each reason for that
is a Problem in three sentences.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

_VENDOR_WORDS = re.compile(r"\b(?:NVIDIA|GeForce|Tesla|Quadro)\b[ -]*", re.IGNORECASE)
# NVML answers "Not Supported" for their memory; one reporter saw odd figures instead.
_UNIFIED = re.compile(r"\b(?:GB10|Thor|Orin)\b")
_GENERATIONS = {
    (6, None): "Pascal",
    (7, 0): "Volta",
    (7, 2): "Volta",
    (7, 5): "Turing",
    (8, 9): "Ada",
    (8, None): "Ampere",
    (9, None): "Hopper",
    (10, None): "Blackwell",
    (11, None): "Blackwell",
    (12, None): "Blackwell",
}

State = Literal["ready", "lost", "hidden", "unknown"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something about the machine that a person should know, a sentence each."""

    id: str
    severity: Literal["error", "warning", "note"]
    what: str
    why: str
    fix: str
    command: str = ""
    """What does `fix`, to be copied; empty where no one command does."""

    @property
    def cure(self) -> str:
        """`fix` with its command, in one line."""
        return f"{self.fix.rstrip('.')}: {self.command}" if self.command else self.fix


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that computes on a GPU; None for what the system keeps to itself."""

    pid: int
    memory_bytes: int | None
    user: str | None
    command: str | None


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card, or one MIG slice of a card. Names are as the driver spells them: not yet visible().

    `uuid` is the only name that means the same card to every program; `index` is NVML's, which
    counts in PCI order. A card that would not say its UUID is called "unknown-<index>".
    """

    uuid: str
    index: int
    name: str
    memory_total_bytes: int | None = None
    memory_free_bytes: int | None = None
    memory_used_bytes: int | None = None
    compute_capability: tuple[int, int] | None = None
    state: State = "ready"
    unified: bool = False
    """Its memory is the computer's own."""
    mig_parent: str | None = None
    """UUID of the card that a MIG slice is cut from."""
    utilization_percent: int | None = None
    temperature_celsius: int | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    processes: tuple[GpuProcess, ...] | None = None
    """None where the driver would not say."""
    note: str = ""
    """Why it is hidden, lost or unknown; of a planned card, how well its memory is known."""

    @property
    def short_name(self) -> str:
        """The name without the maker's words: "RTX 4090", "H100 80GB HBM3"."""
        return short_name(self.name)

    @property
    def refusal(self) -> str:
        """Why a run cannot use it; empty where it can."""
        if self.state == "ready":
            return "" if self.memory_total_bytes else "its memory is not known"
        return self.note if self.state == "hidden" else f"{self.state}: {self.note}"

    @property
    def architecture(self) -> str:
        """The generation's name, such as Hopper; empty where it is not known."""
        if self.compute_capability is None:
            return ""
        major, minor = self.compute_capability
        return _GENERATIONS.get((major, minor)) or _GENERATIONS.get((major, None), "")


def short_name(name: str) -> str:
    """A GPU's name without the maker's words."""
    return _VENDOR_WORDS.sub("", name).strip() or name


def is_unified(name: str) -> bool:
    """Whether a GPU of this name has no memory but the computer's."""
    return bool(_UNIFIED.search(name))


@dataclass(frozen=True, slots=True)
class Machine:
    """One snapshot of a computer, or a plan of one."""

    gpus: tuple[Gpu, ...]
    """Every card, with MIG slices in place of the card they are cut from."""
    driver_version: str | None
    cuda_version: str | None
    """The newest CUDA that the driver can run."""
    cpu_name: str
    cpu_count: int
    """Processors that this process may use."""
    ram_total_bytes: int
    ram_available_bytes: int
    disk_path: str
    disk_free_bytes: int
    stack: Mapping[str, str | None]
    """Version of each package of the training stack, None where it is not installed."""
    problems: tuple[Problem, ...]
    torch_cuda: str | None = None
    """The CUDA that the installed torch was built for, "" for a torch without; None where that is
    not known."""
    assumed: bool = False
    """Whether its GPUs are planned for and not here."""
    nodes: int = 1
    """Computers like this one that are planned for."""

    @property
    def usable_gpus(self) -> tuple[Gpu, ...]:
        """The GPUs that one run can use together: ready, and of known memory.

        CUDA gives a process one MIG slice and nothing beside it, so slices count only where there
        is no whole card, and then only the one with the most free memory.
        """
        ready = [gpu for gpu in self.gpus if gpu.state == "ready" and gpu.memory_total_bytes]
        whole = tuple(gpu for gpu in ready if gpu.mig_parent is None)
        if whole or not ready:
            return whole
        return (max(ready, key=lambda gpu: gpu.memory_free_bytes or 0),)
