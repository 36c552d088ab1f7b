"""The held-out figures: the loss of every learned token, and answers that are exact."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.chat.render import WITHHELD, Kind, LabelRule, learned
from engine.chat.tokenizer import ChatTokenizer, open_tokenizer
from engine.config import DatasetConfig
from engine.errors import UserError, WorkError
from engine.events import Score
from engine.train.batches import Order, Rows
from engine.train.evaluate import (
    LEAST_STEPS,
    TOP,
    BaseDrift,
    LossAlarm,
    OverfittingAlarm,
    Text,
    divergences,
    evaluating,
    expect,
    general_questions,
    general_texts,
    learned_tokens,
    mean_loss,
    row_losses,
    score,
    score_all,
    without_adapter,
)
from engine.train.forward import Model
from engine.train.generate import generate
from engine.train.loop import Training, clip_gradients
from engine.train.model import load_base
from engine.train.run import name_set
from tests.support.stock import stock_model
from tests.support.tiny import (
    ARCHITECTURES,
    MINISTRAL3,
    VOCABULARY,
    Begin,
    MakeRows,
    Models,
    Row,
    adapted,
    learn_by_heart,
    row,
    settings,
    training,
    with_vision,
    write_model,
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
    given = (run.model, run.base.device, ids[:begins].tolist())
    made = generate(*given, end=2, max_new_tokens=len(answer))
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


CPU = torch.device("cpu")
LORA: dict[str, Any] = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}


def text(question_tokens: int, answer_tokens: int, seed: int) -> Text:
    ids = np.random.default_rng(seed).integers(20, VOCABULARY, question_tokens + answer_tokens)
    targets = np.where(np.arange(len(ids)) < question_tokens, -100, ids)
    return Text(ids.astype(np.int64), targets.astype(np.int64))


TEXTS = tuple(text(3 + n, 2 + 3 * n, n) for n in range(10))
"""More than go through the model at once, of different lengths."""


@torch.no_grad()
def textbook(model: Model) -> Tensor:
    """All log-probabilities at the answers' places, one text at a time, by transformers alone."""
    model.eval()
    found = []
    for each in TEXTS:
        ids = torch.from_numpy(each.ids)[None]
        logs = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        places = np.flatnonzero(each.labels != -100) - 1
        found.append(logs[torch.from_numpy(places)])
    return torch.cat(found)


@pytest.fixture
def moved(ministral: Path, uneven: Rows, tmp_path: Path) -> Training:
    """A run whose adapter acts."""
    return adapted(ministral, tmp_path, uneven, **LORA)


class TestTheNumber:
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_it_is_the_textbook_divergence_of_base_from_tuned(
        self, name: str, model_folder: Models, uneven: Rows, tmp_path: Path
    ) -> None:
        folder = model_folder(name)
        run = adapted(folder, tmp_path, uneven, **LORA)
        stock = textbook(load_base(folder, settings(folder)).model)
        tuned = textbook(run.model)
        by_hand = F.kl_div(tuned, stock, reduction="none", log_target=True).sum(-1)
        with without_adapter(run.model):
            base = expect(run.model, CPU, TEXTS, top=VOCABULARY)
        found = divergences(base, run.model, CPU, TEXTS)
        assert by_hand.mean() > 0.05
        assert torch.allclose(found, by_hand, atol=1e-5)

    def test_error_of_what_is_not_kept(self, moved: Training) -> None:
        with without_adapter(moved.model):
            whole = expect(moved.model, CPU, TEXTS, top=VOCABULARY)
            kept = expect(moved.model, CPU, TEXTS)
        exact = divergences(whole, moved.model, CPU, TEXTS)
        found = divergences(kept, moved.model, CPU, TEXTS)
        assert kept.ids.shape == (len(exact), TOP)
        assert (found <= exact + 1e-6).all()
        logs = torch.zeros(len(exact), VOCABULARY).scatter(1, whole.ids, whole.logs)
        others = torch.ones_like(logs).scatter(1, kept.ids, 0.0).bool()
        mass = (logs.exp() * others).sum(-1)
        assert torch.allclose(mass, kept.rest.exp(), atol=1e-5)
        tuned = textbook(moved.model)
        among = torch.where(others, logs.exp() * (logs - tuned), 0.0).sum(-1)
        bound = among - mass * (mass.log() - torch.where(others, tuned.exp(), 0.0).sum(-1).log())
        assert torch.allclose(exact - found, bound, atol=1e-5)

    def test_an_untouched_adapter_has_none(self, begin: Begin, tmp_path: Path) -> None:
        run = begin(**LORA)
        drift = BaseDrift(run.model, CPU, TEXTS, tmp_path / "drift")
        assert drift.measure(untouched=True) == (0.0, sum(2 + 3 * n for n in range(10)))

    def test_it_does_not_depend_on_how_places_are_cut(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: Training
    ) -> None:

        def found() -> tuple[float, int] | None:
            drift = BaseDrift(moved.model, CPU, TEXTS, tmp_path / "none" / "file")
            return drift.measure(untouched=False)

        once = found()
        monkeypatch.setattr("engine.train.evaluate.SMALLEST_CHUNK_BYTES", 4 * VOCABULARY * 7)
        in_chunks = found()
        assert once
        assert in_chunks
        assert in_chunks[0] == pytest.approx(once[0], rel=1e-5)
        assert in_chunks[1] == once[1]

    def test_never_negative(self, moved: Training) -> None:
        with torch.no_grad():
            for name, parameter in moved.model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(1e-4)
            with without_adapter(moved.model):
                base = expect(moved.model, CPU, TEXTS)
        found = divergences(base, moved.model, CPU, TEXTS)
        assert float(found.min()) == 0.0
        assert float(found.max()) < 1e-5


