"""What decides the memory of a run: what is trained, and the weights.

Each trained number is held up to four times, in types of its own: itself, its gradient, the
optimizer's state, and what bfloat16 cuts off of it. `sharding` has one card's share of all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Literal, NamedTuple

from engine.catalog import ModuleTable
from engine.catalog.modules import layer_of
from engine.config import RunConfig
from engine.data.statistics import Statistics
from engine.plan.device import Device, Place
from engine.plan.layers import Widths, image_tokens_at_once, tokens_of_one_image, widths
from engine.plan.targets import adapter_parameters, trainable_parameters
from engine.plan.trainer import SMALLEST_CHUNK_BYTES, base_bytes_of, is_kept, kept_modules


@dataclass(frozen=True, slots=True)
class Stack:
    """How a trainer does what a config leaves open; the defaults are ours.

    By it the formula is held against figures that other tools published for the same config: each
    difference is a field, read off their source or their own description, and never fitted to one
    of the figures.
    """

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
    place: Place
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
    def device(self) -> Device:
        return self.place.device

    @property
    def statistics(self) -> Statistics | None:
        return self.place.statistics

    @property
    def table(self) -> ModuleTable:
        return self.place.table

    @property
    def widths(self) -> Widths:
        tensor, expert = self.config.tensor_parallel_size, self.config.expert_parallel_size
        found = widths(self.table)
        return found.cut(tensor or 1, expert or 1) if tensor or expert else found

    @property
    def offloads(self) -> bool:
        """Whether there is another memory to move to."""
        return self.device.has_ram_beside

    @property
    def trainable(self) -> int:
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

    @property
    def quantizes(self) -> bool:
        return self.config.load_in_4bit or self.config.load_in_8bit

    @property
    def counts(self) -> "Sizes":
        every = self.stack.tower == "quantized" and self.quantizes
        return sizes_of(self.table, ("lm_head",) if every else kept_modules(self.config))

    def bytes_of(self, part: str, held: "Held") -> float:
        """What `held`, numbers of a part of the weights, take."""
        return self.numbers_bytes(part, held) + self.statistics_bytes(part, held)

    def numbers_bytes(self, part: str, held: "Held") -> float:
        """The same without the statistics of what is in 4 bits."""
        config, base_bytes = self.config, self.base_bytes
        if part == "experts":
            return held.plain * (PACKED_BYTES if config.quantize_moe_experts else base_bytes)
        if config.load_in_4bit:
            return held.plain * base_bytes + held.packed * PACKED_BYTES
        if config.load_in_8bit:
            return held.plain * base_bytes + held.packed + held.rows * INT8_ROW_BYTES
        return float((held.plain + held.packed) * base_bytes)

    def statistics_bytes(self, part: str, held: "Held") -> float:
        """Scales of what is in 4 bits, which no optimizer and no FSDP knows of."""
        if part == "experts":
            return STATISTICS_BYTES * held.plain * self.config.quantize_moe_experts
        return STATISTICS_BYTES * held.packed * self.config.load_in_4bit

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


def make_step(config: RunConfig, place: Place, stack: Stack = WINDTUNNEL) -> Step:
    """The run of `config` at `place`."""
    table, statistics = place.table, place.statistics
    tokens = _tokens_at_once(config, statistics)
    of_images = image_tokens_at_once(config, table, tokens, statistics)
    adapter = adapter_parameters(table, config) if config.adapter else 0
    return Step(
        config,
        place,
        stack,
        base_bytes_of(config, place.device),
        tokens,
        _learned_at_once(config, tokens, statistics),
        of_images,
        tokens_of_one_image(place, of_images),
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


PACKED_BYTES, STATISTICS_BYTES = 0.5, 1 / 64 + 4 / (64 * 256)
"""A weight in NF4 with double quantization: 4 bits, and beside them an 8-bit scale for 64 weights,
a float32 scale for 256 of those (QLoRA, arXiv 2305.14314)."""
INT8_ROW_BYTES = 4
"""The float32 maximum that the bytes of a row are scaled by (LLM.int8(), arXiv 2208.07339)."""
SLOTS = 2
"""Offloaded layers that are on the device at once: one at work, the next one on its way."""

WEIGHTS = ("linear", "experts", "embeddings", "norms", "router", "vision", "projector")
"""The parts of an estimate that are the model's own weights."""
_PARTS = {
    "attention": "linear",
    "mlp": "linear",
    "experts": "experts",
    "embedding": "embeddings",
    "head": "embeddings",
    "norm": "norms",
    "router": "router",
    "vision": "vision",
    "projector": "projector",
}


class Held(NamedTuple):
    """Numbers of one part of a model by how a quantized run holds them."""

    plain: int = 0
    packed: int = 0
    """Of linears that are quantized."""
    rows: int = 0
    """Their outputs."""

    def __add__(self, other: "Held") -> "Held":  # type: ignore[override]
        return Held(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True, slots=True, eq=False)
class Sizes:
    """Numbers of a model, by part and by layer."""

    parts: Mapping[str, Held]
    layers: tuple[Mapping[str, Held], ...]
    """The linears and the experts of each layer of the language model."""
    head: int
    """Numbers of the head, or of the embedding that it shares."""
    all: int
    largest: int
    """Numbers of the largest tensor."""
    largest_packed: int
    largest_expert: int
    """Numbers of the larger matrix of one expert."""


@lru_cache(maxsize=32)
def sizes_of(table: ModuleTable, kept: tuple[str, ...]) -> Sizes:
    """Count `table`; `kept` are the modules that no quantized run quantizes."""
    parts = dict.fromkeys(WEIGHTS, Held())
    layers: dict[int, dict[str, Held]] = {}
    head = largest_packed = largest_expert = 0
    for row in table.parameters:
        part = _PARTS[row.group]
        packed = row.quantizable and not is_kept(row.module, kept)
        found = Held(0, row.count, row.shape[0]) if packed else Held(row.count)
        parts[part] += found
        if packed:
            largest_packed = max(largest_packed, row.count)
        if part == "experts":
            largest_expert = max(largest_expert, row.count // row.shape[0])
        if row.group == "head" or (row.group == "embedding" and not head):
            head = row.count or head
        if part in ("linear", "experts"):
            layer = layers.setdefault(layer_of(row.name), {})
            layer[part] = layer.get(part, Held()) + found
    return Sizes(
        parts=parts,
        layers=tuple(layers[number] for number in sorted(layers)),
        head=head,
        all=table.total_parameters,
        largest=max(row.count for row in table.parameters),
        largest_packed=largest_packed,
        largest_expert=largest_expert,
    )


def packed_numbers(config: RunConfig, table: ModuleTable) -> int:
    """Weights that a run holds in 4 bits."""
    sizes = sizes_of(table, kept_modules(config))
    linears = sum(held.packed for held in sizes.parts.values()) if config.load_in_4bit else 0
    return linears + (sizes.parts["experts"].plain if config.quantize_moe_experts else 0)
