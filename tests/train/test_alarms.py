"""A run says what is odd about its losses, ends where it was asked to, and names the rows."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.chat.render import Kind
from engine.errors import UserError, WorkError
from engine.train.batches import Order, Rows
from engine.train.evaluate import LEAST_STEPS, LossAlarm, OverfittingAlarm, row_losses
from engine.train.loop import Training, clip_gradients
from tests.support.stock import stock_model
from tests.support.tiny import MINISTRAL3, Begin, settings, training, with_vision, write_model


def alarm(**keys: Any) -> LossAlarm:
    return LossAlarm(settings(**keys), vocabulary=131072)


def too_high(alarm: LossAlarm, loss: float) -> bool:
    return alarm.stop_reason(1, loss, 1.0) is not None


def notes(run: Training) -> list[tuple[str, str]]:
    """Level and text of every note so far."""
    lines = run.session.run.events.read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [(e["level"], e["text"]) for e in events if e["type"] == "note"]


class TestStart:
    def test_a_loss_above_that_of_guessing_is_reported(self) -> None:
        assert alarm().odd_start(11.7) is None
        sentence = alarm().odd_start(11.9)
        assert sentence is not None
        assert "11.90" in sentence
        assert "11.78" in sentence

    def test_only_the_first_step_of_a_run_is_judged_so(self, begin: Begin) -> None:
        run = begin(max_steps=2)
        run.gradients(run.order.step(1))
        run.judge(1, 7.0, 1.0, run.order.step(1))
        assert [level for level, text in notes(run) if "the first loss is 7.00" in text] == [
            "warning"
        ]
        run.judge(2, 7.0, 1.0, run.order.step(2))
        assert len(notes(run)) == 1

    def test_unreached_parameters_are_reported(self, uneven: Rows, tmp_path: Path) -> None:
        base = write_model(tmp_path / "base", with_vision(MINISTRAL3))
        wish = ["model.vision_tower.*", "model.language_model.norm"]
        run = training(tmp_path / "run", settings(base, unfrozen_parameters=wish), uneven)
        run.step(1, run.order.step(1))
        (note,) = [text for _, text in notes(run) if "not reached" in text]
        tower = [n for n, p in run.model.named_parameters() if "vision_tower" in n]
        assert f"{len(tower)} of {len(tower) + 1} trained tensors" in note

    def test_run_that_trains_nothing_is_refused(self, uneven: Rows, tmp_path: Path) -> None:
        base = write_model(tmp_path / "base", with_vision(MINISTRAL3))
        config = settings(base, unfrozen_parameters=["model.vision_tower.*"])
        run = training(tmp_path / "run", config, uneven)
        with pytest.raises(UserError, match="Nothing would be trained"):
            run.step(1, run.order.step(1))


class TestSpike:
    def test_it_is_a_leap_over_the_median_of_the_losses_before(self) -> None:
        found = alarm()
        for _ in range(LEAST_STEPS):
            assert found.spike(1.5) is None
        assert found.spike(2.9) is None
        assert found.spike(3.1) == 1.5

    def test_a_few_losses_are_too_few(self) -> None:
        found = alarm()
        assert [found.spike(loss) for loss in (1.0, 1.0, 9.0)] == [None] * 3

    def test_a_memorised_loss_may_double(self) -> None:
        found = alarm()
        assert [found.spike(0.01) for _ in range(LEAST_STEPS)] == [None] * LEAST_STEPS
        assert found.spike(0.5) is None
        assert found.spike(1.2) is not None

    def test_it_is_reported_once_in_a_while(self) -> None:
        found = alarm()
        for _ in range(30):
            found.spike(1.0)
        reported = [found.spike(5.0) is not None for _ in range(LEAST_STEPS + 1)]
        assert reported == [True, *[False] * (LEAST_STEPS - 1), True]

    def test_note_names_the_rows_with_the_highest_loss(self, begin: Begin, uneven: Rows) -> None:
        run = begin(gradient_accumulation_steps=8, learning_rate=1e-5)
        for _ in range(LEAST_STEPS):
            run.alarm.spike(0.5)
        batch = run.order.step(1)
        by_loss = sorted(row_losses(run.model, run.base, batch), key=lambda found: -found[1])
        run.step(1, batch)
        (note,) = [text for level, text in notes(run) if "leapt" in text]
        expected = [f"{uneven.place(row)} ({loss:.2f})" for row, loss in by_loss[:3]]
        assert note.endswith(f"from 0.50; highest: {'; '.join(expected)}")


class TestLimit:
    def test_the_run_ends_after_the_steps_that_patience_grants(self) -> None:
        found = alarm(loss_watchdog_threshold=5.0, loss_watchdog_patience=2)
        assert [too_high(found, loss) for loss in (6, 5, 6, 4, 6, 6)] == [False] * 5 + [True]

    def test_patience_is_three_steps_unless_named(self) -> None:
        found = alarm(loss_watchdog_threshold=5.0)
        assert [too_high(found, 6) for _ in range(3)] == [False, False, True]

    def test_without_a_limit_no_loss_is_too_high(self) -> None:
        found = alarm()
        assert not any(too_high(found, 100) for _ in range(10))

    def test_the_rows_are_named_and_the_weights_left_alone(
        self, begin: Begin, uneven: Rows
    ) -> None:
        keys = {"loss_watchdog_threshold": 0.1, "loss_watchdog_patience": 1}
        run = begin(learning_rate=0.1, **keys)
        before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        batch = run.order.step(1)
        with pytest.raises(WorkError, match=r"stays above loss_watchdog_threshold: 0\.1") as caught:
            run.step(1, batch)
        assert uneven.place(batch.rows[0]) in caught.value.why
        assert all(torch.equal(p, before[n]) for n, p in run.model.named_parameters())


class TestLearningByHeart:
    def warned(self, held_out: list[float], training: list[float]) -> list[bool]:
        alarm, warned = OverfittingAlarm(), []
        for loss, steps in zip(held_out, [None, *training], strict=True):
            if steps is not None:
                alarm.add_step(steps)
            warned.append(alarm.add_evaluation(loss, best_step=20) is not None)
        return warned

    def test_it_warns_at_the_second_rise_in_a_row_and_once(self) -> None:
        held_out, training = [2.0, 1.0, 1.1, 1.2, 1.3], [1.5, 1.0, 0.8, 0.5]
        assert self.warned(held_out, training) == [False, False, False, True, False]

    def test_a_fall_in_between_begins_anew(self) -> None:
        assert not any(self.warned([1.0, 1.1, 1.05, 1.2], [0.9, 0.8, 0.7]))
        assert self.warned([1.0, 1.1, 1.0, 1.1, 1.2], [0.9, 0.8, 0.7, 0.6])[-1]

    def test_a_training_loss_that_rises_too_is_another_trouble(self) -> None:
        assert not any(self.warned([1.0, 1.1, 1.2], [0.9, 1.4]))

    def test_it_names_the_losses_and_the_best_save(self) -> None:
        alarm = OverfittingAlarm()
        for loss, step in ((1.0, None), (1.1, 0.9), (1.2, 0.8)):
            if step:
                alarm.add_step(step)
            sentence = alarm.add_evaluation(loss, best_step=20)
        assert sentence
        assert "(1.000 -> 1.100 -> 1.200)" in sentence
        assert sentence.endswith("the save of step 20 is the best")


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_non_finite_loss_names_rows_and_ends_run(begin: Begin, uneven: Rows, loss: float) -> None:
    run = begin(gradient_accumulation_steps=8)
    batch = run.order.step(1)
    bad = batch.rows[5]
    token = int(uneven.ids(bad)[1])
    with torch.no_grad():
        run.model.get_input_embeddings().weight[token] = loss
    with pytest.raises(WorkError, match="gave a loss of") as caught:
        run.step(1, batch)
    assert f"highest loss: {uneven.place(bad)} (nan)" in caught.value.why


@pytest.mark.parametrize("packs", [False, True])
def test_losses_of_single_rows(begin: Begin, ministral: Path, uneven: Rows, packs: bool) -> None:
    keys = {"sample_packing": packs, "micro_batch_size": 3, "gradient_accumulation_steps": 64}
    run = begin(sequence_len=64, **keys)
    batch = Order(uneven, run.config).step(1)
    stock = stock_model(ministral)
    found = dict(row_losses(run.model, run.base, batch))
    assert sorted(found) == list(range(len(uneven)))
    for row, loss in found.items():
        ids = torch.from_numpy(uneven.ids(row).astype("int64"))[None]
        answers = torch.from_numpy(uneven.kinds(row) >= Kind.TEXT)[None]
        theirs = stock(input_ids=ids, labels=ids.masked_fill(~answers, -100)).loss
        assert loss == pytest.approx(theirs.item(), rel=1e-4)
    assert run.model.training


def test_the_norm_of_bfloat16_gradients_is_exact_and_they_are_shortened_to_the_limit() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16)) for _ in range(3)]
    for weight in weights:
        weight.grad = torch.randn(64, 64, generator=generator).bfloat16()
    exact = torch.cat([w.grad.double().flatten() for w in weights if w.grad is not None]).norm()
    idle = torch.nn.Parameter(torch.zeros(2))
    assert clip_gradients([*weights, idle], 1.0) == pytest.approx(float(exact), rel=1e-6)
    after = torch.cat([w.grad.double().flatten() for w in weights if w.grad is not None]).norm()
    assert float(after) == pytest.approx(1.0, rel=0.01)
    assert clip_gradients([idle], 1.0) == 0.0
