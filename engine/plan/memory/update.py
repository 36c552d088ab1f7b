"""What the optimizer's step takes beside weights, gradients and state that are there already.

Separate from `moments` because it follows from code of other libraries, and from how our own step
moves bfloat16 weights: every constant says which tensors it counts. tests/train/test_update.py
holds them against what torch's allocator was asked for.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from engine.plan.memory.trained import EIGHT_BIT, adapter_bytes
from engine.plan.targets import largest_moving
from engine.plan.trainer import WIDENED_NUMBERS

if TYPE_CHECKING:
    from engine.plan.memory.moments import Step

CPU_BYTES: Final[Mapping[str, int]] = MappingProxyType(
    {
        # Its root, the quotient of that, and the quotient of the tensor before, which may be as
        # large (torch.optim.adam, _single_tensor_adam).
        "adamw_torch": 12,
        # Both moments in float32, the scaled gradient, a root and its quotient; and for 32 bits
        # the last three alone (bitsandbytes/backends/cpu/ops.py).
        **dict.fromkeys(EIGHT_BIT, 20),
        "paged_adamw_32bit": 12,
        "adamw_torch_fused": 0,
    }
)
"""For each number of the tensor that is moved, one after another."""
FOREACH_BYTES: Final = 4
"""On a GPU `adamw_torch` takes the root of all second moments at once (torch.optim.adam,
_multi_tensor_adam). The other optimizers are kernels that work in place."""
SPLIT_BYTES: Final = 4
"""One number of `engine.train.optim.split`: an int32 beside the float32 that is cut in two."""
JOIN_BYTES: Final = 8
"""On a CPU `engine.train.optim.join` adds the cut-off bits by way of a copy in int32."""
ROUND_BYTES: Final = 12
"""Of `engine.train.optim.round_at_random`: chance, the sum with it, and that shifted."""


def update_bytes(step: "Step") -> float:
    """The most that the step takes, in bytes.

    Weights in bfloat16 are moved in float32, a few at a time or the largest alone, each with its
    gradient: 4 bytes more, or 2 of a weight whose cut-off bits wait beside it meanwhile.
    """
    moving, stack, cpu = step.moving, step.stack, step.device.kind == "cpu"
    largest = largest_moving(step.table, step.config)
    whole = moving.whole if step.base_bytes == 2 and stack.keeps_rest else 0
    factors = moving.adapter if adapter_bytes(step.config, stack) == 2 else 0
    widened = min(whole + factors, max(WIDENED_NUMBERS, largest))
    cut = max(ROUND_BYTES * bool(factors), (JOIN_BYTES if cpu else SPLIT_BYTES) * bool(whole))
    at_once = moving.all - whole - factors + widened
    return (4 if factors else 2) * widened + max(cut * largest, _working(step, largest, at_once))


def _working(step: "Step", largest: int, at_once: int) -> int:
    """What the optimizer makes for itself."""
    optimizer = step.config.optimizer
    if step.stack.steps_in_backward:
        return 0
    if step.device.kind == "cpu":
        return CPU_BYTES[optimizer] * largest
    return FOREACH_BYTES * at_once if optimizer == "adamw_torch" else 0
