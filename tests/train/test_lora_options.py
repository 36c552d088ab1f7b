"""The options of an adapter do what PEFT does with them, and others can use what they leave."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from engine.catalog import read_architecture
from engine.errors import UserError
from engine.plan.targets import trainable_parameters as planned_parameters
from engine.train.batches import Rows
from engine.train.checkpoint import export_trained, trained_parameters, trained_tensors
from engine.train.forward import head_of
from engine.train.loop import Training
from tests.support.stock import stock_model
from tests.support.tiny import (
    ARCHITECTURES,
    MINISTRAL3,
    VOCABULARY,
    Begin,
    logits,
    settings,
    training,
    wake_adapter,
    with_vision,
    write_model,
)

BASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"bf16": True},
    "NF4": {"adapter": "qlora", "load_in_4bit": True, "bf16": True},
    "int8": {"load_in_8bit": True, "bf16": True},
}


def steps(home: Path, base: Path, rows: Rows, count: int = 2, **keys: Any) -> Training:
    """A run after a few optimizer steps, its adapter awake from the start."""
    config = settings(base, **({"adapter": "lora", "learning_rate": 0.01} | keys))
    run = training(home, config, rows)
    wake_adapter(run.model)
    for number, batch in zip(range(1, count + 1), run.order.steps(0), strict=False):
        run.step(number, batch[1])
    return run


def exported(run: Training, home: Path, base: Path) -> Path:
    return export_trained(run.model, home, base, run.config)


class TestStockPeft:
    """The adapter's file alone makes stock PEFT answer as the run does."""

    @pytest.mark.parametrize(
        "keys",
        [
            {"peft_use_rslora": True, "lora_r": 8, "lora_alpha": 8},
            {"peft_use_dora": True, "lora_r": 4},
            {"peft_init_lora_weights": "gaussian"},
            {"peft_layers_to_transform": [1]},
        ],
        ids=str,
    )
    def test_with_each_option(
        self, ministral: Path, uneven: Rows, tmp_path: Path, keys: dict[str, Any]
    ) -> None:
        run = steps(tmp_path / "run", ministral, uneven, **keys)
        folder = exported(run, tmp_path, ministral)
        stock: Any = peft.PeftModel.from_pretrained(stock_model(ministral), str(folder))
        torch.testing.assert_close(logits(stock), logits(run.model), rtol=0, atol=0)
        assert (logits(stock) - logits(stock_model(ministral))).abs().max() > 0.1

    def test_rslora_scaling(self, ministral: Path, uneven: Rows, tmp_path: Path) -> None:
        run = steps(tmp_path, ministral, uneven, 0, lora_r=16, lora_alpha=8, peft_use_rslora=True)
        layer: Any = run.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
        assert layer.scaling["default"] == 8 / 16**0.5

    @pytest.mark.parametrize("base", BASES.values(), ids=BASES)
    def test_dora_learns_the_length_of_every_output_on_any_base(
        self, ministral: Path, uneven: Rows, tmp_path: Path, base: dict[str, Any]
    ) -> None:
        run = steps(tmp_path, ministral, uneven, 0, peft_use_dora=True, **base)
        run.gradients(run.order.step(1))
        lengths = [p for n, p in trained_parameters(run.model) if "magnitude" in n]
        assert lengths
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lengths)
        assert {p.dtype for p in lengths} == {torch.float32}

    def test_adapter_starts_from_the_untouched_model(self, begin: Begin, ministral: Path) -> None:
        ways: list[dict[str, Any]] = [
            {"peft_init_lora_weights": "gaussian"},
            {"peft_use_dora": True},
        ]
        for number, keys in enumerate(ways):
            run = begin(str(number), adapter="lora", **keys)
            torch.testing.assert_close(
                logits(run.model), logits(stock_model(ministral)), rtol=1e-5, atol=1e-5
            )


