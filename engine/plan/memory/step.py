"""What decides the memory of one run, and what is trained in it.

Each trained number is held up to four times, in types of its own: itself, its gradient, the
optimizer's state, and what bfloat16 cuts off of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from engine.catalog import Architecture, ModuleTable
from engine.config import RunConfig
from engine.data.statistics import Statistics
from engine.plan.device import Device
from engine.plan.layers import Widths, image_tokens_at_once, tokens_of_one_image, widths
from engine.plan.targets import adapter_parameters, trainable_parameters
from engine.plan.trainer import SMALLEST_CHUNK_BYTES, base_bytes_of


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
class Step:
    """One run, as far as it decides memory."""

    config: RunConfig
    architecture: Architecture
    device: Device
    statistics: Statistics | None
    stack: Stack
    base_bytes: int
    """Of one weight that is not quantized."""
    tokens: int
    """Of one forward pass."""
    learned: int
    """Of them, those that are learned at most."""
    of_images: int
    """Of them, image tokens."""
    largest_image: int
    """Tokens that one image can have."""
    adapter: int
    """Numbers of the adapter."""
    whole: int
    """Numbers of weights that are trained whole."""
    chunk_bytes: int = SMALLEST_CHUNK_BYTES
    """Float32 logits that the loss holds at once."""

    @property
    def table(self) -> ModuleTable:
        return self.architecture.table

    @property
    def widths(self) -> Widths:
        return widths(self.table)

    @property
    def offloads(self) -> bool:
        """Whether there is another memory to move to."""
        return self.device.has_ram_beside

    @property
    def trainable(self) -> int:
        """All numbers that are trained."""
        return self.adapter + self.whole

    @property
    def adapter_bytes(self) -> int:
        """Of one number of the adapter, and of its gradient."""
        narrow = self.config.peft_autocast_adapter_dtype is False
        return 2 if narrow else self.stack.adapter_bytes

    @property
    def state_bytes(self) -> float:
        """Of the optimizer, wherever its state lies."""
        optimizer = self.config.optimizer
        return self.trainable * self.stack.state_bytes.get(optimizer, STATE_BYTES[optimizer])

    @property
    def pages_state(self) -> bool:
        """Whether the optimizer's state gives way to RAM."""
        return self.offloads and self.config.optimizer in PAGED

    @property
    def rest_bytes(self) -> int:
        """What is kept beside whole weights in bfloat16, so that small steps move them."""
        return REST_BYTES * self.whole if self.base_bytes == 2 and self.stack.keeps_rest else 0

    def trained_bytes(self) -> dict[str, float]:
        """Adapter, gradients and optimizer state on the device.

        Weights that are trained whole keep their type, and beside an adapter they are a copy.
        """
        held = self.adapter * self.adapter_bytes + self.whole * self.base_bytes
        return {
            "adapter": held if self.config.adapter else 0,
            "gradients": held,
            "optimizer": (0.0 if self.pages_state else self.state_bytes) + self.rest_bytes,
        }


def make_step(
    config: RunConfig,
    architecture: Architecture,
    device: Device,
    statistics: Statistics | None = None,
    stack: Stack = WINDTUNNEL,
) -> Step:
    """The run of `config`; rows of unknown data have `sequence_len` tokens."""
    table, tokens = architecture.table, _tokens_at_once(config, statistics)
    of_images = image_tokens_at_once(config, table, tokens, statistics)
    adapter = adapter_parameters(table, config) if config.adapter else 0
    return Step(
        config,
        architecture,
        device,
        statistics,
        stack,
        base_bytes_of(config, device),
        tokens,
        _learned_at_once(config, tokens, statistics),
        of_images,
        tokens_of_one_image(architecture, of_images, statistics),
        adapter,
        trainable_parameters(table, config) - adapter,
    )


def _tokens_at_once(config: RunConfig, statistics: Statistics | None) -> int:
    """Tokens of one forward pass: full sequences when packed, else the longest row that is kept."""
    row = config.sequence_len
    if statistics and not config.sample_packing:
        row = min(row, statistics.longest_kept(config))
    tokens = config.micro_batch_size * row
    return min(tokens, max(1, statistics.total_tokens)) if statistics else tokens


def _learned_at_once(config: RunConfig, tokens: int, statistics: Statistics | None) -> int:
    """Of the tokens of a forward pass, those that the loss can see; a packed sequence may be made
    of nothing else. Rows may have been counted before `train_on_inputs` was set."""
    most = statistics.most_learned_tokens if statistics else None
    if most is None or config.sample_packing or config.train_on_inputs:
        return tokens
    return min(tokens, config.micro_batch_size * most)
