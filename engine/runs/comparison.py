"""Two runs side by side: their figures where both have learned as much, and what their configs say.

Compared at the same number of learned tokens and not at the same step: a step of another batch size
is another amount of learning. Pure but for reading the two folders.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from engine.config import read_config
from engine.events import Eval, Score, Step
from engine.runs.folder import RunFolder
from engine.runs.follower import Follower
from engine.units import GIB

_WINDOW: Final = 0.1
"""Share of the learned tokens, before the point of comparison, that a loss is the mean of."""


@dataclass(slots=True)
class Curves:
    """What a run's events say, repeated steps once."""

    steps: list[Step] = field(default_factory=list)
    evals: list[Eval] = field(default_factory=list)
    scores: dict[str, Score] = field(default_factory=dict)
    """The newest of each dataset."""

    @property
    def learned_tokens(self) -> int:
        """Over all steps."""
        return sum(step.learned_tokens for step in self.steps)

    @property
    def best(self) -> Eval | None:
        """The evaluation with the lowest loss."""
        real = [each for each in self.evals if math.isfinite(each.loss)]
        return min(real, key=lambda each: each.loss, default=None)

    def loss_at(self, learned_tokens: int) -> float:
        """Mean loss of the tokens learned last before `learned_tokens`; nan before the first."""
        start, total, weight, seen = learned_tokens * (1 - _WINDOW), 0.0, 0, 0
        for step in self.steps:
            seen += step.learned_tokens
            if seen > learned_tokens:
                break
            if seen > start:
                total += step.loss * step.learned_tokens
                weight += step.learned_tokens
        return total / weight if weight else math.nan

    def step_at(self, learned_tokens: int) -> int:
        """Steps done when that many tokens were learned."""
        seen = done = 0
        for step in self.steps:
            seen += step.learned_tokens
            if seen > learned_tokens:
                break
            done = step.step
        return done

    def held_out_at(self, learned_tokens: int) -> float:
        """Held-out loss of the last evaluation until then; nan before the first."""
        until = self.step_at(learned_tokens)
        return next((e.loss for e in reversed(self.evals) if e.step <= until), math.nan)


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of both runs; nan where a run has none."""

    name: str
    first: float
    second: float
    digits: int


def read_curves(run: RunFolder) -> Curves:
    """All steps, evaluations and scores of a run; what a resume repeated counts once."""
    follower, curves = Follower(run.events), Curves()
    while events := follower.read():
        for event in (recorded.event for recorded in events):
            if isinstance(event, Step):
                _forget(curves.steps, event.step)
                curves.steps.append(event)
            elif isinstance(event, Eval):
                _forget(curves.evals, event.step)
                curves.evals.append(event)
            elif isinstance(event, Score):
                curves.scores[event.dataset] = event
    return curves


def _forget(events: list[Step] | list[Eval], step: int) -> None:
    while events and events[-1].step >= step:
        events.pop()


def compare_figures(first: Curves, second: Curves) -> tuple[int, list[Figure]]:
    """The learned tokens at which both are compared, and the figures there and at the ends."""
    tokens = min(first.learned_tokens, second.learned_tokens)
    figures = [
        Figure("loss at the same tokens", first.loss_at(tokens), second.loss_at(tokens), 4),
        Figure("held out at the same tokens", *_both(first, second, tokens), 4),
        Figure("best held out", _loss(first.best), _loss(second.best), 4),
        Figure("step of the best", _step(first.best), _step(second.best), 0),
    ]
    for name in dict.fromkeys([*first.scores, *second.scores]):
        pair = [each.scores.get(name) for each in (first, second)]
        exact = [score.exact if score else math.nan for score in pair]
        figures.append(Figure(f"exact answers, {name}", exact[0], exact[1], 3))
    figures += [
        Figure("steps", float(len(first.steps)), float(len(second.steps)), 0),
        Figure("learned tokens", float(first.learned_tokens), float(second.learned_tokens), 0),
        Figure("tokens a second", _speed(first.steps), _speed(second.steps), 0),
        Figure("peak memory, GiB", _peak_gib(first.steps), _peak_gib(second.steps), 2),
        Figure("seconds in steps", _seconds(first.steps), _seconds(second.steps), 0),
    ]
    return tokens, figures


def differences(first: RunFolder, second: RunFolder) -> tuple[list[tuple[str, str, str]], int]:
    """What the configs of two runs say differently, by key, defaults included; and how many keys
    say the same. Reads both files; raises UserError where one cannot be read."""
    a, b = (
        dict(_flat(read_config(run.config).config.model_dump(mode="json"), ""))
        for run in (first, second)
    )
    keys = [*a, *(key for key in b if key not in a)]
    found = [(key, a.get(key, "-"), b.get(key, "-")) for key in keys if a.get(key) != b.get(key)]
    return found, len(keys) - len(found)


def _flat(value: object, key: str) -> list[tuple[str, str]]:
    """Every plain value below `value`, with its key written as lora.targets[0]."""
    if isinstance(value, dict) and value:
        below = [(f"{key}.{name}" if key else str(name), inner) for name, inner in value.items()]
    elif isinstance(value, list) and value:
        below = [(f"{key}[{place}]", inner) for place, inner in enumerate(value)]
    else:
        return [(key, "null" if value is None else str(value))]
    return [each for name, inner in below for each in _flat(inner, name)]


def _both(first: Curves, second: Curves, tokens: int) -> tuple[float, float]:
    return first.held_out_at(tokens), second.held_out_at(tokens)


def _loss(event: Eval | None) -> float:
    return event.loss if event else math.nan


def _step(event: Eval | None) -> float:
    return float(event.step) if event else math.nan


def _speed(steps: Sequence[Step]) -> float:
    return median(step.tokens_per_second for step in steps) if steps else math.nan


def _peak_gib(steps: Sequence[Step]) -> float:
    return max(step.peak_memory_bytes for step in steps) / GIB if steps else math.nan


def _seconds(steps: Sequence[Step]) -> float:
    return sum(step.seconds for step in steps)
