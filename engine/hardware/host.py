"""Processor, memory and disk of this computer, as far as this process may use them.

A container sees the whole computer in /proc and may use a part of it, so the limits of its control
group count too. `root` stands for "/" so that a test can describe a computer with files.
"""

import os
import platform
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


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
