"""Where the adapter lands and what may move: never nothing, never the vision tower."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.catalog import linear_targets, list_models, read_architecture
from engine.catalog.rows import module_table
from engine.errors import UserError
from engine.plan.targets import choose_targets
from engine.train.batches import Order, Rows
from engine.train.forward import Model, hidden_states
from engine.train.lora import as_expression, attach_lora, choose_trained
from engine.train.model import Base, load_base
from tests.support.tiny import (
    ARCHITECTURES,
    MINISTRAL3,
    Models,
    settings,
    training,
    with_vision,
    write_model,
)

TABLES = {name: module_table(config) for name, config in ARCHITECTURES.items()} | {
    card.name: module_table(card.config) for card in list_models()
}


def adapted(model: Model) -> set[str]:
    """Modules of the base that have an adapter."""
    found = {n.split(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A" in n}
    return {name.removeprefix("base_model.model.") for name in found}


def loaded(folder: Path, **keys: Any) -> Base:
    return load_base(folder, settings(folder, **keys))


def free(base: Base, folder: Path, **keys: Any) -> Model:
    return choose_trained(base.model, read_architecture(folder), settings(folder, **keys))


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
    config = settings(any_model, adapter="lora", lora_target_modules=wish)
    architecture = read_architecture(any_model)
    model: Any = attach_lora(loaded(any_model).model, architecture, config)
    assert adapted(model) == set(choose_targets(architecture.table, config))


def test_many_layers_are_stored_as_one_expression(any_model: Path) -> None:
    config = settings(any_model, adapter="lora")
    model: Any = attach_lora(loaded(any_model).model, read_architecture(any_model), config)
    stored = model.peft_config["default"].target_modules
    assert isinstance(stored, str)
    assert r"layers\.\d+\.self_attn\.o_proj" in stored


def test_a_model_that_is_not_built_as_described_is_refused(tmp_path: Path, ministral: Path) -> None:
    short = write_model(tmp_path / "short", MINISTRAL3 | {"num_hidden_layers": 1})
    config = settings(ministral, adapter="lora")
    with pytest.raises(UserError, match="did not land where it should"):
        attach_lora(loaded(short).model, read_architecture(ministral), config)


class TestWhatIsTrained:
    def test_the_adapters_settings_are_the_configs(self, ministral: Path) -> None:
        config = settings(ministral, adapter="lora", lora_r=4, lora_alpha=12, lora_dropout=0.25)
        model: Any = attach_lora(loaded(ministral).model, read_architecture(ministral), config)
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        assert layer.lora_A["default"].weight.shape == (4, 64)
        assert layer.scaling["default"] == 3.0
        assert layer.lora_dropout["default"].p == 0.25

    def test_only_the_adapter_trains_and_in_float32(self, any_model: Path) -> None:
        config = settings(any_model, adapter="lora", bf16=True)
        model = attach_lora(
            loaded(any_model, bf16=True).model, read_architecture(any_model), config
        )
        moving = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert moving
        assert all("lora_" in name for name in moving)
        assert {p.dtype for p in moving.values()} == {torch.float32}

    def test_step_changes_the_adapter_alone(
        self, any_model: Path, uneven: Rows, tmp_path: Path
    ) -> None:
        config = settings(any_model, adapter="lora", learning_rate=0.01, max_steps=2)
        run = training(tmp_path, config, uneven)
        before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        for number, batch in Order(uneven, config).steps(0):
            run.step(number, batch)
        moved = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {n for n in before if "lora_" in n}

    def test_vision_tower_is_frozen(
        self, model_folder: Models, uneven: Rows, tmp_path: Path
    ) -> None:
        folder = model_folder("mistral3 over ministral3")
        config = settings(folder, learning_rate=0.01, weight_decay=0.5, max_steps=1)
        run = training(tmp_path, config, uneven)
        before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        run.step(1, Order(uneven, config).step(1))
        still = {n for n, p in run.model.named_parameters() if torch.equal(p, before[n])}
        assert still == {n for n in before if "vision_tower" in n or "multi_modal_projector" in n}
        assert still == {n for n, p in run.model.named_parameters() if not p.requires_grad}
        assert still

    def test_unfrozen_parameters_choose_by_the_start_of_the_name(self, ministral: Path) -> None:
        base = loaded(ministral)
        patterns = [r"model\.layers\.1\.", r"model.norm.*"]
        model = free(base, ministral, unfrozen_parameters=patterns)
        moving = {n for n, p in model.named_parameters() if p.requires_grad}
        assert moving == {
            n
            for n, _ in model.named_parameters()
            if n.startswith(("model.layers.1.", "model.norm."))
        }

    def test_unfrozen_parameters_may_name_the_vision_tower(self, tmp_path: Path) -> None:
        folder = write_model(tmp_path / "seeing", with_vision(MINISTRAL3))
        patterns = [r"model\.multi_modal_projector"]
        model = free(loaded(folder), folder, unfrozen_parameters=patterns)
        moving = [n for n, p in model.named_parameters() if p.requires_grad]
        assert moving
        assert all("multi_modal_projector" in name for name in moving)

    def test_an_unfrozen_parameter_that_matches_nothing_is_refused(self, ministral: Path) -> None:
        patterns = ["lm_head", "layers.9"]
        with pytest.raises(UserError, match=r"layers\.9 matches no parameter"):
            free(loaded(ministral), ministral, unfrozen_parameters=patterns)


class TestWhatTheAdapterReads:
    """A wide copy of each adapted layer's input would be kept for the backward pass."""

    @staticmethod
    def read_types(folder: Path, **keys: Any) -> set[torch.dtype]:
        config = settings(folder, adapter="lora", **keys)
        model = attach_lora(loaded(folder, **keys).model, read_architecture(folder), config)
        found: set[torch.dtype] = set()
        for name, module in model.named_modules():
            if name.endswith("lora_A.default"):
                module.register_forward_pre_hook(lambda _, args: found.add(args[0].dtype))
        ids = torch.arange(8)[None]
        states = hidden_states(model, {"input_ids": ids, "position_ids": ids})
        states.float().sum().backward()
        moving = [p for p in model.parameters() if p.requires_grad]
        assert {p.grad.dtype for p in moving if p.grad is not None} == {torch.float32}
        return found

    def test_a_bfloat16_base_hands_its_states_on_as_they_are(self, any_model: Path) -> None:
        assert self.read_types(any_model, bf16=True) == {torch.bfloat16}

    def test_a_float32_base_stays_exact(self, any_model: Path) -> None:
        assert self.read_types(any_model, bf16=False) == {torch.float32}
