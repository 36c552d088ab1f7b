"""How a run settles its loss: the chunks of its plan, or cut-cross-entropy where that runs."""

import json
import sys
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.config import RunConfig
from engine.events import Note
from engine.plan import estimate, plan_document
from engine.plan.trainer import CHUNK_BYTES, PRICE, SMALLEST_CHUNK_BYTES
from engine.train import loss as loss_module
from engine.train.checkpoint import STATE
from engine.train.loss import IN_CHUNKS, Loss, settle_loss, summed_cross_entropy
from tests.support.machines import config, cpu, model
from tests.support.trainers import LORA, Workshop, events_of, figures, finish

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


def test_a_run_without_a_compiler_trains_in_chunks_to_the_same_losses(workshop: Workshop) -> None:
    """Without the try this run ends at its first step, behind everything that was waited for."""
    run = workshop.new(plugins=PLUGINS)
    assert finish(run, before=Kernel("compiler")) == 0, run.log.read_text()
    (note,) = [e.text for e in events_of(run) if isinstance(e, Note) and "Cut-cross" in e.text]
    assert "Failed to find C compiler" in note
    assert figures(run) == figures(workshop.finished())


def test_a_run_trains_by_the_kernel_where_it_runs(workshop: Workshop) -> None:
    run = workshop.new(plugins=PLUGINS)
    assert finish(run, before=Kernel()) == 0, run.log.read_text()
    (note,) = [e.text for e in events_of(run) if isinstance(e, Note) and "Cut-cross" in e.text]
    assert PRICE in note
    losses, others = ([f[2] for f in figures(each)] for each in (run, workshop.finished()))
    assert losses == pytest.approx(others, rel=1e-4)


@pytest.mark.parametrize(
    ("planned", "taken"), [(CHUNK_BYTES[0], CHUNK_BYTES[0]), (12, SMALLEST_CHUNK_BYTES)]
)
def test_a_run_takes_the_chunks_of_its_plan(workshop: Workshop, planned: int, taken: int) -> None:
    run = workshop.new()
    needs = estimate(config(), model("ministral-3-3b"), cpu())
    plan = plan_document(replace(needs, loss_chunk_bytes=planned), cpu())
    run.plan.write_text(json.dumps(plan), "utf-8")
    assert finish(run) == 0, run.log.read_text()
    state = json.loads((run.checkpoints / "step-2" / STATE).read_text("utf-8"))
    assert state["loss_chunk_bytes"] == taken
