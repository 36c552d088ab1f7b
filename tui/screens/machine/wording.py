"""How a computer is told: a line for each choice, one verdict, the rest in rows.

Pure, and without the planner: the first frame of the wizard waits for this module. Names of cards
and paths are strangers' text, and are made visible here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from textual.content import Content

from engine.report import SEVERITY_MARKS
from engine.units import GIB, counted
from engine.visible import fold, visible
from tui.line import marked

if TYPE_CHECKING:
    from engine.hardware import Gpu, Machine

CPU: Final = "cpu"
PLAN: Final = "plan"
ASKING: Final = "asking the driver…"
PLAN_ONLY: Final = ("·", "plan only", "for a GPU that is not here; preview, plan and save work")

_MOST_NAME_CELLS: Final = 28
_GAP: Final = "  "
# Where there is less room a command would be broken inside its words.
_COMMAND_CELLS: Final = 60
# What a run cannot ignore, the gravest first: the verdict's word, and its sentence where the
# problem's own is too long for a row.
_TOLD_FIRST: Final[Mapping[str, tuple[str, str]]] = {
    "driver_silent": ("driver", ""),
    "driver_mismatch": ("driver", "module and library differ: restart, or reload the module"),
    "driver_not_loaded": ("driver", ""),
    "driver_refuses": ("driver", ""),
    "driver_error": ("driver", ""),
    "no_driver": ("no GPU", "NVIDIA driver not found (libnvidia-ml.so.1)"),
    "no_gpu": ("no GPU", ""),
    "driver_too_old_for_torch": ("driver", ""),
    "torch_without_cuda": ("torch", ""),
    "card_not_in_torch": ("torch", ""),
    "cuda_library_missing": ("driver", ""),
    "gpu_lost": ("lost", ""),
    "gpu_unreadable": ("partial", ""),
    "memory_unknown": ("partial", ""),
    "mig_empty": ("partial", ""),
    "cuda_list_ends": ("hidden", ""),
    "cuda_hidden": ("hidden", ""),
    "answers_refused": ("partial", ""),
    "kernels_cannot_be_built": ("kernels", ""),
    "bitsandbytes_without_library": ("4-bit", ""),
    "attention_packages_overwritten": ("attention", ""),
}


@dataclass(frozen=True, slots=True)
class Choice:
    """One line that Enter can take: a card, the processor, or a card that is not here."""

    key: str
    """The card's UUID, CPU or PLAN."""
    gpu: "Gpu | None" = None

    @property
    def refusal(self) -> str:
        """Why a run cannot use it; empty where it can."""
        if self.gpu is None or (self.gpu.state == "ready" and self.gpu.memory_total_bytes):
            return ""
        if self.gpu.state == "hidden":
            return self.gpu.note
        return f"{self.gpu.state}: {self.gpu.note}"


def list_choices(machine: "Machine") -> list[Choice]:
    """Every card in the driver's order, then the processor, then cards that are not here."""
    return [*(Choice(gpu.uuid, gpu) for gpu in machine.gpus), Choice(CPU), Choice(PLAN)]


def choice_lines(
    choices: Sequence[Choice], machine: "Machine", planned: str, cells: int
) -> list[Content]:
    """A line for each choice; `planned` names the card that is planned for now, if one is."""
    lines = _gpu_lines([choice.gpu for choice in choices if choice.gpu], cells)
    cores = counted(machine.cpu_count, "core")
    lines.append(
        Content.assemble(
            "this computer's CPU",
            (f"{_GAP}{cores}; trains the demo model in about a minute", "$muted"),
        )
    )
    now = (
        f"now {visible(planned, one_line=True)}" if planned else "what it holds, without having it"
    )
    lines.append(Content.assemble("plan for another GPU", (f"{_GAP}{now}", "$muted")))
    return lines


def _gpu_lines(gpus: "Sequence[Gpu]", cells: int) -> list[Content]:
    """A table of cards; columns at its end that have no room are left out for all of them."""
    names = [f"{gpu.index}  {visible(gpu.short_name, one_line=True)}" for gpu in gpus]
    width = min(max(map(len, names), default=0), _MOST_NAME_CELLS)
    rows = [_figures(gpu) if not Choice("", gpu).refusal else () for gpu in gpus]
    count = max(map(len, rows), default=0)
    widths = [max(len(row[at]) for row in rows if row) for at in range(count)]
    while widths and width + sum(widths) + len(_GAP) * len(widths) > cells:
        widths.pop()
    lines = []
    for gpu, name, row in zip(gpus, names, rows, strict=True):
        shown = f"{name:<{width}}"
        if row:
            figures = (f"{cell:>{w}}" for cell, w in zip(row, widths, strict=False))
            lines.append(Content(_GAP.join([shown, *figures])))
        else:
            why = visible(Choice("", gpu).refusal, one_line=True)
            lines.append(Content.styled(f"{shown}{_GAP}{why}", "$faint"))
    return lines


