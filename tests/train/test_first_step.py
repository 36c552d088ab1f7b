"""The first optimizer step of every architecture and method is the one that stock tools take.

Of rows of text, of rows with images, and from an FP8 checkpoint, where the yardstick has the
dequantized weights. Ours runs packed with recomputed layers, and one row at a time without; a
saved adapter is what stock PEFT takes the step with, so that its file is proved too.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.train.batches import Rows
from engine.train.checkpoint import export_trained
from engine.train.loop import Training
from tests.support import stock
from tests.support.fp8_checkpoints import write_fp8
from tests.support.methods import METHODS, Method
from tests.support.stock import norm_of
from tests.support.tiny import ARCHITECTURES, Models, settings, training, wake_adapter

IN_ONE_STEP = {"gradient_accumulation_steps": 64, "max_grad_norm": 1e9}
STEP_LAYOUTS: dict[str, dict[str, Any]] = {
    "packed, recomputed": {
        "sample_packing": True,
        "sequence_len": 64,
        "micro_batch_size": 3,
        "gradient_checkpointing": True,
    },
    "one row at a time": {"micro_batch_size": 1},
}


TOWER_TOO = {"full with the tower": Method({"unfrozen_parameters": [".*"]}, 1e-5, stock.FLOAT32)}
STARTS = ("text", "images", "FP8")
FAST = {
    ("text", "mistral3 over ministral3", "full"),
    ("text", "mistral3 over ministral3", "LoRA bfloat16"),
    ("text", "mistral3 over ministral3", "NF4 LoRA"),
    ("text", "mistral3 over mistral4", "int8 LoRA"),
    ("images", "mistral3 over mistral4", "LoRA"),
    ("images", "mistral3 over ministral3", "NF4 LoRA"),
    ("FP8", "mistral3 over mistral4", "NF4 LoRA on NF4 experts"),
}
"""Between them they have every kind of layer; the others run with the slow tests."""


def cases() -> list[Any]:
    """Start, architecture and method of every test."""
    found = []
    for start in STARTS:
        for architecture in ARCHITECTURES:
            for name in METHODS | (TOWER_TOO if start == "images" else {}):
                if "experts" in name and "mistral4" not in architecture:
                    continue
                if start == "images" and "over" not in architecture:
                    continue
                case = (start, architecture, name)
                slow = () if case in FAST else pytest.mark.slow
                found.append(pytest.param(*case, id=", ".join(case), marks=slow))
    return found


@pytest.fixture(scope="module")
def bases(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Models, seeing_model: Models
) -> Callable[[str, str], tuple[Path, Path]]:
    """The folder that a run starts from, and the one of the same numbers for stock tools."""
    home = tmp_path_factory.mktemp("bases")

    def find(start: str, architecture: str) -> tuple[Path, Path]:
        if start == "text":
            return (model_folder(architecture),) * 2
        if start == "images":
            return (seeing_model(architecture.removeprefix("mistral3 over ")),) * 2
        folder = home / f"{start} {architecture}"
        plain = folder.with_name(f"{folder.name} in float32")
        if not folder.exists():
            write_fp8(Path(shutil.copytree(model_folder(architecture), folder)))
            stock.write_dequantized(folder, plain)
        return folder, plain

    return find


def stock_trainee(base: Path, run: Training, home: Path, method: Method) -> Any:
    """What stock tools train from the same start: the exported adapter, or the same parameters."""
    model = stock.open_model(base, method.stock)
    if run.config.adapter:
        stock.take_nf4_experts(model, run.model)
        return stock.open_adapter(model, export_trained(run.model, home, base, run.config))
    for name, parameter in model.named_parameters():
        vision = "vision" in name or "multi_modal" in name
        parameter.requires_grad_(not vision or bool(run.config.unfrozen_parameters))
    return model


@pytest.mark.parametrize(("start", "architecture", "name"), cases())
def test_the_first_step_is_that_of_stock_tools(
    bases: Callable[[str, str], tuple[Path, Path]],
    uneven: Rows,
    mixed: Rows,
    tmp_path: Path,
    start: str,
    architecture: str,
    name: str,
) -> None:
    rows, method = (mixed if start == "images" else uneven), (METHODS | TOWER_TOO)[name]
    base, plain = bases(start, architecture)
    runs = []
    for number, layout in enumerate(STEP_LAYOUTS.values()):
        config = settings(base, **(IN_ONE_STEP | layout | method.keys))
        run = training(tmp_path / str(number), config, rows)
        if config.adapter:
            wake_adapter(run.model)
        runs.append(run)
    trainee = stock_trainee(plain, runs[0], tmp_path, method).train()
    loss, gradients = stock.take_step(trainee, rows)
    for run in runs:
        ours = run.gradients(run.order.step(1))
        assert ours == pytest.approx((loss, norm_of(gradients)), rel=method.tolerance)
        trained = [p for p in run.model.parameters() if p.requires_grad]
        assert len([p for p in trained if p.grad is not None]) == len(gradients) == len(trained)
    row = stock.row_of(rows, 2)
    found, expected = stock.logits_of_ours(runs[0].model, row), stock.logits(trainee, row)
    assert stock.distance(found, expected) < (1e-5 if method.tolerance < 0.01 else method.logits)
    if run.config.adapter:
        with trainee.disable_adapter():
            assert stock.distance(stock.logits(trainee, row), expected) > 0.3
