"""A step's seconds are its batch, its passes and its optimizer, and nothing between two steps."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.events import Eval, SampleTime, Score
from engine.runs import Follower, RunFolder
from engine.train.batches import Order, Rows, StepBatch
from engine.train.checkpoint import trained_tensors
from engine.train.generate import Prompt
from engine.train.loop import StepClock, Training
from engine.train.lora import put_on_training
from engine.train.model import load_base
from tests.support.tiny import Begin, open_session, settings, training, wake_adapter
from tests.support.written_runs import read_steps

COLLATING, MOVING, BETWEEN = 7.0, 5.0, 1000.0


class Clock:
    """Time that passes only where a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class SlowOrder(Order):
    """Rows that take long to be laid side by side."""

    clock: Clock

    def step(self, number: int) -> StepBatch:
        self.clock.now += COLLATING
        return super().step(number)


class SlowTraining(Training):
    """A run in which everything takes long, and which leaves nothing behind."""

    clock: Clock

    def between_steps(self, prompts: Sequence[Prompt]) -> None:
        self.clock.now += BETWEEN
        super().between_steps(prompts)

    def measure(self) -> list[Score]:
        self.clock.now += BETWEEN
        return super().measure()

    def sample(self, prompts: Sequence[Prompt], when: SampleTime) -> None:
        self.clock.now += BETWEEN

    def save(self) -> None:
        self.clock.now += BETWEEN
        super().save()

    def finish(self, prompts: Sequence[Prompt]) -> None:
        pass


def test_collating_and_the_optimizer_count(ministral: Path, uneven: Rows, tmp_path: Path) -> None:
    config = settings(
        ministral,
        adapter="lora",
        micro_batch_size=2,
        max_steps=4,
        val_set_size=0.25,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    base, clock = load_base(ministral, config), Clock()
    model = put_on_training(base, ministral, config)
    held_out = {"validation": uneven.first(2)}
    run = SlowTraining(base, model, uneven, held_out, config, open_session(tmp_path), None)  # type: ignore[arg-type]
    run.order = SlowOrder(uneven, config)
    run.step_clock = StepClock(base.device, clock)
    run.clock = run.order.clock = clock

    def move(*_: object) -> None:
        clock.now += MOVING

    run.optimizer.register_step_post_hook(move)
    run.fit([])
    steps = read_steps(RunFolder(tmp_path))
    assert [step.step for step in steps] == [1, 2, 3, 4]
    assert [step.seconds for step in steps] == [COLLATING + MOVING] * 4
    assert steps[0].tokens_per_second == steps[0].tokens / (COLLATING + MOVING)


def test_clock_is_read_after_the_update(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the step is judged before they move."""
    found: list[str] = []

    def noting(name: str, act: Callable[..., Any] = lambda *_: 0.0) -> Callable[..., Any]:
        def noted(*arguments: object) -> Any:
            found.append(name)
            return act(*arguments)

        return noted

    run = begin(adapter="lora")
    run.step_clock = StepClock(torch.device("cuda"), noting("clock"))
    monkeypatch.setattr(torch.cuda, "synchronize", noting("synchronize"))
    monkeypatch.setattr(run, "judge", noting("judge", run.judge))
    run.optimizer.register_step_post_hook(noting("optimizer", lambda *_: None))
    found.clear()
    run.step(1, run.order.step(1))
    assert found == ["judge", "optimizer", "synchronize", "clock"]


def test_no_forward_pass_waits_for_its_loss(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of a step are added up on the device and read once, with the norm."""
    run = begin(gradient_accumulation_steps=4)
    batch, read = run.order.step(1), []
    whole = Tensor.__float__
    monkeypatch.setattr(Tensor, "__float__", lambda tensor: read.append(1) or whole(tensor))
    loss, norm = run.gradients(batch)
    assert len(batch.micros) == 4
    assert loss > 0
    assert norm > 0
    assert not read


def test_last_figures_are_of_the_best_model(ministral: Path, uneven: Rows, tmp_path: Path) -> None:
    keys = {"adapter": "lora", "max_steps": 9, "learning_rate": 0.03}
    config = settings(ministral, **keys, load_best_model_at_end=True)
    run = training(tmp_path, config, uneven, {"validation": uneven})
    for number in range(1, 9):
        run.step(number, run.order.step(number))
    assert run.evaluate()
    run.save()
    best = {name: tensor.clone() for name, tensor in trained_tensors(run.model).items()}
    wake_adapter(run.model)  # forgets what it has learned
    run.position.step = 9
    assert not run.evaluate()
    run.finish([])
    events = [recorded.event for recorded in Follower(run.session.run.events).read()]
    at_best, worse = (event.loss for event in events if isinstance(event, Eval))
    assert at_best < worse
    *_, last = (event.loss for event in events if isinstance(event, Score))
    assert last == pytest.approx(at_best, abs=1e-6)
    result = trained_tensors(run.model)
    assert all(result[name].equal(tensor) for name, tensor in best.items())
