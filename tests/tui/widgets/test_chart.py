"""Braille curves: what is drawn where, with gaps, and in any size of pane."""

import math

import pytest

from tui.widgets.chart import Curve, Frame, Raster, label


def drawn(curve: Curve, columns: int = 10, rows: int = 2, right: float = 19.0) -> list[str]:
    raster = Raster(Frame(columns, rows, 0.0, right, 0.0, 7.0))
    raster.draw(curve)
    return ["".join(text for text, _ in row) for row in raster.rows()]


def test_a_line_goes_from_the_lower_left_to_the_upper_right() -> None:
    top, bottom = drawn(Curve([(0, 0), (19, 7)], ""))
    assert (top[0], bottom[-1]) == (" ", " ")
    assert " " not in (top[-1], bottom[0])


def test_a_value_that_is_no_number_leaves_a_gap() -> None:
    (line,) = drawn(Curve([(0, 3), (4, 3), (8, math.nan), (12, 3), (19, 3)], ""), rows=1)
    assert line[0] != " "
    assert line[4] == " "
    assert line[-1] != " "


def test_a_spike_reaches_the_top_however_narrow_the_chart() -> None:
    points = [(float(x), 7.0 if x == 500 else 0.0) for x in range(1000)]
    assert drawn(Curve(points, ""), columns=4, right=999.0)[0].strip()


def test_a_mark_stands_on_the_lines() -> None:
    raster = Raster(Frame(10, 2, 0.0, 19.0, 0.0, 7.0))
    raster.draw(Curve([(0, 0), (19, 0)], "line"))
    raster.draw(Curve([(9, 0)], "mark", "◆"))
    assert ("◆", "mark") in raster.rows()[1]


def test_a_dotted_line_leaves_every_other_cell_out() -> None:
    (line,) = drawn(Curve([(0, 3), (19, 3)], "", dotted=True), rows=1)
    assert [cell == " " for cell in line] == [False, True] * 5


def test_what_lies_outside_is_cut_at_the_sides_and_held_at_top_and_bottom() -> None:
    raster = Raster(Frame(4, 1, 10.0, 20.0, 0.0, 1.0))
    raster.draw(Curve([(10, 5), (30, -5)], ""))
    raster.draw(Curve([(5, 0.5), (25, 0.5)], "", "◆"))
    (line,) = ("".join(text for text, _ in row) for row in raster.rows())
    assert len(line) == 4
    assert "◆" not in line
    assert line.strip()


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [(0, 2, "0"), (2.2249, 2, "2.22"), (2e-4, 5, "2e-4"), (1234.5, 2, "1234"), (1e6, 0, "1e6")],
)
def test_values_at_the_axis_fit_six_cells(value: float, digits: int, shown: str) -> None:
    assert label(value, digits) == shown
