"""The plan's sizes against what the trainer really holds: parameters, bytes, optimizer state."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Params4bit
from ruamel.yaml import YAML
from torch import nn

from engine.catalog import read_architecture
from engine.config import RunConfig
from engine.hardware import assume
from engine.plan import WEIGHTS, Estimate, cpu_device, estimate
from engine.plan.memory import moment_parts
from engine.plan.targets import adapter_parameters, count_targets, trainable_parameters
from engine.train.batches import Order, Rows
from engine.train.lora import attach_lora, choose_trained
from engine.train.model import load_base
from tests.fakes.processes import ROOT
from tests.research.layer_memory import PACKAGES, PAGE, REGIMES, layer_against_plan
from tests.support.tiny import MINISTRAL3, settings, training, with_vision, write_model

CPU = cpu_device(assume("24 GB"))
# Every matrix holds whole blocks of 64 x 256 weights, and more than the 4,096 numbers below which
# bitsandbytes keeps an optimizer's state in float32.
WIDE = MINISTRAL3 | {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
QLORA = {"adapter": "qlora", "load_in_4bit": True}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four million weights with a vision tower."""
    return write_model(tmp_path_factory.mktemp("wide") / "wide", with_vision(WIDE))


def planned(folder: Path, config: RunConfig) -> Estimate:
    return estimate(config, read_architecture(folder), CPU)


def moving(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in an optimizer's or a quantized weight's state."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors(each)
    elif hasattr(value, "absmax"):
        yield from tensors(vars(value))


def held_bytes(*found: torch.Tensor) -> int:
    """Bytes of the storages behind the tensors, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
    return sum(storages.values())


class TestCounts:
    @pytest.mark.parametrize(
        "wish", [None, ["o_proj"], ["layers.1.self_attn.o_proj", "up_proj"], r".*\.o_proj"], ids=str
    )
    @pytest.mark.parametrize("rank", [1, 8])
    def test_adapter_has_the_planned_modules(self, any_model: Path, wish: Any, rank: int) -> None:
        config = settings(any_model, adapter="lora", lora_r=rank, lora_target_modules=wish)
        architecture = read_architecture(any_model)
        model = attach_lora(load_base(any_model, config).model, architecture, config)
        assert moving(model) == adapter_parameters(architecture.table, config)
        assert moving(model) == planned(any_model, config).trainable_parameters
        modules = set(model.targeted_module_names)
        if not isinstance(wish, list):
            assert len(modules) == sum(count_targets(architecture.table, config).values())
        for entry in wish if isinstance(wish, list) else ():
            found = [name for name in modules if name.endswith(entry)]
            assert count_targets(architecture.table, config)[entry] == len(found)

    @pytest.mark.parametrize("wish", [None, [r"model\..*layers\.1\."], [r".*norm", "lm_head"]])
    def test_a_full_fine_tune_trains_the_planned_numbers(self, any_model: Path, wish: Any) -> None:
        config = settings(any_model, unfrozen_parameters=wish)
        architecture = read_architecture(any_model)
        model = choose_trained(load_base(any_model, config).model, architecture, config)
        assert moving(model) == trainable_parameters(architecture.table, config) > 0


class TestWeights:
    @pytest.mark.parametrize("bf16", [True, False])
    def test_unquantized_weights_take_the_planned_bytes(self, any_model: Path, bf16: bool) -> None:
        config = settings(any_model, adapter="lora", bf16=bf16)
        parts = planned(any_model, config).parts
        held = held_bytes(*load_base(any_model, config).model.parameters())
        assert sum(parts.get(name, 0) for name in WEIGHTS) == held

    def test_4_bit_weights_take_the_planned_bytes_and_the_rest_its_own(self, wide: Path) -> None:
        config = settings(wide, **QLORA)
        parts = planned(wide, config).parts
        model = load_base(wide, config).model
        packed = [p for p in model.parameters() if isinstance(p, Params4bit)]
        states = [t for p in packed for t in tensors(p.quant_state)]
        norms = [p for n, p in model.named_parameters() if "norm" in n and "vision" not in n]
        held = held_bytes(*(p.data for p in packed), *states, *norms)
        assert parts["linear"] + parts["norms"] == pytest.approx(held, rel=0.01)
        seen = [p for n, p in model.named_parameters() if "vision" in n or "multi_modal" in n]
        assert {p.dtype for p in seen} == {torch.float32}
        assert parts["vision"] + parts["projector"] == held_bytes(*seen)


class TestTrainable:
    @pytest.mark.parametrize(
        ("keys", "tolerance"),
        [
            ({"adapter": "lora"}, 0),
            ({"adapter": "lora", "bf16": True}, 0),
            ({"adapter": "lora", "optimizer": "adamw_bnb_8bit"}, 0.01),
            ({"optimizer": "adamw_torch_fused"}, 0),
            ({"optimizer": "adamw_torch_fused", "bf16": True}, 0),
        ],
        ids=str,
    )
    def test_gradients_and_optimizer_state_after_a_step(
        self, wide: Path, uneven: Rows, tmp_path: Path, keys: dict[str, Any], tolerance: float
    ) -> None:
        config = settings(wide, max_steps=1, lora_r=64, **keys)
        run = training(tmp_path, config, uneven)
        parts = moment_parts(config, read_architecture(wide), CPU, "optimizer step")
        run.gradients(Order(uneven, config).step(1))
        grads = [p.grad for p in run.model.parameters() if p.grad is not None]
        assert parts["gradients"] == held_bytes(*grads)
        if config.adapter:
            adapter = [p for p in run.model.parameters() if p.requires_grad]
            assert parts["adapter"] == held_bytes(*adapter)
        run.optimizer.step()
        state = [
            t for s in run.optimizer.state.values() for t in tensors(s) if t.numel() not in (1, 256)
        ]
        assert parts["optimizer"] == pytest.approx(held_bytes(*state), rel=tolerance or 1e-9)


@pytest.mark.parametrize("name", ["bf16 lora", "bf16 lora, 4-bit base", "fp32 full"])
def test_a_layer_of_the_step_takes_the_planned_bytes(name: str) -> None:
    (regime,) = (each for each in REGIMES if each.name == name)
    planned, measured = layer_against_plan(regime)
    assert planned == pytest.approx(measured, rel=0.05)


def test_the_coefficients_are_those_of_the_pinned_versions() -> None:
    """`python -m tests.research.layer_memory` makes them anew."""
    stored = YAML(typ="safe", pure=True).load(PAGE.read_text("utf-8"))["origin"]["versions"]
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    assert {name: str(found).split("+")[0] for name, found in stored.items()} == {
        name: pinned[name] for name in PACKAGES
    }
