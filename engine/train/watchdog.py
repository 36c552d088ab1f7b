"""Whether a step's loss is one that somebody should look at, or that has to end the run.

Apart from the loop because it is pure arithmetic over the losses so far. A loss that is no number
is not judged here: that ends every run.
"""

import math
from collections import deque
from statistics import median

from engine.config import RunConfig

PATIENCE_STEPS = 3
"""Axolotl's, where the config names none."""
WINDOW_STEPS, LEAST_STEPS = 50, 10
"""Losses that the median is taken of, and how many there have to be."""
SPIKE_RATIO, SPIKE_NATS = 2.0, 1.0
"""A spike is both: twice the median, and a whole nat above it, which a memorised loss of 0.01 that
doubles is not."""


class LossWatch:
    """The losses of one launch, and what is odd about the newest."""

    def __init__(self, config: RunConfig, vocabulary: int) -> None:
        self._limit = config.loss_watchdog_threshold
        self._patience = config.loss_watchdog_patience or PATIENCE_STEPS
        self._guessing = math.log(vocabulary)
        self._recent: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._above = 0
        self._quiet_steps = 0

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

    def too_high(self, loss: float) -> bool:
        """Whether this is the last step that `loss_watchdog_threshold` lets pass."""
        self._above = self._above + 1 if self._limit is not None and loss > self._limit else 0
        return self._above >= self._patience
