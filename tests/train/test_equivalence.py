"""One optimizer step is the same step however it is cut: packed or not, in few passes or many.

The yardstick is transformers itself, one row at a time, weighted by hand.
"""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from engine.chat.render import Kind, LabelRule
from engine.config import RunConfig
from engine.events import Step
from engine.train.batches import Order, Rows, StepBatch, collate
from engine.train.checkpoint import save_trained
from engine.train.evaluate import learned_tokens, score
from engine.train.forward import Model, hidden_states, unwrapped
from engine.train.loop import Training
from engine.train.model import load_base
from tests.support.run_folders import read_steps
from tests.support.stock import norm_of, stock_model, stock_step
from tests.support.tiny import (
    MakeRows,
    assert_same,
    gradients,
    row,
    settings,
    training,
    wake_adapter,
)

ALL_IN_ONE_STEP = {"gradient_accumulation_steps": 64}
LAYOUTS = {
    "packed, one sequence": {"sample_packing": True, "sequence_len": 256},
    "packed, several at once": {"sample_packing": True, "sequence_len": 64, "micro_batch_size": 3},
    "one row at a time": {"micro_batch_size": 1},
    "padded together": {"micro_batch_size": 8},
}


def first_step(config: RunConfig, rows: Rows) -> StepBatch:
    return Order(rows, config).step(1)


class TestAgainstTransformers:
    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
    def test_a_full_fine_tune_takes_the_step_of_single_samples(
        self, any_model: Path, uneven: Rows, tmp_path: Path, layout: dict[str, Any]
    ) -> None:
        config = settings(any_model, max_grad_norm=1e9, **ALL_IN_ONE_STEP, **layout)
        ours = training(tmp_path, config, uneven)
        loss, norm = ours.gradients(first_step(config, uneven))
        theirs, expected = stock_step(stock_model(any_model), uneven)
        assert loss == pytest.approx(theirs, rel=1e-5)
        assert norm == pytest.approx(norm_of(expected), rel=1e-5)
        assert_same(gradients(ours.model), expected)

    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
    def test_an_adapter_takes_the_step_of_peft_on_single_samples(
        self, any_model: Path, uneven: Rows, tmp_path: Path, layout: dict[str, Any]
    ) -> None:
        config = settings(any_model, adapter="lora", max_grad_norm=1e9, **ALL_IN_ONE_STEP, **layout)
        ours = training(tmp_path / "run", config, uneven)
        wake_adapter(ours.model)
        (tmp_path / "adapter").mkdir()
        save_trained(ours.model, tmp_path / "adapter", config)
        stock = peft.PeftModel.from_pretrained(
            stock_model(any_model), str(tmp_path / "adapter"), is_trainable=True
        )
        loss, norm = ours.gradients(first_step(config, uneven))
        theirs, expected = stock_step(stock, uneven)
        assert loss == pytest.approx(theirs, rel=1e-5)
        assert norm == pytest.approx(norm_of(expected), rel=1e-5)
        assert_same(gradients(ours.model), expected)


class TestEvaluation:
    def test_packing_does_not_change_the_score(self, any_model: Path, uneven: Rows) -> None:
        separate = settings(any_model)
        base = load_base(any_model, separate)
        packed = settings(any_model, sample_packing=True, sequence_len=64, micro_batch_size=2)
        ours, theirs = (score(base.model, base, uneven, c) for c in (packed, separate))
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert (ours.tokens_by_kind, ours.rows) == (theirs.tokens_by_kind, theirs.rows)
        assert learned_tokens(ours) == 93 + 8


class TestWhatKeepsPackedRowsApart:
    """transformers looks at `position_ids` only when there is neither a mask nor a cache."""

    @pytest.fixture
    def packed(self, any_model: Path, uneven: Rows) -> tuple[Model, dict[str, torch.Tensor]]:
        model = load_base(any_model, settings(any_model)).model
        return model, collate(uneven, [range(len(uneven))], LabelRule()).tensors

    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_the_path_of_the_trainer_sees_every_row_alone(
        self, packed: tuple[Model, dict[str, torch.Tensor]], uneven: Rows, mode: str
    ) -> None:
        model, tensors = packed
        getattr(model, mode)()
        with torch.no_grad():
            together = hidden_states(model, tensors)[0]
            rows = [collate(uneven, [[k]], LabelRule()).tensors for k in range(len(uneven))]
            alone = torch.cat([hidden_states(model, tensors)[0] for tensors in rows])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("mode", ["train", "eval"])
    @pytest.mark.parametrize("addition", ["attention_mask", "cache"])
    def test_a_mask_or_a_cache_would_mix_them(
        self, packed: tuple[Model, dict[str, torch.Tensor]], addition: str, mode: str
    ) -> None:
        model, tensors = packed
        getattr(model, mode)()
        extra: dict[str, Any] = {"use_cache": True}
        if addition == "attention_mask":
            extra = {"use_cache": False, "attention_mask": torch.ones_like(tensors["input_ids"])}
        inputs = {k: tensors[k] for k in ("input_ids", "position_ids")}
        with torch.no_grad():
            mixed = unwrapped(model).model(**inputs, **extra).last_hidden_state
            assert (mixed - hidden_states(model, tensors)).abs().max() > 0.1