class TestTheBase:
    def test_disabled_adapter_is_base(self, ministral: Path, moved: Training) -> None:
        trained = [p.requires_grad for p in moved.model.parameters()]
        with without_adapter(moved.model):
            inside = textbook(moved.model)
        stock = textbook(load_base(ministral, settings(ministral)).model)
        assert torch.equal(inside, stock)
        assert not torch.allclose(textbook(moved.model), stock, atol=1e-2)
        assert [p.requires_grad for p in moved.model.parameters()] == trained

    def test_full_fine_tune_is_stored(self, begin: Begin, ministral: Path, tmp_path: Path) -> None:
        run = begin(max_steps=3, learning_rate=0.01)
        file = tmp_path / "drift.safetensors"
        assert BaseDrift(run.model, CPU, TEXTS, file).measure(untouched=True) == (0.0, 155)
        for number, batch in run.order.steps(0):
            run.step(number, batch)
        resumed = BaseDrift(run.model, CPU, TEXTS, file).measure(untouched=False)
        stock = load_base(ministral, settings(ministral)).model
        again = divergences(expect(stock, CPU, TEXTS), run.model, CPU, TEXTS)
        assert resumed
        assert resumed[0] == pytest.approx(float(again.mean()), rel=1e-5)
        assert resumed[0] > 0.01

    @pytest.mark.parametrize("lost", ["gone", "torn", "of other texts"])
    def test_lost_base_is_asked_again_with_an_adapter_alone(
        self, lost: str, begin: Begin, ministral: Path, uneven: Rows, tmp_path: Path
    ) -> None:
        file = tmp_path / "drift.safetensors"
        full = begin("full")
        BaseDrift(full.model, CPU, TEXTS, file).measure(untouched=True)
        texts = TEXTS[:3] if lost == "of other texts" else TEXTS
        if lost == "gone":
            file.unlink()
        elif lost == "torn":
            file.write_bytes(file.read_bytes()[:100])
        assert BaseDrift(full.model, CPU, texts, file).measure(untouched=False) is None
        run = adapted(ministral, tmp_path / "lora", uneven, **LORA)
        found = BaseDrift(run.model, CPU, texts, file).measure(untouched=False)
        assert found
        assert found[0] > 0.05

    def test_it_is_remembered_although_the_disk_refuses(self, begin: Begin, tmp_path: Path) -> None:
        run = begin()
        drift = BaseDrift(run.model, CPU, TEXTS, tmp_path / "no folder" / "drift.safetensors")
        assert drift.measure(untouched=True)
        assert drift.measure(untouched=False)


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return open_tokenizer("demo-tiny")


def test_the_general_texts_are_short_and_of_many_kinds(tokenizer: ChatTokenizer) -> None:
    texts = general_texts(tokenizer)
    assert len(texts) == len(general_questions()) == len(set(general_questions())) == 24
    answers = [int((each.labels != -100).sum()) for each in texts]
    assert min(answers) >= 5
    assert sum(answers) < 700
    assert all(each.labels[-1] == tokenizer.specials.eos for each in texts)
    assert max(len(each.ids) for each in texts) < 80


