"""Training with images: the same numbers packed, padded and alone, and only what is meant moves."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.catalog import TokenizerSpec
from engine.chat.render import Kind, LabelRule, Rendered
from engine.chat.tokenizer import build_tokenizer
from engine.errors import WorkError
from engine.plan.trainer import PATCHES_AT_ONCE
from engine.train import batches
from engine.train.batches import Order, Rows, collate, evaluation_micros, tower_groups
from engine.train.evaluate import evaluating, score
from engine.train.forward import Model, head_of, hidden_states, image_features, unwrapped
from engine.train.generate import ask_about_images, generate
from engine.train.model import load_base
from tests.support.pictured_rows import MIXED, Pictured, picture, write_pictured, write_rendered
from tests.support.stock import stock_model, take_step
from tests.support.tiny import (
    Models,
    assert_resumes,
    assert_same,
    gradients,
    moved,
    settings,
    training,
    wake_adapter,
)

TEXT_MODELS = ("mistral", "ministral3", "mistral4")
LAYOUTS: dict[str, dict[str, Any]] = {
    "one by one": {"gradient_accumulation_steps": 5},
    "padded together": {"micro_batch_size": 5},
    "packed": {"sample_packing": True, "sequence_len": 128, "gradient_accumulation_steps": 5},
    "packed, several at once": {"sample_packing": True, "sequence_len": 64, "micro_batch_size": 5},
}


@pytest.fixture(params=TEXT_MODELS)
def model_path(request: pytest.FixtureRequest, seeing_model: Models) -> Path:
    return seeing_model(request.param)


@pytest.fixture
def ministral(seeing_model: Models) -> Path:
    return seeing_model("ministral3")


def alone(model: Model, rows: Rows) -> torch.Tensor:
    each = [collate(rows, [[k]], LabelRule()).tensors for k in range(len(rows))]
    return torch.cat([hidden_states(model, tensors)[0] for tensors in each])


class TestSameNumbers:
    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_packed_equal_separate_rows(self, model_path: Path, mixed: Rows, mode: str) -> None:
        model = load_base(model_path, settings(model_path)).model
        getattr(model, mode)()
        with torch.no_grad():
            packed = collate(mixed, [range(len(mixed))], LabelRule()).tensors
            together = hidden_states(model, packed)[0]
            torch.testing.assert_close(together, alone(model, mixed), rtol=1e-5, atol=1e-5)

    def test_lone_image_of_one_token(self, ministral: Path, tmp_path: Path) -> None:
        tiny = [Pictured((picture(20, 28, seed),), seed=seed) for seed in (1, 2)]
        rows = write_pictured(tmp_path / "rows", tiny)
        model = load_base(ministral, settings(ministral)).model
        with torch.no_grad():
            together = hidden_states(model, collate(rows, [[0, 1]], LabelRule()).tensors)[0]
            torch.testing.assert_close(together, alone(model, rows), rtol=1e-5, atol=1e-5)

    def test_small_image_beside_a_large_one(self, ministral: Path, tmp_path: Path) -> None:
        tiny = [Pictured((picture(28, 28, seed),), seed=seed) for seed in range(9)]
        rows = write_pictured(tmp_path / "rows", [Pictured((picture(112, 112),)), *tiny])
        model = load_base(ministral, settings(ministral)).model
        tensors = collate(rows, [range(len(rows))], LabelRule()).tensors
        assert tensors["pixels"].numel() == 3 * (112**2 + 9 * 28**2)
        given: list[torch.Size] = []
        unwrapped(model).model.vision_tower.patch_conv.register_forward_pre_hook(
            lambda _, inputs: given.append(inputs[0].shape)
        )
        with torch.no_grad():
            together = hidden_states(model, tensors)[0]
            assert given == [(10, 3, 112, 112)]
            torch.testing.assert_close(together, alone(model, rows), rtol=1e-5, atol=1e-5)

    @given(
        st.lists(st.tuples(st.integers(1, 110), st.integers(1, 110)), min_size=1, max_size=60),
        st.integers(1, 5000),
    )
    def test_tower_groups(self, shapes: list[tuple[int, int]], most: int) -> None:
        """Each image once and in order, padded to the largest of its group."""
        sizes = [(14 * high, 14 * wide) for high, wide in shapes]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batches, "PATCHES_AT_ONCE", most)
            groups = list(tower_groups(sizes, 14))
        assert [place for start, end in groups for place in range(start, end)] == [
            *range(len(sizes))
        ]
        for start, end in groups:
            high, wide = (max(shape[k] for shape in shapes[start:end]) for k in (0, 1))
            assert end - start == 1 or (end - start) * high * wide <= most

    def test_an_image_is_seen(self, ministral: Path, mixed: Rows) -> None:
        model = load_base(ministral, settings(ministral)).model
        tensors = collate(mixed, [[0]], LabelRule()).tensors
        with torch.no_grad():
            seen = hidden_states(model, tensors)
            other = tensors | {"pixels": tensors["pixels"].flip(-1)}
            assert (hidden_states(model, other) - seen).abs().max() > 1e-3

    def test_a_tower_that_sees_few_images_at_a_time_sees_the_same(
        self, ministral: Path, mixed: Rows, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = load_base(ministral, settings(ministral)).model
        tensors = collate(mixed, [range(len(mixed))], LabelRule()).tensors
        found = []
        with torch.no_grad():
            for patches in (PATCHES_AT_ONCE, 40, 1):
                monkeypatch.setattr(batches, "PATCHES_AT_ONCE", patches)
                found.append(hidden_states(model, tensors))
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[2], found[0], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
    def test_the_first_step_is_that_of_single_samples_in_transformers(
        self, ministral: Path, mixed: Rows, tmp_path: Path, layout: dict[str, Any]
    ) -> None:
        keys = {"unfrozen_parameters": [".*"], "max_grad_norm": 1e9, "num_epochs": 1}
        ours = training(tmp_path, settings(ministral, **keys, **layout), mixed)
        loss, norm = ours.gradients(ours.order.step(1))
        stock, expected = take_step(stock_model(ministral), mixed)
        assert loss == pytest.approx(stock, rel=1e-5)
        total = torch.cat([g.flatten().double() for g in expected.values()]).norm()
        assert norm == pytest.approx(float(total), rel=1e-5)
        assert_same(gradients(ours.model), expected, 1e-4, 1e-6)

    def test_packing_does_not_change_the_score(self, ministral: Path, mixed: Rows) -> None:
        separate = settings(ministral)
        base = load_base(ministral, separate)
        packed = settings(ministral, sample_packing=True, sequence_len=128)
        ours, theirs = (score(base.model, base, mixed, c) for c in (packed, separate))
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert ours.tokens_by_kind == theirs.tokens_by_kind


class TestWhatIsTrained:
    @pytest.mark.parametrize("adapter", ["lora", None])
    def test_frozen_tower(self, ministral: Path, mixed: Rows, adapter: str | None) -> None:
        """PEFT would have it so: twice the tower's work more, and its masks kept meanwhile."""
        config = settings(ministral, adapter=adapter, gradient_checkpointing=True)
        model = training(ministral, config, mixed).model.train()
        batch = collate(mixed, [range(len(mixed))], LabelRule()).tensors
        seen = image_features(model, batch)["mm_encoder_outputs"]["image"].pooler_output
        assert not any(feature.requires_grad for feature in seen)
        words = unwrapped(model).get_input_embeddings()(batch["input_ids"])
        assert words.requires_grad == (adapter is None)
        assert hidden_states(model, batch).requires_grad

    def test_full_fine_tune_of_the_text(self, ministral: Path, mixed: Rows, tmp_path: Path) -> None:
        names = moved(training(tmp_path, settings(ministral, micro_batch_size=5), mixed), 1)
        assert names
        assert not [name for name in names if "vision_tower" in name or "projector" in name]

    def test_named_they_are_trained(self, ministral: Path, mixed: Rows, tmp_path: Path) -> None:
        names = ["model.vision_tower.*", "model.multi_modal_projector.*"]
        config = settings(ministral, micro_batch_size=5, unfrozen_parameters=names)
        found = moved(training(tmp_path, config, mixed), 1)
        assert {name.split(".")[1] for name in found} == {"vision_tower", "multi_modal_projector"}

    def test_adapter_spares_the_tower(self, ministral: Path, mixed: Rows, tmp_path: Path) -> None:
        run = training(tmp_path, settings(ministral, adapter="lora", micro_batch_size=5), mixed)
        run.step(1, run.order.step(1))
        adapted = [n for n, p in run.model.named_parameters() if p.requires_grad]
        assert all("language_model" in name for name in adapted)

    @pytest.mark.parametrize("keys", [{"unfrozen_parameters": [".*"]}, {"adapter": "lora"}])
    def test_checkpointing_is_exact(
        self, ministral: Path, mixed: Rows, tmp_path: Path, keys: dict[str, Any]
    ) -> None:
        found = []
        for number, first in enumerate((0, 1, None)):
            again = {"gradient_checkpointing": first != 0, "checkpointed_layers": first or None}
            config = settings(ministral, micro_batch_size=5, **again, **keys)
            run = training(tmp_path / str(number), config, mixed)
            if "adapter" in keys:
                wake_adapter(run.model)
            found.append((run.gradients(run.order.step(1)), gradients(run.model)))
        assert any("vision_tower" in name for name in found[0][1]) == ("adapter" not in keys)
        for other in found[1:]:
            assert other[0] == found[0][0]
            assert_same(other[1], found[0][1], 0.0, 0.0)

    def test_it_trains_in_bfloat16(self, ministral: Path, mixed: Rows, tmp_path: Path) -> None:
        keys = {"micro_batch_size": 5, "unfrozen_parameters": [".*"]}
        losses = []
        for bf16 in (True, False):
            run = training(tmp_path / str(bf16), settings(ministral, bf16=bf16, **keys), mixed)
            losses.append(run.gradients(run.order.step(1))[0])
            assert gradients(run.model)["model.vision_tower.patch_conv.weight"].abs().sum() > 0
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_cache_changes_no_answer_about_images(ministral: Path, mixed: Rows) -> None:
    model = load_base(ministral, settings(ministral)).model
    tensors = collate(mixed, [[2]], LabelRule()).tensors
    begins = int(np.flatnonzero(mixed.kinds(2) == Kind.TEXT)[0])
    images = {k: tensors[k] for k in ("pixels", "image_sizes")}
    prompt = mixed.ids(2)[:begins].tolist()
    made = generate(model, torch.device("cpu"), prompt, images=images, end=-1, max_new_tokens=12)
    ids = list(prompt)
    with evaluating(model):
        for _ in range(12):
            known = torch.tensor([ids])
            batch = {"input_ids": known, "position_ids": torch.arange(len(ids))[None], **images}
            logits = hidden_states(model, batch)[0, -1] @ head_of(model).T
            ids.append(int(logits.argmax()))
    assert made == ids[begins:]


