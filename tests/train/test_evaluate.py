"""The held-out figures: the loss of every learned token, and answers that are exact."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.chat.render import WITHHELD, Kind, LabelRule, learned
from engine.errors import UserError
from engine.events import Score
from engine.train.batches import Order, Rows
from engine.train.evaluate import evaluating, learned_tokens, mean_loss, score, score_all
from engine.train.generate import generate
from engine.train.loop import Training
from engine.train.model import load_base
from tests.support.tiny import (
    MakeRows,
    Models,
    Row,
    learn_by_heart,
    row,
    settings,
    training,
    write_rows,
)

TAUGHT, OTHERS = 5, 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "separate": {"micro_batch_size": 1},
    "padded": {"micro_batch_size": 4},
    "packed": {"eval_sample_packing": True, "sequence_len": 128},
    "packed, several at once": {
        "eval_sample_packing": True,
        "sequence_len": 32,
        "micro_batch_size": 3,
    },
}


def with_wrong_end(given: Row) -> Row:
    """The same row with one other token as the last of its answer."""
    token, kind = given[-2]
    return [*given[:-2], (token - 1 if token > 20 else token + 1, kind), given[-1]]


@pytest.fixture(scope="module")
def memorised(model_folder: Models, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A model that knows five rows by heart."""
    given = [row(4, 3 + n, seed=n) for n in range(TAUGHT)]
    folder = model_folder("mistral3 over ministral3")
    return learn_by_heart(tmp_path_factory.mktemp("memorised"), folder, given)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Taught rows, taught rows with one wrong token, and rows that were never seen, in turn."""
    rows = []
    for n in range(TAUGHT):
        rows += [row(4, 3 + n, seed=n), with_wrong_end(row(4, 3 + n, seed=n))]
    rows += [row(3, 5, seed=100 + n) for n in range(OTHERS)]
    return write_rows(tmp_path_factory.mktemp("mixed") / "rows", rows)


def answers_exactly(run: Training, rows: Rows, index: int) -> bool:
    """Whether greedy generation from a row's question gives its answer, to the end."""
    ids, kinds = rows.ids(index), rows.kinds(index)
    begins = int(np.flatnonzero(learned(kinds, LabelRule()))[0])
    answer = ids[begins:].tolist()
    made = generate(
        run.model, run.base.device, ids[:begins].tolist(), end=2, max_new_tokens=len(answer)
    )
    return bool(made == answer)


class TestExactAnswers:
    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
    def test_exact_match(self, memorised: Training, mixed: Rows, layout: dict[str, Any]) -> None:
        right = [answers_exactly(memorised, mixed, index) for index in range(len(mixed))]
        assert right == [True, False] * TAUGHT + [False] * OTHERS
        config = settings(**layout)
        assert score(memorised.model, memorised.base, mixed, config).exact == TAUGHT / len(mixed)
        for index, is_right in enumerate(right):
            chosen = slice(index, index + 1)
            alone = Rows(mixed.prepared, mixed.chosen[chosen], mixed.lengths[chosen])
            assert score(memorised.model, memorised.base, alone, config).exact == is_right

    def test_only_learned_tokens_count(self, memorised: Training, make_rows: MakeRows) -> None:
        taught = row(4, 3, seed=0)
        asks_more = [*taught, (50, Kind.USER), (51, Kind.USER)]
        rows = make_rows([taught, asks_more])
        found = score(memorised.model, memorised.base, rows, settings(micro_batch_size=2))
        assert found.exact == 1.0


class TestLoss:
    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
    def test_mean_of_tokens(self, memorised: Training, mixed: Rows, layout: dict[str, Any]) -> None:
        total, count = 0.0, 0
        for index in range(len(mixed)):
            ids = torch.from_numpy(mixed.ids(index).astype(np.int64))
            flags = torch.from_numpy(learned(mixed.kinds(index), LabelRule()))
            with torch.no_grad():
                logits = memorised.base.model(input_ids=ids[None], use_cache=False).logits[0]
            losses = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
            total, count = total + float(losses[flags[1:]].sum()), count + int(flags.sum())
        found = score(memorised.model, memorised.base, mixed, settings(**layout))
        assert found.loss == pytest.approx(total / count, rel=1e-5)
        assert (learned_tokens(found), found.rows) == (count, len(mixed))

    def test_over_several_sets_every_token_weighs_the_same(self) -> None:
        few = Score(0, "a", 1.0, 0.0, 3, tokens_by_kind={"text": 8, "eos": 2})
        many = Score(0, "b", 4.0, 1.0, 1, tokens_by_kind={"text": 30})
        assert mean_loss([few, many]) == 3.25

    def test_every_set_has_its_own_score(self, memorised: Training, mixed: Rows) -> None:
        sets = {"first": mixed.first(1), "all": mixed}
        first, every = score_all(memorised.model, memorised.base, sets, settings())
        assert (first.dataset, every.dataset) == ("first", "all")
        assert (first.rows, first.exact) == (1, 1.0)
        assert first.loss < every.loss

    def test_empty_set_is_refused(self, memorised: Training, make_rows: MakeRows) -> None:
        questions = make_rows([[(1, Kind.BOS), (30, Kind.USER), (31, Kind.USER)]])
        with pytest.raises(UserError, match="The evaluation set questions has no answer"):
            score_all(memorised.model, memorised.base, {"questions": questions}, settings())


