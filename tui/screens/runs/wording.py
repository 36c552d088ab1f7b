"""The words of the list of runs: pure, from the facts of a run and the time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from textual.content import Content

from engine.report.run import figures_text
from engine.runs import run_home
from engine.runs.history import Point, RunFacts, finite
from engine.units import counted, nats
from engine.visible import visible

_STATES: Final = {
    "running": ("▶", "$success"),
    "paused": ("❚", "$accent"),
    "finished": ("✓", "$muted"),
    "stopped": ("·", "$muted"),
    "failed": ("✗", "$error"),
    "lost": ("✗", "$error"),
    "waiting": ("◌", "$muted"),
    None: ("?", "$warning"),
}
_WEEK_SECONDS: Final = 6 * 86_400.0
_DAY_SECONDS: Final = 86_400.0
_STATE_CELLS: Final = 15


@dataclass(frozen=True, slots=True)
class Widths:
    """Cells of the columns whose text can be long."""

    name: int = 22
    model: int = 12


WIDE: Final = Widths(name=44, model=28)


def header(widths: Widths) -> str:
    """The names of the columns."""
    return (
        f"      {'name':<{widths.name}} {'model':<{widths.model}} {'state':<{_STATE_CELLS}}"
        f"{'held out':>9}  when"
    )


def run_line(facts: RunFacts, mark: str, now: float, widths: Widths) -> Content:
    """One run in the list: its mark, its state, its best held-out loss, when it was written."""
    glyph, style = _STATES[facts.status]
    name = _cut(visible(facts.folder.name, one_line=True), widths.name)
    model = _cut(visible(facts.model, one_line=True), widths.model)
    held_out = f"{facts.best[1]:.3f}" if facts.best else "-"
    return Content.assemble(
        (f"{mark:<2}", "bold $accent"),
        (f"{glyph} ", style),
        f"{name:<{widths.name}} ",
        (f"{model:<{widths.model}} ", "$muted"),
        (f"{_cut(state(facts), _STATE_CELLS):<{_STATE_CELLS}}", style),
        f"{held_out:>9}  ",
        (when(facts, now), "$muted"),
    )


def state(facts: RunFacts) -> str:
    """What a run does, in a few words."""
    of = f"{facts.step}/{facts.total_steps}" if facts.total_steps else f"{facts.step}"
    return {
        "running": f"step {of}" if facts.total_steps else "loading",
        "paused": f"paused {of}",
        "finished": f"done, {facts.step} steps",
        "stopped": f"stopped {of}",
        "failed": f"failed at {facts.step}",
        "lost": f"lost at {facts.step}",
        "waiting": "not started",
        None: "cannot be read",
    }[facts.status]


def when(facts: RunFacts, now: float) -> str:
    """`now`, a time of today, a weekday, or a date."""
    if facts.is_alive:
        return "now"
    if not facts.written_time:
        return ""
    moment = datetime.fromtimestamp(facts.written_time)
    age = now - facts.written_time
    if age < _DAY_SECONDS and moment.date() == datetime.fromtimestamp(now).date():
        return moment.strftime("%H:%M")
    return moment.strftime("%a" if age < _WEEK_SECONDS else "%d %b")


def totals(runs: Sequence[RunFacts]) -> str:
    """`4 runs, 1 training`."""
    live = sum(facts.status == "running" for facts in runs)
    words = counted(len(runs), "run")
    return f"{words}, {live} training" if live else words


def details(facts: RunFacts) -> list[tuple[str, str]]:
    """What the pane below the list says of the run under the cursor."""
    if facts.status is None:
        return [("why", facts.problem)]
    lines = []
    if facts.best:
        step, loss = facts.best
        lines.append(("best", f"held-out {nats(loss)} at step {step}"))
    if told := figures_text(*facts.figures):
        lines.append(("figures", told))
    if facts.saved:
        lines.append(("saved", ", ".join(each.rsplit("/", 1)[-1] for each in facts.saved[-4:])))
    if facts.ended_what:
        lines.append(("ended", facts.ended_what))
    if facts.folder.path.parent != run_home() / "runs":
        lines.append(("where", str(facts.folder.path)))
    return lines


def change(facts: RunFacts) -> str:
    """The loss at the first and at the last step."""
    values = finite(list(facts.loss))
    return f"loss {nats(values[0])} → {nats(values[-1])}" if values else ""


def at_step(points: Sequence[Point], step: int) -> float:
    """The value of a curve at a step or at the nearest one before it; nan where there is none."""
    before = [y for x, y in points if x <= step]
    return before[-1] if before else math.nan


def same_step(first: RunFacts, second: RunFacts) -> list[tuple[str, float, float, int]]:
    """The figures of two runs at the last step that both have: name, A, B, decimals."""
    step = min(first.step, second.step)
    pairs = (
        ("loss, smoothed", first.loss, second.loss, 3),
        ("held out", first.held_out, second.held_out, 3),
        ("tokens/s", first.tokens_per_second, second.tokens_per_second, 0),
        ("memory GiB", first.memory_gib, second.memory_gib, 1),
    )
    return [(name, at_step(a, step), at_step(b, step), digits) for name, a, b, digits in pairs]


def _cut(text: str, cells: int) -> str:
    return text if len(text) <= cells else text[: cells - 1] + "…"
