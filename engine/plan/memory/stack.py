"""What decides the memory of a run beside its config: how the trainer that reads it is built.

By it the formula is held against figures that other tools published for the same config: each
difference between their stack and ours is a field, read off their source or their own description,
and never fitted to one of the figures.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True, slots=True)
class Stack:
    """How a trainer does what a config leaves open; the defaults are ours."""

    name: str = "Windtunnel"
    tower: Literal["idle in RAM", "on the device", "quantized"] = "idle in RAM"
    """The vision tower of a run without images. `quantized`: always on the device, its matrices in
    the format of the others."""
    stacks_at_once: int = 0
    """Fused expert tensors of a layer, of the size of the larger one, that are in 16 bits while
    the layer works; ours dequantizes one expert at a time. Both of a layer are one and a half."""
    stacks_formed: int = 0
    """The same in a run with an adapter on the experts, where the update is formed whole."""
    logits_bytes: float = 0.0
    """Held for each learned token and word of the vocabulary; 0 where the loss is fused."""
    cuts_loss: bool = False
    """Whether cut-cross-entropy computes the loss of a config that does not name it, too."""
    adapter_bytes: int = 4
    """Of one number of the adapter and of its gradient, unless the config says otherwise."""
    state_bytes: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """Optimizer state a trained number by optimizer, where it is not as ours."""
    keeps_rest: bool = True
    """Whether bfloat16 weights that move keep beside them what bfloat16 cuts off."""
    steps_in_backward: bool = False
    """Whether a weight moves as soon as its gradient is there, which is then dropped."""


DIFFERENCES: Mapping[str, str] = MappingProxyType(
    {
        "tower": "the vision tower",
        "stacks_at_once": "a layer's experts in 16 bits at once",
        "stacks_formed": "the update of a layer's experts formed whole",
        "logits_bytes": "whole logits",
        "cuts_loss": "the loss by cut-cross-entropy",
        "adapter_bytes": "the adapter's type",
        "state_bytes": "the optimizer's states",
        "keeps_rest": "what bfloat16 weights keep beside them",
        "steps_in_backward": "weights that move in the backward pass",
    }
)
"""What each field decides."""

WINDTUNNEL = Stack()
AXOLOTL = Stack(
    "Axolotl",
    tower="quantized",
    stacks_at_once=3,
    stacks_formed=5,
    cuts_loss=True,
    keeps_rest=False,
)
"""With cut-cross-entropy, as its Mistral examples are run. Without `llm_int8_skip_modules`
bitsandbytes takes every linear but the head. Its parametrization of experts caches the dequantized
tensors of a layer during the layer's backward pass, gate and up twice the size of down; PEFT's
adapter on them forms the update of the larger one beside it. In halves of the larger tensor: 3, and
5 with the adapter."""
