"""Cross entropy over the whole vocabulary without ever holding the whole logits.

At 131,072 rows of the head this product is most of the memory and time of a small model. Every
function returns a sum, never a mean: the loop divides by the learned tokens of the whole optimizer
step, so each learned token weighs the same however batches are cut.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.chat.render import IGNORED_LABEL
from engine.config import RunConfig
from engine.plan.trainer import PRICE, SMALLEST_CHUNK_BYTES, chunk_rows, names_cut_loss
from engine.train.out_of_memory import is_out_of_memory
from engine.visible import first_line


@dataclass(frozen=True, slots=True)
class Loss:
    """How a run computes its loss; settled while it loads."""

    chunk_bytes: int = SMALLEST_CHUNK_BYTES
    """Float32 logits of one chunk."""
    cut: bool = False
    """Whether cut-cross-entropy does it where the head is frozen."""


IN_CHUNKS = Loss()
"""As on a CPU, and where no plan says how much room there is."""
TRIED_ROWS, TRIED_TOKENS = 16, 128
"""States and tokens on which cut-cross-entropy is tried before the first step needs it."""


def product(left: Tensor, right: Tensor) -> Tensor:
    """The matrix product in float32."""
    if _widens(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right).float()


def _widens(left: Tensor) -> bool:
    """Whether a half-precision product can be had as it is added up, in float32.

    A card's can; else it is rounded to half precision at the end, as a CPU's is (torch 2.13).
    """
    return left.is_cuda and left.dtype != torch.float32


def _exponentials(logits: Tensor, highest: Tensor) -> Tensor:
    """Turn `logits` into exp(logits - highest), in place; returns their sums, (rows, 1)."""
    return logits.sub_(highest).exp_().sum(-1, keepdim=True)


def _add_chunk(
    states: Tensor, head: Tensor, targets: Tensor, grad: Tensor | None, head_grad: Tensor | None
) -> Tensor:
    """One chunk's sum of cross entropies. The states' gradient is written into `grad`, the head's
    added to `head_grad`.

    The gradient of a row's logits stays multiplied by the sum of its exponentials: the narrow
    products are divided by it instead of the wide chunk. The target's outweighs all others, and
    rounded with them it would be most of the error: it joins in float32.
    """
    target = targets[:, None]
    logits = product(states, head.t())
    highest = logits.amax(-1, keepdim=True)
    reached = logits.gather(1, target)
    sums = _exponentials(logits, highest)
    of_target = logits.gather(1, target) - sums
    if head_grad is not None:
        gradient = logits.scatter_(1, target, of_target)
        head_grad.addmm_(gradient.t(), states.float() / sums)
    if grad is not None:
        moved = product(logits.scatter_(1, target, 0.0).to(head.dtype), head)
        grad.copy_(moved.addcmul_(of_target, head[targets].float()).div_(sums))
    return (sums.log() + highest - reached).sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Exact sum of cross entropies whose gradient is formed while the logits chunk is at hand.

    The checkpointed alternative computes each chunk twice, and takes 1.3 to 1.7 times as long.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, rows: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        needs_hidden, needs_head, *_ = ctx.needs_input_grad
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        # float32: chunks are added up, and bfloat16 would round each addition.
        head_grad = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
        for start in range(0, targets.numel(), rows):
            part = slice(start, start + rows)
            grad = None if hidden_grad is None else hidden_grad[part]
            total += _add_chunk(hidden[part], head, targets[part], grad, head_grad)
        ctx.save_for_backward(hidden_grad, head_grad)
        ctx.head_dtype, ctx.rows = head.dtype, rows
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (scale,) = outputs
        hidden_grad, head_grad = ctx.saved_tensors
        if hidden_grad is not None:
            for part in hidden_grad.split(ctx.rows):
                part.copy_(part.float().mul_(scale))  # of bfloat16, `scale` would be rounded too
        if head_grad is not None:
            head_grad = head_grad.mul_(scale).to(ctx.head_dtype)
        return hidden_grad, head_grad, None, None


def shift(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pair every state with the token it has to predict and drop what is not learned.

    `hidden` is (batch, length, width), `labels` (batch, length) with `IGNORED_LABEL` where nothing
    is learned; returns states (learned, width) and targets (learned,).
    """
    states = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    targets = labels[:, 1:].reshape(-1)
    keep = (targets != IGNORED_LABEL).nonzero().squeeze(1)
    return states.index_select(0, keep), targets.index_select(0, keep)


