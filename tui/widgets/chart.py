"""Curves as braille, eight dots a cell, with the fewest axes that still let a value be read.

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

_DOTS: Final = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BLANK: Final = 0x2800


@dataclass(frozen=True, slots=True)
class Curve:
    """Points from left to right; a `y` of nan is a gap.

    A `mark` draws one glyph a point; `dotted` leaves every other cell out, to tell two curves
    apart without colour.
    """

    points: Sequence[Point]
    style: str
    mark: str = ""
    dotted: bool = False


@dataclass(frozen=True, slots=True)
class Frame:
    """The part of the plane that is drawn, and the cells it is drawn into."""

    columns: int
    rows: int
    left: float
    right: float
    bottom: float
    top: float

    def dot(self, point: Point) -> tuple[int, int]:
        """Dot column from the left and dot row from the top; beyond the frame where x is."""
        x, y = point
        width, height = self.right - self.left, self.top - self.bottom
        across = round((x - self.left) / width * (self.columns * 2 - 1)) if width else 0
        down = round((self.top - y) / height * (self.rows * 4 - 1)) if height else self.rows * 2
        return across, max(0, min(self.rows * 4 - 1, down))


class Raster:
    """Cells of dots; a cell has the style of the curve that was drawn into it last."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._bits = [[0] * frame.columns for _ in range(frame.rows)]
        self._styles = [[""] * frame.columns for _ in range(frame.rows)]
        self._marks: dict[tuple[int, int], str] = {}

    def draw(self, curve: Curve) -> None:
        before: tuple[int, int] | None = None
        for point in curve.points:
            if not math.isfinite(point[1]):
                before = None
                continue
            dot = self._frame.dot(point)
            if curve.mark:
                self._mark(dot, curve)
            elif dot != before:
                self._line(before or dot, dot, curve)
            before = dot

    def rows(self) -> list[list[tuple[str, str]]]:
        """Each row as pairs of a text and its style, neighbours of one style together."""
        found = []
        for row, (bits, styles) in enumerate(zip(self._bits, self._styles, strict=True)):
            parts: list[tuple[str, str]] = []
            for column, (cell, style) in enumerate(zip(bits, styles, strict=True)):
                glyph = self._marks.get((row, column)) or (chr(_BLANK + cell) if cell else " ")
                if parts and parts[-1][1] == style:
                    parts[-1] = (parts[-1][0] + glyph, style)
                else:
                    parts.append((glyph, style))
            found.append(parts)
        return found

    def _mark(self, dot: tuple[int, int], curve: Curve) -> None:
        column, row = dot[0] // 2, dot[1] // 4
        if 0 <= column < self._frame.columns:
            self._marks[row, column] = curve.mark
            self._styles[row][column] = curve.style

    def _line(self, start: tuple[int, int], end: tuple[int, int], curve: Curve) -> None:
        (x0, y0), (x1, y1) = start, end
        last = self._frame.columns * 2 - 1
        if x1 < 0 or x0 > last:
            return
        length = max(abs(x1 - x0), abs(y1 - y0), 1)
        for step in range(length + 1):
            x = x0 + (x1 - x0) * step // length
            y = y0 + round((y1 - y0) * step / length)
            if 0 <= x <= last and not (curve.dotted and x // 2 % 2):
                self._bits[y // 4][x // 2] |= _DOTS[x % 2][y % 4]
                self._styles[y // 4][x // 2] = curve.style


_AXIS_CELLS: Final = 8
_LEAST_COLUMNS: Final = 8


@dataclass(frozen=True, slots=True)
class Scale:
    """What a chart shows of the plane. None takes the bounds of the curves."""

    right: float
    """The last step: what is empty is still to come."""
    bottom: float | None = None
    top: float | None = None
    digits: int = 2
    """Decimals of the values at the axis."""


class Chart(Widget):
    """Braille curves over steps. `waiting` is what it says before the first point."""

    def __init__(self, *, foot: bool = True, waiting: str = "waiting for the first step") -> None:
        super().__init__()
        self._foot = foot
        self._waiting = waiting
        self.show((), Scale(1))

    def show(self, curves: Sequence[Curve], scale: Scale) -> None:
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
        self.show((), Scale(1), "")

    def show(self, points: Sequence[Point], scale: Scale, value: str) -> None:
        self._points, self._scale, self._value = points, scale, value
        self.refresh()

    def render(self) -> RenderResult:
        columns = self.size.width - 11 - 15
        values = finite(self._points)
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
    return Frame(columns, rows, 0.0, max(right, 1.0), bottom, top)


def _step_axis(frame: Frame) -> Content:
    left, middle, right = (
        f"{step:,.0f}" for step in (frame.left, (frame.left + frame.right) / 2, frame.right)
    )
    half = frame.columns // 2
    line = left + middle.rjust(half - len(left) + 1)
    return Content.styled(
        " " * _AXIS_CELLS + line + right.rjust(frame.columns - len(line)), "$faint"
    )
