"""One rank of many without a card: the real model at full size, really sharded, no contents.

A process group that sends nothing stands in for the other ranks (torch's own "fake" backend), and
the trainer's own `shard` divides the model, so that FSDP2 gathers, frees and scatters as it does
among them. Model and step are those of `oracle`; like it this shares nothing with the plan's
formulas. Beside what lives it counts what the collectives were given.
"""

import gc
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from engine.catalog import Architecture
from engine.config import RunConfig
from engine.plan import Place
from engine.plan.layout import layout_on
from engine.plan.memory import moment_parts
from engine.plan.step import make_step
from engine.plan.traffic import Traffic, traffic_of
from engine.plan.trainer import CHUNK_BYTES
from engine.train.checkpoint import trained_parameters
from engine.train.forward import hidden_states, use_head
from engine.train.loss import Loss
from engine.train.optim import build_optimizer, is_lora_matrix
from engine.train.quantize import statistics
from engine.train.ranks import Ranks
from engine.train.shard import (
    is_spread,
    local_bytes,
    local_parameters,
    local_part,
    shard,
    sync_gradients,
)
from tests.research.oracle import build, cross_entropy, hold_state, make_batch, materialize
from tests.support.card_bytes import CardBytes, as_on_cuda
from tests.support.live_bytes import ALLOCATION_BYTES
from tests.support.machines import card, config

KINDS = {
    "c10d._allgather_base_.default": "all-gather",
    "c10d._reduce_scatter_base_.default": "reduce-scatter",
    "c10d.allreduce_.default": "all-reduce",
    "c10d.alltoall_base_.default": "all-to-all",
}


@dataclass(frozen=True, slots=True)
class RankRun:
    """What one rank holds and sends in an optimizer step of two micro-batches, in bytes."""

    held_bytes: Mapping[str, int]
    """At rest by part, as `local_bytes` has them; also `gradients` and `optimizer`."""
    peaks: Mapping[str, int]
    """By moment of the second pass: forward, loss, backward."""
    traffic_bytes: Mapping[str, int]
    """Of the whole tensors that collectives of each kind were given, in both passes."""
    calls: Mapping[str, int]

    @property
    def peak_bytes(self) -> int:
        return max(self.peaks.values())