class TestImagesOfARow:
    def test_a_cut_row_has_the_images_before_the_cut(self, mixed: Rows) -> None:
        first, second = MIXED[2].images
        whole = 1 + first.tokens + 3 + second.tokens
        for length, images in ((whole, 2), (whole - second.tokens, 1), (1, 0)):
            lengths = np.minimum(mixed.lengths, length)
            cut = Rows(mixed.prepared, mixed.chosen, lengths)
            assert len(cut.images(2)) == images

    @pytest.mark.parametrize("damage", ["a token less", "an image less", "another token"])
    def test_tokens_that_do_not_fit_the_images(self, tmp_path: Path, damage: str) -> None:
        good = MIXED[2].rendered()
        ids, kinds, images = good.input_ids.copy(), good.kinds, good.images
        if damage == "a token less":
            ids, kinds = np.delete(ids, 2), np.delete(kinds, 2)
        elif damage == "an image less":
            images = images[:1]
        else:
            ids[2] = 12
        bad = Rendered(ids, kinds, np.zeros(len(ids), np.int32), images)
        rows = write_rendered(tmp_path / "rows", [MIXED[0].rendered(), bad])
        with pytest.raises(WorkError, match="line 2 do not fit its images"):
            collate(rows, [[0, 1]], LabelRule())

    def test_other_images_behind_the_same_tokens_are_another_order(self, tmp_path: Path) -> None:
        prints = [
            Order(write_pictured(tmp_path / str(n), [Pictured((picture(28, 28, n),))]), settings())
            for n in (1, 2)
        ]
        assert prints[0].fingerprint() != prints[1].fingerprint()

    def test_the_first_held_out_images_are_asked_up_to_their_answer(self, mixed: Rows) -> None:
        tokenizer = build_tokenizer(TokenizerSpec("v13", think=True))
        asked = ask_about_images({"held": mixed}, tokenizer)
        assert [len(prompt.images["image_sizes"]) for prompt in asked] == [1, 2, 1]
        assert "rows.jsonl line 3" in asked[1].text
        expected = mixed.ids(0)[: -MIXED[0].answer_tokens - 1].tolist()
        assert list(asked[0].tokens) == expected


