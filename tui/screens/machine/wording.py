"""How a computer is described: a line for each choice, one verdict, the rest in rows.

Pure, and without the planner: the first frame of the wizard waits for this module. Names of cards
and paths are strangers' text, and are made visible here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from textual.content import Content

from engine.units import counted
from engine.visible import fold, visible
from engine.wizard.machine import CPU, PLAN, PLAN_ONLY, card_figures, machine_verdict
from tui.line import marked

if TYPE_CHECKING:
    from engine.hardware import Gpu, Machine


_MOST_NAME_CELLS: Final = 28
_GAP: Final = "  "
# Where there is less room a command would be broken inside its words.
_COMMAND_CELLS: Final = 60


@dataclass(frozen=True, slots=True)
class Choice:
    """One line that Enter can take: a card, the processor, or a card that is not here."""

    key: str
    """The card's UUID, CPU or PLAN."""
    gpu: "Gpu | None" = None

    @property
    def refusal(self) -> str:
        """Why a run cannot use it; empty where it can."""
        return self.gpu.refusal if self.gpu else ""


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
    rows = [card_figures(gpu) if not gpu.refusal else () for gpu in gpus]
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
            why = visible(gpu.refusal, one_line=True)
            lines.append(Content.styled(f"{shown}{_GAP}{why}", "$faint"))
    return lines


def verdict(machine: "Machine", choice: Choice) -> tuple[str, str, str]:
    """Mark, word and sentence: what is wrong with the machine, else what the choice is."""
    line = PLAN_ONLY if choice.key == PLAN else machine_verdict(machine, choice.gpu)
    return line.mark, line.label, line.text


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
            program = visible(f"{user}  {command}", one_line=True)
            lines.append(Content(f"   {memory:>9}  {program}"))
    return Content("\n").join(lines or [Content("There is no GPU here.")])