class RankBytes(CardBytes):
    """Counts also what FSDP2 takes and gives back by resizing storages, and what is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic, self.calls = Counter[str](), Counter[str]()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if kind := KINDS.get(str(function)):
            sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            self.traffic[kind] += max(sizes)
            self.calls[kind] += 1
        return super().__torch_dispatch__(function, types, args, kwargs)

    def count(self, tensor: Tensor) -> None:
        """A sharded tensor is its rows here, which are counted as what they are."""
        if not isinstance(tensor, DTensor):
            super().count(tensor)

    def resize(self, tensor: Tensor, size: int) -> None:
        """What torch's own alloc_storage and free_storage do, seen."""
        storage = tensor.untyped_storage()
        if storage.size() == size:
            return
        storage.resize_(size)
        key = storage._cdata
        if key not in self._sizes:
            self.count(tensor)
            return
        held = -(-size // ALLOCATION_BYTES) * ALLOCATION_BYTES
        self.now += held - self._sizes[key]
        self._sizes[key] = held
        self.peak = max(self.peak, self.now)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, FSDP2's storages are counted."""
        with ExitStack() as stack:
            for name in ("alloc_storage", "free_storage"):
                whole = name == "alloc_storage"
                stack.enter_context(
                    patch.object(
                        _fsdp_param,
                        name,
                        lambda tensor, whole=whole: self.resize(
                            tensor, whole * tensor.numel() * tensor.itemsize
                        ),
                    )
                )
            yield


@contextmanager
def absent_ranks(shards: int, replicas: int = 1, experts: int = 1) -> Iterator[Ranks]:
    """The first of so many ranks, of which no other is there."""
    world_size = shards * replicas
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield Ranks(0, world_size).laid_out(shards, replicas, experts)
    finally:
        dist.destroy_process_group()


@contextmanager
def _whole_states(model: nn.Module) -> Iterator[None]:
    """A 4-bit weight that FSDP2 made whole again gets its statistics back, as bitsandbytes gives
    them: by making a parameter of its own type, which a tensor without contents cannot become."""

    def give_back(module: Any) -> None:
        module.weight.quant_state = module.quant_state

    for module in model.modules():
        if isinstance(module, Linear4bit):
            packed: Any = module.weight
            module.quant_state = packed.quant_state

    name = "bitsandbytes.nn.modules.fix_4bit_weight_quant_state_from_module"
    with patch(name, give_back):
        yield


def rank_run(
    architecture: Architecture,
    config: RunConfig,
    ranks: Ranks,
    *,
    tokens_per_sequence: int,
    sequences: int = 1,
    image_sizes: Sequence[tuple[int, int]] = (),
    once: bool = True,
) -> RankRun:
    """An optimizer step of two micro-batches on the first of `ranks`.

    Every token is learned. With `once` gradients are reduced in the last pass alone.
    """
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    with torch.device("meta"):
        model = build(architecture, config, dtype)
    counter = RankBytes()
    loss = Loss(CHUNK_BYTES[0], False)
    with (
        as_on_cuda(tokens_per_sequence, sequences),
        FakeTensorMode(allow_non_fake_inputs=True),
        ExitStack() as stack,
    ):
        materialize(model, dtype, vision_on_device=True)
        stack.enter_context(_whole_states(model))
        whole = {name: s for name, s in _all_statistics(model)}
        shard(model, config, ranks)
        gc.collect()
        for tensor in (*model.parameters(), *model.buffers(), *whole.values()):
            counter.count(local_part(tensor.detach()))
        # Before anything counts: DTensor tries its operations on whole tensors.
        held = dict(local_bytes(model))
        named = local_parameters(list(trained_parameters(model)))
        stack.enter_context(counter)
        stack.enter_context(counter.watched())
        before = counter.now
        optimizer = build_optimizer(named, config)
        hold_state(optimizer, {p for n, p in named if is_lora_matrix(n)})
        held["optimizer"] = counter.now - before
        model.train()
        from engine.train.forward import head_module, unwrapped

        for root in (unwrapped(model).model, head_module(model)):
            if hasattr(root, "_get_fsdp_state"):
                root._get_fsdp_state()._lazy_init()
        peaks: dict[str, int] = {}
        batch = make_batch(tokens_per_sequence, sequences, image_sizes)
        for last in (False, True):
            sync_gradients(model, last or not once)
            counter.peak = counter.now
            states = hidden_states(model, batch)
            peaks["forward"] = counter.peak
            counter.peak = counter.now
            total = use_head(
                model, states, lambda s, head: cross_entropy(s, head, batch["labels"], loss)
            )
            peaks["loss"] = counter.peak
            counter.peak = counter.now
            del states
            total.backward()
            del total
            peaks["backward"] = counter.peak
            if not last:
                held["gradients"] = _gradients_bytes(model)
    return RankRun(held, peaks, dict(counter.traffic), dict(counter.calls))


def _gradients_bytes(model: nn.Module) -> int:
    """Whole ones that wait for the last pass, and this rank's rows of the others; those of experts
    that are in no unit are beside their parameters."""
    units = [unit for unit in model.modules() if isinstance(unit, FSDPModule)]
    # A tied pair is two modules of one unit.
    states = {id(state): state for state in (unit._get_fsdp_state() for unit in units)}
    groups = [group for state in states.values() for group in state._fsdp_param_groups]
    every = [each for group in groups for each in group.fsdp_params]
    whole = [getattr(each, "_unsharded_param", None) for each in every]
    held = [each.unsharded_accumulated_grad for each in every]
    known = {id(each.sharded_param) for each in every}
    held += [p.grad for p in model.parameters() if id(p) not in known and is_spread(p)]
    held += [
        each.grad for each in (*whole, *(each.sharded_param for each in every)) if each is not None
    ]
    return sum(local_part(tensor).nbytes for tensor in held if tensor is not None)


def _all_statistics(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            for place, tensor in enumerate(statistics(module)):
                yield f"{name}.{place}", tensor


LENGTH = 2048
COMMON: dict[str, Any] = {
    "lora_r": 32,
    "sequence_len": LENGTH,
    "sample_packing": True,
    "gradient_checkpointing": True,
    "optimizer": "adamw_torch_fused",
    "bf16": True,
    "gradient_accumulation_steps": 2,
    "fsdp_config": {"reshard_after_forward": True},
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": "lora"},
    "nf4": {"adapter": "qlora"},
    "full": {"adapter": None},
}
SMALL_4: dict[str, dict[str, Any]] = {
    "lora": {"lora_target_modules": ["o_proj"]},
    "nf4": {"lora_target_modules": ["o_proj"], "quantize_moe_experts": True},
    "full": {},
}
MOMENTS = {"forward": "forward pass", "loss": "loss", "backward": "backward pass"}
RESTING = {
    "layers": ("linear", "norms", "router", "experts"),
    "embeddings": ("embeddings",),
    "vision": ("vision", "projector"),
    "adapter": ("adapter",),
    "gradients": ("gradients",),
    "optimizer": ("optimizer",),
}
"""Parts of the plan by parts of `local_bytes`."""
GRANULES = 2**21
"""Bytes by which small parts may differ: the allocator's granules, tables of quantization."""


def compare(
    architecture: Architecture, method: str, shards: int, replicas: int = 1, **keys: Any
) -> None:
    """Assert that the plan of one rank is within 5 % of what it holds, by part and at its peak."""
    run = config(
        **COMMON | METHODS[method] | keys, dp_shard_size=shards, dp_replicate_size=replicas
    )
    image_sizes = [(1540, 1540)] if run.processor_type else []
    place = Place(architecture, card("B300 x8"))
    with absent_ranks(shards, replicas, run.expert_parallel_size or 1) as ranks:
        found = rank_run(
            architecture,
            run,
            ranks,
            tokens_per_sequence=LENGTH,
            image_sizes=image_sizes,
            once=run.adapter is not None,
        )
    planned = {name: moment_parts(run, place, moment) for name, moment in MOMENTS.items()}
    _rests(found, planned["backward"])
    sums = {name: sum(parts.values()) for name, parts in planned.items()}
    assert max(sums.values()) == pytest.approx(found.peak_bytes, rel=0.05)
    _sends(found, traffic_of(make_step(run, place), layout_on(run, place.device)))
    for name, peak in found.peaks.items():
        # The backward pass begins with the head's, which is counted where the loss is.
        with_head = max(sums[name], sums["loss"] if name == "backward" else 0)
        assert sums[name] <= 1.1 * peak, name
        assert with_head >= 0.9 * peak, name


def _sends(found: RankRun, planned: Traffic) -> None:
    sizes = {
        "all-gather": planned.gathered_forward + planned.gathered_backward,
        "reduce-scatter": planned.scattered,
        "all-reduce": planned.summed,
        "all-to-all": planned.exchanged,
    }
    for kind, size in sizes.items():
        assert size == pytest.approx(found.traffic_bytes.get(kind, 0), rel=0.05), kind


def _rests(found: RankRun, planned: dict[str, int]) -> None:
    held = dict(found.held_bytes)
    held["embeddings"] += held.pop("head", 0)
    held["layers"] += held.pop("norm") + held.pop("statistics", 0)
    for name, parts in RESTING.items():
        mine = sum(planned.get(part, 0) for part in parts)
        close = pytest.approx(held.get(name, 0), rel=0.05, abs=GRANULES)
        assert mine == close, (
            f"{name}: {mine / 2**20:.1f} MiB planned of {held.get(name, 0) / 2**20:.1f}"
        )