def alarm(**keys: Any) -> LossAlarm:
    return LossAlarm(settings(**keys), vocabulary=131072)


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
        levels = [level for level, text in notes(run) if "the first loss is 7.00" in text]
        assert levels == ["warning"]
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
    @pytest.mark.parametrize(
        ("before", "then", "found"),
        [
            ([1.5] * LEAST_STEPS, [2.9, 3.1], [None, 1.5]),
            ([1.0, 1.0], [9.0], [None]),  # a few losses are too few
            ([0.01] * LEAST_STEPS, [0.5, 1.2], [None, 0.01]),  # a memorised loss may double
            ([1.0] * 30, [5.0] * (LEAST_STEPS + 1), [1.0, *[None] * (LEAST_STEPS - 1), 5.0]),
        ],
        ids=["a leap over the median", "too few", "memorised", "once in a while"],
    )
    def test_it_is_reported(
        self, before: list[float], then: list[float], found: list[float | None]
    ) -> None:
        losses = alarm()
        assert not any(losses.spike(loss) for loss in before)
        reported = [losses.spike(loss) for loss in then]
        assert [each is not None for each in reported] == [each is not None for each in found]
        assert reported[:2] == found[:2]

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
    @pytest.mark.parametrize(
        ("keys", "losses", "ends"),
        [
            ({"loss_watchdog_patience": 2}, (6, 5, 6, 4, 6, 6), [False] * 5 + [True]),
            ({}, (6, 6, 6), [False, False, True]),
            ({"loss_watchdog_threshold": None}, (100,) * 10, [False] * 10),
        ],
        ids=["patience", "three steps unless named", "no limit"],
    )
    def test_the_run_ends_after_the_steps_that_patience_grants(
        self, keys: dict[str, Any], losses: tuple[float, ...], ends: list[bool]
    ) -> None:
        found = alarm(**({"loss_watchdog_threshold": 5.0} | keys))
        assert [found.stop_reason(1, loss, 1.0) is not None for loss in losses] == ends

    def test_the_rows_are_named_the_weights_left_alone(self, begin: Begin, uneven: Rows) -> None:
        keys = {"loss_watchdog_threshold": 0.1, "loss_watchdog_patience": 1}
        run = begin(learning_rate=0.1, **keys)
        before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        batch = run.order.step(1)
        with pytest.raises(WorkError, match=r"stays above loss_watchdog_threshold: 0\.1") as caught:
            run.step(1, batch)
        assert uneven.place(batch.rows[0]) in caught.value.why
        assert all(torch.equal(p, before[n]) for n, p in run.model.named_parameters())


class TestLearningByHeart:
    @pytest.mark.parametrize(
        ("held_out", "training", "warned"),
        [
            ([2.0, 1.0, 1.1, 1.2, 1.3], [1.5, 1.0, 0.8, 0.5], [3]),  # at the second rise, and once
            ([1.0, 1.1, 1.05, 1.2], [0.9, 0.8, 0.7], []),  # a fall in between begins anew
            ([1.0, 1.1, 1.0, 1.1, 1.2], [0.9, 0.8, 0.7, 0.6], [4]),
            ([1.0, 1.1, 1.2], [0.9, 1.4], []),  # the training loss rises, too
        ],
    )
    def test_it_warns_at_the_second_rise_in_a_row_while_training_falls(
        self, held_out: list[float], training: list[float], warned: list[int]
    ) -> None:
        alarm, found = OverfittingAlarm(), []
        for number, (loss, steps) in enumerate(zip(held_out, [None, *training], strict=True)):
            if steps is not None:
                alarm.add_step(steps)
            if alarm.add_evaluation(loss, best_step=20) is not None:
                found.append(number)
        assert found == warned

    def test_it_names_the_losses_and_the_best_save(self) -> None:
        alarm = OverfittingAlarm()
        for loss, step in ((1.0, 1.0), (1.1, 0.9), (1.2, 0.8)):
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
    for index, loss in found.items():
        ids = torch.from_numpy(uneven.ids(index).astype("int64"))[None]
        answers = torch.from_numpy(uneven.kinds(index) >= Kind.TEXT)[None]
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


def test_no_evaluation_set_takes_the_name_of_another() -> None:
    sets = [("a/rows", "validation"), ("a/rows", "test"), ("b/rows.jsonl", None), ("rows", "test")]
    taken: list[str] = []
    for path, split in sets:
        taken.append(name_set(DatasetConfig(path=path, split=split), taken))
    assert taken == ["rows", "rows-test", "rows-2", "rows-3"]
