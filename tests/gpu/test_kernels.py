"""What a card computes, piece by piece, against float64 or float32; needs no model library.

Where transformers or peft are missing, the pieces that import them are skipped and the others run.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import RunConfig
from engine.plan.trainer import CHUNK_BYTES
from engine.train.loss import Loss, settle_loss, summed_cross_entropy
from tests.support.card import Card

VOCABULARY = 131_072
CUDA = "cuda"


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative, in the norm, float64."""
    difference = (found.double() - expected.double()).norm() / expected.double().norm()
    return float(difference)


def problem(card: Card, tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """States, a head and labels, whose losses are those of a model that has learned something."""
    torch.manual_seed(0)
    head = torch.randn(VOCABULARY, width, device=CUDA, dtype=card.half) * width**-0.5
    labels = torch.randint(VOCABULARY, (1, tokens), device=CUDA)
    near = head[labels[0].roll(-1)].float() * 8 + torch.randn(tokens, width, device=CUDA)
    states = near.to(card.half)[None].requires_grad_()
    labels[:, ::7] = -100
    return states, head, labels


def exact(states: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of the states in float64, few rows at a time."""
    wide, total = head.double(), torch.zeros((), dtype=torch.float64, device=states.device)
    grad = torch.zeros(states.shape, dtype=torch.float64, device=states.device)
    for start in range(0, states.shape[1] - 1, 128):
        stop = min(start + 128, states.shape[1] - 1)
        targets = labels[0, start + 1 : stop + 1]
        part = states.detach()[0, start:stop].double().requires_grad_()
        loss = torch.nn.functional.cross_entropy(part @ wide.t(), targets, reduction="sum")
        (grad[0, start:stop],) = torch.autograd.grad(loss, part)
        total += loss.detach()
    return total, grad


def sizes(card: Card) -> tuple[int, int]:
    """Tokens and width: those of Ministral 3 8B, in two chunks."""
    return (1500, 4096) if card.real else (24, 32)


class TestLoss:
    def twice(self, problem: tuple[Tensor, Tensor, Tensor], loss: Loss) -> list[Tensor]:
        """The loss and the gradient of the states, computed two times."""
        states, head, labels = problem
        found: list[Tensor] = []
        for _ in range(2):
            states.grad = None
            ours = summed_cross_entropy(states, head, labels, loss)
            ours.backward()
            assert states.grad is not None
            found += [ours.detach(), states.grad]
        return found

    def test_own_chunks_are_exact_at_the_real_vocabulary_and_repeatable(
        self, card: Card, record_property: Callable[[str, object], None]
    ) -> None:
        with card.here():
            given = problem(card, *sizes(card))
            loss, grad = exact(*given)
            first, slopes, second, again = self.twice(given, Loss(CHUNK_BYTES[0]))
            assert torch.equal(first, second)
            assert torch.equal(slopes, again)
            off = distance(slopes, grad)
            record_property("relative error of the states' gradient", f"{off:.2g}")
            assert float(first) == pytest.approx(float(loss), rel=1e-5)
            assert off < (0.004 if card.half == torch.bfloat16 else 1e-5)

    def test_a_head_that_is_trained_gets_the_exact_gradient(self, card: Card) -> None:
        with card.here():
            states, head, labels = problem(card, 40, 32)
            trained = head.clone().requires_grad_()
            summed_cross_entropy(
                states, trained, labels, Loss(CHUNK_BYTES[-1], cut=True)
            ).backward()
            wide = head.double().requires_grad_()
            logits = states.detach()[0, :-1].double() @ wide.t()
            torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").backward()
            assert trained.grad is not None
            assert wide.grad is not None
            assert distance(trained.grad, wide.grad) < 0.004

    def test_cut_cross_entropy_is_as_near_as_its_price_says(
        self, card: Card, record_property: Callable[[str, object], None]
    ) -> None:
        config = RunConfig(base_model="any", cut_cross_entropy=True)
        with card.here():
            given = problem(card, *sizes(card))
            kind, words = settle_loss(config, given[1], torch.device(CUDA), CHUNK_BYTES[0])
            if not kind.cut:
                pytest.skip(words)
            loss, grad = exact(*given)
            first, slopes, _, again = self.twice(given, kind)
            off = distance(slopes, grad)
            record_property("relative error of the states' gradient", f"{off:.2g}")
            record_property("repeatable", torch.equal(slopes, again))
            assert float(first) == pytest.approx(float(loss), rel=1e-3)
            assert off < 0.05


EXPERTS = 8
SIDES = {"kernel": (256, 192), "loop": (256, 192), "odd rows": (60, 72)}
"""Inputs and outputs; rows of 60 halves are no multiple of 16 bytes, which the kernel wants."""


@pytest.mark.parametrize("form", ["GroupedStack", "GroupedNF4"])
@pytest.mark.parametrize("way", SIDES)
def test_experts_compute_and_learn_what_float32_does(
    card: Card, form: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bitsandbytes", "peft", "transformers"):
        pytest.importorskip(name)
    from engine.train import experts as grouped

    inputs, outputs = SIDES[way]
    if way == "loop":
        monkeypatch.setattr(grouped, "_has_kernel", lambda weight: False)
    with card.here():
        if way == "kernel" and card.capability < (8, 0):
            pytest.skip("grouped products need capability 8.0")
        torch.manual_seed(0)
        layer = getattr(grouped, form)(EXPERTS, inputs, outputs, card.half)
        layer.take((torch.randn(outputs, inputs) / 16 for _ in range(EXPERTS)), torch.device(CUDA))
        chosen = torch.tensor([0] * 5 + [1] * 17 + [4] * 2 + [7] * 40, device=CUDA)
        rows = torch.randn(len(chosen), inputs, device=CUDA, dtype=card.half, requires_grad=True)
        slope = torch.randn(len(chosen), outputs, device=CUDA)
        found = layer(rows, grouped.Groups(chosen, EXPERTS))
        (found.float() * slope).sum().backward()
        exact = rows.detach().float().requires_grad_()
        parts = [exact[chosen == e] @ layer.matrix(e).float().t() for e in range(EXPERTS)]
        expected = torch.cat(parts)
        (expected * slope).sum().backward()
        assert rows.grad is not None
        assert exact.grad is not None
        tolerance = 0.01 if card.half == torch.bfloat16 else 1e-5
        assert distance(found.detach(), expected.detach()) < tolerance
        assert distance(rows.grad, exact.grad) < tolerance


class TestQuantized:
    def test_nf4_holds_the_numbers_that_it_holds_on_a_cpu(self, card: Card) -> None:
        functional = pytest.importorskip("bitsandbytes.functional")
        weight = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))

        def held(where: Tensor) -> Tensor:
            packed, state = functional.quantize_4bit(
                where, blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            full: Tensor = functional.dequantize_4bit(packed, state)
            return full.cpu()

        on_cpu = held(weight)
        with card.here():
            on_card = held(weight.to(CUDA))
        assert 0.05 < distance(on_card, weight) < 0.12
        # A number halfway between two codes may go either way.
        assert ((on_card - on_cpu).abs() > 1e-3).float().mean() < 1e-3

    @pytest.mark.parametrize("bits", [4, 8])
    def test_a_linear_of_few_bits_multiplies_as_what_it_holds(self, card: Card, bits: int) -> None:
        pytest.importorskip("transformers")
        from engine.train import quantize

        with card.here():
            torch.manual_seed(0)
            weight = torch.randn(192, 256, device=CUDA, dtype=card.half) / 16
            plain = torch.nn.Linear(256, 192, bias=False, device="meta")
            make: Any = quantize._four_bit if bits == 4 else quantize._eight_bit
            with torch.device("meta"):
                linear = make(plain, card.half) if bits == 4 else make(plain)
            quantize.hold_quantized(linear, weight)
            rows = torch.randn(3, 40, 256, device=CUDA, dtype=card.half, requires_grad=True)
            found = linear(rows)
            found.float().square().sum().backward()
            assert rows.grad is not None
            # Of the plain weight: NF4 loses a tenth, int8 a hundredth.
            expected = rows.detach().float() @ weight.float().t()
            assert distance(found.detach(), expected) < (0.12 if bits == 4 else 0.02)
            back = 2 * expected @ weight.float()
            assert distance(rows.grad, back) < (0.2 if bits == 4 else 0.03)


OPTIMIZERS = ["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit"]
SHAPES = {"small": (32, 64), "8-bit": (128, 128), "paged": (320, 320), "vector": (320,)}
"""bitsandbytes keeps 32 bits below 4,096 numbers, and pages from 100,000 on."""


@pytest.mark.parametrize("name", [*OPTIMIZERS, "paged_adamw_32bit"])
class TestOptimizers:
    def network(self, device: str, dtype: torch.dtype) -> torch.nn.ParameterDict:
        drawn = torch.Generator().manual_seed(0)
        return torch.nn.ParameterDict(
            {n: torch.randn(s, generator=drawn).to(device, dtype) for n, s in SHAPES.items()}
        )

    def steps(self, parameters: torch.nn.ParameterDict, optimizer: Any, count: int) -> None:
        from engine.train.optim import take_step

        for number in range(count):
            drawn = torch.Generator().manual_seed(number)
            for parameter in parameters.values():
                gradient = torch.randn(parameter.shape, generator=drawn)
                parameter.grad = gradient.to(parameter.device, parameter.dtype)
            take_step(optimizer)
            optimizer.zero_grad(set_to_none=True)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_moves_as_float32_adamw_does(
        self, card: Card, name: str, dtype: torch.dtype
    ) -> None:
        pytest.importorskip("bitsandbytes")
        from engine.train.optim import build_optimizer

        keys = {"base_model": "any", "optimizer": name, "learning_rate": 0.01}
        config = RunConfig.model_validate(keys)
        if dtype == torch.bfloat16 and card.half != dtype:
            pytest.skip("this card has no bfloat16")
        reference = self.network("cpu", dtype).float()
        start = {n: p.detach().clone() for n, p in reference.items()}
        self.steps(reference, torch.optim.AdamW(reference.values(), lr=0.01, weight_decay=0.0), 3)
        with card.here():
            ours = self.network(CUDA, dtype)
            optimizer = build_optimizer(ours.items(), config)
            self.steps(ours, optimizer, 3)
            for key, parameter in ours.items():
                moved = parameter.detach().float().cpu() - start[key]
                expected = reference[key].detach() - start[key]
                tolerance = 0.15 if "8bit" in name else 1e-4
                if dtype == torch.bfloat16:  # the weight itself has eight bits
                    tolerance = max(tolerance, 0.2)
                assert distance(moved, expected) < tolerance, key
            if name.startswith("paged"):
                state = optimizer.state[ours["paged"]]["state1"]
                assert getattr(state, "is_paged", False)
                assert not getattr(optimizer.state[ours["8-bit"]]["state1"], "is_paged", False)

    def test_its_state_is_saved_and_goes_on(self, card: Card, name: str, tmp_path: Path) -> None:
        pytest.importorskip("bitsandbytes")
        pytest.importorskip("transformers")
        from engine.runs import RunFolder
        from engine.train.checkpoint import Checkpoints
        from engine.train.optim import build_optimizer
        from engine.train.seal import Position, read_checkpoint

        keys = {"base_model": "any", "optimizer": name, "learning_rate": 0.01}
        config = RunConfig.model_validate(keys)
        with card.here():
            first, second = self.network(CUDA, torch.float32), self.network(CUDA, torch.float32)
            optimizers = [build_optimizer(each.items(), config) for each in (first, second)]
            checkpoints = Checkpoints(RunFolder(tmp_path), config)
            self.steps(first, optimizers[0], 2)
            position = Position(2, 0, None, None, "same")
            folder = checkpoints.save(first, optimizers[0], position)  # type: ignore[arg-type]
            self.steps(first, optimizers[0], 2)
            checkpoints.load(read_checkpoint(folder), second, optimizers[1])  # type: ignore[arg-type]
            self.steps(second, optimizers[1], 2)
            for key in SHAPES:
                assert torch.equal(first[key], second[key]), key
            state = optimizers[1].state[second["paged"]]
            moments = [state[key] for key in ("state1", "state2") if key in state]
            paged = name.startswith("paged")
            assert all(getattr(moment, "is_paged", False) == paged for moment in moments)
