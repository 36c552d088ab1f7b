"""PyTorch's kernel for rows of different lengths, against the same rows one after another."""

from typing import Any

import pytest
import torch

from engine.train.attention import Segments, attend_by_kernel, attend_row_by_row
from tests.support.card import Card
from tests.support.stock import CUT, positions, states, tiny, tokens
from tests.support.tiny import ARCHITECTURES


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=["even", "grouped"])
@pytest.mark.parametrize("widths", [(128, 128), (128, 64), (64, 64)])
@pytest.mark.parametrize("window", [None, 100])
def test_the_kernel_agrees_with_rows_one_after_another(
    card: Card, heads: tuple[int, int], widths: tuple[int, int], window: int | None
) -> None:
    if card.half != torch.bfloat16:
        pytest.skip("PyTorch's kernel needs capability 8.0")
    with card.here():
        check_kernel(heads, widths, window)


def check_kernel(heads: tuple[int, int], widths: tuple[int, int], window: int | None) -> None:
    bounds = torch.tensor([0, 300, 301, 700, 1024], dtype=torch.int32, device="cuda")
    rows = Segments(bounds, 399)
    torch.manual_seed(0)
    shapes = [(heads[0], widths[0]), (heads[1], widths[0]), (heads[1], widths[1])]
    exact: Any = [torch.randn(1024, *shape, device="cuda", requires_grad=True) for shape in shapes]
    halves: Any = [state.detach().bfloat16().requires_grad_() for state in exact]
    found = attend_by_kernel(*halves, rows, 0.1, window)  # type: ignore[call-arg]
    expected = attend_row_by_row(*exact, rows, 0.1, window)  # type: ignore[call-arg]
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    found.float().square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip(halves, exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        difference = (ours.grad.float() - theirs.grad).norm() / theirs.grad.norm()
        assert difference < 0.02


@pytest.mark.parametrize("name", ["mistral", "ministral3", "mistral4"])
def test_a_model_on_the_kernel_agrees_with_one_under_a_mask(card: Card, name: str) -> None:
    if card.half != torch.bfloat16:
        pytest.skip("PyTorch's kernel needs capability 8.0")
    found = []
    with card.here():
        for backend in (CUT, "sdpa"):
            model = tiny(ARCHITECTURES[name], backend).to("cuda", torch.bfloat16)
            found.append(states(model, tokens().cuda(), positions().cuda()).float())
    assert (found[0] - found[1]).norm() / found[1].norm() < 0.02
