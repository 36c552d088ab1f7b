"""`windtunnel probe` and `windtunnel doctor`: what this computer has, and what to install for it.

They decide only how it is printed. Both do their work on a computer without a GPU too, so both end
with 0 there; what is wrong is in the text and in `problems`.
"""

import json
from dataclasses import asdict
from textwrap import wrap
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter

from engine.hardware import (
    Gpu,
    GpuProcess,
    Machine,
    Missing,
    Problem,
    flash_4_on,
    missing_packages,
    torch_problem,
)
from engine.units import GIB, counted
from engine.visible import fold, visible
from engine.wizard.request import find_machine

_COLUMNS = 80
AsJson = Annotated[bool, Parameter("--json", negative="", help="Print one JSON document.")]
Assume = Annotated[
    str | None, Parameter(help="Plan for GPUs that are not here, such as 'H100 x2' or '24 GB'.")
]


def register(app: cyclopts.App) -> None:
    """Adds the commands of this module to `app`."""
    app.command(probe)
    app.command(doctor)


def probe(*, assume: Assume = None, as_json: AsJson = False) -> None:
    """Show this computer's GPUs, what uses them, memory, disk, and the training stack."""
    machine = find_machine(assume)
    print(json.dumps(describe(machine)) if as_json else show(machine))


def doctor(*, as_json: AsJson = False) -> None:
    """Show what is installed, what is missing on this computer, and the command that adds it."""
    machine = find_machine(None)
    missing = missing_packages(machine)
    if as_json:
        problems = [asdict(problem) for problem in machine.problems]
        entries = [asdict(each) for each in missing]
        found = {"stack": machine.stack, "torch_cuda": machine.torch_cuda}
        print(json.dumps({**found, "missing": entries, "problems": problems}))
    else:
        print(show_stack(machine, missing))


def describe(machine: Machine) -> dict[str, Any]:
    """The machine as `probe --json` prints it; sizes in bytes."""
    return {
        "gpus": [_gpu_entry(gpu) for gpu in machine.gpus],
        "assumed": machine.assumed,
        "host": {
            "cpu_name": machine.cpu_name,
            "cpu_count": machine.cpu_count,
            "ram_total_bytes": machine.ram_total_bytes,
            "ram_available_bytes": machine.ram_available_bytes,
            "disk_path": machine.disk_path,
            "disk_free_bytes": machine.disk_free_bytes,
            "driver_version": machine.driver_version,
            "cuda_version": machine.cuda_version,
        },
        "stack": dict(machine.stack),
        "torch_cuda": machine.torch_cuda,
        "missing": [asdict(each) for each in missing_packages(machine)],
        "problems": [asdict(problem) for problem in machine.problems],
    }


def _gpu_entry(gpu: Gpu) -> dict[str, Any]:
    capability = gpu.compute_capability
    return asdict(gpu) | {
        "short_name": gpu.short_name,
        "architecture": gpu.architecture,
        "compute_capability": None if capability is None else "{}.{}".format(*capability),
        "flash_attention_4": None if capability is None else flash_4_on(capability),
    }


def show(machine: Machine) -> str:
    """The machine as text, at most 80 columns wide: verdict, cards, the rest, problems."""
    lines = [_verdict(machine), ""]
    # Planned cards are all alike.
    for gpu in machine.gpus[:1] if machine.assumed else machine.gpus:
        lines += _card(gpu)
    if machine.gpus:
        lines.append("")
    lines += _rest(machine)
    for problem in machine.problems:
        lines += ["", *_sentences(problem)]
    return "\n".join(lines)


def show_stack(machine: Machine, missing: tuple[Missing, ...]) -> str:
    """What is installed and what to install, as text at most 80 columns wide; faults first."""
    wanted = {package: each.needed for each in missing for package in each.packages}
    lines = [_health(machine, missing), ""]
    if machine.driver_version:
        driver = f"{machine.driver_version}, runs CUDA up to {machine.cuda_version or 'unknown'}"
        lines.append(f"✓ {'NVIDIA driver':<18} {visible(driver, one_line=True)}")
    for package, version in machine.stack.items():
        if version is not None:
            built_for = _built_for(machine) if package == "torch" else ""
            lines.append(f"✓ {package:<18} {visible(version, one_line=True)}{built_for}")
        elif package in wanted:
            lines.append(f"{'✗' if wanted[package] else '·'} {package:<18} not installed")
    faults = [problem for problem in machine.problems if problem.severity != "note"]
    for problem in faults:
        lines += ["", *_sentences(problem)]
    for each in missing:
        lines += ["", *_fold(f"{', '.join(each.packages)}: {each.why}")]
        lines += command_lines(each.command)
    for problem in machine.problems:
        if problem not in faults:
            lines += ["", *_sentences(problem)]
    return "\n".join(lines)


def _health(machine: Machine, missing: tuple[Missing, ...]) -> str:
    """The gravest of what `doctor` found, in one sentence."""
    needed = [package for each in missing if each.needed for package in each.packages]
    errors = sum(problem.severity == "error" for problem in machine.problems)
    if needed:
        return f"{counted(len(needed), 'package')} missing for this computer."
    if errors:
        return f"{counted(errors, 'fault')} on this computer: see below."
    if missing:
        return "No package is missing for this computer; one more would make it faster."
    return "No package is missing for this computer."


