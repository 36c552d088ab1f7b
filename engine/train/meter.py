"""How fast the run goes and how much memory it takes, with the clock passed in.

Apart so that the loop holds no timing arithmetic and a test can hold the clock still.
"""

import resource
import sys
import time
from collections.abc import Callable

import torch

from engine.plan.memory.formula import PROCESS_BYTES


def peak_memory_bytes(device: torch.device) -> int:
    """Peak bytes allocated on the card, or the process's peak resident bytes on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def held_memory_bytes(device: torch.device) -> int:
    """Bytes allocated on the card now; on a CPU what the process held at most, less what it takes
    before it loads anything."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return max(0, peak_memory_bytes(device) - PROCESS_BYTES)


class Meter:
    """Seconds and tokens of each optimizer step, from making its batch to its last moved weight."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic) -> None:
        self._device, self._clock = device, clock
        self._started = clock()

    def start(self) -> None:
        """Begin a step: an eval, a save or a pause before it is not its time."""
        self._started = self._clock()

    def stop(self, tokens: int) -> tuple[float, float]:
        """End a step when the device has done it; returns its seconds and its tokens a second.

        Waits for the optimizer alone, as the loss was read before the weights moved. Events on the
        device would be waited for as well, because the step's figures are written at once.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = self._clock() - self._started
        return seconds, tokens / seconds if seconds > 0 else 0.0
