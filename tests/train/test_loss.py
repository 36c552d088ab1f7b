"""The loss is the textbook's, in value and in gradient, without its memory."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config import RunConfig
from engine.events import Note
from engine.plan import estimate, plan_document
from engine.plan.trainer import CHUNK_BYTES, PRICE, SMALLEST_CHUNK_BYTES, chunk_rows
from engine.train import loss as loss_module
from engine.train import loss as module
from engine.train.loss import (
    IN_CHUNKS,
    Loss,
    score_tokens,
    settle_loss,
    shift,
    summed_cross_entropy,
)
from engine.train.seal import STATE
from tests.fakes.kernels import check_product, matrix_product
from tests.support.machines import at, config, cpu
from tests.support.trainers import LORA, Workshop, events_of, figures, finish


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
def test_fused_loss_and_gradients_equal_the_textbook(chunk_rows: int) -> None:
    hidden, head, labels = example(torch.float32)
    expected = torch.autograd.grad(textbook(hidden, head, labels) / 7, (hidden, head))
    fused = summed_cross_entropy(hidden, head, labels, Loss(chunk_rows * 4 * 101))
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


VOCABULARY = 131_072


@pytest.fixture(scope="module")
def head() -> Tensor:
    """A head of the real vocabulary, (131072, 1024), bfloat16."""
    drawn = torch.Generator().manual_seed(0)
    return (torch.randn(VOCABULARY, 1024, generator=drawn) * 0.02).bfloat16()


@pytest.fixture
def as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products are asked for in float32, of a kernel that takes no more than a card's does."""

    def product(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
        return matrix_product(left, right, out_dtype=out_dtype)

    monkeypatch.setattr(module, "_widens", lambda left: left.dtype != torch.float32)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("mm.dtype", product, "CPU")
        yield


def states_of(head: Tensor, count: int, sure: float = 15) -> tuple[Tensor, Tensor]:
    """States (count, width) and targets of which the model is partly sure: 5.9 nats each."""
    drawn = torch.Generator().manual_seed(1)
    targets = torch.randint(0, len(head), (count,), generator=drawn)
    noise = torch.randn(count, head.shape[1], generator=drawn)
    return (noise + sure * head[targets].float()).to(head.dtype), targets


def run(states: Tensor, head: Tensor, targets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The loss, and the states' gradient."""
    given = states.detach().clone().requires_grad_()
    loss: Any = module._ChunkedCrossEntropy.apply(given, head, targets, rows)
    loss.backward()
    assert given.grad is not None
    return loss.detach(), given.grad


class TestAtTheRealVocabulary:
    """Against float64. Cut-cross-entropy's gradient is off by 0.022 here."""

    def assert_near(self, head: Tensor, of_loss: float, of_gradient: float) -> None:
        states, targets = states_of(head, 12)
        loss, gradient = run(states, head, targets, 5)
        exact = states.double().requires_grad_()
        whole = F.cross_entropy(exact @ head.double().t(), targets, reduction="sum")
        whole.backward()
        assert exact.grad is not None
        off = (gradient.double() - exact.grad).norm() / exact.grad.norm()
        assert abs(float(loss / whole.detach()) - 1) < of_loss
        assert off < of_gradient

    @pytest.mark.usefixtures("as_on_a_card")
    def test_bfloat16_on_a_card(self, head: Tensor) -> None:
        self.assert_near(head, 1e-6, 0.002)

    def test_bfloat16_on_a_cpu_whose_logits_are_rounded(self, head: Tensor) -> None:
        self.assert_near(head, 1e-3, 0.002)

    def test_float32(self, head: Tensor) -> None:
        self.assert_near(head.float(), 1e-6, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("as_on_a_card")
def test_any_chunk_gives_the_same_and_repeats_bit_for_bit(head: Tensor, dtype: torch.dtype) -> None:
    narrow = head[:, :32].to(dtype) * 8
    states, targets = states_of(narrow, 300)
    found = {
        size: run(states, narrow, targets, chunk_rows(size, VOCABULARY))
        for size in (SMALLEST_CHUNK_BYTES, CHUNK_BYTES[0])
    }
    few, many = found.values()
    torch.testing.assert_close(few[0], many[0], rtol=1e-6, atol=0)
    step = 2**-7 if dtype == torch.bfloat16 else 1e-4  # two neighbours of bfloat16 at most
    torch.testing.assert_close(few[1], many[1], rtol=step, atol=1e-6)
    for ours, again in zip(few, run(states, narrow, targets, 128), strict=True):
        assert torch.equal(ours, again)


class Products(TorchDispatchMode):
    """The matrix products that are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[object] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if "mm" in str(function):
            self.made.append(function)
        if function is torch.ops.aten.mm.dtype:
            check_product(*args)
        return function(*args, **(kwargs or {}))


def test_on_a_card_a_product_of_bfloat16_is_asked_for_in_float32() -> None:
    with FakeTensorMode(), Products() as products:
        for dtype in (torch.bfloat16, torch.float32):
            states, head = (torch.empty(n, 64, dtype=dtype, device="cuda") for n in (8, 512))
            found = module.product(states, head.t())
            assert (found.dtype, found.shape) == (torch.float32, (8, 512))
    assert products.made == [torch.ops.aten.mm.dtype, torch.ops.aten.mm.default]


def test_a_scale_is_not_rounded_to_the_states_type() -> None:
    hidden, head, labels = example(torch.bfloat16)
    (whole,) = torch.autograd.grad(summed_cross_entropy(hidden, head.detach(), labels), hidden)
    loss = summed_cross_entropy(hidden, head.detach(), labels) / 193  # in bfloat16 0.3 % less
    (third,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(third, (whole.float() / 193).bfloat16())


@pytest.mark.usefixtures("as_on_a_card")
def test_scores_on_a_card_are_float32(head: Tensor) -> None:
    states, targets = states_of(head, 12, sure=7)
    labels = torch.cat([targets.new_zeros(1), targets])
    hidden = torch.cat([states, states[:1]])[None]
    losses, right = score_tokens(hidden, head, labels[None])
    logits = states.double() @ head.double().t()
    exact = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=1e-6)
    assert torch.equal(right, logits.argmax(-1) == targets)
    assert 0 < right.sum() < len(right)


PLUGINS = ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"]
ASKED = RunConfig(base_model="any", plugins=PLUGINS)
NO_COMPILER = (
    "Failed to find C compiler. Please specify via CC environment variable or set "
    "triton.knobs.build.impl."
)
"""What triton 3.7 says, triton/runtime/build.py."""
CPU = torch.device("cpu")
KEYS = LORA | {"max_steps": 2, "lora_dropout": 0.0}


class OutOfResources(Exception):
    """triton's word for a kernel that a card has no room for."""


class Refusing(torch.autograd.Function):
    """A kernel whose backward pass does not fit the card."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        return states.sum()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Tensor:
        raise OutOfResources("out of resource: shared memory, Required: 98304, Hardware limit: 65")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A stand-in for the package `cut_cross_entropy`, on a device that may have it."""

    fails: str = ""

    def __call__(self) -> None:
        loss_module._refused = lambda head, device: ""
        package = ModuleType("cut_cross_entropy")
        package.linear_cross_entropy = self.compute  # type: ignore[attr-defined]
        sys.modules["cut_cross_entropy"] = package

    def compute(self, states: Tensor, head: Tensor, targets: Tensor, **settings: object) -> Tensor:
        """The signature of cut-cross-entropy 25.1."""
        assert settings == {"reduction": "sum", "filter_eps": "auto", "impl": "cce"}
        if self.fails == "compiler":
            raise RuntimeError(NO_COMPILER)
        if self.fails == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if self.fails == "card":
            found: Tensor = Refusing.apply(states)
            return found
        return F.cross_entropy(states @ head.t(), targets, reduction="sum")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> type[Kernel]:
    """The stand-in, whose traces go with the test."""
    monkeypatch.setattr(loss_module, "_refused", loss_module._refused)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", ModuleType("none"))
    return Kernel


def test_a_kernel_that_runs_is_taken_with_a_word_on_its_price(kernel: type[Kernel]) -> None:
    kernel()()
    loss, words = settle_loss(ASKED, torch.ones(128, 64), CPU, SMALLEST_CHUNK_BYTES)
    assert loss == Loss(SMALLEST_CHUNK_BYTES, cut=True)
    assert words == f"Cut-cross-entropy, as the config asks: {PRICE}"
    assert settle_loss(RunConfig(base_model="any"), torch.ones(128, 64), CPU, 7) == (Loss(7), "")


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ("compiler", f"RuntimeError: {NO_COMPILER[:-1]}"),
        ("card", "OutOfResources: out of resource: shared memory"),
    ],
)
def test_failing_kernel_is_left_and_reported(kernel: type[Kernel], fails: str, said: str) -> None:
    kernel(fails)()
    loss, words = settle_loss(ASKED, torch.ones(128, 64), CPU, 7)
    assert loss == Loss(7)
    assert words.startswith("Cut-cross-entropy is not used, but chunks of logits: it does not run")
    assert said in words
    assert "windtunnel doctor" in words


def test_out_of_memory_is_no_reason_to_take_more_memory(kernel: type[Kernel]) -> None:
    kernel("memory")()
    with pytest.raises(torch.OutOfMemoryError):
        settle_loss(ASKED, torch.ones(128, 64), CPU, 7)


@pytest.mark.parametrize(
    ("dtype", "device", "trained", "why"),
    [
        (torch.bfloat16, "cuda", True, "the head is trained"),
        (torch.float32, "cuda", False, "bfloat16 on a GPU"),
        (torch.bfloat16, "cpu", False, "bfloat16 on a GPU"),
        (torch.bfloat16, "cuda", False, ""),
    ],
)
def test_where_it_is_not_tried(dtype: torch.dtype, device: str, trained: bool, why: str) -> None:
    with FakeTensorMode():
        head = torch.empty(512, 64, dtype=dtype, requires_grad=trained)
        found = loss_module._refused(head, torch.device(device))
    assert why in found
    assert bool(why) == bool(found)


def test_a_head_that_is_trained_is_never_left_to_it(kernel: type[Kernel]) -> None:
    kernel("compiler")()
    hidden, head = torch.randn(1, 9, 64), torch.randn(128, 64, requires_grad=True)
    labels = torch.randint(0, 128, (1, 9))
    ours = summed_cross_entropy(hidden, head, labels, Loss(cut=True))
    assert torch.equal(ours, summed_cross_entropy(hidden, head, labels, IN_CHUNKS))
    with pytest.raises(RuntimeError, match="C compiler"):
        summed_cross_entropy(hidden, head.detach(), labels, Loss(cut=True))


@pytest.mark.parametrize(
    ("fails", "said", "near"), [("compiler", "Failed to find C compiler", 0), ("", PRICE, 1e-4)]
)
def test_a_run_without_a_compiler_trains_in_chunks_to_the_same_losses(
    workshop: Workshop, fails: str, said: str, near: float
) -> None:
    """And by the kernel where it runs. Without the try it ends at its first step, behind everything
    that was waited for."""
    run = workshop.new(plugins=PLUGINS)
    assert finish(run, before=Kernel(fails)) == 0, run.log.read_text()
    (note,) = [e.text for e in events_of(run) if isinstance(e, Note) and "Cut-cross" in e.text]
    assert said in note
    losses, others = ([f[2] for f in figures(each)] for each in (run, workshop.finished()))
    assert losses == pytest.approx(others, rel=near, abs=0)
    assert near or figures(run) == figures(workshop.finished())


@pytest.mark.parametrize(
    ("planned", "taken"), [(CHUNK_BYTES[0], CHUNK_BYTES[0]), (12, SMALLEST_CHUNK_BYTES)]
)
def test_a_run_takes_the_chunks_of_its_plan(workshop: Workshop, planned: int, taken: int) -> None:
    run = workshop.new()
    needs = estimate(config(), at("ministral-3-3b", cpu()))
    plan = plan_document(replace(needs, loss_chunk_bytes=planned), cpu())
    run.plan.write_text(json.dumps(plan), "utf-8")
    assert finish(run) == 0, run.log.read_text()
    state = json.loads((run.checkpoints / "step-2" / STATE).read_text("utf-8"))
    assert state["loss_chunk_bytes"] == taken
