"""One Machine from all that can be asked: driver, environment, host and packages.

`read_machine` looks at everything, `poll` only at what changes while a person watches, and `assume`
puts GPUs that are not here in place of those that are. Trouble with hardware never raises: it is in
`problems`.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Final

from engine.errors import UserError
from engine.hardware.machine import Gpu, Host, Machine, Problem, read_host, read_memory
from engine.hardware.packages import (
    read_stack,
    read_torch_cuda,
    toolchain_problems,
    torch_problems,
    version_problem,
)
from engine.hardware.planned import plan_gpus
from engine.visible import visible

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

    host = read_host(disk or _home())
    ram = host.ram_total_bytes, host.ram_available_bytes
    answer = driver.ask(lambda: driver.read_cards(ram), timeout_seconds)
    gpus, hidden = hide(answer.gpus, os.environ if environment is None else environment)
    machine = replace(
        _machine(host, gpus, (*answer.problems, *hidden)),
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
    """This computer with the GPUs that `text` names in place of its own: "H100 x2", "24 GB".

    `disk` is as in `read_machine`. Raises UserError, with the nearest names, where the text means
    no GPU or more than one kind.
    """
    gpus = plan_gpus(text)
    what = f"{len(gpus)} x {gpus[0].short_name}" if gpus[1:] else gpus[0].short_name
    problem = Problem(
        "planned",
        "note",
        f"This plans for {what}, which nobody has looked at here.",
        f"{gpus[0].note[0].upper()}{gpus[0].note[1:]}.",
        "Run `windtunnel probe` on the computer that has it before a long run.",
    )
    return replace(_machine(read_host(disk or _home()), gpus, (problem,)), assumed=True)


def _home() -> Path:
    # Unlike Path.home() it does not raise for an account without one.
    return Path(os.path.expanduser("~"))


def _machine(host: Host, gpus: tuple[Gpu, ...], problems: tuple[Problem, ...]) -> Machine:
    return Machine(
        gpus=gpus,
        driver_version=None,
        cuda_version=None,
        cpu_name=host.cpu_name,
        cpu_count=host.cpu_count,
        ram_total_bytes=host.ram_total_bytes,
        ram_available_bytes=host.ram_available_bytes,
        disk_path=host.disk_path,
        disk_free_bytes=host.disk_free_bytes,
        stack=read_stack(),
        torch_cuda=read_torch_cuda(),
        problems=problems,
    )


VISIBLE, ORDER, PCI_ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PCI_BUS_ID"
_NUMBER = re.compile(r"[+-]?\d{1,18}", re.ASCII)
_UNSET_FIX = f"Start windtunnel without {VISIBLE}, or with the UUID of the card that you want."


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
        problems.append(
            Problem(
                "cuda_list_ends",
                "warning",
                f"{setting} {fault}.",
                f"CUDA shows {_count(len(shown))} for it.",
                _UNSET_FIX,
            )
        )
    note = f"hidden by {setting}"
    marked = tuple(
        gpu if gpu.uuid in shown or gpu.state == "lost" else replace(gpu, state="hidden", note=note)
        for gpu in gpus
    )
    hidden = [gpu for gpu in marked if gpu.state == "hidden"]
    if hidden:
        problems.append(_hidden(hidden, setting))
    if _is_unsure(value, gpus, environment):
        problems.append(_unsure(setting))
    return marked, problems


def _shown(value: str, gpus: Sequence[Gpu]) -> tuple[list[str], str]:
    """UUIDs that CUDA shows, and what is wrong with the list; empty where nothing is."""
    entries = value.split(",")
    prefix = next((prefix for prefix in ("GPU-", "MIG-") if value.startswith(prefix)), "")
    read = _number if not prefix else lambda entry: entry if entry.startswith(prefix) else None
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
    return _one_slice(found, gpus), fault


def _number(entry: str) -> int | None:
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


def _one_slice(uuids: Sequence[str], gpus: Sequence[Gpu]) -> list[str]:
    """A card that is cut into MIG slices is shown as its first slice."""
    first_slice = {gpu.mig_parent: gpu.uuid for gpu in reversed(gpus) if gpu.mig_parent}
    return [first_slice.get(uuid, uuid) for uuid in uuids]


def _is_unsure(value: str, gpus: Sequence[Gpu], environment: Mapping[str, str]) -> bool:
    kinds = {gpu.name for gpu in gpus if gpu.mig_parent is None}
    by_number = any(entry.strip()[:1].isdigit() for entry in value.split(","))
    return by_number and len(kinds) > 1 and environment.get(ORDER) != PCI_ORDER


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


def _unsure(setting: str) -> Problem:
    return Problem(
        "cuda_order_unsure",
        "note",
        f"Which cards {setting} means is not certain here.",
        "The cards differ, and CUDA numbers the fastest first while the driver goes by slot.",
        f"Set {ORDER}={PCI_ORDER} too, or name the cards by UUID.",
    )


def _count(cards: int) -> str:
    return {0: "no card", 1: "one card"}.get(cards, f"{cards} cards")
