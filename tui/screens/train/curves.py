"""Which curves the Train page draws, and the value that stands beside each."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Final

from engine.runs.history import METRICS, History, Metric, Series, finite
from tui.widgets.chart import Chart, Curve, Scale, Spark
from tui.widgets.pane import Pane

if TYPE_CHECKING:
    from textual.screen import Screen

_TREND_POINTS: Final = 10
_MOST_DIGITS: Final = 3
"""More would be zeros: such a figure is written as a power of ten."""


_STYLES: Final = ("$accent", "$warning", "$success", "$secondary")


def metric_styles() -> "Iterator[tuple[Metric, str]]":
    """Every small chart and its colour."""
    return zip(METRICS, cycle(_STYLES), strict=False)


@dataclass(frozen=True, slots=True)
class Curves:
    """Draws a history into the charts of a page."""

    history: History

    def show(self, page: "Screen[None]") -> None:
        """Redraw every chart and spark that can be seen."""
        right = float(self.history.total_steps or 1)
        self._show_loss(page.query_one("#loss", Pane), right)
        drawn = zip(
            metric_styles(), page.query("Pane.small").results(Pane), page.query(Spark), strict=True
        )
        for (metric, style), pane, spark in drawn:
            series = self.history.series[metric]
            points, top, value = series.raw.points(), _top(series), _value(metric, series)
            pane.show_subtitle(value)
            scale = Scale(right, bottom=0, top=top, digits=metric.digits)
            pane.query_one(Chart).show([Curve(points, style)], scale)
            spark.show(points, Scale(right, bottom=0, top=top), value)

    def _show_loss(self, pane: Pane, right: float) -> None:
        loss = self.history.loss
        held_out = self.history.held_out
        smooth = loss.smooth.points()
        pane.show_title(f"loss {_number(loss.smooth.last)}{_trend(smooth)}" if smooth else "loss")
        legend = "⠒ loss  ━ smoothed"
        if held_out and self.history.best:
            step, newest = held_out[-1]
            best = ", best" if newest == self.history.best[1] else ""
            legend += f"  ◆ held out {_number(newest)} at step {step}{best}"
        pane.show_subtitle(legend)
        curves = [Curve(loss.raw.points(), "$raw"), Curve(smooth, "bold $primary")]
        curves.append(Curve([(float(step), value) for step, value in held_out], "bold $lit", "◆"))
        pane.query_one(Chart).show(curves, Scale(right))


def _value(metric: Metric, series: Series) -> str:
    if not series.raw:
        return ""
    if not math.isfinite(series.last):
        return "not a number"
    small = metric.digits > _MOST_DIGITS
    return _exponent(series.last) if small else f"{series.last:,.{metric.digits}f}"


def _top(series: Series) -> float:
    return max(finite(series.raw.points()), default=1.0) or 1.0


def _trend(smooth: list[tuple[float, float]]) -> str:
    """Where the average went over the last points that are drawn."""
    values = finite(smooth)[-_TREND_POINTS:]
    if len(values) < _TREND_POINTS or values[0] == values[-1]:
        return ""
    return " ↓" if values[-1] < values[0] else " ↑"


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "not a number"


def _exponent(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-") if value else "0"