class TestOrder:
    def test_decoding_ahead_changes_no_batch(self, mixed: Rows) -> None:
        config = settings(micro_batch_size=2, num_epochs=2)
        walked = [batch for _, batch in Order(mixed, config).steps(0)]
        again = Order(mixed, config)
        for number, batch in enumerate(walked, start=1):
            for left, right in zip(batch.micros, again.step(number).micros, strict=True):
                assert left.rows == right.rows
                assert left.tensors.keys() == right.tensors.keys()
                assert all(torch.equal(left.tensors[k], right.tensors[k]) for k in left.tensors)

    def test_evaluation_reads_every_image_once(self, mixed: Rows) -> None:
        config = settings(micro_batch_size=2)
        sizes = [
            micro.tensors["image_sizes"].tolist()
            for micro in evaluation_micros(mixed, config)
            if "image_sizes" in micro.tensors
        ]
        flat = [size for part in sizes for size in part]
        assert flat == [[28, 56], [84, 112], [84, 56], [112, 112], [84, 84]]

    def test_resume_repeats_the_steps(self, ministral: Path, mixed: Rows, tmp_path: Path) -> None:
        keys = {"adapter": "lora", "sample_packing": True, "sequence_len": 64, "max_steps": 4}
        config = settings(ministral, **keys, gradient_accumulation_steps=1, learning_rate=0.01)
        assert_resumes(tmp_path, config, mixed, saved=2)
