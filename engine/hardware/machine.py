"""What a computer is to a training run: its GPUs, memory, disk and installed packages.

What could not be found out is None or "unknown", never a guess, and each reason for that
is a Problem in three sentences.
"""

import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
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
    memory_total_bytes: int | None
    memory_free_bytes: int | None
    memory_used_bytes: int | None
    compute_capability: tuple[int, int] | None
    state: State
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


@dataclass(frozen=True, slots=True)
class Host:
    """What a computer has beside its GPUs."""

    cpu_name: str
    cpu_count: int
    ram_total_bytes: int
    ram_available_bytes: int
    disk_path: str
    disk_free_bytes: int


def read_host(disk: Path, root: Path = Path("/")) -> Host:
    """The host, with the free space of the file system that holds, or would hold, `disk`."""
    total, available = read_memory(root)
    where, free = _read_disk(disk)
    return Host(_cpu_name(root), count_cpus(root), total, available, str(where), free)


def read_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes of memory: all that there is for this process, and what is free of it now."""
    total, available = _system_memory(root)
    for group in _control_groups(root):
        limit = _number(group / "memory.max")
        if limit is not None and limit < total:
            total = limit
        if limit is not None:
            # File pages that nobody has touched lately are given back before memory runs out.
            used = _number(group / "memory.current") or 0
            cached = _fields(group / "memory.stat").get("inactive_file", 0)
            available = min(available, max(0, limit - max(0, used - cached)))
    return total, min(available, total)


def count_cpus(root: Path = Path("/")) -> int:
    """Processors that this process may use: its affinity and its control group's quota."""
    if sys.platform == "linux":
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    for group in _control_groups(root):
        quota, _, period = _text(group / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            count = min(count, max(1, -(-int(quota) // int(period))))
    return count


def _system_memory(root: Path) -> tuple[int, int]:
    fields = _fields(root / "proc" / "meminfo")
    if "MemTotal:" in fields:
        total = fields["MemTotal:"] * 1024
        return total, fields.get("MemAvailable:", fields["MemTotal:"]) * 1024
    total = available = 0
    with suppress(ValueError, OSError):
        page = os.sysconf("SC_PAGE_SIZE")
        total = available = page * os.sysconf("SC_PHYS_PAGES")
        # macOS has no word for the pages that are free; there it is the total.
        available = page * os.sysconf("SC_AVPHYS_PAGES")
    return total, available


def _control_groups(root: Path) -> list[Path]:
    """The control group (version 2) of this process and those above it."""
    for line in _text(root / "proc" / "self" / "cgroup").splitlines():
        if line.startswith("0::"):
            top = root / "sys" / "fs" / "cgroup"
            group = top / line[3:].strip().lstrip("/")
            return [each for each in (group, *group.parents) if each.is_relative_to(top)]
    return []


def _cpu_name(root: Path) -> str:
    for line in _text(root / "proc" / "cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def _read_disk(path: Path) -> tuple[Path, int]:
    """`path`, and the free bytes of the nearest folder above it that exists."""
    for folder in (path, *path.absolute().parents):
        with suppress(OSError):
            return path, shutil.disk_usage(folder).free
    return path, 0


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None


def _fields(path: Path) -> dict[str, int]:
    """Lines of "name number ..." as a table."""
    table = {}
    for line in _text(path).splitlines():
        words = line.split()
        if len(words) > 1 and words[1].isdigit():
            table[words[0]] = int(words[1])
    return table
