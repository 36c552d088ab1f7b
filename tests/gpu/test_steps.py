"""Whole optimizer steps of every method on a card, against the same in float32 on the CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.catalog import read_architecture
from engine.errors import UserError
from engine.train.attention import pick_attention
from engine.train.batches import Rows
from engine.train.generate import generate
from tests.fakes import card as fake
from tests.fakes import flash, kernels
from tests.support.card import Card
from tests.support.methods import ON_EXPERTS
from tests.support.pictured_rows import MIXED, seeing, write_pictured
from tests.support.tiny import (
    MINISTRAL3,
    MISTRAL,
    MISTRAL4,
    UNEVEN,
    edit_weights,
    gradients,
    settings,
    training,
    wake_adapter,
    write_model,
    write_rows,
)

LORA = {"adapter": "lora"}
QLORA = {"adapter": "qlora", "load_in_4bit": True}
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "lora": (MINISTRAL3, LORA, 0.08),
    "lora, bfloat16 adapter": (MINISTRAL3, LORA | {"peft_autocast_adapter_dtype": False}, 0.08),
    "dora": (MINISTRAL3, LORA | {"peft_use_dora": True}, 0.08),
    "qlora": (MINISTRAL3, QLORA, 0.08),
    "int8": (MINISTRAL3, LORA | {"load_in_8bit": True}, 0.12),
    "full": (MINISTRAL3, {}, 0.06),
    "full, float32": (MINISTRAL3, {"bf16": False}, 1e-3),
    "experts, adapted": (MISTRAL4, LORA | ON_EXPERTS, 0.16),
    "experts, NF4": (MISTRAL4, QLORA | {"quantize_moe_experts": True} | ON_EXPERTS, 0.3),
}
"""Model, keys, and how far the gradient may be from float32's, relative, in the norm: twice what
bfloat16 on a CPU is off. int8 rounds its inputs too; a token at a router's edge may go to another
expert. Wrong rows, masks or scales are off by more than 0.5.
"""
PACKED = {"sample_packing": True, "sequence_len": 64, "micro_batch_size": 2}
ALONE = {"micro_batch_size": 1}
IN_ONE_STEP = {"gradient_accumulation_steps": 64, "max_grad_norm": 1e9}

Found = tuple[float, dict[str, Tensor]]


def write_rounded(folder: Path, config: dict[str, Any]) -> Path:
    """A model of weights that bfloat16 holds as they are, so that every precision has the same."""
    write_model(folder, config)
    weights = load_file(folder / "model.safetensors")
    edit_weights(folder, {name: weight.bfloat16().float() for name, weight in weights.items()})
    return folder


@pytest.fixture
def step(tmp_path: Path) -> Callable[..., Found]:
    """The loss and gradients of all rows at once, on the CPU."""
    made = iter(range(100))

    def take(folder: Path, rows: Rows, **keys: Any) -> Found:
        run = training(
            tmp_path / f"run-{next(made)}", settings(folder, **(IN_ONE_STEP | keys)), rows
        )
        wake_adapter(run.model)
        loss, _ = run.gradients(run.order.step(1))
        return loss, {name: grad.float().cpu() for name, grad in gradients(run.model).items()}

    return take


def distance(found: Found, expected: Found) -> float:
    """Of all gradients as one vector, relative, in the norm."""
    assert found[1].keys() == expected[1].keys()
    off = sum(float((found[1][n] - g).square().sum()) for n, g in expected[1].items())
    whole = sum(float(g.square().sum()) for g in expected[1].values())
    return float((off / whole) ** 0.5)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_every_method_is_that_of_float32(
    card: Card,
    method: str,
    tmp_path: Path,
    step: Callable[..., Found],
    record_property: Callable[[str, object], None],
) -> None:
    text, keys, tolerance = METHODS[method]
    folder = write_rounded(tmp_path / "model", text)
    rows = write_rows(tmp_path / "rows", UNEVEN)
    expected = step(folder, rows, **(keys | ALONE | {"bf16": False}))
    with card.here():
        found = step(folder, rows, **({"bf16": "auto"} | keys | PACKED))
    off = distance(found, expected)
    record_property("relative error of the gradient", f"{off:.2g}")
    assert found[0] == pytest.approx(expected[0], rel=0.02 if tolerance > 0.001 else 1e-4)
    assert off < tolerance


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_bfloat16_where_the_card_has_it(
    card: Card, capability: tuple[int, int], tmp_path: Path
) -> None:
    if card.real:
        if (card.capability >= (8, 0)) != (capability >= (8, 0)):
            pytest.skip(f"this card has capability {card.capability}")
    else:
        card = replace(card, capability=capability, here=partial(fake.card, capability))
    folder = write_model(tmp_path / "model", MISTRAL)
    rows = write_rows(tmp_path / "rows", UNEVEN)
    with card.here():
        config = settings(folder, bf16="auto", adapter="lora", **PACKED)
        run = training(tmp_path / "run", config, rows)
        loss, _ = run.gradients(run.order.step(1))
    assert run.base.dtype == card.half
    assert loss > 0


def test_images_step_as_in_float32(card: Card, tmp_path: Path, step: Callable[..., Found]) -> None:
    folder = write_rounded(tmp_path / "model", seeing(MINISTRAL3))
    rows = write_pictured(tmp_path / "rows", MIXED)
    expected = step(folder, rows, bf16=False, **LORA, **ALONE)
    with card.here():
        found = step(folder, rows, bf16="auto", **LORA, **PACKED)
    assert found[0] == pytest.approx(expected[0], rel=0.02)
    assert distance(found, expected) < 0.08


BACKENDS = ["flash_attention_2", "flash_attention_4", "flash_attention_torch", "sdpa"]


@contextmanager
def installed(card: Card, backend: str, folder: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, the package of a backend is there: on a stand-in, a stand-in of it."""
    if not card.real and backend in flash.FLASH:
        name, version = flash.FLASH[backend]
        folder.mkdir()
        flash.install(folder, name, version, flash.KERNELS[name])
        patch.syspath_prepend(str(folder))
        flash.forget(patch)
    with card.here():
        yield
    if not card.real:
        patch.undo()
        flash.forget(patch)


