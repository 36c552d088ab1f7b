"""The chart: curves with the fewest axes that still let a value be read, from four rows up.

Drawn by ourselves: for 10,000 points textual-hires-canvas took four times as long for the same
picture (43 against 11 ms of CPU at 110x30), and it brings numpy along.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from textual.app import RenderResult
from textual.content import Content
from textual.widget import Widget

from engine.runs.history import Point, finite
from tui.widgets.braille import Curve, Frame, Raster

_AXIS_CELLS: Final = 8
_LEAST_COLUMNS: Final = 8


@dataclass(frozen=True, slots=True)
class Scale:
    """What a chart shows of the plane. None takes the bounds of the curves."""

    right: float
    """The last step: what is empty is still to come."""
    left: float = 0.0
    bottom: float | None = None
    top: float | None = None
    digits: int = 2
    """Decimals of the values at the axis."""


class Chart(Widget):
    """Braille curves over steps. `waiting` is what it says before the first point."""

    def __init__(
        self,
        *,
        foot: bool = True,
        waiting: str = "waiting for the first step",
        id: str | None = None,  # noqa: A002 (Textual's name)
    ) -> None:
        super().__init__(id=id)
        self._foot = foot
        self._waiting = waiting
        self._curves: Sequence[Curve] = ()
        self._scale = Scale(1)

    def show(self, curves: Sequence[Curve], scale: Scale) -> None:
        """Draw these; the first curve lies lowest."""
        self._curves, self._scale = curves, scale
        self.refresh()

    def render(self) -> RenderResult:
        columns, rows = self.size.width - _AXIS_CELLS, self.size.height - self._foot
        values = [y for curve in self._curves for y in finite(curve.points)]
        if columns < _LEAST_COLUMNS or rows < 2 or not values:
            return Content.styled(self._waiting, "$muted")
        frame = _frame(self._scale, values, columns, rows)
        raster = Raster(frame)
        for curve in self._curves:
            raster.draw(curve)
        lines = [
            Content.assemble(*self._axis(frame, row), *parts)
            for row, parts in enumerate(raster.rows())
        ]
        if self._foot:
            lines.append(_step_axis(frame))
        return Content("\n").join(lines)

    def _axis(self, frame: Frame, row: int) -> list[tuple[str, str]]:
        middle = frame.rows // 2 if frame.rows > 4 else -1
        if row not in (0, middle, frame.rows - 1):
            return [(" " * (_AXIS_CELLS - 1) + "│", "$faint")]
        share = row / (frame.rows - 1)
        value = label(frame.top - share * (frame.top - frame.bottom), self._scale.digits)
        return [(f"{value:>{_AXIS_CELLS - 2}} ", "$muted"), ("┤", "$faint")]


class Spark(Widget):
    """One metric on one line: its name, its curve from zero up, and its last value."""

    def __init__(self, name: str, style: str) -> None:
        super().__init__()
        self._title = name
        self._style = style
        self._points: Sequence[Point] = ()
        self._scale = Scale(1)
        self._value = ""

    def show(self, points: Sequence[Point], scale: Scale, value: str) -> None:
        """Draw these points and write `value` behind them."""
        self._points, self._scale, self._value = points, scale, value
        self.refresh()

    def render(self) -> RenderResult:
        columns = self.size.width - 11 - 15
        values = finite(list(self._points))
        curve: list[tuple[str, str]] = [(" " * max(columns, 0), "")]
        if columns >= _LEAST_COLUMNS and values:
            raster = Raster(_frame(self._scale, values, columns, 1))
            raster.draw(Curve(self._points, self._style))
            (curve,) = raster.rows()
        return Content.assemble(
            (f"{self._title:<11}", "$muted"), *curve, (f"{self._value:>15}", "$foreground")
        )


def label(value: float, digits: int) -> str:
    """A value at the axis, at most six cells wide."""
    if value == 0:
        return "0"
    if abs(value) < 0.01 or abs(value) >= 100_000:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.{digits if abs(value) < 1000 else 0}f}"


def _frame(scale: Scale, values: Sequence[float], columns: int, rows: int) -> Frame:
    bottom = min(values) if scale.bottom is None else scale.bottom
    top = max(values) if scale.top is None else scale.top
    if not top - bottom > abs(top) * 1e-9:  # one value all along: a line through the middle
        margin = abs(top) / 10 or 1.0
        bottom, top = bottom - margin, top + margin
    right = scale.right if math.isfinite(scale.right) else 1.0
    return Frame(columns, rows, scale.left, max(right, scale.left + 1), bottom, top)


def _step_axis(frame: Frame) -> Content:
    """The first, the middle and the last step below the curves."""
    left, middle, right = (
        f"{step:,.0f}" for step in (frame.left, (frame.left + frame.right) / 2, frame.right)
    )
    half = frame.columns // 2
    line = left + middle.rjust(half - len(left) + 1)
    return Content.styled(
        " " * _AXIS_CELLS + line + right.rjust(frame.columns - len(line)), "$faint"
    )