def _figures(gpu: "Gpu") -> tuple[str, ...]:
    """What is known of a card that can be used, what matters most first."""
    capability = "" if gpu.compute_capability is None else "{}.{}".format(*gpu.compute_capability)
    used, load, heat = gpu.memory_used_bytes, gpu.utilization_percent, gpu.temperature_celsius
    return (
        f"{(gpu.memory_total_bytes or 0) / GIB:.1f} GiB",
        "" if used is None else f"{used / GIB:.1f} used",
        f"{gpu.architecture} {capability}".strip(),
        "" if heat is None else f"{heat} °C",
        "" if gpu.power_watts is None else f"{gpu.power_watts:.0f} W",
        "" if load is None else f"busy {load}%",
    )


def verdict(machine: "Machine", choice: Choice) -> tuple[str, str, str]:
    """Mark, word and sentence: what is wrong with the machine, else what the choice is."""
    if choice.refusal and choice.gpu:
        name = visible(choice.gpu.short_name, one_line=True)
        return "✗", "cannot be used", f"GPU {choice.gpu.index}, {name}: {choice.refusal}"
    if choice.key == PLAN:
        return PLAN_ONLY
    found = {problem.id: problem for problem in machine.problems}
    for name, (word, short) in _TOLD_FIRST.items():
        if problem := found.get(name):
            return SEVERITY_MARKS[problem.severity], word, short or problem.what.rstrip(".")
    if choice.gpu is None:
        return "✓", "ready", "this computer's CPU trains the demo model in about a minute"
    return "✓", "ready", _told(choice.gpu)


def _told(gpu: "Gpu") -> str:
    name = visible(gpu.short_name, one_line=True)
    total, free = (gpu.memory_total_bytes or 0) / GIB, (gpu.memory_free_bytes or 0) / GIB
    if gpu.mig_parent:
        return f"GPU {gpu.index} is cut into MIG slices; pick one: {name}, {total:.1f} GiB"
    if gpu.unified:
        return f"{name}, unified memory: {total:.1f} GiB total, {free:.1f} free now"
    return f"{name}, {free:.1f} of {total:.1f} GiB free"


def is_plain(machine: "Machine", choice: Choice) -> bool:
    """Whether the verdict has nothing to warn of, so that there is room for what fits."""
    gpu = choice.gpu
    mark, _, _ = verdict(machine, choice)
    return mark == "✓" and gpu is not None and not gpu.mig_parent and not gpu.unified


def blocks(machine: "Machine") -> bool:
    """Whether something is wrong that a person should see before going on unasked."""
    return any(problem.severity == "error" for problem in machine.problems)


def rest(machine: "Machine", cells: int) -> Content:
    """Every problem in its three sentences, then driver, memory, disk and packages in rows."""
    # Imported here, as in the page: the first frame does not wait for it.
    from engine.report.machine import problem_line, rest_lines

    lines: list[Content] = []
    for problem in machine.problems:
        line = problem_line(problem)
        text = line.text
        if line.detail:
            has_room = cells >= _COMMAND_CELLS
            more = f": {line.detail}" if has_room else ". `windtunnel doctor` has the command."
            text = text.rstrip(".") + more
        lines += _hang(marked(line.mark, ""), text, cells)
    for line in rest_lines(machine):
        text = f"{line.text}: {line.detail}" if line.label == "missing" else line.text
        lines += _hang(marked(line.mark, f"{line.label:<8} "), text, cells)
    return Content("\n").join(lines)


def _hang(head: Content, text: str, cells: int) -> list[Content]:
    """`text` beside `head`, its further lines below its first."""
    indent = head.cell_length
    first, *more = fold(visible(text, one_line=True), max(20, cells - indent))
    return [head + first.rstrip(), *(Content(" " * indent + line.rstrip()) for line in more)]


def processes(machine: "Machine") -> Content:
    """Who computes on each card now."""
    from engine.report.machine import process_cells

    lines: list[Content] = []
    for gpu in machine.gpus:
        name = visible(gpu.short_name, one_line=True)
        lines.append(Content.styled(f"{gpu.index}  {name}", "bold $lit"))
        if gpu.processes is None:
            lines.append(Content.styled("   the driver does not say what runs on it", "$muted"))
        elif not gpu.processes:
            lines.append(Content.styled("   nothing runs on it", "$muted"))
        for process in gpu.processes or ():
            memory, user, command = process_cells(process)
            told = visible(f"{user}  {command}", one_line=True)
            lines.append(Content(f"   {memory:>9}  {told}"))
    return Content("\n").join(lines or [Content("There is no GPU here.")])
