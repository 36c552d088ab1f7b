"""Cross entropy over the whole vocabulary without ever holding the whole logits.

Apart from the loop because every architecture ends in the same product, hidden states times head,
and because at 131,072 rows this product is most of the memory and time of a small model.
Every function returns a sum, never a mean: the loop divides by the learned tokens of the whole
optimizer step, so each learned token weighs the same however batches are cut.
"""

from typing import Any

import torch
from torch import Tensor

from engine.chat.render import IGNORED_LABEL
from engine.plan.memory.moments import LOSS_CHUNK_BYTES


class _FusedCrossEntropy(torch.autograd.Function):
    """Exact sum of cross entropies whose gradient is formed while the logits chunk is at hand.

    The checkpointed alternative computes each chunk of logits twice; this one computes it once,
    which is why it is 1.3 to 1.7 times faster.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        rows = max(1, LOSS_CHUNK_BYTES // (4 * head.shape[0]))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # float32: chunks are added up, and bfloat16 would round each addition.
        head_grad = (
            torch.zeros(head.shape, dtype=torch.float32, device=head.device)
            if ctx.needs_input_grad[1]
            else None
        )
        for start in range(0, targets.numel(), rows):
            part = slice(start, start + rows)
            states, wanted = hidden[part], targets[part, None]
            logits = torch.mm(states, head.t()).float()
            log_sum = torch.logsumexp(logits, dim=-1, keepdim=True)
            total += (log_sum - logits.gather(1, wanted)).sum()
            if hidden_grad is None and head_grad is None:
                continue
            slope = logits.sub_(log_sum).exp_()
            slope.scatter_add_(1, wanted, torch.full_like(log_sum, -1.0))
            narrow = slope.to(head.dtype)
            if hidden_grad is not None:
                torch.mm(narrow, head, out=hidden_grad[part])
            if head_grad is not None:
                head_grad.addmm_(slope.t(), states.float())
            del logits, slope, narrow  # or they lie beside the next chunk
        ctx.save_for_backward(hidden_grad, head_grad)
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (scale,) = outputs
        hidden_grad, head_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad * scale.to(hidden_grad.dtype),
            None if head_grad is None else head_grad.mul_(scale).to(ctx.head_dtype),
            None,
        )


def shift(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pair every state with the token it has to predict and drop what is not learned.

    `hidden` is (batch, length, width), `labels` (batch, length) with `IGNORED_LABEL` where nothing
    is learned; returns states (learned, width) and targets (learned,).
    """
    states = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    targets = labels[:, 1:].reshape(-1)
    keep = (targets != IGNORED_LABEL).nonzero().squeeze(1)
    return states.index_select(0, keep), targets.index_select(0, keep)


def summed_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Sum over the learned tokens of -log p(token), float32, differentiable in hidden and head.

    On a CUDA card in half precision this is Apple's cut-cross-entropy kernel (arXiv 2411.09009),
    unless the head itself is trained: that kernel leaves out slopes below 2^-12 and adds up the
    head's gradient in bfloat16. There and elsewhere it is the fused chunks above. A batch in which
    nothing is learned gives a zero that still reaches the graph.
    """
    states, targets = shift(hidden, labels)
    if targets.numel() == 0:
        return hidden.sum() * 0.0
    if states.is_cuda and states.dtype == torch.bfloat16 and not head.requires_grad:
        from cut_cross_entropy import linear_cross_entropy

        loss: Tensor = linear_cross_entropy(
            states, head, targets, reduction="sum", filter_eps="auto", impl="cce"
        )
        return loss
    loss = _FusedCrossEntropy.apply(states, head, targets)
    return loss


@torch.no_grad()
def score_tokens(hidden: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """-log p of each learned token, and whether it is the most likely one, in `shift`'s order.

    Returns float32 (learned,) and bool (learned,).
    """
    states, targets = shift(hidden, labels)
    rows = max(1, LOSS_CHUNK_BYTES // (4 * head.shape[0]))
    losses = torch.empty(targets.shape, dtype=torch.float32, device=targets.device)
    right = torch.empty(targets.shape, dtype=torch.bool, device=targets.device)
    for start in range(0, targets.numel(), rows):
        part = slice(start, start + rows)
        logits = torch.mm(states[part], head.t()).float()
        wanted = targets[part]
        losses[part] = torch.logsumexp(logits, -1) - logits.gather(1, wanted[:, None]).squeeze(1)
        right[part] = logits.argmax(dim=-1) == wanted
        del logits
    return losses, right
