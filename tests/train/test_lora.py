"""Where the adapter lands and what may move: never nothing, never the vision tower."""

import json
import re
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from engine.catalog import linear_targets, list_models, read_architecture
from engine.catalog.rows import module_table
from engine.errors import UserError
from engine.files import SUMS
from engine.plan.targets import choose_targets
from engine.plan.targets import trainable_parameters as planned_parameters
from engine.train.batches import Rows
from engine.train.checkpoint import export_trained, trained_parameters, trained_tensors
from engine.train.forward import head_of, hidden_states, unwrapped
from engine.train.loop import Training
from engine.train.lora import as_expression, attach_lora, choose_trained
from engine.train.model import load_base
from tests.support.stock import stock_model
from tests.support.tiny import (
    ARCHITECTURES,
    MINISTRAL3,
    VOCABULARY,
    Begin,
    gradients,
    logits,
    moved,
    settings,
    training,
    wake_adapter,
    with_vision,
    write_model,
)

QLORA = {"adapter": "qlora", "load_in_4bit": True}
TABLES = {name: module_table(config) for name, config in ARCHITECTURES.items()} | {
    card.name: module_table(card.config) for card in list_models()
}


def attached(folder: Path, **keys: Any) -> Any:
    """The folder's model with the config's adapter on it."""
    config = settings(folder, adapter="lora", **keys)
    return attach_lora(load_base(folder, config).model, read_architecture(folder), config)


def chosen(folder: Path, **keys: Any) -> Any:
    """The folder's model as a full fine-tune trains it."""
    config = settings(folder, **keys)
    return choose_trained(load_base(folder, config).model, read_architecture(folder), config)


