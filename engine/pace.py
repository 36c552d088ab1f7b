"""How often something that happens all the time is reported."""

import math
import time
from collections.abc import Callable


def every(seconds: float) -> Callable[[], bool]:
    """A question whose answer is yes at first, and again once `seconds` have passed since a yes."""
    next_time = -math.inf

    def is_due() -> bool:
        nonlocal next_time
        now = time.monotonic()
        due = now >= next_time
        if due:
            next_time = now + seconds
        return due

    return is_due
