"""A computer in lines: its cards, what runs on them, the rest of it, and what is wrong with it."""

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
from engine.report import SEVERITY_MARKS, Line
from engine.units import GIB, counted

_ENGINE = ("torch", "transformers", "peft", "bitsandbytes", "flash-attn")
"""The packages that are named first."""


def ready_line(machine: Machine) -> Line:
    """Which cards a run can have, of all that are here or planned for."""
    usable = machine.usable_gpus
    if not machine.gpus:
        return Line("·", "no GPU", "preview, plan and config work; training runs on the CPU")
    if not usable:
        return Line("✗", "no usable GPU", "each one below says why")
    names = {gpu.short_name for gpu in usable}
    cards = f"{len(usable)} x {names.pop()}" if len(names) == 1 else f"{len(usable)} GPUs"
    cards = cards.removeprefix("1 x ")
    total = sum(gpu.memory_total_bytes or 0 for gpu in usable)
    free = sum(gpu.memory_free_bytes or 0 for gpu in usable)
    memory = f"{cards}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if machine.assumed:
        return Line("·", "planned", memory)
    if all(torch_problem(machine, gpu) for gpu in usable):
        why = f"{cards}, {total / GIB:.1f} GiB: the installed torch cannot use it"
        return Line("✗", "not ready", why)
    return Line("✓", "ready", memory)


def card_state(gpu: Gpu) -> str:
    """Whether a run can use a card, or why not."""
    return gpu.refusal or ("planned" if gpu.uuid.startswith("planned-") else "ready")


def card_text(gpu: Gpu) -> str:
    """All figures of a card in one line."""
    figures = [_card_memory(gpu)]
    if gpu.architecture and gpu.compute_capability:
        figures.append("{} {}.{}".format(gpu.architecture, *gpu.compute_capability))
    if gpu.utilization_percent is not None:
        figures.append(f"busy {gpu.utilization_percent}%")
    if gpu.temperature_celsius is not None:
        figures.append(f"{gpu.temperature_celsius} °C")
    if gpu.power_watts is not None:
        limit = "" if gpu.power_limit_watts is None else f" of {gpu.power_limit_watts:.0f}"
        figures.append(f"{gpu.power_watts:.0f}{limit} W")
    return ", ".join(figures)


def _card_memory(gpu: Gpu) -> str:
    if gpu.memory_total_bytes is None:
        return "memory unknown"
    memory = f"{gpu.memory_total_bytes / GIB:.1f} GiB"
    if gpu.memory_free_bytes is not None:
        memory = f"{gpu.memory_free_bytes / GIB:.1f} of {memory} free"
    return f"{memory}, shared with the computer" if gpu.unified else memory


def process_cells(process: GpuProcess) -> tuple[str, str, str]:
    """Who computes on a card: memory, user, command; the memory is empty where nobody says it."""
    size = process.memory_bytes
    memory = "" if size is None else f"{size / GIB:.1f} GiB"
    return memory, process.user or "somebody", process.command or f"process {process.pid}"


def rest_lines(machine: Machine) -> list[Line]:
    """Driver, memory, disk and packages, a label each; the detail of what is missing adds it."""
    lines = []
    if machine.driver_version:
        text = f"{machine.driver_version}, CUDA {machine.cuda_version or 'unknown'}"
        lines.append(Line("✓", "driver", text))
    total, free = machine.ram_total_bytes / GIB, machine.ram_available_bytes / GIB
    lines.append(Line("✓", "memory", f"{free:,.1f} of {total:,.1f} GiB free"))
    disk = f"{machine.disk_free_bytes / 1e9:,.0f} GB free for {machine.disk_path}"
    lines.append(Line("✓", "disk", disk))
    here = {
        name: f"{name} {version}{_built_for(machine) if name == 'torch' else ''}"
        for name, version in machine.stack.items()
        if version
    }
    if here:
        first = [here.pop(name) for name in _ENGINE if name in here]
        lines.append(Line("✓", "engine", ", ".join(first), ", ".join(here.values())))
    cards = {gpu.compute_capability: gpu for gpu in machine.usable_gpus if gpu.compute_capability}
    for capability, gpu in cards.items():
        which = f"{gpu.short_name} is " if len(cards) > 1 else ""
        lines.append(Line("·", "flash 4", f"{which}{flash_4_on(capability)}"))
    for each in missing_packages(machine):
        mark = SEVERITY_MARKS["warning" if each.needed else "note"]
        lines.append(Line(mark, "missing", ", ".join(each.packages), each.command))
    return lines


def problem_line(problem: Problem) -> Line:
    """What is wrong, why, and what to do; the detail is the command that does it."""
    text = f"{problem.what} {problem.why} {problem.fix}"
    return Line(SEVERITY_MARKS[problem.severity], problem.severity, text, problem.command)


def packages_line(machine: Machine, missing: tuple[Missing, ...]) -> Line:
    """The gravest of what is not installed or does not work, in one sentence."""
    needed = [package for each in missing if each.needed for package in each.packages]
    errors = sum(problem.severity == "error" for problem in machine.problems)
    if needed:
        count = counted(len(needed), "package")
        return Line("✗", "", f"{count} missing for this computer.")
    if errors:
        return Line("✗", "", f"{counted(errors, 'fault')} on this computer: see below.")
    more = "; one more would make it faster" if missing else ""
    return Line("✓", "", f"No package is missing for this computer{more}.")


def package_lines(machine: Machine, missing: tuple[Missing, ...]) -> list[Line]:
    """The driver and every package of the trainer: its version, or that it is not here."""
    needed = {package: each.needed for each in missing for package in each.packages}
    lines = []
    if machine.driver_version:
        runs = f"{machine.driver_version}, runs CUDA up to {machine.cuda_version or 'unknown'}"
        lines.append(Line("✓", "NVIDIA driver", runs))
    for package, version in machine.stack.items():
        if version is not None:
            built_for = _built_for(machine) if package == "torch" else ""
            lines.append(Line("✓", package, f"{version}{built_for}"))
        elif package in needed:
            lines.append(Line("✗" if needed[package] else "·", package, "not installed"))
    return lines


def _built_for(machine: Machine) -> str:
    if machine.torch_cuda is None:
        return ""
    return f" (CUDA {machine.torch_cuda})" if machine.torch_cuda else " (without CUDA)"
