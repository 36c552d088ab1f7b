"""What the events of one run add up to: the curves, the log, the answers, the newest figures.

The same events give the same history, live or years later.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from engine.events import (
    Ack,
    Answers,
    Drift,
    Ended,
    Eval,
    Event,
    Note,
    Phase,
    Recorded,
    Sample,
    Saved,
    Score,
    Shortage,
    Started,
    Step,
)
from engine.units import GIB

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


@dataclass(slots=True)
class Stream:
    """Points of rising x, at most CAPACITY stretches of them."""

    _buckets: list[Bucket] = field(default_factory=list)
    _width: int = 1
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


@dataclass(slots=True)
class Smoothed:
    """An exponential moving average over about `span` points, without the usual bias of its start.

    Values that are not finite are left out. The formula is Adam's: the average of what was seen,
    divided by the weight that it has so far.
    """

    span: float
    _sum: float = 0.0
    _weight: float = 0.0

    def add(self, value: float) -> float:
        """The average with one more value; nan before the first finite one."""
        if math.isfinite(value):
            keep = 1 - 1 / max(1.0, self.span)
            self._sum = keep * self._sum + (1 - keep) * value
            self._weight = keep * self._weight + (1 - keep)
        return self._sum / self._weight if self._weight else math.nan

    def restart(self, value: float) -> None:
        """Go on from an average that was reached before."""
        self._sum, self._weight = (value, 1.0) if math.isfinite(value) else (0.0, 0.0)


@dataclass(slots=True)
class Series:
    """One metric over the steps of a run: as reported, and smoothed where there is an average."""

    average: Smoothed | None = None
    raw: Stream = field(default_factory=Stream)
    smooth: Stream = field(default_factory=Stream)
    """Empty without an average."""
    last: float = math.nan
    """The newest value, nan included."""

    def add(self, x: float, y: float) -> None:
        """The value at a step, right of all before."""
        self.last = y
        self.raw.add(x, y)
        if self.average:
            self.smooth.add(x, self.average.add(y))

    def rewind(self, x: float) -> None:
        """Forget the values at `x` and right of it."""
        self.raw.rewind(x)
        self.smooth.rewind(x)
        self.last = self.raw.last
        if self.average:
            self.average.restart(self.smooth.last)


def finite(points: Iterable[Point]) -> list[float]:
    """The values that can be drawn."""
    return [y for _, y in points if math.isfinite(y)]


LOG_LINES: Final = 500
_RECENT_STEPS: Final = 30
_NOTHING_SECONDS: Final = 0.5
"""Between two steps: the clocks of a step and of its event are read apart."""

_REPORTED_BY_RESULT: Final = frozenset({"evaluate", "save"})


@dataclass(frozen=True, slots=True)
class Logged:
    """An event that is worth a line of the log."""

    time: float
    """Unix seconds."""
    event: Event
    best: float | None = None
    """The lowest held-out loss before it; None before the first."""


class Figures(NamedTuple):
    """The figures of evaluations beside the held-out loss, the newest of each."""

    score: Score | None = None
    written: Answers | None = None
    """Of answers that the model wrote by itself."""
    drift: Drift | None = None
    """How far the model has moved from its base on general questions."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of every step that is drawn as a curve."""

    name: str
    field: str
    """Of the event Step."""
    digits: int
    unit: int = 1
    """What a point of the curve counts the field in."""


