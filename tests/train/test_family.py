"""Every architecture in every method takes a step, is saved, and answers alike in stock tools.

What is proved of each (architecture, method), and where:

- the first step's loss and gradient norm, of text, of images and from FP8: `test_equivalence`
- rows of text and images packed, padded and alone: `test_equivalence`, `test_vision`
- recomputing changes nothing, every matrix of an adapter learns, the step is saved and stock
  transformers and PEFT answer as the run does, in logits and in generated tokens: here
- an adapter in the vision tower, trained with images: here
- other options of an adapter: `test_lora`; experts: `test_experts`
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.train.batches import Rows
from engine.train.checkpoint import export_trained
from engine.train.forward import half_precision
from engine.train.generate import generate
from engine.train.loop import Training
from tests.support import stock
from tests.support.methods import METHODS, Method
from tests.support.tiny import (
    ARCHITECTURES,
    Models,
    assert_same,
    gradients,
    settings,
    training,
    wake_adapter,
)

PACKED: dict[str, Any] = {
    "sample_packing": True,
    "sequence_len": 64,
    "gradient_accumulation_steps": 64,
    "learning_rate": 0.01,
}
IN_THE_TOWER = r"model\.(language_model|vision_tower)\..*_proj"
FAST = {
    ("mistral3 over mistral4", "NF4 LoRA"),
    ("mistral3 over ministral3", "full bfloat16"),
    ("ministral3", "int8 LoRA"),
}
CPU = torch.device("cpu")
PROMPT_TOKENS, MADE_TOKENS = 16, 8


def cases() -> list[Any]:
    found = []
    for architecture in ARCHITECTURES:
        for name in METHODS:
            if "experts" in name and "mistral4" not in architecture:
                continue
            slow = () if (architecture, name) in FAST else pytest.mark.slow
            found.append(pytest.param(architecture, name, id=f"{architecture}, {name}", marks=slow))
    return found


@pytest.fixture(scope="module")
def base_of(model_folder: Models, seeing_model: Models) -> Models:
    """The folder of an architecture; one with a tower sees the images of `mixed`."""

    def find(name: str) -> Path:
        text = name.removeprefix("mistral3 over ")
        return model_folder(name) if text == name else seeing_model(text)

    return find


def start(home: Path, base: Path, rows: Rows, keys: dict[str, Any]) -> Training:
    """A run before its first step, its adapter awake."""
    run = training(home, settings(base, **(PACKED | keys)), rows)
    if run.config.adapter:
        wake_adapter(run.model)
    return run


def both_gradients(
    home: Path, base: Path, rows: Rows, keys: dict[str, Any]
) -> tuple[Training, list[dict[str, Tensor]]]:
    """A run, and the gradients of its first step with layers kept and with layers recomputed."""
    found = []
    for switch in (True, False):
        run = start(home / str(switch), base, rows, keys | {"gradient_checkpointing": switch})
        run.gradients(run.order.step(1))
        found.append(gradients(run.model))
        run.optimizer.zero_grad(set_to_none=True)
    return run, found


def in_stock(run: Training, base: Path, home: Path, method: Method) -> Any:
    """What the run leaves on the disk, opened by stock tools."""
    folder = export_trained(run.model, home, base, run.config)
    if not run.config.adapter:
        return stock.open_model(folder, method.stock)
    model = stock.open_model(base, method.stock)
    stock.take_nf4_experts(model, run.model)
    return stock.open_adapter(model, folder)


def answers(run: Training, model: Any, row: dict[str, Tensor]) -> tuple[list[int], list[int]]:
    """Greedy tokens after a row's images and first words: ours, and those of stock `generate`."""
    prompt = row["input_ids"][:, : max(PROMPT_TOKENS, row["input_ids"].shape[1] - MADE_TOKENS)]
    images: dict[str, Any] = {key: row[key] for key in ("pixels", "image_sizes") if key in row}
    asked = (run.model, CPU, prompt[0].tolist())
    ours = generate(*asked, images=images, end=-1, max_new_tokens=MADE_TOKENS)
    model.eval()
    with torch.no_grad(), half_precision(model):
        made = model.generate(
            **stock.seen(row | {"input_ids": prompt}),
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=MADE_TOKENS,
            min_new_tokens=MADE_TOKENS,
            eos_token_id=None,
        )
    return ours, made[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize(("architecture", "name"), cases())
def test_a_step_is_taken_saved_and_read_by_stock_tools(
    base_of: Models, uneven: Rows, mixed: Rows, tmp_path: Path, architecture: str, name: str
) -> None:
    base, method = base_of(architecture), METHODS[name]
    rows = mixed if "over" in architecture else uneven
    run, found = both_gradients(tmp_path, base, rows, method.keys)
    assert_same(found[0], found[1], atol=1e-6)
    if run.config.adapter:
        assert all(gradient.abs().max() > 0 for gradient in found[0].values())
    row = stock.row_of(rows, 2)
    before = stock.logits_of_ours(run.model, row)
    run.model.train()
    run.step(1, run.order.step(1))
    after = stock.logits_of_ours(run.model, row)
    assert stock.distance(after, before) > 0.01
    model: Any = in_stock(run, base, tmp_path, method)
    near = 1e-5 if method.tolerance < 0.01 else method.logits
    assert stock.distance(after, stock.logits(model, row)) < near
    if near < 0.01:
        ours, theirs = answers(run, model, row)
        assert ours == theirs


@pytest.mark.parametrize("text", ["mistral", "ministral3", "mistral4"])
@pytest.mark.parametrize("name", ["LoRA", "NF4 LoRA"])
@pytest.mark.slow
def test_an_adapter_in_the_vision_tower_learns_from_images_and_stock_peft_sees_with_it(
    base_of: Models, mixed: Rows, tmp_path: Path, text: str, name: str
) -> None:
    base, method = base_of(f"mistral3 over {text}"), METHODS[name]
    keys = method.keys | {"lora_target_modules": IN_THE_TOWER}
    run, found = both_gradients(tmp_path, base, mixed, keys)
    assert_same(found[0], found[1], atol=1e-6)
    assert any("vision_tower" in key for key in found[0])
    assert len(found[0]) == len([p for p in run.model.parameters() if p.requires_grad])
    assert all(gradient.abs().max() > 0 for gradient in found[0].values())
    run.step(1, run.order.step(1))
    trained: Any = run.model
    model: Any = in_stock(run, base, tmp_path, method)
    assert set(model.targeted_module_names) == set(trained.targeted_module_names)
    row = stock.row_of(mixed, 2)
    ours = stock.logits_of_ours(run.model, row)
    assert stock.distance(ours, stock.logits(model, row)) < 1e-3
    made, theirs = answers(run, model, row)
    assert made == theirs