@pytest.mark.parametrize("backend", [*BACKENDS, "flex_attention"])
@pytest.mark.parametrize(
    "text",
    [MINISTRAL3, MISTRAL4, MISTRAL | {"sliding_window": 9}],
    ids=["ministral3", "mistral4", "window"],
)
def test_packed_rows_learn_what_separate_ones_do(
    card: Card,
    backend: str,
    text: dict[str, Any],
    tmp_path: Path,
    step: Callable[..., Found],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if backend == "flex_attention" and not card.real:
        pytest.skip("flex attention is compiled for a card: no stand-in")
    folder = write_rounded(tmp_path / "model", text)
    rows = write_rows(tmp_path / "rows", UNEVEN)
    expected = step(folder, rows, bf16=False, **LORA, **ALONE)
    keys = {"bf16": "auto", "attn_implementation": backend} | LORA
    with installed(card, backend, tmp_path / "packages", monkeypatch):
        try:
            pick_attention(
                settings(folder, **keys), read_architecture(folder), torch.device("cuda")
            )
        except UserError as error:
            pytest.skip(f"{error.what} {error.why}")
        kernels.CALLS.clear()
        packed = step(folder, rows, **keys, **PACKED)
        assert card.real or backend == "sdpa" or set(kernels.CALLS) == {backend}
        separate = step(folder, rows, **keys, **ALONE)
    tolerance = 0.16 if text is MISTRAL4 else 0.08
    assert distance(packed, expected) < tolerance
    assert distance(packed, separate) < tolerance


def test_text_is_generated_as_on_a_cpu(card: Card, tmp_path: Path) -> None:
    folder = write_rounded(tmp_path / "model", MINISTRAL3)
    rows = write_rows(tmp_path / "rows", UNEVEN)
    said: list[list[int]] = []

    def say() -> None:
        run = training(tmp_path / f"run-{len(said)}", settings(folder, bf16=False), rows)
        said.append(generate(run.model, run.base.device, [1, 40, 50], end=-1, max_new_tokens=5))

    say()
    with card.here():
        say()
    assert said[0] == said[1]
