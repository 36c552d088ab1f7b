"""What is trained in a run, with its gradients and its optimizer's state.

Separate from `frozen` because each trained number is held up to four times, in types of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from engine.catalog import ModuleTable
from engine.config import RunConfig
from engine.plan.memory.stack import Stack
from engine.plan.targets import (
    adapter_parameters,
    trainable_parameters,
)

REST_BYTES = 2
"""What bfloat16 cuts off of a trained float32 number, which the trainer keeps beside it."""
EIGHT_BIT = ("adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit", "paged_adamw_8bit")
STATE_BYTES: Mapping[str, float] = MappingProxyType(
    {
        **dict.fromkeys(EIGHT_BIT, 2 + 8 / 256),
        **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"), 8),
    }
)
"""State of a trained number: two float32 moments, or two 8-bit ones, each with a float32 scale for
256."""
PAGED = ("paged_adamw_8bit", "paged_adamw_32bit")
"""Optimizers whose state is in unified memory, which makes room on the device when it must."""


@dataclass(frozen=True, slots=True)
class Trainable:
    """Numbers that are trained."""

    adapter: int
    whole: int
    """Of weights that are trained whole."""

    @property
    def all(self) -> int:
        return self.adapter + self.whole


def trainable_numbers(table: ModuleTable, config: RunConfig) -> Trainable:
    """How many numbers of the adapter and of whole weights `config` trains."""
    adapter = adapter_parameters(table, config) if config.adapter else 0
    return Trainable(adapter, trainable_parameters(table, config) - adapter)


def adapter_bytes(config: RunConfig, stack: Stack) -> int:
    """Of one number of the adapter, and of its gradient."""
    return 2 if config.peft_autocast_adapter_dtype is False else stack.adapter_bytes


def state_bytes(config: RunConfig, stack: Stack) -> float:
    """Of the optimizer, for one trained number, wherever it lies."""
    return stack.state_bytes.get(config.optimizer, STATE_BYTES[config.optimizer])


def trained_bytes(
    config: RunConfig, trainable: Trainable, base_bytes: int, stack: Stack, *, pages: bool
) -> dict[str, float]:
    """Adapter, gradients and optimizer state on the device, which `pages` paged state out or not.

    Weights that are trained whole keep their type, and beside an adapter they are a copy.
    """
    narrow = adapter_bytes(config, stack)
    held = trainable.adapter * narrow + trainable.whole * base_bytes
    paged = pages and config.optimizer in PAGED
    state = 0.0 if paged else trainable.all * state_bytes(config, stack)
    return {
        "adapter": held if config.adapter else 0,
        "gradients": held,
        "optimizer": state + rest_bytes(trainable, base_bytes, stack),
    }


def rest_bytes(trainable: Trainable, base_bytes: int, stack: Stack) -> int:
    """What is kept beside whole weights in bfloat16, so that small steps move them."""
    return REST_BYTES * trainable.whole if base_bytes == 2 and stack.keeps_rest else 0