class TestAccumulation:
    def take_step(self, folder: Path, config: RunConfig, rows: Rows) -> Training:
        run = training(folder, config, rows)
        if config.adapter:
            wake_adapter(run.model)
        run.step(1, first_step(config, rows))
        return run

    @pytest.mark.parametrize("adapter", [None, "lora"])
    @pytest.mark.parametrize("packs", [False, True])
    def test_eight_passes_of_one_are_one_pass_of_eight(
        self, ministral: Path, uneven: Rows, tmp_path: Path, adapter: str | None, packs: bool
    ) -> None:
        # The epsilon keeps AdamW's first step, g / (|g| + eps), from being a sign alone.
        keys: dict[str, Any] = {"adapter": adapter, "sample_packing": packs, "sequence_len": 41}
        keys |= {"adam_epsilon": 1e-4, "learning_rate": 1e-2, "max_grad_norm": 0.1}
        few, many = (
            self.take_step(
                tmp_path / f"{size}",
                settings(
                    ministral, micro_batch_size=size, gradient_accumulation_steps=8 // size, **keys
                ),
                uneven,
            )
            for size in (8, 1)
        )
        (one,), (other,) = (
            [(s.loss, s.grad_norm, s.learned_tokens) for s in steps_of(run)] for run in (few, many)
        )
        assert one == pytest.approx(other, rel=1e-5)
        for left, right in zip(few.parameters, many.parameters, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)

    def test_tokens_weigh_alike(self, ministral: Path, make_rows: MakeRows, tmp_path: Path) -> None:
        short, long = row(3, 1, seed=1), row(3, 40, seed=2)
        alone: list[float] = []
        for rows in ([short], [long]):
            prepared = make_rows(rows)
            run = training(tmp_path / str(len(alone)), settings(ministral), prepared)
            alone.append(run.gradients(first_step(run.config, prepared))[0])
        both = make_rows([short, long])
        config = settings(ministral, gradient_accumulation_steps=2)
        loss, _ = training(tmp_path / "both", config, both).gradients(first_step(config, both))
        assert loss == pytest.approx((2 * alone[0] + 41 * alone[1]) / 43, rel=1e-6)
        assert abs(loss - sum(alone) / 2) > 0.01


def steps_of(run: Training) -> list[Step]:
    return read_steps(run.session.run)


class TestMaskedTokens:
    @pytest.mark.parametrize("packs", [False, True])
    def test_a_token_that_is_only_a_masked_label_changes_no_gradient(
        self, ministral: Path, make_rows: MakeRows, tmp_path: Path, packs: bool
    ) -> None:
        # The last token of a row is nobody's input; its only place is in the labels.
        config = settings(ministral, sample_packing=packs, micro_batch_size=2)
        found = []
        for number, (last, kind) in enumerate(
            [(30, Kind.USER), (31, Kind.USER), (30, Kind.TEXT), (31, Kind.TEXT)]
        ):
            rows = make_rows([[*row(4, 5, seed=1), (last, kind)], row(3, 6, seed=2)])
            run = training(tmp_path / str(number), config, rows)
            found.append((run.gradients(first_step(config, rows)), gradients(run.model)))
        masked, other_id, learned, other_answer = found
        assert masked[0] == other_id[0]
        assert all(torch.equal(masked[1][n], other_id[1][n]) for n in masked[1])
        assert learned[0] != masked[0]
        assert learned[0] != other_answer[0]

    def test_rows_do_not_leak(self, ministral: Path, make_rows: MakeRows, tmp_path: Path) -> None:
        config = settings(ministral, train_on_inputs=True, sample_packing=True)
        headless = [row(4, 5, seed=n)[1:] for n in range(3)]
        rows = make_rows(headless)
        run = training(tmp_path, config, rows)
        batch = first_step(config, rows)
        assert batch.learned_tokens == sum(len(r) - 1 for r in headless)
        packed, _ = run.gradients(batch)
        alone = [make_rows([r]) for r in headless]
        assert packed == pytest.approx(
            np.mean([run.gradients(first_step(config, r))[0] for r in alone]), rel=1e-5
        )


def test_gradients_are_clipped_to_the_norm(ministral: Path, uneven: Rows, tmp_path: Path) -> None:
    config = settings(ministral, max_grad_norm=0.01, **ALL_IN_ONE_STEP)
    run = training(tmp_path, config, uneven)
    _, norm = run.gradients(first_step(config, uneven))
    assert norm > 0.1
    assert norm_of(gradients(run.model)) == pytest.approx(0.01, rel=1e-3)
