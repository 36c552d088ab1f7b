"""How a model is drawn: one line of the list."""

from collections.abc import Collection
from typing import Final

from textual.content import Content

from engine.report.models import size
from engine.units import GIB
from engine.wizard.model import Candidate
from tui.line import MARK_STYLES
from tui.screens.machine.prospects import TITLE_CELLS, title_cells

TITLE: Final = f"{'models':<{TITLE_CELLS + 8}}{'needs':>6}  verdict     reads  thinks   download"


def model_line(candidate: Candidate, cached: Collection[str]) -> Content:
    """One line of the list; `cached` are the names of models that are on this computer."""
    plan, line = candidate.plan, candidate.verdict()
    style = "$muted" if candidate.is_blind else MARK_STYLES[line.mark]
    reads = "image" if candidate.sees else "text"
    return Content.assemble(
        title_cells(candidate.title).stylize("$muted" if candidate.is_blind else ""),
        f" {size(plan.estimate.total_parameters):>6}",
        f"{plan.estimate.device_bytes / GIB:>6.1f}  ",
        (f"{line.mark} {line.label:<10}", style),
        (f"{reads:<7}{candidate.thinks:<9}{candidate.where_from(cached)}", "$muted"),
    )