class TestVisionTower:
    def test_pattern_may_name_the_vision_tower(self, uneven: Rows, tmp_path: Path) -> None:
        base = write_model(tmp_path / "base", with_vision(MINISTRAL3))
        wish = r"model\.(language_model|vision_tower)\..*\.(q_proj|up_proj)"
        run = steps(tmp_path / "run", base, uneven, lora_target_modules=wish)
        names: Any = run.model.targeted_module_names
        assert any("vision_tower" in name for name in names)
        assert any("language_model" in name for name in names)
        folder = exported(run, tmp_path, base)
        stock: Any = peft.PeftModel.from_pretrained(stock_model(base), str(folder))
        assert set(stock.targeted_module_names) == set(names)


class TestSavedWhole:
    """embed_tokens and lm_head trained beside the adapter."""

    @pytest.fixture(params=[False, True], ids=["untied", "tied"])
    def base(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        config = with_vision(MINISTRAL3) | {"tie_word_embeddings": request.param}
        return write_model(tmp_path / "base", config)

    @pytest.mark.parametrize("kind", BASES.values(), ids=BASES)
    def test_both_are_trained_and_stock_peft_answers_the_same(
        self, base: Path, uneven: Rows, tmp_path: Path, kind: dict[str, Any]
    ) -> None:
        keys = {"lora_modules_to_save": ["embed_tokens", "lm_head"]} | kind
        run = steps(tmp_path / "run", base, uneven, **keys)
        tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
        whole = {n: p for n, p in trained_parameters(run.model) if "lora_" not in n}
        assert len(whole) == (1 if tied else 2)
        embedding = run.model.get_base_model().get_input_embeddings()
        assert (head_of(run.model).data_ptr() == embedding.weight.data_ptr()) == tied
        assert head_of(run.model).requires_grad
        dtype = torch.bfloat16 if kind else torch.float32
        assert {p.dtype for p in whole.values()} == {dtype}
        folder = exported(run, tmp_path, base)
        if "load_in_4bit" in kind or "load_in_8bit" in kind:
            return
        stock: Any = peft.PeftModel.from_pretrained(stock_model(base, dtype), str(folder))
        torch.testing.assert_close(logits(stock), logits(run.model), rtol=0, atol=1e-3)
        assert (logits(stock) - logits(stock_model(base, dtype))).abs().max() > 0.1

    @pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
    def test_one_of_a_tied_pair_means_both(self, uneven: Rows, tmp_path: Path, name: str) -> None:
        base = write_model(tmp_path / "base", MINISTRAL3 | {"tie_word_embeddings": True})
        run = steps(tmp_path / "run", base, uneven, lora_modules_to_save=[name])
        embedding = run.model.get_base_model().get_input_embeddings()
        assert head_of(run.model).data_ptr() == embedding.weight.data_ptr()
        before = stock_model(base).get_input_embeddings().weight
        assert not torch.equal(embedding.weight, before)
        folder = exported(run, tmp_path, base)
        stock: Any = peft.PeftModel.from_pretrained(stock_model(base), str(folder))
        torch.testing.assert_close(logits(stock), logits(run.model), rtol=0, atol=0)

    def test_only_the_named_one_of_two_is_trained(self, uneven: Rows, tmp_path: Path) -> None:
        base = write_model(tmp_path / "base", MINISTRAL3)
        run = steps(tmp_path / "run", base, uneven, lora_modules_to_save=["lm_head"])
        inner = run.model.get_base_model()
        assert torch.equal(
            inner.get_input_embeddings().weight, stock_model(base).get_input_embeddings().weight
        )
        assert not torch.equal(head_of(run.model), stock_model(base).lm_head.weight)


class TestGoingOn:
    @pytest.fixture
    def first(self, ministral: Path, uneven: Rows, tmp_path: Path) -> Path:
        return exported(steps(tmp_path / "first", ministral, uneven), tmp_path, ministral)

    def test_starts_with_its_weights(self, begin: Begin, ministral: Path, first: Path) -> None:
        run = begin("second", adapter="lora", lora_model_dir=str(first))
        stock: Any = peft.PeftModel.from_pretrained(stock_model(ministral), str(first))
        assert torch.equal(logits(run.model), logits(stock))
        assert all(p.requires_grad for p in run.parameters)

    @pytest.mark.parametrize(
        ("keys", "says"),
        [
            ({"lora_r": 4, "lora_alpha": 32}, "its lora_r is 16"),
            ({"lora_alpha": 16}, "its lora_alpha is 32"),
            ({"peft_use_rslora": True}, "its peft_use_rslora is false"),
            ({"peft_use_dora": True}, "its peft_use_dora is false"),
            ({"lora_target_modules": ["q_proj"]}, r"it has model\.layers\.0\.mlp"),
            ({"lora_modules_to_save": ["lm_head"]}, r"it lacks lm_head"),
        ],
        ids=str,
    )
    def test_another_build_is_refused_with_the_difference(
        self, begin: Begin, first: Path, keys: dict[str, Any], says: str
    ) -> None:
        with pytest.raises(UserError, match=says):
            begin("second", adapter="lora", lora_model_dir=str(first), **keys)

    @pytest.mark.parametrize(
        ("key", "value"),
        [("alpha_pattern", {"q_proj": 4}), ("init_lora_weights", "pissa"), ("lora_bias", True)],
    )
    def test_other_settings_refused(self, begin: Begin, first: Path, key: str, value: Any) -> None:
        path = first / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        with pytest.raises(UserError, match=f"its {key} is"):
            begin("second", adapter="lora", lora_model_dir=str(first))

    @pytest.mark.parametrize(
        "damage",
        [
            lambda folder: shutil.rmtree(folder),
            lambda folder: (folder / "adapter_model.safetensors").unlink(),
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"short"),
            lambda folder: (folder / "adapter_config.json").write_text("[]"),
            lambda folder: (folder / "adapter_config.json").write_text("{"),
        ],
    )
    def test_no_adapter(self, begin: Begin, first: Path, damage: Callable[[Path], object]) -> None:
        damage(first)
        with pytest.raises(UserError, match="There is no adapter to go on from"):
            begin("second", adapter="lora", lora_model_dir=str(first))


