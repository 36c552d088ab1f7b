"""Curves of any length in bounded memory, with every spike kept.

A run of a million steps costs a chart no more than one of a thousand: a stream keeps the lowest and
the highest point of each stretch of the run; when there are too many stretches, neighbours are
merged in pairs.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

CAPACITY: Final = 1024
"""Stretches at most: two points each are more than the dots of the widest terminal."""

Point = tuple[float, float]


@dataclass(slots=True)
class Bucket:
    """One stretch: its lowest and its highest point, and how many points lie in it.

    The two are nan where no point of the stretch is finite: the curve has a gap there.
    """

    first: float
    last: float
    low: Point
    high: Point
    count: int

    def points(self) -> tuple[Point, ...]:
        """The one or two points to draw, from left to right."""
        if self.low[0] == self.high[0]:
            return (self.low,)
        return (self.low, self.high) if self.low[0] < self.high[0] else (self.high, self.low)

    def merged(self, later: "Bucket") -> "Bucket":
        """This stretch and the one after it."""
        low, high = self.low, self.high
        if not later.is_gap and (self.is_gap or later.low[1] < low[1]):
            low = later.low
        if not later.is_gap and (self.is_gap or later.high[1] > high[1]):
            high = later.high
        return Bucket(self.first, later.last, low, high, self.count + later.count)

    @property
    def is_gap(self) -> bool:
        return math.isnan(self.low[1])


class Stream:
    """Points of rising x, at most CAPACITY stretches of them."""

    def __init__(self) -> None:
        self._buckets: list[Bucket] = []
        self._width = 1
        """Points that a stretch takes before the next one begins."""

    def __len__(self) -> int:
        return len(self._buckets)

    def add(self, x: float, y: float) -> None:
        """One more point, right of all others; a `y` that is not finite makes a gap."""
        point = (x, y if math.isfinite(y) else math.nan)
        new = Bucket(x, x, point, point, 1)
        if self._buckets and self._buckets[-1].count < self._width:
            self._buckets[-1] = self._buckets[-1].merged(new)
        else:
            self._buckets.append(new)
        if len(self._buckets) > CAPACITY:
            self._merge_pairs()

    def rewind(self, x: float) -> None:
        """Forget the points at `x` and right of it: a resumed run writes them again.

        In a stretch that lies on both sides the older points stay with the extremes of all.
        """
        while self._buckets and self._buckets[-1].first >= x:
            self._buckets.pop()
        if self._buckets and self._buckets[-1].last >= x:
            last = self._buckets[-1]
            low, high = ((min(at, x - 1), y) for at, y in (last.low, last.high))
            self._buckets[-1] = Bucket(last.first, x - 1, low, high, last.count)

    def points(self) -> list[Point]:
        """What to draw, from left to right; a `y` of nan is a gap."""
        return [point for bucket in self._buckets for point in bucket.points()]

    @property
    def last(self) -> float:
        """The newest `y` that the stream still knows, nan where there is none."""
        return self._buckets[-1].points()[-1][1] if self._buckets else math.nan

    def _merge_pairs(self) -> None:
        pairs = iter(self._buckets)
        self._buckets = [
            bucket.merged(later) if (later := next(pairs, None)) else bucket for bucket in pairs
        ]
        self._width *= 2


class Smoothed:
    """An exponential moving average over about `span` points, without the usual bias of its start.

    Values that are not finite are left out. The formula is Adam's: the average of what was seen,
    divided by the weight that it has so far.
    """

    def __init__(self, span: float) -> None:
        self._keep = 1 - 1 / max(1.0, span)
        self._sum = 0.0
        self._weight = 0.0

    def add(self, value: float) -> float:
        """The average with one more value; nan before the first finite one."""
        if math.isfinite(value):
            self._sum = self._keep * self._sum + (1 - self._keep) * value
            self._weight = self._keep * self._weight + (1 - self._keep)
        return self._sum / self._weight if self._weight else math.nan

    def restart(self, value: float) -> None:
        """Go on from an average that was reached before."""
        self._sum, self._weight = (value, 1.0) if math.isfinite(value) else (0.0, 0.0)


class Series:
    """One metric over the steps of a run: as reported, and smoothed where a span is given."""

    def __init__(self, span: float | None = None) -> None:
        self.raw = Stream()
        self.smooth = Stream()
        """Empty without a span."""
        self.last = math.nan
        """The newest value, nan included."""
        self._average = Smoothed(span) if span else None

    def add(self, x: float, y: float) -> None:
        """The value at a step, right of all before."""
        self.last = y
        self.raw.add(x, y)
        if self._average:
            self.smooth.add(x, self._average.add(y))

    def rewind(self, x: float) -> None:
        """Forget the values at `x` and right of it."""
        self.raw.rewind(x)
        self.smooth.rewind(x)
        self.last = self.raw.last
        if self._average:
            self._average.restart(self.smooth.last)


def finite(points: Iterable[Point]) -> list[float]:
    """The values that can be drawn."""
    return [y for _, y in points if math.isfinite(y)]
