"""What a CUDA card's kernels take inside, where a fake or a CPU kernel takes something else."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.attention.varlen  # registers torch_attn's operators
from bitsandbytes.autograd._functions import MatMul8bitLt
from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl
from torch import Tensor
from transformers import AttentionMaskInterface

from engine.train import attention, loss
from engine.train.attention import TORCH_VARLEN, Segments
from engine.train.experts import Experts, Groups
from tests.support.live_bytes import LiveBytes

FLASH_ROWS = 128
"""Rows of padding for each sequence in what FlashAttention's backward pass adds up."""


class CardBytes(LiveBytes):
    """Counts also what the kernels of a card take inside, by `INSIDES`."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        inside = INSIDES.get(function)
        if inside is not None:
            with self:
                return inside(*args, **(kwargs or {}))
        return super().__torch_dispatch__(function, types, args, kwargs)


def _vectorwise_quant(states: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """bitsandbytes/backends/cuda/ops.py, with no outlier among the inputs."""
    maxima = states.new_empty(states.numel() // states.shape[-1], dtype=torch.float32)
    numbers = states.new_empty(states.shape, dtype=torch.int8)
    outliers = states.abs() >= threshold
    outliers.any()
    return numbers, maxima, states.new_empty(0, dtype=torch.int64)


def _mixed_scaled_mm(
    states: Tensor, numbers: Tensor, weight: Tensor, *_: Tensor | None
) -> tuple[Tensor, Tensor]:
    """bitsandbytes/backends/default/ops.py: int32 sums, scaled to float16, then to the type."""
    none = states.new_empty(0)
    sums = states.new_empty((*numbers.shape[:-1], weight.shape[0]), dtype=torch.int32)
    return torch.empty_like(sums, dtype=torch.float16).to(states.dtype), none


def _flash_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """mha_varlen_bwd of PyTorch's flash_api.cpp: queries' gradients are added up in float32, and
    where keys have fewer heads, theirs are formed for each head of the queries."""
    results = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    rows = query.shape[0] + FLASH_ROWS * (_[0].shape[0] - 1)
    heads, width = query.shape[1:]
    inside = [
        query.new_empty((heads, rows), dtype=torch.float32),
        query.new_empty((rows, heads, -(-width // 32) * 32), dtype=torch.float32),
    ]
    if key.shape[1] != heads:
        inside += [query.new_empty((key.shape[0], heads, width)) for _ in range(2)]
    del inside
    return results


INSIDES: dict[Any, Callable[..., Any]] = {
    # Past 1,536 rows the card's kernel dequantizes the whole weight in 16 bits and multiplies; so
    # does this for fewer, where by the card and the shape it may not.
    torch.ops.bitsandbytes.gemm_4bit.default: _gemm_4bit_default_impl,
    torch.ops.bitsandbytes.int8_vectorwise_quant.default: _vectorwise_quant,
    torch.ops.bitsandbytes.int8_mixed_scaled_mm.default: _mixed_scaled_mm,
    torch.ops.torch_attn._varlen_attn_backward.default: _flash_backward,
}


class CutCrossEntropy(torch.autograd.Function):
    """cut_cross_entropy/cce.py by what it allocates, for a head that is frozen."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        rows, vocabulary = len(states), len(head)
        log_sums = states.new_empty(rows, dtype=torch.float32)
        averages = states.new_empty(vocabulary, dtype=torch.float32)
        dots = states.new_zeros(rows, dtype=torch.float32)
        ctx.save_for_backward(states, head, log_sums, targets, averages)
        return dots.add_(log_sums).sum()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        states, head, _, _, averages = ctx.saved_tensors
        order = torch.argsort(averages).to(torch.int32)
        slope = torch.zeros_like(states)
        locks = [states.new_zeros(len(each), dtype=torch.int32) for each in (states, head)]
        del order, locks
        return slope, None, None


class _Known(list[int]):
    """Where rows begin, as numbers: what a tensor would be asked for on a fake has no value."""

    def diff(self) -> "_Known":
        return _Known(b - a for a, b in itertools.pairwise(self))

    def tolist(self) -> list[int]:
        return list(self)


def even_sizes(groups: Any) -> list[int]:
    """Rows of each expert where every expert gets as many."""
    experts = len(groups.ends)
    return [(groups.rows * (e + 1)) // experts - groups.rows * e // experts for e in range(experts)]


def even_counts(experts: Experts, groups: Any) -> tuple[Tensor, list[int], list[int]]:
    """Of rows that go to other ranks' experts, as many to each and from each."""
    ranks = dist.get_world_size(experts.group)
    each = [groups.rows * (n + 1) // ranks - groups.rows * n // ranks for n in range(ranks)]
    return groups.ends, each, each


@contextmanager
def as_on_cuda(tokens_per_sequence: int, sequences: int, cuda: bool = True) -> Iterator[None]:
    """The trainer's code with the answers that it would get on a card, for tensors without values.

    Rows are as long as their sequence, and every expert gets as many of them. With `cuda` false the
    CPU's own kernels are taken.
    """
    bounds = _Known(range(0, tokens_per_sequence * sequences + 1, tokens_per_sequence))

    def segments(*_: object, device: torch.device | None = None, **__: object) -> Segments:
        given: Any = torch.empty(sequences + 1, dtype=torch.int32) if cuda else bounds
        return Segments(given, tokens_per_sequence)

    def fits_kernel(query: Tensor, value: Tensor) -> bool:
        return cuda and query.dtype == torch.bfloat16

    def begin(groups: Any, sorted_experts: Tensor, num_experts: int, first: int = 0) -> None:
        start(groups, sorted_experts, num_experts, first)
        groups.rows = len(sorted_experts)

    def product(states: Tensor, weight: Tensor, *, bias: Any = None, state: Any) -> Tensor:
        found: Tensor = MatMul8bitLt.apply(states, weight, None, bias, state)
        return found

    def table(**_: object) -> Tensor:
        return torch.empty(256)

    def widens(left: Tensor) -> bool:
        return left.dtype == torch.bfloat16

    start = Groups.__init__
    with ExitStack() as stack:
        stack.callback(attention.register_backends)
        AttentionMaskInterface.register(TORCH_VARLEN, segments)
        stack.enter_context(patch.object(attention, "_fits_kernel", fits_kernel))
        stack.enter_context(patch.object(Groups, "__init__", begin))
        stack.enter_context(patch.object(Groups, "sizes", property(even_sizes)))
        stack.enter_context(patch.object(Experts, "_counts", even_counts))
        stack.enter_context(patch("bitsandbytes.functional.create_dynamic_map", table))
        if cuda:
            stack.enter_context(patch("bitsandbytes.matmul", product))
            stack.enter_context(patch.object(loss, "_widens", widens))
        yield
