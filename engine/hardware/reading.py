"""One Machine from all that can be asked: driver, environment, host and packages.

Trouble with hardware never raises: it is in `problems`. What CUDA_VISIBLE_DEVICES shows follows
CUDA's rules as torch reads them (`torch.cuda._parse_visible_devices`): a list of numbers or of the
beginnings of UUIDs that ends at the first entry that names no card, and is empty where a card is
named twice. A number counts in CUDA's own order, which is NVML's only where all cards are alike or
CUDA_DEVICE_ORDER is PCI_BUS_ID: that is why a run is started with UUIDs. A container sees the whole
computer in /proc and may use a part of it, so the limits of its control group count too; `root`
stands for "/" so that a test can describe a computer with files.
"""

import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Final

from engine.errors import UserError
from engine.hardware.known import plan_gpus
from engine.hardware.machine import Gpu, Machine, Problem
from engine.hardware.packages import (
    read_stack,
    read_torch_cuda,
    toolchain_problems,
    torch_problems,
    version_problem,
)
from engine.visible import visible

VISIBLE, ORDER, PCI_ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PCI_BUS_ID"
_NUMBER = re.compile(r"[+-]?\d{1,18}", re.ASCII)
_UNSET_FIX = f"Start windtunnel without {VISIBLE}, or with the UUID of the card that you want."
_TIMEOUT_SECONDS: Final = 3.0
# Found anew at each look at the cards.
_PASSING = ("driver_silent", "gpu_lost", "gpu_unreadable", "memory_unknown", "answers_refused")


def read_machine(
    environment: Mapping[str, str] | None = None,
    *,
    disk: Path | None = None,
    timeout_seconds: float = _TIMEOUT_SECONDS,
) -> Machine:
    """This computer as it is now; takes at most `timeout_seconds` longer than a healthy driver.

    `environment` is where CUDA_VISIBLE_DEVICES is read, by default the real one; `disk` is the
    folder whose free space counts, by default the home folder.
    """
    # Imported here: a planned machine and every other command have no use for NVML.
    from engine.hardware import driver

    ram = read_memory()
    answer = driver.ask(lambda: driver.read_cards(ram), timeout_seconds)
    gpus, hidden = hide(answer.gpus, os.environ if environment is None else environment)
    machine = replace(
        _machine(ram, disk, gpus, (*answer.problems, *hidden)),
        driver_version=answer.driver_version,
        cuda_version=answer.cuda_version,
    )
    versions = version_problem()
    found = (
        *((versions,) if versions else ()),
        *torch_problems(machine),
        *toolchain_problems(machine),
    )
    return replace(machine, problems=(*machine.problems, *found))


def poll(machine: Machine, *, timeout_seconds: float = _TIMEOUT_SECONDS) -> Machine:
    """The same machine with memory, load, heat and processes as they are now.

    A card that vanished stays and is "lost" until `read_machine` looks again. While the driver is
    silent the last figures stay, with the problem "driver_silent".
    """
    total, available = read_memory()
    machine = replace(machine, ram_total_bytes=total, ram_available_bytes=available)
    if machine.assumed or not machine.gpus:
        return machine
    from engine.hardware import driver

    answer = driver.ask(
        lambda: driver.refresh_cards(machine.gpus, (total, available)), timeout_seconds
    )
    known = {problem.id for problem in answer.problems}
    lasting = [
        problem
        for problem in machine.problems
        if problem.id not in known and (answer.silent or problem.id not in _PASSING)
    ]
    return replace(
        machine,
        gpus=machine.gpus if answer.silent else answer.gpus,
        problems=(*answer.problems, *lasting),
    )


def assume(text: str, *, disk: Path | None = None) -> Machine:
    """This computer with the GPUs that `text` names in place of its own: "H100 x2", "24 GB", "8 x 8
    H100" for eight computers.

    `disk` is as in `read_machine`. Raises UserError, with the nearest names, where the text means
    no GPU or more than one kind.
    """
    gpus, nodes = plan_gpus(text)
    what = f"{len(gpus)} x {gpus[0].short_name}" if gpus[1:] else gpus[0].short_name
    what = f"{nodes} computers with {what}" if nodes > 1 else what
    problem = Problem(
        "planned",
        "note",
        f"This plans for {what}, which nobody has looked at here.",
        f"{gpus[0].note[0].upper()}{gpus[0].note[1:]}.",
        "Run `windtunnel probe` on the computer that has it before a long run.",
    )
    machine = _machine(read_memory(), disk, gpus, (problem,))
    return replace(machine, assumed=True, nodes=nodes)


def _machine(
    ram: tuple[int, int], disk: Path | None, gpus: tuple[Gpu, ...], problems: tuple[Problem, ...]
) -> Machine:
    # Unlike Path.home() expanduser does not raise for an account without one.
    disk = disk or Path(os.path.expanduser("~"))
    return Machine(
        gpus=gpus,
        driver_version=None,
        cuda_version=None,
        cpu_name=cpu_name(),
        cpu_count=count_cpus(),
        ram_total_bytes=ram[0],
        ram_available_bytes=ram[1],
        disk_path=str(disk),
        disk_free_bytes=_free_bytes(disk),
        stack=read_stack(),
        torch_cuda=read_torch_cuda(),
        problems=problems,
    )


def cuda_environment(gpus: Sequence[Gpu]) -> dict[str, str]:
    """What to set for a process that shall use exactly these GPUs; none of them means the CPU.

    Raises UserError for a GPU that is only planned for.
    """
    planned = [gpu for gpu in gpus if gpu.uuid.startswith("planned-")]
    if planned:
        name = visible(planned[0].short_name, one_line=True)
        raise UserError(
            f"Nothing can run on {name}: it is only planned for.",
            "The plan was made with --assume, for a GPU that this computer may not have.",
            "Copy the config to the computer with that GPU and start it there.",
        )
    return {VISIBLE: ",".join(gpu.uuid for gpu in gpus), ORDER: PCI_ORDER}


