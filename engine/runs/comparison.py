"""Two runs side by side: their figures where both have learned as much, and what their configs say.

Compared at the same number of learned tokens and not at the same step: a step of another batch size
is another amount of learning.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Final

from engine.config import read_config
from engine.events import Eval, Sample, Score, Started, Step
from engine.runs.folder import RunFolder
from engine.runs.summary import Follower
from engine.units import GIB


@dataclass(slots=True)
class Curves:
    """Steps and evaluations in their order, answers and scores before and after."""

    started: Started | None = None
    """The newest."""
    steps: list[Step] = field(default_factory=list)
    evals: list[Eval] = field(default_factory=list)
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    """By dataset: `before` the first step and, the newest, `after`."""
    answers: dict[str, dict[str, str]] = field(default_factory=dict)
    """By prompt: `before` and `after`."""

    @property
    def learned_tokens(self) -> int:
        """Over all steps."""
        return sum(step.learned_tokens for step in self.steps)

    @property
    def best(self) -> Eval | None:
        """The evaluation with the lowest loss."""
        real = [each for each in self.evals if math.isfinite(each.loss)]
        return min(real, key=lambda each: each.loss, default=None)


def read_curves(run: RunFolder) -> Curves:
    """Read all events of a run. Raises OSError where they cannot be read."""
    follower, curves = Follower(run.events), Curves()
    while events := follower.read():
        for event in (recorded.event for recorded in events):
            match event:
                case Started():
                    curves.started = event
                case Step():
                    _forget(curves.steps, event.step)
                    curves.steps.append(event)
                case Eval():
                    _forget(curves.evals, event.step)
                    curves.evals.append(event)
                case Score():
                    when = "after" if event.step else "before"
                    curves.scores.setdefault(event.dataset, {})[when] = event
                case Sample() if event.when != "during":
                    curves.answers.setdefault(event.prompt, {})[event.when] = event.text
    return curves


def _forget(events: list[Step] | list[Eval], step: int) -> None:
    while events and events[-1].step >= step:
        events.pop()


_WINDOW: Final = 0.1
"""Share of the learned tokens, before the point of comparison, that a loss is the mean of."""

SPLIT_KEYS: Final = ("datasets", "val_set_size", "seed")
"""What decides the held-out rows of a run without `test_datasets`, beside the keys below."""

RENDER_KEYS: Final = (
    *("image_folder", "image_size", "image_resize_algorithm"),
    *("history_thinking", "chat_template_kwargs", "train_on_inputs"),
)
"""What a row becomes: its tokens and their kinds."""

LABEL_KEYS: Final = ("train_on_thinking",)
"""What of it is learned, beside them."""

HELD_OUT_KEYS: Final = (
    *("test_datasets", "sequence_len", "excess_length_strategy"),
    *RENDER_KEYS,
    *LABEL_KEYS,
)
"""What decides the tokens that a held-out loss is the mean of."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of both runs; nan where a run has none."""

    name: str
    first: float
    second: float
    digits: int


@dataclass(frozen=True, slots=True)
class ConfigDifferences:
    """What the configs of two runs say differently."""

    lines: Sequence[tuple[str, str, str]]
    """Key, what the first says, what the second says; defaults included."""
    same: int
    """How many keys have one value in both."""
    held_out: tuple[str, ...]
    """Keys by which the two hold out different rows, or learn other tokens of them: then a lower
    held-out loss does not mean the better model."""

    @property
    def held_out_on(self) -> str:
        """What the two hold out that is not the same: different rows, or other tokens of them."""
        other_rows = {*SPLIT_KEYS, "test_datasets"} & {*self.held_out}
        return "different rows" if other_rows else "other tokens"


def compare_figures(first: Curves, second: Curves) -> tuple[int, list[Figure]]:
    """The learned tokens at which both are compared, and the figures there and at the ends."""

    def figure(name: str, value: Callable[[Curves], float], digits: int) -> Figure:
        return Figure(name, value(first), value(second), digits)

    tokens = min(first.learned_tokens, second.learned_tokens)
    return tokens, [
        figure("loss at the same tokens", lambda run: _loss_at(run, tokens), 4),
        figure("held out at the same tokens", lambda run: _held_out_at(run, tokens), 4),
        figure("best held out", lambda run: run.best.loss if run.best else math.nan, 4),
        figure("step of the best", lambda run: run.best.step if run.best else math.nan, 0),
        *(
            figure(f"exact answers, {name}", partial(_exact, name), 3)
            for name in dict.fromkeys([*first.scores, *second.scores])
        ),
        figure("steps", lambda run: len(run.steps), 0),
        figure("learned tokens", lambda run: run.learned_tokens, 0),
        figure("tokens a second", _speed, 0),
        figure("peak memory, GiB", _peak_gib, 2),
        figure("seconds in steps", lambda run: sum(step.seconds for step in run.steps), 0),
    ]


def differences(first: RunFolder, second: RunFolder) -> ConfigDifferences:
    """Compare two runs by their config.yml. Raises UserError where one cannot be read."""
    configs = [read_config(run.config).config for run in (first, second)]
    a, b = (dict(_flat(config.model_dump(mode="json"), "")) for config in configs)
    keys = [*a, *(key for key in b if key not in a)]
    lines = [(key, a.get(key, "-"), b.get(key, "-")) for key in keys if a.get(key) != b.get(key)]
    sets_apart = any(config.test_datasets for config in configs)
    deciding = HELD_OUT_KEYS if sets_apart else (*SPLIT_KEYS, *HELD_OUT_KEYS)
    held_out = (key for key in deciding if getattr(configs[0], key) != getattr(configs[1], key))
    return ConfigDifferences(lines, len(keys) - len(lines), tuple(held_out))


def _flat(value: object, key: str) -> list[tuple[str, str]]:
    """Every plain value below `value`, with its key written as lora.targets[0]."""
    if isinstance(value, dict) and value:
        below = [(f"{key}.{name}" if key else str(name), inner) for name, inner in value.items()]
    elif isinstance(value, list) and value:
        below = [(f"{key}[{place}]", inner) for place, inner in enumerate(value)]
    else:
        return [(key, "null" if value is None else str(value))]
    return [each for name, inner in below for each in _flat(inner, name)]


def _loss_at(curves: Curves, learned_tokens: int) -> float:
    """Mean loss of the tokens learned last before `learned_tokens`; nan before the first."""
    start, total, weight, seen = learned_tokens * (1 - _WINDOW), 0.0, 0, 0
    for step in curves.steps:
        seen += step.learned_tokens
        if seen > learned_tokens:
            break
        if seen > start:
            total += step.loss * step.learned_tokens
            weight += step.learned_tokens
    return total / weight if weight else math.nan


def _held_out_at(curves: Curves, learned_tokens: int) -> float:
    """Held-out loss of the last evaluation until then; nan before the first."""
    seen = until = 0
    for step in curves.steps:
        seen += step.learned_tokens
        if seen > learned_tokens:
            break
        until = step.step
    return next((e.loss for e in reversed(curves.evals) if e.step <= until), math.nan)


def _exact(dataset: str, curves: Curves) -> float:
    """The newest share of exact answers."""
    scores = [*curves.scores.get(dataset, {}).values()]
    return scores[-1].exact if scores else math.nan


def _speed(curves: Curves) -> float:
    return median(step.tokens_per_second for step in curves.steps) if curves.steps else math.nan


def _peak_gib(curves: Curves) -> float:
    return max((step.peak_memory_bytes for step in curves.steps), default=math.nan) / GIB
