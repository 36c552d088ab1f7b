"""An adapter in bfloat16: on every base, as good as one in float32, and for others to read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.train.batches import Rows
from engine.train.checkpoint import export_trained, trained_parameters
from tests.support import stock
from tests.support.methods import METHODS, NF4, ON_EXPERTS
from tests.support.tiny import (
    Models,
    everything,
    gradients,
    settings,
    steps,
    training,
    wake_adapter,
)

NARROW = {"peft_autocast_adapter_dtype": False}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("ministral3", {"adapter": "lora"}),
    "bfloat16": ("ministral3", {"adapter": "lora", "bf16": True}),
    "int8": ("ministral3", {"adapter": "lora", "bf16": True, "load_in_8bit": True}),
    "NF4": ("ministral3", NF4),
    "NF4, float32": ("ministral3", NF4 | {"bf16": False}),
    "DoRA": ("ministral3", {"adapter": "lora", "peft_use_dora": True}),
    "DoRA on NF4": ("ministral3", NF4 | {"peft_use_dora": True}),
    "dropout": ("ministral3", {"adapter": "lora", "lora_dropout": 0.2}),
    "experts": ("mistral4", {"adapter": "lora"} | ON_EXPERTS),
    "NF4 experts": ("mistral4", METHODS["NF4 LoRA on NF4 experts"].keys),
    "beside a tower": ("mistral3 over ministral3", {"adapter": "lora", "bf16": True}),
}


@pytest.mark.parametrize(("architecture", "keys"), ADAPTERS.values(), ids=ADAPTERS)
def test_gradients_are_near_those_of_float32(
    model_folder: Models, uneven: Rows, tmp_path: Path, architecture: str, keys: dict[str, Any]
) -> None:
    found = []
    for number, narrow in enumerate(({}, NARROW)):
        config = settings(model_folder(architecture), max_grad_norm=1e9, **keys, **narrow)
        run = training(tmp_path / str(number), config, uneven)
        wake_adapter(run.model)
        torch.manual_seed(0)  # the same inputs are dropped
        loss, _ = run.gradients(run.order.step(1))
        found.append((loss, gradients(run.model)))
    named = dict(trained_parameters(run.model))
    kinds = {("magnitude" in n, p.dtype, p.grad.dtype) for n, p in named.items()}
    expected = {(False, torch.bfloat16, torch.bfloat16)}
    if "peft_use_dora" in keys:
        expected.add((True, torch.float32, torch.float32))
    assert kinds == expected
    (loss, exact), (ours, rounded) = found
    assert ours == pytest.approx(loss, rel=0.02)
    assert exact.keys() == rounded.keys()
    far = torch.cat([(exact[n] - rounded[n]).flatten() for n in exact]).norm()
    # An NF4 expert's router sends a token at its edge elsewhere.
    limit = 0.3 if "quantize_moe_experts" in keys else 0.05
    assert far < limit * torch.cat([exact[n].flatten() for n in exact]).norm()


@pytest.mark.parametrize("name", ["float32", "NF4", "DoRA", "experts"])
def test_loads_in_stock_peft(model_folder: Models, uneven: Rows, tmp_path: Path, name: str) -> None:
    architecture, keys = ADAPTERS[name]
    folder = model_folder(architecture)
    config = settings(folder, learning_rate=0.01, num_epochs=2, **keys, **NARROW)
    run = training(tmp_path / "run", config, uneven)
    wake_adapter(run.model)
    steps(run, 4)
    home = export_trained(run.model, tmp_path, folder, config)
    saved = load_file(home / "adapter_model.safetensors")
    kinds = {tensor.dtype for key, tensor in saved.items() if "magnitude" not in key}
    assert kinds == {torch.bfloat16}
    form = stock.NF4 if name == "NF4" else stock.FLOAT32
    theirs = stock.open_adapter(stock.open_model(folder, form), home)
    row = stock.row_of(uneven, 2)
    # PEFT widens the matrices, so that only the products differ, and where a router sends a token.
    ours = stock.logits_of_ours(run.model, row)
    assert stock.distance(ours, stock.logits(theirs, row)) < (0.1 if name == "experts" else 0.02)


def test_random_rounding_learns(model_folder: Models, uneven: Rows, tmp_path: Path) -> None:
    found = []
    for number, narrow in enumerate(({}, NARROW)):
        keys = {"lr_scheduler": "constant", "warmup_steps": 0, "num_epochs": 5}
        folder = model_folder("ministral3")
        config = settings(folder, adapter="lora", learning_rate=1e-4, **keys, **narrow)
        run = training(tmp_path / str(number), config, uneven)
        wake_adapter(run.model)
        losses = [loss for loss, _ in steps(run, 40)]
        found.append(sum(losses[:8]) - sum(losses[-8:]))
    exact, ours = found
    assert exact > 0
    assert ours == pytest.approx(exact, rel=0.1)


def test_continues_a_float32_adapter(model_folder: Models, uneven: Rows, tmp_path: Path) -> None:
    keys = {"adapter": "lora", "learning_rate": 0.01, "num_epochs": 2}
    wide, ours = (
        training(tmp_path, settings(model_folder("ministral3"), **keys, **narrow), uneven)
        for narrow in ({}, NARROW)
    )
    steps(wide, 3)
    wide.save()
    ours.restore(None)
    before, after = everything(wide), everything(ours)
    assert before.keys() == after.keys()
    moments = [key for key in before if key.endswith(("exp_avg", "exp_avg_sq"))]
    assert moments
    assert all(before[key] == after[key] for key in moments)
    assert len(steps(ours, 2)) == 2
