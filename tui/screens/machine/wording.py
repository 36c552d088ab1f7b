"""How a computer is described: a line for each choice, the rest in rows.

Pure, and without the planner: the first frame of the wizard waits for this module. Names of cards
and paths are strangers' text, and are made visible here.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from textual.content import Content

from engine.visible import fold, visible
from engine.wizard.machine import card_figures
from engine.wizard.question import Question
from tui.line import marked

if TYPE_CHECKING:
    from engine.hardware import Gpu, Machine


_MOST_NAME_CELLS: Final = 28
_GAP: Final = "  "
# Where there is less room a command would be broken inside its words.
_COMMAND_CELLS: Final = 60


def choice_lines(question: Question, machine: "Machine", cells: int) -> list[Content]:
    """A line for each choice: the cards as a table, what is known of the others beside them."""
    uuids = [gpu.uuid for gpu in machine.gpus]
    cards = dict(zip(uuids, _gpu_lines(machine.gpus, cells), strict=True))
    return [
        cards.get(choice.key)
        or Content.assemble(
            visible(choice.label, one_line=True),
            (f"{_GAP}{visible(choice.note, one_line=True)}", "$muted"),
        )
        for choice in question.choices
    ]


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