THINKING: Row = [
    *[(1, Kind.BOS), (31, Kind.USER), (34, Kind.THINK), (40, Kind.THINK), (35, Kind.THINK)],
    *[(50, Kind.TEXT), (51, Kind.TEXT), (2, Kind.EOS)],
]
CALLING: Row = [
    *[(1, Kind.BOS), (32, Kind.USER), (9, Kind.CALL), (60, Kind.CALL), (61, Kind.CALL)],
    *[(2, Kind.EOS), (70, Kind.TOOL_RESULT), (52, Kind.TEXT), (2, Kind.EOS)],
]
WITHHELD_ANSWER: Row = [
    *[(1, Kind.BOS), (33, Kind.USER), (53, Kind.TEXT), (2, Kind.EOS), (36, Kind.USER)],
    *[(54, Kind.TEXT), (2, Kind.EOS)],
]


class TestLossByKind:
    @pytest.mark.parametrize("thinking", [True, False])
    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
    def test_it_is_the_mean_over_the_learned_tokens_of_each_kind(
        self, memorised: Training, make_rows: MakeRows, layout: dict[str, Any], thinking: bool
    ) -> None:
        withheld = list(WITHHELD_ANSWER)
        for place in (2, 3):
            withheld[place] = (withheld[place][0], withheld[place][1] | WITHHELD)  # type: ignore[assignment]
        rows = make_rows([THINKING, CALLING, withheld, row(4, 3, seed=0)])
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for index in range(len(rows)):
            ids = torch.from_numpy(rows.ids(index).astype(np.int64))
            with torch.no_grad():
                logits = memorised.base.model(input_ids=ids[None], use_cache=False).logits[0]
            losses = F.cross_entropy(logits[:-1], ids[1:], reduction="none").tolist()
            for loss, kind in zip(losses, rows.kinds(index)[1:].tolist(), strict=True):
                if kind in (Kind.TEXT, Kind.CALL, Kind.EOS) or (thinking and kind == Kind.THINK):
                    word = Kind(kind).word
                    sums[word] = sums.get(word, 0.0) + loss
                    counts[word] = counts.get(word, 0) + 1
        config = settings(train_on_thinking=thinking, **layout)
        found = score(memorised.model, memorised.base, rows, config, 7, "some")
        assert ("think" in found.loss_by_kind) == thinking
        assert found.tokens_by_kind == counts
        assert found.loss_by_kind == pytest.approx({w: sums[w] / counts[w] for w in sums}, rel=1e-4)
        assert (found.step, found.dataset, found.rows) == (7, "some", 4)


class TestItLeavesNoTrace:
    def test_no_dropout_no_gradient(self, ministral: Path, uneven: Rows, tmp_path: Path) -> None:
        config = settings(ministral, adapter="lora", lora_dropout=0.5, max_steps=1)
        run = training(tmp_path, config, uneven)
        run.step(1, Order(uneven, config).step(1))
        first, second = (score(run.model, run.base, uneven, config).loss for _ in range(2))
        assert first == second
        assert run.model.training
        assert all(p.grad is None for p in run.model.parameters())

    def test_training_goes_on_after_an_error_too(self, ministral: Path) -> None:
        model = load_base(ministral, settings(ministral)).model
        seen = []
        with contextlib.suppress(ZeroDivisionError), evaluating(model):
            seen = [model.training, torch.is_grad_enabled()]
            raise ZeroDivisionError
        assert seen == [False, False]
        assert model.training
        assert torch.is_grad_enabled()

    def test_it_draws_no_random_number(self, ministral: Path, uneven: Rows, tmp_path: Path) -> None:
        config = settings(ministral, adapter="lora", lora_dropout=0.5)
        run = training(tmp_path, config, uneven)
        before = torch.get_rng_state()
        score(run.model, run.base, uneven, config)
        assert torch.equal(torch.get_rng_state(), before)
