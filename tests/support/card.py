"""The card that a test of tests/gpu runs on."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Card:
    """A card, or its stand-in; outside of `here()` this process trains on the CPU."""

    real: bool
    capability: tuple[int, int]
    uuid: str
    here: Callable[[], AbstractContextManager[object]]

    @property
    def half(self) -> torch.dtype:
        """What `bf16: auto` must be."""
        return torch.bfloat16 if self.capability >= (8, 0) else torch.float32
