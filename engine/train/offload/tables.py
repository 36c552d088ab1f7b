"""The embedding and the head in RAM: rows of the one are looked up there, the other is lent.

They are large tables that nothing comes behind: at 131,072 rows each takes as much as a few layers,
and is read once in a forward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.train.offload.transfer import Hosted, HostMemory


class LentHead(nn.Linear):
    """A head whose weight is on the device only where `head_at_hand` or `head_for_loss` says so."""

    hosted: Hosted

    @classmethod
    def of(cls, head: nn.Linear, device: torch.device, memory: HostMemory) -> "LentHead":
        """The same head with its numbers, which `head` has in RAM, for `device`."""
        lent = cls(head.in_features, head.out_features, bias=False, device="meta")
        host = memory.copy(head.weight)
        shell = torch.empty_like(host, device=device, pin_memory=False)
        lent.weight = nn.Parameter(shell, requires_grad=False)
        lent.hosted = Hosted(shell, host)
        return lent

    def forward(self, states: Tensor) -> Tensor:
        if not self.hosted.present:
            raise RuntimeError("the head is read where nothing has called for it")
        return super().forward(states)


def offload_tables(model: PreTrainedModel, device: torch.device, memory: HostMemory) -> None:
    """Let the embedding of `model`, which lies in RAM with the head, be read there from now on.

    A tied head gets a place on the device of its own, since the two are read in different places.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    lent = LentHead.of(head, device, memory)
    if head.weight is embedding.weight:
        embedding.weight = nn.Parameter(lent.hosted.host)
    embedding.weight.requires_grad_(False)
    model.set_output_embeddings(lent)
    embedding.register_forward_pre_hook(lambda _module, inputs: tuple(i.cpu() for i in inputs))
    embedding.register_forward_hook(lambda _module, _inputs, rows: rows.to(device))


@contextmanager
def head_at_hand(head: nn.Module) -> Iterator[None]:
    """`head` on the device while the context is open."""
    if not isinstance(head, LentHead) or head.hosted.present:
        yield
        return
    head.hosted.fill()
    try:
        yield
    finally:
        head.hosted.empty()


@contextmanager
def head_for_loss(head: nn.Module, states: Tensor) -> Iterator[None]:
    """`head` on the device until the loss's gradient has reached `states`, the head's input.

    By then the backward pass is at the first layer, which needs the room.
    """
    with head_at_hand(head):
        if isinstance(head, LentHead) and states.requires_grad:
            states.register_hook(lambda _gradient: head.hosted.empty())
        yield
