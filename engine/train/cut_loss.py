"""Whether cut-cross-entropy can compute a run's loss, tried before the first step needs it.

The kernel is compiled where it first runs, which takes a C compiler and Python's headers, and which
a card may refuse. A run then takes the chunks of `loss`, and says why.
"""

import torch
from torch import Tensor

from engine.config import RunConfig
from engine.plan.trainer import PRICE, names_cut_loss
from engine.train.loss import Loss, cut_cross_entropy
from engine.train.out_of_memory import is_out_of_memory
from engine.visible import visible

TRIED_ROWS, TRIED_TOKENS = 16, 128


def settle_loss(
    config: RunConfig, head: Tensor, device: torch.device, chunk_bytes: int
) -> tuple[Loss, str]:
    """How a run on `device` computes its loss, and a sentence where the config asks for a kernel.

    `head` is the head as it trains, `chunk_bytes` what the plan has room for.
    """
    if not names_cut_loss(config):
        return Loss(chunk_bytes), ""
    why = _refused(head, device) or _failed(head, device)
    if why:
        return Loss(chunk_bytes), f"Cut-cross-entropy is not used, but chunks of logits: {why}"
    return Loss(chunk_bytes, cut=True), f"Cut-cross-entropy, as the config asks: {PRICE}"


def _refused(head: Tensor, device: torch.device) -> str:
    """What stands against the kernel for this head on this device; empty where nothing does."""
    if head.requires_grad:
        return "the head is trained, and the kernel would add up its gradient in bfloat16"
    if device.type != "cuda" or head.dtype != torch.bfloat16:
        return "the kernel computes in bfloat16 on a GPU"
    return ""


def _failed(head: Tensor, device: torch.device) -> str:
    """What goes wrong where the kernel is tried; empty where it ran."""
    try:
        _try(head.shape[1], head.dtype, device)
    except Exception as error:  # of triton, of torch's compiler, of the C compiler that they start
        if is_out_of_memory(error):
            raise
        said = visible(next(iter(str(error).splitlines()), ""), one_line=True).rstrip(".")
        return (
            f"it does not run here ({type(error).__name__}: {said}); `windtunnel doctor` says "
            "what is missing"
        )
    return ""


def _try(width: int, dtype: torch.dtype, device: torch.device) -> None:
    """The kernel once, forward and backward, on a few states of the model's width."""
    states = torch.ones(TRIED_ROWS, width, dtype=dtype, device=device, requires_grad=True)
    head = torch.ones(TRIED_TOKENS, width, dtype=dtype, device=device)
    targets = torch.zeros(TRIED_ROWS, dtype=torch.int64, device=device)
    loss = cut_cross_entropy(states, head, targets)
    torch.autograd.backward(loss)
    float(loss.detach())  # a card reports what failed in a kernel when it is waited for