class TestFreezing:
    """What is frozen is the same byte for byte after steps with decay."""

    @pytest.mark.parametrize("bf16", [False, True])
    @pytest.mark.parametrize(
        "wish",
        [
            None,
            ["model.language_model.*"],
            ["lm_head", "embed_tokens"],
            [r"layers\.1\."],
            [r"model\.vision_tower", "model.language_model.norm"],
        ],
        ids=str,
    )
    def test_only_the_named_parameters_are_trained(
        self, uneven: Rows, tmp_path: Path, wish: list[str] | None, bf16: bool
    ) -> None:
        base = write_model(tmp_path / "base", ARCHITECTURES["mistral3 over ministral3"])
        keys = {"adapter": None, "weight_decay": 0.5, "unfrozen_parameters": wish, "bf16": bf16}
        config = settings(base, learning_rate=0.05, **keys)
        run = training(tmp_path / "run", config, uneven)
        before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        for number, batch in zip((1, 2), run.order.steps(0), strict=False):
            run.step(number, batch[1])
        moved = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
        free = {n for n, p in run.model.named_parameters() if p.requires_grad}
        # In a text run the tower gets no gradient, so that being free moves nothing of it.
        assert moved == {n for n in free if "vision_tower" not in n}
        assert free
        assert free != set(before)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "keys",
    [
        {"peft_use_dora": True, "lora_r": 3},
        {"lora_modules_to_save": ["lm_head", "embed_tokens"]},
        {"peft_layers_to_transform": 1, "lora_modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_planned_parameters(uneven: Rows, tmp_path: Path, keys: dict[str, Any], tied: bool) -> None:
    base = write_model(tmp_path / "base", MINISTRAL3 | {"tie_word_embeddings": tied})
    run = training(tmp_path / "run", settings(base, adapter="lora", **keys), uneven)
    planned = planned_parameters(read_architecture(base).table, run.config)
    assert sum(p.numel() for p in run.parameters) == planned


def test_saved_head_has_every_row(ministral: Path, uneven: Rows, tmp_path: Path) -> None:
    run = steps(tmp_path, ministral, uneven, lora_modules_to_save=["lm_head"])
    saved = {n: t.shape for n, t in trained_tensors(run.model).items() if "lora_" not in n}
    assert saved == {"base_model.model.lm_head.weight": (VOCABULARY, 64)}
