"""Measures what a layer of experts costs, and prints the coefficients of `plan.layers`.

`python -m tests.research.expert_memory` runs the trainer's own experts on a CPU, in bfloat16 over
NF4, with and without an adapter on them, and counts the bytes that live. Least squares gives bytes
a routed row (a token times the experts that it passes) for each width, and bytes a number of the
adapter. The worst residual is printed beside them.
"""

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from torch import nn

from engine.train.experts import Experts, GroupedNF4, LoraGrouped
from tests.support.live_bytes import LiveBytes

EXPERTS, CHOSEN = 8, 4


def build(hidden: int, width: int, rank: int) -> Experts:
    """A layer of experts; rank 0 is one without an adapter."""
    sizes: Any = SimpleNamespace(
        num_experts=EXPERTS, hidden_dim=hidden, intermediate_dim=width, act_fn=nn.SiLU()
    )
    layer = Experts(sizes, GroupedNF4, torch.bfloat16)
    for name, linear in list(layer.named_children()):
        if isinstance(linear, GroupedNF4):
            shape = linear.out_features, linear.in_features
            linear.take((torch.zeros(shape) for _ in range(EXPERTS)), torch.device("cpu"))
            if rank:
                settings = LoraConfig(r=rank, lora_alpha=rank)
                options = {"r": rank, "lora_alpha": rank}
                setattr(layer, name, LoraGrouped(linear, "default", settings, **options))
    return layer


def step_bytes(hidden: int, width: int, tokens: int, rank: int) -> tuple[int, int]:
    """(kept from the forward to the backward pass, peak) over weights, gradients and input."""
    layer = build(hidden, width, rank)
    states = torch.randn(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(tokens, CHOSEN, dtype=torch.bfloat16, requires_grad=True)
    chosen = torch.stack([torch.randperm(EXPERTS)[:CHOSEN] for _ in range(tokens)])
    moving = [states, weights, *(p for p in layer.parameters() if p.requires_grad)]
    for tensor in moving:
        tensor.grad = torch.zeros_like(tensor)
    counter = LiveBytes()
    for tensor in [*layer.parameters(), *layer.buffers(), *moving]:
        counter.count(tensor)
        if tensor.grad is not None:
            counter.count(tensor.grad)
    resting = counter.now
    with counter:
        output = layer(states, chosen, weights).sum()
        kept = counter.now - resting
        output.backward()
    return kept, counter.peak - resting


def samples(rank: int) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """Rows of the least squares: what each coefficient multiplies, and the bytes."""
    for hidden, width, tokens in itertools.product((512, 1024), (256, 512), (256, 1024)):
        routed = tokens * CHOSEN
        numbers = EXPERTS * rank * ((hidden + 2 * width) + (width + hidden))
        yield [routed * hidden, routed * width, numbers], step_bytes(hidden, width, tokens, rank)


def main() -> None:
    """Print one line of coefficients for each rank and figure."""
    print(f"{'rank and figure':<16} {'hidden':>8} {'width':>8} {'adapter':>8}   worst")
    for rank in (0, 8, 32):
        rows = list(samples(rank))
        terms = np.array([row for row, _ in rows], dtype=float)
        used = terms.any(axis=0)
        for place, name in enumerate(("kept", "peak")):
            measured = np.array([found[place] for _, found in rows], dtype=float)
            relative = terms[:, used] / measured[:, None]
            found = np.zeros(terms.shape[1])
            found[used] = np.linalg.lstsq(relative, np.ones(len(rows)), rcond=None)[0]
            worst = np.abs(terms @ found / measured - 1).max()
            figures = " ".join(f"{figure:8.2f}" for figure in found)
            print(f"{rank:>4} {name:<11} {figures} {worst:7.1%}", flush=True)


if __name__ == "__main__":
    main()
