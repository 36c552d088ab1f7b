"""4-bit weights: the language model's linears alone, and gradients that an evaluation leaves."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import nn

from engine.catalog import linear_targets, read_architecture
from engine.errors import WorkError
from engine.train.batches import Order, Rows
from engine.train.evaluate import score
from engine.train.experts import GroupedNF4
from engine.train.model import Base, load_base
from engine.train.quantize import hold_quantized
from tests.support.tiny import Models, gradients, settings, training, wake_adapter

QLORA = {"adapter": "qlora", "load_in_4bit": True}


def quantized(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}


@pytest.fixture
def base(any_model: Path) -> Base:
    return load_base(any_model, settings(any_model, **QLORA))


def test_exactly_the_linears_of_the_language_model_are_4_bit(any_model: Path, base: Base) -> None:
    table = read_architecture(any_model).table
    assert sorted(quantized(base.model)) == sorted(linear_targets(table))
    kept = {n: p.dtype for n, p in base.model.named_parameters() if p.dtype != torch.uint8}
    assert set(kept.values()) == {torch.float32}
    assert {"lm_head.weight"} < set(kept)
    assert any("embed_tokens" in name for name in kept)


def test_they_are_nf4_and_their_scales_are_quantized_again(base: Base) -> None:
    for module in quantized(base.model).values():
        state = module.weight.quant_state
        assert (state.quant_type, state.blocksize, state.nested) == ("nf4", 64, True)
        assert module.compute_dtype == torch.float32


@pytest.mark.parametrize(
    "hold",
    [
        partial(hold_quantized, Linear4bit(1, 1)),
        partial(hold_quantized, Linear8bitLt(1, 1)),
        partial(GroupedNF4.store, cast(Any, None), 0),
    ],
    ids=["4 bits", "8 bits", "an expert"],
)
def test_more_numbers_than_its_kernels_count_are_refused(hold: Callable[..., None]) -> None:
    """128 experts' gate and up matrices of Mistral Small 4 in one tensor: 2^31 numbers."""
    whole = torch.empty(128 * 4096, 4096, dtype=torch.bfloat16, device="meta")
    with pytest.raises(WorkError, match=r"2,147,483,648 numbers cannot be quantized"):
        hold(whole)


def test_a_4_bit_weight_is_near_its_original(ministral: Path) -> None:
    exact = load_base(ministral, settings(ministral)).model
    for name, module in quantized(load_base(ministral, settings(ministral, **QLORA)).model).items():
        weight = bitsandbytes.functional.dequantize_4bit(
            module.weight.data, module.weight.quant_state
        )
        original = exact.get_submodule(name).weight
        assert (weight - original).norm() / original.norm() < 0.12


class TestGradientsAfterAnEvaluation:
    """A forward without gradients repacks 4-bit weights on a CPU with AVX512-BF16, for good."""

    def test_same_bit_for_bit(self, ministral: Path, uneven: Rows, tmp_path: Path) -> None:
        config = settings(ministral, sample_packing=True, gradient_accumulation_steps=8, **QLORA)
        run = training(tmp_path, config, uneven)
        wake_adapter(run.model)
        batch = Order(uneven, config).step(1)
        found = []
        for _ in range(2):
            result = run.gradients(batch)
            found.append((result, gradients(run.model)))
            run.optimizer.zero_grad(set_to_none=True)
            score(run.model, run.base, uneven, config)
        assert found[0][0] == found[1][0]
        assert found[0][1].keys() == found[1][1].keys()
        assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])
        assert all(gradient.abs().sum() > 0 for gradient in found[0][1].values())

    def test_repacking_is_off(self, model_folder: Models, monkeypatch: pytest.MonkeyPatch) -> None:
        # Most CPUs lack the instructions: every layer learns at its making that this one has them.
        if not has_avx512bf16():
            monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
        assert Linear4bit(64, 64).support_avx512bf16_for_cpu
        folder = model_folder("mistral3 over ministral3")
        layers = quantized(load_base(folder, settings(folder, **QLORA)).model)
        assert layers
        assert not any(layer.support_avx512bf16_for_cpu for layer in layers.values())