def summed_cross_entropy(
    hidden: Tensor, head: Tensor, labels: Tensor, loss: Loss = IN_CHUNKS
) -> Tensor:
    """Sum over the learned tokens of -log p(token), float32, differentiable in hidden and head.

    Repeatable bit for bit, unless `loss` asks for Apple's cut-cross-entropy kernel (arXiv
    2411.09009) and the head is frozen: that one adds up the states' gradient in bfloat16, in an
    order that its threads decide. A batch in which nothing is learned gives a zero that still
    reaches the graph.
    """
    states, targets = shift(hidden, labels)
    if targets.numel() == 0:
        nothing = hidden.sum() * 0.0
        # A head that is trained is reached as well, or ranks would add up other gradients.
        return nothing + head[0].sum() * 0.0 if head.requires_grad else nothing
    if loss.cut and not head.requires_grad:
        return cut_cross_entropy(states, head, targets)
    rows = chunk_rows(loss.chunk_bytes, head.shape[0])
    total: Tensor = _ChunkedCrossEntropy.apply(states, head, targets, rows)
    return total


def cut_cross_entropy(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The same sum by Apple's kernel, for a frozen head and bfloat16 on a card."""
    from cut_cross_entropy import linear_cross_entropy

    loss: Tensor = linear_cross_entropy(
        states, head, targets, reduction="sum", filter_eps="auto", impl="cce"
    )
    return loss


@torch.no_grad()
def score_tokens(hidden: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """-log p of each learned token, and whether it is the most likely one, in `shift`'s order.

    Returns float32 (learned,) and bool (learned,).
    """
    states, targets = shift(hidden, labels)
    rows = chunk_rows(SMALLEST_CHUNK_BYTES, head.shape[0])
    losses = torch.empty(targets.shape, dtype=torch.float32, device=targets.device)
    right = torch.empty(targets.shape, dtype=torch.bool, device=targets.device)
    for start in range(0, targets.numel(), rows):
        part = slice(start, start + rows)
        target = targets[part, None]
        logits = product(states[part], head.t())
        highest, likeliest = logits.max(-1, keepdim=True)
        reached = logits.gather(1, target)
        losses[part] = (_exponentials(logits, highest).log() + highest - reached).squeeze(1)
        right[part] = (likeliest == target).squeeze(1)
        del logits
    return losses, right


def settle_loss(
    config: RunConfig, head: Tensor, device: torch.device, chunk_bytes: int
) -> tuple[Loss, str]:
    """How a run on `device` computes its loss, and a sentence where the config asks for a kernel.

    `head` is the head as it trains, `chunk_bytes` what the plan has room for. The kernel is
    compiled where it first runs, which takes a C compiler and Python's headers: it is tried here.
    """
    if not names_cut_loss(config):
        return Loss(chunk_bytes), ""
    why = _refused(head, device) or _failed(head, device)
    if why:
        return Loss(chunk_bytes), f"Cut-cross-entropy is not used, but chunks of logits: {why}"
    return Loss(chunk_bytes, cut=True), f"Cut-cross-entropy, as the config asks: {PRICE}"


def _refused(head: Tensor, device: torch.device) -> str:
    if head.requires_grad:
        return "the head is trained, and the kernel would add up its gradient in bfloat16"
    if device.type != "cuda" or head.dtype != torch.bfloat16:
        return "the kernel computes in bfloat16 on a GPU"
    return ""


def _failed(head: Tensor, device: torch.device) -> str:
    """What goes wrong where the kernel is tried on a few states; empty where it ran."""
    kind: dict[str, Any] = {"dtype": head.dtype, "device": device}
    states = torch.ones(TRIED_ROWS, head.shape[1], requires_grad=True, **kind)
    few = torch.ones(TRIED_TOKENS, head.shape[1], **kind)
    try:
        loss = cut_cross_entropy(states, few, torch.zeros(TRIED_ROWS, dtype=torch.long).to(device))
        torch.autograd.backward(loss)
        float(loss.detach())  # a card reports what failed in a kernel when it is waited for
    except Exception as error:  # of triton, of torch's compiler, of the C compiler that they start
        if is_out_of_memory(error):
            raise
        return (
            f"it does not run here ({type(error).__name__}: {first_line(error)}); "
            "`windtunnel doctor` says what is missing"
        )
    return ""
