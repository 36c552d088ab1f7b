"""The loss is the textbook's, in value and in gradient, without its memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.train import loss as module
from engine.train.loss import score_tokens, shift, summed_cross_entropy


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 9, 16, generator=generator, dtype=dtype)
    head = torch.randn(101, 16, generator=generator, dtype=dtype)
    labels = torch.randint(0, 101, (2, 9), generator=generator)
    labels[0, :4] = -100
    labels[1, 6:] = -100
    return hidden.requires_grad_(), head.requires_grad_(), labels


def textbook(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    logits = hidden @ head.t()
    return F.cross_entropy(
        logits[:, :-1].reshape(-1, head.shape[0]),
        labels[:, 1:].reshape(-1),
        ignore_index=-100,
        reduction="sum",
    )


@pytest.mark.parametrize("chunk_rows", [1, 3, 1000])
def test_fused_loss_and_gradients_equal_the_textbook(
    chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOSS_CHUNK_BYTES", chunk_rows * 4 * 101)
    hidden, head, labels = example(torch.float32)
    expected = torch.autograd.grad(textbook(hidden, head, labels) / 7, (hidden, head))
    fused = summed_cross_entropy(hidden, head, labels)
    torch.testing.assert_close(fused, textbook(hidden, head, labels))
    for ours, theirs in zip(torch.autograd.grad(fused / 7, (hidden, head)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_frozen_head_gets_no_gradient_and_costs_none() -> None:
    hidden, head, labels = example(torch.float32)
    frozen = head.detach()
    (ours,) = torch.autograd.grad(summed_cross_entropy(hidden, frozen, labels), hidden)
    (theirs,) = torch.autograd.grad(textbook(hidden, frozen, labels), hidden)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert frozen.grad is None


def test_a_masked_token_gives_no_gradient() -> None:
    hidden, head, labels = example(torch.float32)
    summed_cross_entropy(hidden, head.detach(), labels).backward()
    assert hidden.grad is not None
    predicts_learned = torch.zeros(2, 9, dtype=torch.bool)
    predicts_learned[:, :-1] = labels[:, 1:] != -100
    assert (hidden.grad[~predicts_learned] == 0).all()
    assert (hidden.grad[predicts_learned].abs().sum(-1) > 0).all()


def test_a_batch_without_learned_tokens_is_zero_and_still_has_a_graph() -> None:
    hidden, head, labels = example(torch.float32)
    loss = summed_cross_entropy(hidden, head.detach(), torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert (hidden.grad == 0).all()


def test_bfloat16_keeps_the_sum_in_float32() -> None:
    hidden, head, labels = example(torch.bfloat16)
    loss = summed_cross_entropy(hidden, head, labels)
    assert loss.dtype == torch.float32
    exact = textbook(hidden.float(), head.float(), labels)
    torch.testing.assert_close(loss, exact, rtol=0.01, atol=0.01)
    loss.backward()
    assert head.grad is not None
    assert head.grad.dtype == torch.bfloat16


def test_scores_add_up_to_the_loss_and_know_the_right_tokens() -> None:
    hidden, head, labels = example(torch.float32)
    losses, right = score_tokens(hidden, head, labels)
    torch.testing.assert_close(losses.sum(), summed_cross_entropy(hidden, head, labels))
    states, targets = shift(hidden, labels)
    assert torch.equal(right, (states @ head.t()).argmax(-1) == targets)
    assert not right.all()
