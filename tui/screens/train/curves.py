"""Which curves the Train page draws, and the value that stands beside each."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from engine.runs.history import History
from engine.runs.series import Series, finite
from tui.widgets.braille import Curve
from tui.widgets.chart import Chart, Scale, Spark
from tui.widgets.pane import Pane

if TYPE_CHECKING:
    from textual.screen import Screen

_TREND_POINTS: Final = 10


@dataclass(frozen=True, slots=True)
class Metric:
    """One of the small charts."""

    name: str
    style: str
    digits: int
    series: Callable[[History], Series]
    written: Callable[[float], str]


METRICS: Final = (
    Metric("lr", "$accent", 5, lambda history: history.lr, lambda lr: _exponent(lr)),
    Metric("grad norm", "$warning", 2, lambda history: history.grad_norm, "{:.2f}".format),
    Metric("tokens/s", "$success", 0, lambda history: history.tokens_per_second, "{:,.0f}".format),
    Metric("memory GiB", "$secondary", 1, lambda history: history.memory_gib, "{:.1f}".format),
)


@dataclass(frozen=True, slots=True)
class Curves:
    """Draws a history into the charts of a page."""

    history: History

    def show(self, page: "Screen[None]") -> None:
        """Redraw every chart and spark that can be seen."""
        right = float(self.history.total_steps or 1)
        self._show_loss(page.query_one("#loss", Pane), right)
        for metric, pane in zip(METRICS, page.query("Pane.small").results(Pane), strict=True):
            series = metric.series(self.history)
            points = series.raw.points()
            pane.show_subtitle(_value(metric, series))
            scale = Scale(right, bottom=0, top=_top(series), digits=metric.digits)
            pane.query_one(Chart).show([Curve(points, metric.style)], scale)
        for metric, spark in zip(METRICS, page.query(Spark), strict=True):
            series = metric.series(self.history)
            scale = Scale(right, bottom=0, top=_top(series))
            spark.show(series.raw.points(), scale, _value(metric, series))

    def _show_loss(self, pane: Pane, right: float) -> None:
        loss = self.history.loss
        held_out = self.history.held_out
        smooth = loss.smooth.points()
        pane.show_title(f"loss {_number(loss.smooth.last)}{_trend(smooth)}" if smooth else "loss")
        legend = "⠒ loss  ━ smoothed"
        if held_out and self.history.best:
            newest = held_out[-1][1]
            best = ", best" if newest == self.history.best[1] else ""
            legend += f"  ◆ held out {_number(newest)}{best}"
        pane.show_subtitle(legend)
        curves = [Curve(loss.raw.points(), "$raw"), Curve(smooth, "bold $primary")]
        curves.append(Curve([(float(step), value) for step, value in held_out], "bold $lit", "◆"))
        pane.query_one(Chart).show(curves, Scale(right))


def _value(metric: Metric, series: Series) -> str:
    if not series.raw:
        return ""
    return metric.written(series.last) if math.isfinite(series.last) else "not a number"


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