def hide(
    gpus: Sequence[Gpu], environment: Mapping[str, str]
) -> tuple[tuple[Gpu, ...], list[Problem]]:
    """The GPUs with those marked "hidden" that CUDA would not show, and what to say about it."""
    value = environment.get(VISIBLE)
    if value is None or not gpus:
        return tuple(gpus), []
    setting = f"{VISIBLE}={visible(value, one_line=True)}"
    shown, fault = _shown(value, gpus)
    problems = []
    if fault:
        count = {0: "no card", 1: "one card"}.get(len(shown), f"{len(shown)} cards")
        what, why = f"{setting} {fault}.", f"CUDA shows {count} for it."
        problems.append(Problem("cuda_list_ends", "warning", what, why, _UNSET_FIX))
    note = f"hidden by {setting}"
    marked = tuple(
        gpu if gpu.uuid in shown or gpu.state == "lost" else replace(gpu, state="hidden", note=note)
        for gpu in gpus
    )
    hidden = [gpu for gpu in marked if gpu.state == "hidden"]
    if hidden:
        problems.append(_hidden(hidden, setting))
    kinds = {gpu.name for gpu in gpus if gpu.mig_parent is None}
    by_number = any(entry.strip()[:1].isdigit() for entry in value.split(","))
    if by_number and len(kinds) > 1 and environment.get(ORDER) != PCI_ORDER:
        what = f"Which cards {setting} means is not certain here."
        why = "The cards differ, and CUDA numbers the fastest first while the driver goes by slot."
        fix = f"Set {ORDER}={PCI_ORDER} too, or name the cards by UUID."
        problems.append(Problem("cuda_order_unsure", "note", what, why, fix))
    return marked, problems


def _shown(value: str, gpus: Sequence[Gpu]) -> tuple[list[str], str]:
    """UUIDs that CUDA shows, and what is wrong with the list; empty where nothing is."""
    entries = value.split(",")
    prefix = next((prefix for prefix in ("GPU-", "MIG-") if value.startswith(prefix)), "")
    read = _card_number if not prefix else lambda entry: entry if entry.startswith(prefix) else None
    wanted = list(takewhile(lambda key: key is not None, map(read, entries)))
    found: list[str] = []
    for key in wanted:
        matching = _matching(key, gpus)
        if len(matching) != 1:
            break
        found += matching
    if len(set(wanted)) < len(wanted) or len(set(found)) < len(found):
        return [], "names a card twice"
    if prefix == "MIG-" and len(found) > 1:
        return found[:1], "names more than one MIG slice, of which a program gets the first"
    fault = ""
    # These are how a person says "no GPU".
    if len(found) < len(entries) and value.strip() not in ("", "-1", "NoDevFiles"):
        key = wanted[len(found)] if len(found) < len(wanted) else None
        fault = _fault(entries[len(found)], key, gpus)
    # A card that is cut into MIG slices is shown as its first slice.
    first_slice = {gpu.mig_parent: gpu.uuid for gpu in reversed(gpus) if gpu.mig_parent}
    return [first_slice.get(uuid, uuid) for uuid in found], fault


def _card_number(entry: str) -> int | None:
    """As C's strtoul reads it, for which "1x" is 1; None for what no card can have."""
    match = _NUMBER.match(entry.strip())
    return int(match[0]) if match and int(match[0]) >= 0 else None


def _matching(key: str | int | None, gpus: Sequence[Gpu]) -> list[str]:
    """UUIDs of the cards, or of the MIG slices, that an entry names."""
    if isinstance(key, str) and key.startswith("MIG-"):
        return [gpu.uuid for gpu in gpus if gpu.mig_parent and gpu.uuid.startswith(key)]
    cards = {gpu.mig_parent or gpu.uuid: gpu.index for gpu in gpus}
    if isinstance(key, str):
        return [uuid for uuid in cards if uuid.startswith(key)]
    return [uuid for uuid, index in cards.items() if index == key]


def _fault(entry: str, key: str | int | None, gpus: Sequence[Gpu]) -> str:
    shown = visible(entry, one_line=True) or "an empty entry"
    matching = len(_matching(key, gpus))
    if matching:
        return f"ends at {shown}, with which {matching} UUIDs begin"
    return f"ends at {shown}, which is no card of this computer"


def _hidden(hidden: Sequence[Gpu], setting: str) -> Problem:
    numbers = list(dict.fromkeys(str(gpu.index) for gpu in hidden))
    cards = f"GPU {numbers[0]} is" if len(numbers) == 1 else f"GPUs {', '.join(numbers)} are"
    if all(gpu.mig_parent for gpu in hidden):
        slices = "a MIG slice" if len(hidden) == 1 else f"{len(hidden)} MIG slices"
        cards = f"{slices[:1].upper()}{slices[1:]} {'is' if len(hidden) == 1 else 'are'}"
    return Problem(
        "cuda_hidden",
        "warning",
        f"{cards} hidden by {setting}.",
        "It was set before windtunnel started, and CUDA shows a program only what it names.",
        _UNSET_FIX,
    )


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


def cpu_name(root: Path = Path("/")) -> str:
    for line in _text(root / "proc" / "cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def _free_bytes(path: Path) -> int:
    """Of the disk that holds, or would hold, `path`: of the nearest folder above that exists."""
    for folder in (path, *path.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(folder).free
    return 0


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
