"""What a device is good for: a line for each model of the catalog.

It needs the planner, which the first frame does not wait for: whoever has a survey to show imports
it then.
"""

from typing import Final

from textual.content import Content

from engine.plan import Device, Prospect
from engine.report.plan import method, model_verdict
from engine.units import GIB, gib
from engine.visible import visible
from engine.wizard.model import Survey
from tui.line import MARK_STYLES

TITLE_CELLS: Final = 19


def headline(found: Survey) -> str:
    """What the device can do, in one sentence."""
    device, plan = found.device, found.proposed.plan
    billions = round(plan.estimate.total_parameters / 10**9)
    can_give = f"can give {device.can_give_bytes / GIB:.1f} of {gib(device.total_bytes)}"
    return f"trains up to {billions}B with {method(plan)}; {can_give}"


def prospect_lines(found: Survey) -> Content:
    """One line a model, the proposed one first: what it needs, what is left, how it is trained."""
    lines = sorted(found.prospects, key=lambda prospect: prospect is not found.proposed)
    return Content("\n").join(_line(prospect, found.proposed, found.device) for prospect in lines)


def title_cells(title: str) -> Content:
    """A model's title in TITLE_CELLS cells, cut where it is longer."""
    cut = Content(visible(title, one_line=True)).truncate(TITLE_CELLS, ellipsis=True)
    return cut.pad_right(TITLE_CELLS - cut.cell_length)


def _line(prospect: Prospect, proposed: Prospect, device: Device) -> Content:
    plan, needs = prospect.plan, prospect.plan.estimate
    mark = model_verdict(plan).mark
    spare = needs.spare_bytes / GIB
    left = f"{spare:>5.1f} spare" if spare >= 0 else f"{-spare:>5.1f} over "
    note = method(plan)
    if plan.not_trained:
        note = "not trained yet"
    elif prospect is proposed:
        note = f"{note}, proposed"
    elif device.kind == "cpu":
        note = f"{note}, slow"
    elif plan.is_slow:
        note = f"{note}, in RAM: slow"
    return Content.assemble(
        (mark, MARK_STYLES[mark]),
        " ",
        title_cells(prospect.card.title).stylize("$lit" if prospect is proposed else ""),
        f"  needs {needs.device_bytes / GIB:>5.1f} GiB ± {needs.uncertainty:>3.0%}",
        f"  {left}",
        (f"  {note}", "" if prospect is proposed else "$muted"),
    )
