"""A whole run's step without a card: the real model at full size on tensors without contents.

It shares nothing with the plan's formulas, so that it can judge them. The trainer's own code builds
the model, adapts it and runs it; every tensor has the type and shape that a card would hold, and
`live` counts them. Memory and time are those of the Python objects alone: a model of 128 billion
weights takes about a minute.
"""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from engine.catalog import Architecture
from engine.config import RunConfig
from engine.plan.trainer import CHUNK_BYTES, SMALLEST_CHUNK_BYTES, chunk_rows, names_cut_loss
from engine.train.checkpoint import trained_parameters
from engine.train.experts import (
    GroupedNF4,
    balance_loss,
    balance_weight,
    replace_experts,
    watch_routers,
)
from engine.train.forward import Model, checkpoint_activations, head_of, hidden_states
from engine.train.lora import attach_lora, choose_trained, put_on_training
from engine.train.loss import Loss, _ChunkedCrossEntropy
from engine.train.model import build_empty, load_base
from engine.train.optim import build_optimizer, is_lora_matrix, take_step
from engine.train.quantize import swap_linears
from tests.support.card_bytes import CardBytes, CutCrossEntropy, as_on_cuda
from tests.support.live_bytes import ALLOCATION_BYTES
from tests.support.tiny import MINISTRAL3, settings

