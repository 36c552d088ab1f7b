"""Two runs side by side: their curves, what differs in their configs, their figures at one step."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from textual.app import ComposeResult, RenderResult
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.geometry import Size
from textual.widget import Widget

from engine.errors import UserError
from engine.runs.history import RunFacts
from engine.visible import visible
from tui.screens.runs.wording import same_step
from tui.widgets.chart import Chart, Curve, Scale
from tui.widgets.pane import Pane, TextPane

if TYPE_CHECKING:
    from engine.runs.comparison import ConfigDifferences

_LEAST_CELLS: Final = 12


class Differences(Widget):
    """Key, value of A, value of B, a line each."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: Sequence[tuple[str, str, str]] = ()
        self._note = "reading the configs"

    def show(self, lines: Sequence[tuple[str, str, str]], same: int) -> None:
        """Draw these, and say how many keys are the same."""
        self._lines = lines
        self._note = f"{same} keys are the same"
        self.refresh(layout=True)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return len(self._lines) + 1

    def render(self) -> RenderResult:
        width = max(self.size.width, _LEAST_CELLS)
        longest = max((len(key) for key, _, _ in self._lines), default=0)
        key_cells = min(longest, width // 2) + 2
        cells = (width - key_cells) // 2
        rows = [
            Content.assemble(
                (_cell(key, key_cells), "$muted"), _cell(first, cells), _cell(second, cells)
            )
            for key, first, second in self._lines
        ]
        return Content("\n").join([*rows, Content.styled(self._note, "$muted")])


class Comparison(Vertical):
    """A panel over the list; what the configs say comes when a thread has read them."""

    def __init__(self, first: RunFacts, second: RunFacts) -> None:
        super().__init__()
        self._first, self._second = first, second

    def compose(self) -> ComposeResult:
        names = [visible(each.folder.name, one_line=True) for each in (self._first, self._second)]
        with Pane(title=f"A ━━ {names[0]}   B ┅┅ {names[1]}", subtitle="loss, ◆◇ held out"):
            yield Chart(waiting="neither has told a loss")
        with Horizontal():
            with Pane(title="what differs", can_focus=True):
                yield Differences()
            step = min(self._first.step, self._second.step)
            yield TextPane(f"at the same step ({step})", self._figures())

    def on_mount(self) -> None:
        right = max(self._first.total_steps or 1, self._second.total_steps or 1)
        curves = [
            Curve(self._second.loss, "bold $secondary", dotted=True),
            Curve(self._first.loss, "bold $primary"),
            Curve(self._second.held_out, "bold $secondary", "◇"),
            Curve(self._first.held_out, "bold $lit", "◆"),
        ]
        self.query_one(Chart).show(curves, Scale(float(right)))

    def show_differences(self, found: "ConfigDifferences | UserError") -> None:
        """The keys with different values, and which run is better where both hold out the same."""
        if isinstance(found, UserError):
            self.query_one(Differences).show([("config.yml", str(found), "")], 0)
            return
        self.query_one(Differences).show(found.lines, found.same)
        self.query_one(TextPane).border_subtitle = (
            "held out on different rows" if found.held_out else self._better()
        )

    def _figures(self) -> Content:
        rows = [Content.styled(f"{'':<16}{'A':>9}{'B':>9}", "$muted")]
        for name, a, b, digits in same_step(self._first, self._second):
            rows.append(
                Content.assemble(
                    (f"{name:<16}", "$muted"), f"{_number(a, digits):>9}{_number(b, digits):>9}"
                )
            )
        return Content("\n").join(rows)

    def _better(self) -> str:
        _, a, b, _ = same_step(self._first, self._second)[1]
        if not math.isfinite(a - b) or a == b:
            return ""
        return f"{'A' if a < b else 'B'} is better by {abs(a - b):.3f} held out"


def _cell(text: str, cells: int) -> str:
    """One line of text in a column, with a space behind it."""
    shown = visible(text, one_line=True)
    room = cells - 1
    return f"{shown if len(shown) <= room else shown[: room - 1] + '…':<{cells}}"


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if math.isfinite(value) else "-"
