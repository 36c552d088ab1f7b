"""Drift is the divergence of base from tuned model, and needs no second model to tell it."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.chat.tokenizer import ChatTokenizer, open_tokenizer
from engine.train.batches import Rows
from engine.train.evaluate import (
    TOP,
    BaseDrift,
    Text,
    divergences,
    expect,
    general_questions,
    general_texts,
    without_adapter,
)
from engine.train.forward import Model
from engine.train.loop import Training
from engine.train.model import load_base
from tests.support.tiny import (
    ARCHITECTURES,
    VOCABULARY,
    Begin,
    Models,
    settings,
    training,
    wake_adapter,
)

CPU = torch.device("cpu")
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}


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


def adapted(folder: Path, home: Path, rows: Rows, **keys: object) -> Training:
    run = training(home, settings(folder, **(LORA | keys)), rows)
    wake_adapter(run.model)
    return run


class TestTheNumber:
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_it_is_the_textbook_divergence_of_base_from_tuned(
        self, name: str, model_folder: Models, uneven: Rows, tmp_path: Path
    ) -> None:
        folder = model_folder(name)
        run = adapted(folder, tmp_path, uneven)
        stock = textbook(load_base(folder, settings(folder)).model)
        tuned = textbook(run.model)
        by_hand = F.kl_div(tuned, stock, reduction="none", log_target=True).sum(-1)
        with without_adapter(run.model):
            base = expect(run.model, CPU, TEXTS, top=VOCABULARY)
        found = divergences(base, run.model, CPU, TEXTS)
        assert by_hand.mean() > 0.05
        assert torch.allclose(found, by_hand, atol=1e-5)

    def test_error_of_what_is_not_kept(self, ministral: Path, uneven: Rows, tmp_path: Path) -> None:
        run = adapted(ministral, tmp_path, uneven)
        with without_adapter(run.model):
            whole = expect(run.model, CPU, TEXTS, top=VOCABULARY)
            kept = expect(run.model, CPU, TEXTS)
        exact = divergences(whole, run.model, CPU, TEXTS)
        found = divergences(kept, run.model, CPU, TEXTS)
        assert kept.ids.shape == (len(exact), TOP)
        assert (found <= exact + 1e-6).all()
        logs = torch.zeros(len(exact), VOCABULARY).scatter(1, whole.ids, whole.logs)
        others = torch.ones_like(logs).scatter(1, kept.ids, 0.0).bool()
        mass = (logs.exp() * others).sum(-1)
        assert torch.allclose(mass, kept.rest.exp(), atol=1e-5)
        tuned = textbook(run.model)
        among = torch.where(others, logs.exp() * (logs - tuned), 0.0).sum(-1)
        bound = among - mass * (mass.log() - torch.where(others, tuned.exp(), 0.0).sum(-1).log())
        assert torch.allclose(exact - found, bound, atol=1e-5)

    def test_an_untouched_adapter_has_none(self, begin: Begin, tmp_path: Path) -> None:
        run = begin(**LORA)
        drift = BaseDrift(run.model, CPU, TEXTS, tmp_path / "drift")
        assert drift.measure(untouched=True) == (0.0, sum(2 + 3 * n for n in range(10)))

    def test_it_does_not_depend_on_how_places_are_cut(
        self, ministral: Path, uneven: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = adapted(ministral, tmp_path, uneven)

        def found() -> tuple[float, int] | None:
            return BaseDrift(run.model, CPU, TEXTS, tmp_path / "none" / "file").measure(
                untouched=False
            )

        once = found()
        monkeypatch.setattr("engine.train.evaluate.SMALLEST_CHUNK_BYTES", 4 * VOCABULARY * 7)
        in_chunks = found()
        assert once
        assert in_chunks
        assert in_chunks[0] == pytest.approx(once[0], rel=1e-5)
        assert in_chunks[1] == once[1]

    def test_never_negative(self, model_folder: Models, uneven: Rows, tmp_path: Path) -> None:
        run = adapted(model_folder("ministral3"), tmp_path, uneven)
        with torch.no_grad():
            for name, parameter in run.model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(1e-4)
            with without_adapter(run.model):
                base = expect(run.model, CPU, TEXTS)
        found = divergences(base, run.model, CPU, TEXTS)
        assert float(found.min()) == 0.0
        assert float(found.max()) < 1e-5


class TestTheBase:
    def test_disabled_adapter_is_base(self, ministral: Path, uneven: Rows, tmp_path: Path) -> None:
        run = adapted(ministral, tmp_path, uneven)
        trained = [p.requires_grad for p in run.model.parameters()]
        with without_adapter(run.model):
            inside = textbook(run.model)
        stock = textbook(load_base(ministral, settings(ministral)).model)
        assert torch.equal(inside, stock)
        assert not torch.allclose(textbook(run.model), stock, atol=1e-2)
        assert [p.requires_grad for p in run.model.parameters()] == trained

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
        run = adapted(ministral, tmp_path / "lora", uneven)
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