VISION = ("vision_tower", "multi_modal_projector")
WIDE: dict[str, Any] = MINISTRAL3 | {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
"""Three layers that are wide enough for tensors to weigh more than their granules."""
PAGED_NUMBERS = 100_000
"""A paged optimizer's state of fewer numbers stays on the card (bitsandbytes/optim)."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a step holds, in bytes on the card."""

    static_bytes: Mapping[str, int]
    """By what it is: weights, experts, embeddings, vision, adapter, buffers."""
    gradients_bytes: int
    optimizer_bytes: int
    after_forward_bytes: int
    """Everything that lives when the second forward pass ends."""
    pass_bytes: int
    """The peak of the second forward and backward pass, in which gradients are added up."""
    step_bytes: int
    """The peak of moving the weights."""

    @property
    def peak_bytes(self) -> int:
        return max(self.pass_bytes, self.step_bytes)

    @property
    def resting_bytes(self) -> int:
        """Weights, gradients and optimizer state: what lives between two passes."""
        return sum(self.static_bytes.values()) + self.gradients_bytes + self.optimizer_bytes

    @property
    def kept_bytes(self) -> int:
        """What the forward pass leaves for the backward pass."""
        return self.after_forward_bytes - self.resting_bytes

    @property
    def transient_bytes(self) -> int:
        """What the backward pass takes beyond what is kept."""
        return self.pass_bytes - self.after_forward_bytes


def dry_run(
    architecture: Architecture,
    config: RunConfig,
    *,
    tokens_per_sequence: int,
    sequences: int,
    image_sizes: Sequence[tuple[int, int]] = (),
    vision_on_device: bool = True,
    cuda: bool = True,
) -> Run:
    """Two forward and backward passes of `config`, then one move of the weights.

    Every token is learned. `image_sizes` are heights and widths in pixels of the images of one
    pass. `cuda` false runs them as on a CPU.
    """
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    with torch.device("meta"):
        model = build(architecture, config, dtype)
    counter = CardBytes()
    with (
        as_on_cuda(tokens_per_sequence, sequences, cuda),
        FakeTensorMode(allow_non_fake_inputs=True),
        counter,
    ):
        static = materialize(model, dtype, vision_on_device)
        gc.collect()
        if counter.now != sum(static.values()):
            raise AssertionError(f"{counter.now} bytes live, {sum(static.values())} are held")
        optimizer = build_optimizer(trained_parameters(model), config)
        hold_state(optimizer, {p for n, p in trained_parameters(model) if is_lora_matrix(n)})
        optimizer_bytes = counter.now - sum(static.values())
        batch = make_batch(tokens_per_sequence, sequences, image_sizes)
        model.train()
        cut = cuda and dtype == torch.bfloat16 and names_cut_loss(config)
        loss = Loss(CHUNK_BYTES[0] if cuda else SMALLEST_CHUNK_BYTES, cut)
        after_forward, in_pass = passes(model, config, batch, counter, loss)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        gradients_bytes = sum(map(on_card, gradients))
        del gradients
        step = move(optimizer, counter)
    return Run(
        static_bytes=static,
        gradients_bytes=gradients_bytes,
        optimizer_bytes=optimizer_bytes,
        after_forward_bytes=after_forward,
        pass_bytes=in_pass,
        step_bytes=step,
    )


def build(architecture: Architecture, config: RunConfig, dtype: torch.dtype) -> Model:
    """The model as `load_base` and `put_on_training` leave it, on the meta device."""
    model = build_empty(architecture, Path("nowhere"), dtype, "flash_attention_torch")
    if any(row.tied for row in architecture.table.parameters):
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    swap_linears(model, config, dtype)
    replace_experts(model, config, dtype)
    model.eval()
    if config.gradient_checkpointing:
        checkpoint_activations(model, config.checkpointed_layers)
    attach = choose_trained if config.adapter is None else attach_lora
    return attach(model, architecture, config)


def on_card(tensor: Tensor) -> int:
    """Bytes of a tensor of its own, as the allocator gives them out."""
    return -(-tensor.untyped_storage().nbytes() // ALLOCATION_BYTES) * ALLOCATION_BYTES


def materialize(model: nn.Module, dtype: torch.dtype, vision_on_device: bool) -> dict[str, int]:
    """Give every parameter and buffer a fake tensor in the form in which a card holds it.

    Returns the bytes by what they are, counted from the tensors themselves.
    """
    sizes: dict[str, int] = {}
    made: dict[int, nn.Parameter | Tensor] = {}
    replaced: list[Tensor] = []  # alive, or another tensor gets the number of one that is gone
    shared = torch.empty(256)  # bitsandbytes' table of 8-bit numbers, the same for all
    if any(isinstance(module, Linear4bit) for module in model.modules()):
        sizes["buffers"] = on_card(shared)
    for name, module in model.named_modules():
        if not vision_on_device and any(part in name for part in VISION):
            continue
        if isinstance(module, GroupedNF4):
            module.code, module.nested_code = torch.empty(16), torch.empty(256)
        for held in (module._parameters, module._buffers):
            for own, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake, beside = _fake(module, own, tensor, dtype, shared)
                    made[id(tensor)] = fake
                    replaced.append(tensor)
                    kind = _kind(f"{name}.{own}", tensor)
                    more = sum(map(on_card, (fake, *beside)))
                    sizes[kind] = sizes.get(kind, 0) + more
                held[own] = made[id(tensor)]
    return sizes


def _fake(
    module: nn.Module, own: str, tensor: Tensor, dtype: torch.dtype, shared: Tensor
) -> tuple[Any, list[Tensor]]:
    """The tensor without contents, and what lies beside it."""
    if own == "weight" and isinstance(module, Linear4bit):
        return _four_bit(tuple(tensor.shape), dtype, shared)
    if own == "weight" and isinstance(module, Linear8bitLt):
        packed: Any = nn.Parameter(torch.empty(tensor.shape, dtype=torch.int8), requires_grad=False)
        packed.CB, packed.SCB = packed.data, torch.empty(tensor.shape[0], dtype=torch.float32)
        return packed, [packed.SCB]
    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad), []
    return fake, []


def _four_bit(
    shape: tuple[int, ...], dtype: torch.dtype, shared: Tensor
) -> tuple[Any, list[Tensor]]:
    """NF4 with nested statistics, as bitsandbytes' quantize_4bit makes it."""
    numbers = shape[0] * shape[1]
    blocks = -(-numbers // 64)
    packed: Any = nn.Parameter(
        torch.empty((-(-numbers // 2), 1), dtype=torch.uint8), requires_grad=False
    )
    nested = QuantState(
        absmax=torch.empty(-(-blocks // 256)), code=shared, blocksize=256, dtype=torch.float32
    )
    packed.quant_state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8),
        shape=torch.Size(shape),
        code=torch.empty(16),
        blocksize=64,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty(()),
        state2=nested,
    )
    state = packed.quant_state
    return packed, [state.absmax, state.code, state.offset, nested.absmax]


def _kind(name: str, tensor: Tensor) -> str:
    """What of a model the tensor `name` belongs to."""
    if "lora_" in name or "modules_to_save" in name:
        return "adapter"
    for part, kind in (
        ("vision_tower", "vision"),
        ("multi_modal_projector", "vision"),
        (".experts.", "experts"),
        ("embed_tokens", "embeddings"),
        ("lm_head", "embeddings"),
    ):
        if part in name:
            return kind
    return "weights" if isinstance(tensor, nn.Parameter) else "buffers"


def hold_state(optimizer: Optimizer, adapter: set[nn.Parameter]) -> None:
    """Let `optimizer` allocate its state, which it does at its first step; matrices of an `adapter`
    keep nothing of what bfloat16 cuts off."""
    for index, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if hasattr(optimizer, "init_state"):
                _hold_bitsandbytes(optimizer, group, parameter, index, place)
            else:
                optimizer.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter, dtype=torch.float32),
                    "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.float32),
                }
            if parameter.dtype == torch.bfloat16 and parameter not in adapter:
                rest = torch.empty(parameter.shape, dtype=torch.int16)
                optimizer.state[parameter]["rest"] = rest


def _hold_bitsandbytes(
    optimizer: Any, group: dict[str, Any], parameter: Tensor, index: int, place: int
) -> None:
    """Its own code, but a paged state lies in memory that the card shares with the computer."""
    if optimizer.is_paged and parameter.numel() >= PAGED_NUMBERS:
        return
    optimizer.init_state(group, parameter, index, place)


def make_batch(
    tokens_per_sequence: int, sequences: int, image_sizes: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """A batch as `collate` makes it, every token learned."""
    shape = (sequences, tokens_per_sequence)
    batch: dict[str, Any] = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "labels": torch.zeros(shape, dtype=torch.long),
        "position_ids": torch.arange(tokens_per_sequence).repeat(sequences, 1),
    }
    if image_sizes:
        height, width = (max(size[k] for size in image_sizes) for k in (0, 1))
        batch["pixel_values"] = torch.empty(len(image_sizes), 3, height, width)
        batch["image_sizes"] = Sizes([list(size) for size in image_sizes])
    return batch


class Sizes(list[list[int]]):
    """Sizes of images as numbers, where a fake tensor has none."""

    def tolist(self) -> list[list[int]]:
        return list(self)


def passes(
    model: Model, config: RunConfig, batch: dict[str, Any], counter: CardBytes, loss: Loss
) -> tuple[int, int]:
    """Two passes as `Training.gradients` makes them, with what its variables keep alive.

    Returns what lives after the second forward pass, and the peak of the second pass.
    """
    weight = balance_weight(config)
    for _ in range(2):
        counter.peak = counter.now
        with watch_routers(model, weight > 0) as routings:
            states = hidden_states(model, batch)
        after_forward = counter.now
        total = cross_entropy(states, head_of(model), batch["labels"], loss)
        mean = goal = total / 2
        if routings:
            goal = mean + weight * balance_loss(routings, batch["input_ids"] != 0)
        goal.backward()
    return after_forward, counter.peak


def cross_entropy(states: Tensor, head: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    """As the trainer computes it, where every token but the first of a row is learned."""
    chosen = states[:, :-1].reshape(-1, states.shape[-1])
    targets = labels[:, 1:].reshape(-1)
    keep = torch.arange(len(targets))
    chosen, targets = chosen.index_select(0, keep), targets.index_select(0, keep)
    if loss.cut and not head.requires_grad:
        found: Tensor = CutCrossEntropy.apply(chosen, head, targets)
        return found
    rows = chunk_rows(loss.chunk_bytes, head.shape[0])
    found = _ChunkedCrossEntropy.apply(chosen, head, targets, rows)
    return found


def move(optimizer: Optimizer, counter: CardBytes) -> int:
    """The peak while bfloat16 weights move as float32 ones, in the trainer's parts; others move in
    their place."""

    def hooks_alone() -> None:
        for hook in (
            *optimizer._optimizer_step_pre_hooks.values(),
            *optimizer._optimizer_step_post_hooks.values(),
        ):
            hook(optimizer, (), {})

    counter.peak = counter.now
    with patch.object(optimizer, "step", hooks_alone):
        take_step(optimizer)
    return counter.peak


def really_run(
    folder: Path, keys: dict[str, Any], tokens: int, sequences: int, rows: int = 1
) -> tuple[int, int]:
    """(kept, peak) over what rests, of the trainer's own model on tensors with contents; each
    sequence is made of `rows`."""
    given = settings(folder, **keys)
    trained = put_on_training(load_base(folder, given), folder, given)
    trained.train()
    counter = CardBytes()
    for tensor in [*trained.parameters(), *trained.buffers()]:
        counter.count(tensor)
    with counter:
        batch = make_batch(tokens, sequences, ())
        batch["position_ids"] %= tokens // rows
        kept, peak = passes(trained, given, batch, counter, Loss())
    gradients = [p.grad for _, p in trained_parameters(trained) if p.grad is not None]
    held = CardBytes()
    for tensor in [*trained.parameters(), *trained.buffers(), *gradients]:
        held.count(tensor)
    return kept - held.now, peak - held.now