def free(model: Any) -> dict[str, nn.Parameter]:
    """The parameters that are trained."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_the_expression_for_all_layers_covers_them_and_nothing_else(table: Any) -> None:
    targets = linear_targets(table)
    expression = re.compile(as_expression(targets))
    everything = [p.module for p in table.parameters if p.quantizable]
    assert tuple(name for name in everything if expression.fullmatch(name)) == targets


@pytest.mark.parametrize(
    "wish",
    [
        None,
        ["o_proj"],
        ["o_proj", "gate_proj", "up_proj", "down_proj"],
        ["layers.0.self_attn.o_proj"],
        ["self_attn.o_proj", "down_proj"],
        r".*layers\.1\..*",
        r".*\.(o|up)_proj",
    ],
    ids=str,
)
def test_the_adapter_lands_on_exactly_what_was_chosen(any_model: Path, wish: Any) -> None:
    model = attached(any_model, lora_target_modules=wish)
    found = {n.split(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A" in n}
    config = settings(any_model, adapter="lora", lora_target_modules=wish)
    targets = choose_targets(read_architecture(any_model).table, config)
    assert {name.removeprefix("base_model.model.") for name in found} == set(targets)


def test_many_layers_are_stored_as_one_expression(any_model: Path) -> None:
    stored = attached(any_model).peft_config["default"].target_modules
    assert isinstance(stored, str)
    assert r"layers\.\d+\.self_attn\.o_proj" in stored


def test_a_model_that_is_not_built_as_described_is_refused(tmp_path: Path, ministral: Path) -> None:
    short = write_model(tmp_path / "short", MINISTRAL3 | {"num_hidden_layers": 1})
    model = load_base(short, settings(short)).model
    with pytest.raises(UserError, match="did not land where it should"):
        attach_lora(model, read_architecture(ministral), settings(ministral, adapter="lora"))


class TestWhatIsTrained:
    def test_the_adapters_settings_are_the_configs(self, ministral: Path) -> None:
        model = attached(ministral, lora_r=4, lora_alpha=12, lora_dropout=0.25)
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        assert layer.lora_A["default"].weight.shape == (4, 64)
        assert layer.scaling["default"] == 3.0
        assert layer.lora_dropout["default"].p == 0.25

    def test_only_the_adapter_trains_and_in_float32(self, any_model: Path) -> None:
        trained = free(attached(any_model, bf16=True))
        assert trained
        assert all("lora_" in name for name in trained)
        assert {p.dtype for p in trained.values()} == {torch.float32}

    @pytest.mark.parametrize("keys", [{"adapter": "lora"}, QLORA], ids=["lora", "qlora"])
    def test_step_changes_the_adapter_alone(
        self, any_model: Path, uneven: Rows, tmp_path: Path, keys: dict[str, Any]
    ) -> None:
        run = training(tmp_path, settings(any_model, learning_rate=0.01, **keys), uneven)
        named = unwrapped(run.model).named_parameters()
        assert moved(run, 2) == {n for n, _ in named if "lora_" in n}

    @pytest.mark.parametrize(
        ("sees", "patterns", "starts"),
        [
            (False, [r"model\.layers\.1\.", r"model.norm.*"], ("model.layers.1.", "model.norm.")),
            (True, [r"model\.multi_modal_projector"], ("model.multi_modal_projector.",)),
        ],
        ids=["layers", "projector"],
    )
    def test_unfrozen_parameters_choose_by_the_start_of_the_name(
        self, tmp_path: Path, sees: bool, patterns: list[str], starts: tuple[str, ...]
    ) -> None:
        folder = write_model(tmp_path / "base", with_vision(MINISTRAL3) if sees else MINISTRAL3)
        model = chosen(folder, unfrozen_parameters=patterns)
        names = {name for name, _ in model.named_parameters() if name.startswith(starts)}
        assert names
        assert free(model).keys() == names

    def test_an_unfrozen_parameter_that_matches_nothing_is_refused(self, ministral: Path) -> None:
        with pytest.raises(UserError, match=r"layers\.9 matches no parameter"):
            chosen(ministral, unfrozen_parameters=["lm_head", "layers.9"])


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_adapter_reads_a_layers_input(any_model: Path, bf16: bool, dtype: torch.dtype) -> None:
    """A wide copy of each adapted layer's input would be kept for the backward pass."""
    model = attached(any_model, bf16=bf16)
    found: set[torch.dtype] = set()
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda _, args: found.add(args[0].dtype))
    ids = torch.arange(8)[None]
    hidden_states(model, {"input_ids": ids, "position_ids": ids}).float().sum().backward()
    assert {gradient.dtype for gradient in gradients(model).values()} == {torch.float32}
    assert found == {dtype}


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
    for number, batch in islice(run.order.steps(0), count):
        run.step(number, batch)
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
        ways: tuple[dict[str, Any], ...] = (
            {"peft_init_lora_weights": "gaussian"},
            {"peft_use_dora": True},
        )
        for number, keys in enumerate(ways):
            run = begin(str(number), adapter="lora", **keys)
            torch.testing.assert_close(
                logits(run.model), logits(stock_model(ministral)), rtol=1e-5, atol=1e-5
            )


def test_pattern_may_name_the_vision_tower(uneven: Rows, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", with_vision(MINISTRAL3))
    wish = r"model\.(language_model|vision_tower)\..*\.(q_proj|up_proj)"
    run = steps(tmp_path / "run", base, uneven, lora_target_modules=wish)
    names: Any = run.model.targeted_module_names
    assert {name.split(".")[1] for name in names} == {"language_model", "vision_tower"}
    stock: Any = peft.PeftModel.from_pretrained(
        stock_model(base), str(exported(run, tmp_path, base))
    )
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
        with pytest.raises(UserError, match="is not as it was written"):
            begin("second", adapter="lora", lora_model_dir=str(first))
        (first / SUMS).unlink()  # the change is meant
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
        trained, every = free(run.model).keys(), {n for n, _ in run.model.named_parameters()}
        # In a text run the tower gets no gradient, so that being free moves nothing of it.
        assert moved(run, 2) == {n for n in trained if "vision_tower" not in n}
        assert trained
        assert trained != every
        if wish is None:
            assert every - trained == {n for n in every if "vision_tower" in n or "projector" in n}


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