SPEED: Final = Metric("tokens/s", "tokens_per_second", 0)
MEMORY: Final = Metric("memory GiB", "peak_memory_bytes", 1, GIB)
METRICS: Final = (Metric("lr", "lr", 5), Metric("grad norm", "grad_norm", 2), SPEED, MEMORY)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to one of the fixed prompts."""

    label: str
    """`before`, `step 60` or `after`."""
    text: str


@dataclass(slots=True)
class Between:
    """What a launch does between two steps: evaluations, samples and saves."""

    began_time: float = math.nan
    """Unix seconds of the end of the newest step."""
    last: float = 0.0
    """Seconds that it took the last time, which is what it takes after the last step."""
    _total: float = 0.0
    _steps: int = -1
    """The first one has what is done before any step."""

    def begin(self, time: float) -> None:
        """The step has ended."""
        self.began_time = time

    def end(self, time: float) -> None:
        """The next step begins."""
        self._steps += 1
        spent = time - self.began_time
        if spent > _NOTHING_SECONDS:
            self.last = spent
            self._total += spent if self._steps else 0.0

    @property
    def seconds_a_step(self) -> float:
        return self._total / self._steps if self._steps > 0 else 0.0


@dataclass(slots=True)
class History:
    """The state of a run after the events that were added, in their order."""

    started: Started | None = None
    phase: Phase | None = None
    """What the run does besides steps, until the next step."""
    step: Step | None = None
    total_steps: int | None = None
    ended: Ended | None = None
    shortage: Shortage | None = None
    """Of this launch, the newest: memory that ran out."""
    last_time: float = math.nan
    """Unix seconds of the newest event."""
    began_time: float = math.nan
    """Unix seconds of the first event of this launch."""
    held_out: list[tuple[int, float]] = field(default_factory=list)
    """Step and loss of each evaluation."""
    figures: Figures = field(default_factory=Figures)
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    """By prompt, in the order of the events."""
    saved: list[Saved] = field(default_factory=list)
    acks: dict[str, Ack] = field(default_factory=dict)
    log: list[Logged] = field(default_factory=list)
    """The newest LOG_LINES."""
    nan_since: int | None = None
    """First step of the stretch of losses without a number that the run is in."""
    loss: Series = field(default_factory=Series)
    series: dict[str, Series] = field(default_factory=lambda: {m.name: Series() for m in METRICS})
    """By the name of its metric."""
    phase_time: float = math.nan
    """Unix seconds at which `phase` began."""
    _seconds: list[float] = field(default_factory=list)
    """Of the last _RECENT_STEPS."""
    _between: Between = field(default_factory=Between)

    def add(self, events: Iterable[Recorded]) -> None:
        """Take in events, oldest first."""
        for recorded in events:
            self.last_time = recorded.time
            if math.isnan(self.began_time):
                self.began_time = recorded.time
            self._take(recorded)

    @property
    def steps_done(self) -> int:
        """Optimizer steps that count."""
        return self.step.step if self.step else 0

    @property
    def step_seconds(self) -> float:
        """Mean wall time of the last steps; nan before the first."""
        return sum(self._seconds) / len(self._seconds) if self._seconds else math.nan

    @property
    def seconds_left(self) -> float:
        """From the newest step to the end of the run: steps at the speed of the last ones, and
        evaluations and saves as they went so far."""
        if self.total_steps is None:
            return math.nan
        steps = self.total_steps - self.steps_done
        return steps * (self.step_seconds + self._between.seconds_a_step) + self._between.last

    @property
    def best(self) -> tuple[int, float] | None:
        """The evaluation with the lowest loss."""
        return best_of(self.held_out)

    @property
    def rises(self) -> int:
        """How often in a row the held-out loss has risen."""
        count = 0
        for (_, before), (_, after) in zip(self.held_out, self.held_out[1:], strict=False):
            count = count + 1 if after > before else 0
        return count

    def _take(self, recorded: Recorded) -> None:
        event, time = recorded.event, recorded.time
        match event:
            case Started():
                self._start(event, time)
            case Step():
                self._take_step(event, time)
            case Phase():
                self._take_phase(event, time)
            case Eval():
                self._take_eval(event, time)
            case Score() if event.dataset == "train":
                pass
            case Score():
                self.figures = self.figures._replace(score=event)
                self._log(time, event)
            case Answers():
                self.figures = self.figures._replace(written=event)
                self._log(time, event)
            case Drift():
                self.figures = self.figures._replace(drift=event)
                self._log(time, event)
            case Sample():
                label = event.when if event.when != "during" else f"step {event.step}"
                self.answers.setdefault(event.prompt, []).append(Answer(label, event.text))
            case Saved():
                self.saved.append(event)
                self.phase = None
                self._log(time, event)
            case Note():
                self._log(time, event)
            case Shortage():
                self.shortage = event
                self._log(time, event)
            case Ack():
                self.acks[event.id] = event
                self._between.begin(time)  # a pause is no work that comes again
            case Ended():
                self.ended, self.phase = event, None
                self._log(time, event)

    def _start(self, event: Started, time: float) -> None:
        self.started, self.total_steps = event, event.total_steps
        self.ended = self.phase = self.shortage = None
        self.began_time = time
        self._between = Between(time)
        if not self.loss.raw:
            # A thirtieth of the run: follows a fall in 100 steps, calms the noise of 10,000.
            self.loss = Series(Smoothed(min(50.0, max(3.0, event.total_steps / 30))))
        self._log(time, event)

    def _take_step(self, step: Step, time: float) -> None:
        self._between.end(time - step.seconds)
        self._between.begin(time)
        if self.step and step.step <= self.step.step:
            self._rewind(step.step)
        self.step, self.phase = step, None
        self.total_steps = step.total_steps or self.total_steps
        self._seconds = [*self._seconds[1 - _RECENT_STEPS :], step.seconds]
        if math.isfinite(step.loss):
            self.nan_since = None
        elif self.nan_since is None:
            self.nan_since = step.step
        self.loss.add(step.step, step.loss)
        for metric in METRICS:
            self.series[metric.name].add(step.step, getattr(step, metric.field) / metric.unit)

    def _rewind(self, step: int) -> None:
        for series in (self.loss, *self.series.values()):
            series.rewind(step)
        self.held_out = [each for each in self.held_out if each[0] < step]

    def _take_phase(self, phase: Phase, time: float) -> None:
        if self.phase is None or self.phase.name != phase.name:
            self.phase_time = time
            if self.ended:  # a new launch of a run that had ended
                self.ended, self.began_time = None, time
            if phase.name not in _REPORTED_BY_RESULT:
                self._log(time, phase)
        self.phase = phase

    def _take_eval(self, event: Eval, time: float) -> None:
        self._log(time, event)
        self.phase = None
        self.held_out = [each for each in self.held_out if each[0] < event.step]
        self.held_out.append((event.step, event.loss))

    def _log(self, time: float, event: Event) -> None:
        self.log.append(Logged(time, event, self.best[1] if self.best else None))
        del self.log[:-LOG_LINES]


def best_of(held_out: Sequence[tuple[int, float]]) -> tuple[int, float] | None:
    """Step and loss of the evaluation with the lowest loss; None before the first."""
    real = [each for each in held_out if math.isfinite(each[1])]
    return min(real, key=lambda each: each[1]) if real else None