def _built_for(machine: Machine) -> str:
    """What the installed torch was built for, to stand behind its version."""
    if machine.torch_cuda is None:
        return ""
    return f", built for CUDA {machine.torch_cuda}" if machine.torch_cuda else ", without CUDA"


def _verdict(machine: Machine) -> str:
    usable = machine.usable_gpus
    if not machine.gpus:
        return "no GPU: preview, plan and config work; training runs on the CPU"
    if not usable:
        return "no usable GPU: each one below says why"
    names = {visible(gpu.short_name, one_line=True) for gpu in usable}
    cards = f"{len(usable)} x {names.pop()}" if len(names) == 1 else f"{len(usable)} GPUs"
    cards = cards.removeprefix("1 x ")
    total = sum(gpu.memory_total_bytes or 0 for gpu in usable)
    free = sum(gpu.memory_free_bytes or 0 for gpu in usable)
    memory = f"{cards}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if machine.assumed:
        return f"planned: {memory}"
    if all(torch_problem(machine, gpu) for gpu in usable):
        return f"not ready: {cards}, {total / GIB:.1f} GiB: the installed torch cannot use it"
    return f"ready: {memory}"


def _card(gpu: Gpu) -> list[str]:
    """A card: name and state, figures, UUID, and a line for each process."""
    name = visible(gpu.short_name, one_line=True)
    planned = gpu.uuid.startswith("planned-")
    state: str = "planned" if planned else gpu.state
    if gpu.state != "ready":
        state = gpu.note if gpu.state == "hidden" else f"{gpu.state}: {gpu.note}"
    lines = _fold(f"{gpu.index:>3}  {name}  {visible(state, one_line=True)}")
    figures = [_memory(gpu)]
    if gpu.architecture and gpu.compute_capability:
        figures.append("{} {}.{}".format(gpu.architecture, *gpu.compute_capability))
    if gpu.utilization_percent is not None:
        figures.append(f"busy {gpu.utilization_percent}%")
    if gpu.temperature_celsius is not None:
        figures.append(f"{gpu.temperature_celsius} °C")
    if gpu.power_watts is not None:
        limit = "" if gpu.power_limit_watts is None else f" of {gpu.power_limit_watts:.0f}"
        figures.append(f"{gpu.power_watts:.0f}{limit} W")
    lines += [f"     {line}" for line in _fold(", ".join(figures), _COLUMNS - 5)]
    if not planned:
        lines.append(f"     {visible(gpu.uuid, one_line=True)}")
    return lines + [_process(process) for process in gpu.processes or ()]


def _memory(gpu: Gpu) -> str:
    if gpu.memory_total_bytes is None:
        return "memory unknown"
    memory = f"{gpu.memory_total_bytes / GIB:.1f} GiB"
    if gpu.memory_free_bytes is not None:
        memory = f"{gpu.memory_free_bytes / GIB:.1f} of {memory} free"
    return f"{memory}, shared with the computer" if gpu.unified else memory


def _process(process: GpuProcess) -> str:
    memory = "" if process.memory_bytes is None else f"{process.memory_bytes / GIB:.1f} GiB  "
    user = visible(process.user or "somebody", one_line=True)
    command = visible(process.command or f"process {process.pid}", one_line=True)
    return _fold(f"     used by {user}  {memory}{command}")[0]


def _rest(machine: Machine) -> list[str]:
    rows = []
    if machine.driver_version:
        rows.append(
            ("driver", f"{machine.driver_version}, CUDA {machine.cuda_version or 'unknown'}")
        )
    total, free = machine.ram_total_bytes, machine.ram_available_bytes
    rows.append(("cpu", f"{machine.cpu_name}, {counted(machine.cpu_count, 'core')}"))
    rows.append(("memory", f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"))
    rows.append(("disk", f"{machine.disk_free_bytes / 1e9:.0f} GB free for {machine.disk_path}"))
    stack = [
        f"{name} {version}" + (_built_for(machine).replace(",", "") if name == "torch" else "")
        for name, version in machine.stack.items()
        if version
    ]
    cards = {gpu.compute_capability: gpu for gpu in machine.usable_gpus if gpu.compute_capability}
    for capability, gpu in cards.items():
        which = f"{gpu.short_name} is " if len(cards) > 1 else ""
        rows.append(("flash 4", f"{which}{flash_4_on(capability)}"))
    rows.append(("stack", ", ".join(stack) or "nothing for training"))
    if missing := [package for each in missing_packages(machine) for package in each.packages]:
        rows.append(("missing", f"{', '.join(missing)} (see `windtunnel doctor`)"))
    lines = []
    for heading, text in rows:
        first, *more = _fold(visible(text, one_line=True), _COLUMNS - 9)
        lines += [f"{heading:<8} {first}", *(f"{'':9}{line}" for line in more)]
    return lines


def _sentences(problem: Problem) -> list[str]:
    text = f"{problem.severity}: {problem.what} {problem.why} {problem.fix}"
    return _fold(visible(text, one_line=True)) + command_lines(problem.command)


def command_lines(command: str) -> list[str]:
    """A command as a shell reads it from several lines of at most 80 columns."""
    lines = wrap(
        command,
        _COLUMNS - 2,
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [*(f"{line} \\" for line in lines[:-1]), *lines[-1:]]


def _fold(text: str, columns: int = _COLUMNS) -> list[str]:
    return [line.rstrip() for line in fold(text, columns)]
