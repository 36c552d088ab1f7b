"""One Machine from all that can be asked: driver, environment, host and packages.

`read_machine` looks at everything, `poll` only at what changes while a person watches, and `assume`
puts GPUs that are not here in place of those that are. Trouble with hardware never raises: it is in
`problems`.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from engine.hardware.machine import Gpu, Host, Machine, Problem, read_host, read_memory
from engine.hardware.packages import (
    read_stack,
    read_torch_cuda,
    toolchain_problems,
    torch_problems,
    version_problem,
)
from engine.hardware.planned import plan_gpus
from engine.hardware.visibility import hide

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
