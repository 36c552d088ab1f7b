"""Curves as braille: eight dots a cell, the only drawing that still reads in a pane of four rows.

Shared by charts and one-row sparks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from engine.runs.history import Point

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
        """Put a curve over what is there already."""
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
