"""What a run's losses warn of, and what ends the run: arithmetic over the losses so far."""

import math
from collections import deque
from collections.abc import Iterable
from statistics import mean, median

from torch import nn

from engine.config import RunConfig
from engine.errors import UserError

PATIENCE_STEPS = 3
"""Axolotl's, where the config names none."""
WINDOW_STEPS, LEAST_STEPS = 50, 10
"""Losses that the median is taken of, and how many there have to be."""
SPIKE_RATIO, SPIKE_NATS = 2.0, 1.0
"""A spike is both: twice the median, and a whole nat above it, which a memorised loss of 0.01 that
doubles is not."""
RISES = 2
"""Rises of the held-out loss in a row that are warned of."""


class LossAlarm:
    """The training losses of one launch, and what is odd about the newest."""

    def __init__(self, config: RunConfig, vocabulary: int) -> None:
        self._limit = config.loss_watchdog_threshold
        self._patience = config.loss_watchdog_patience or PATIENCE_STEPS
        self._guessing = math.log(vocabulary)
        self._recent: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._above = 0
        self._quiet_steps = 0

    def stop_reason(self, step: int, loss: float, norm: float) -> str | None:
        """Why the run has to end before `step` changes anything: a loss or a gradient norm that is
        no number, or one loss too many above `loss_watchdog_threshold`."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"Step {step} gave a loss of {loss:g} and a gradient norm of {norm:g}."
        self._above = self._above + 1 if self._limit is not None and loss > self._limit else 0
        if self._limit is None or self._above < self._patience:
            return None
        return (
            f"The loss is {loss:.2f} at step {step}, and stays above "
            f"loss_watchdog_threshold: {self._limit:g}."
        )

    def odd_start(self, loss: float) -> str | None:
        """A sentence about the untouched model's loss, where guessing would be better."""
        if loss <= self._guessing:
            return None
        return (
            f"the first loss is {loss:.2f}, worse than {self._guessing:.2f}, which a model has "
            "that takes every token for equally likely: usual for a base that was never trained; "
            "of a trained one the weights or the tokenizer are not its own"
        )

    def spike(self, loss: float) -> float | None:
        """The median of the losses before, where `loss` leaps above it; then quiet for a while."""
        usual = median(self._recent) if len(self._recent) >= LEAST_STEPS else math.inf
        self._recent.append(loss)
        self._quiet_steps -= 1
        if loss <= max(SPIKE_RATIO * usual, usual + SPIKE_NATS) or self._quiet_steps > 0:
            return None
        self._quiet_steps = LEAST_STEPS
        return usual


class OverfittingAlarm:
    """Whether the held-out loss rises while the training loss falls: learning by heart."""

    def __init__(self) -> None:
        self._steps: list[float] = []
        self._training = math.inf
        self._risen: list[float] = []
        """Held-out losses of which each is above the one before."""

    def add_step(self, loss: float) -> None:
        """Take in a training step's loss."""
        self._steps.append(loss)

    def add_evaluation(self, loss: float, best_step: int | None) -> str | None:
        """Take in a held-out loss; a sentence at the second rise in a row, since one is noise.

        `best_step` is the step of the save with the lowest held-out loss so far.
        """
        training = mean(self._steps) if self._steps else math.inf
        learns = training < self._training
        self._steps, self._training = [], training
        rises = bool(self._risen) and learns and loss > self._risen[-1]
        self._risen = [*self._risen, loss] if rises else [loss]
        if len(self._risen) != 1 + RISES:
            return None
        path = " -> ".join(f"{each:.3f}" for each in self._risen)
        kept = f"the save of step {best_step} is the best" if best_step else "no save is better"
        return (
            f"the held-out loss has risen twice in a row ({path}) while the training loss still "
            f"falls: the model learns its rows by heart, and {kept}"
        )


def unreached(trainable: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """A sentence about what got no gradient from the first step.

    Raises UserError where nothing got one.
    """
    trainable = list(trainable)
    idle = [name for name, parameter in trainable if parameter.grad is None]
    if len(idle) == len(trainable):
        raise UserError(
            "Nothing would be trained.",
            f"No row of the first step reaches what is trained, such as {idle[0]}.",
            "Rows with images reach the vision tower; change the rows, or what is trained.",
        )
    if not idle:
        return None
    return (
        f"{len(idle)} of {len(trainable)} trained tensors were not reached by the first step, such "
        f"as {idle[0]}: without rows that reach them they stay as they are"
    )
