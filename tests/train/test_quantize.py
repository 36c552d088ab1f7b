"""Weights in fewer bits: 4-bit linears and their gradients; FP8 converted with its scales."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.catalog import linear_targets, read_architecture
from engine.errors import WorkError
from engine.train.batches import Order, Rows
from engine.train.evaluate import score
from engine.train.experts import GroupedNF4
from engine.train.model import Base, load_base
from engine.train.quantize import dequantize, hold_quantized
from tests.support.fp8_checkpoints import quantize, write_fp8
from tests.support.tiny import (
    ARCHITECTURES,
    Models,
    assert_same,
    edit_config,
    edit_weights,
    gradients,
    refused,
    settings,
    training,
    wake_adapter,
)

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
        packed = module.weight
        weight = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)
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
        assert_same(found[0][1], found[1][1], 0.0, 0.0)
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


UP = "model.layers.1.mlp.up_proj"
SCALES = (f"{UP}.weight_scale_inv", f"{UP}.activation_scale")
EXPERTS = "language_model.model.layers.1.mlp.experts.gate_up_proj"
QLORA_EXPERTS = QLORA | {"quantize_moe_experts": True, "lora_target_modules": ["o_proj"]}


@pytest.fixture
def own(tmp_path: Path, model_folder: Models) -> Callable[..., Path]:
    """A copy of a tiny model in FP8 that a test may spoil."""

    def make(name: str = "ministral3", block: int | None = None) -> Path:
        folder = Path(shutil.copytree(model_folder(name), tmp_path / "fp8"))
        return write_fp8(folder, block)

    return make


def up_proj(folder: Path, **keys: Any) -> Tensor:
    """The weight whose scale tests change, as it is loaded."""
    return load_base(folder, settings(folder, **keys)).model.get_parameter(f"{UP}.weight")


def error(found: Tensor, exact: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((found.float() - exact.float()).norm() / exact.float().norm())


class TestConverted:
    @pytest.mark.parametrize("name", ARCHITECTURES)
    @pytest.mark.parametrize("block", [None, 32])
    def test_every_weight_is_near_the_one_that_was_rounded(
        self, name: str, block: int | None, own: Callable[..., Path], model_folder: Models
    ) -> None:
        folder, exact = own(name, block), model_folder(name)
        loaded = load_base(folder, settings(folder, bf16=True)).model.state_dict()
        original = load_base(exact, settings(exact, bf16=True)).model.state_dict()
        errors = {key: error(loaded[key], original[key]) for key in original}
        assert max(errors.values()) < 0.03
        assert {key for key in errors if errors[key]} == {
            key for key in original if _is_fp8(key) and original[key].ndim > 1
        }
        assert {weight.dtype for weight in loaded.values()} == {torch.bfloat16}

    def test_each_number_is_rounded_once(self, own: Callable[..., Path]) -> None:
        folder = own()
        stored = load_file(folder / "model.safetensors")
        exact = stored[f"{UP}.weight"].double() * stored[f"{UP}.weight_scale_inv"].double()
        assert torch.equal(up_proj(folder, bf16=True), exact.to(torch.bfloat16))

    @pytest.mark.parametrize(
        ("name", "shape"),
        [("qscale_weight", ()), ("weight_scale_inv", (1,)), ("weight_scale_inv", (1, 1))],
    )
    def test_another_way_to_write_a_scale(
        self, own: Callable[..., Path], name: str, shape: tuple[int, ...]
    ) -> None:
        """Mistral's own names, those of activations included, and other shapes of one number."""
        folder = own()
        before, stored = up_proj(folder), load_file(folder / "model.safetensors")
        changes: dict[str, Tensor | None] = dict.fromkeys(SCALES)
        changes |= {f"{UP}.{name}": stored[f"{UP}.weight_scale_inv"].reshape(shape)}
        changes |= {f"{UP}.qscale_act": stored[f"{UP}.activation_scale"]}
        edit_weights(folder, changes)
        assert torch.equal(up_proj(folder), before)

    def test_straight_to_nf4_is_nf4_of_the_converted(self, own: Callable[..., Path]) -> None:
        folder = own("mistral3 over ministral3")
        converted = load_base(folder, settings(folder)).model
        packed = load_base(folder, settings(folder, **QLORA)).model
        layers = quantized(packed)
        assert layers
        for name, layer in layers.items():
            exact = converted.get_parameter(f"{name}.weight").detach()
            numbers, _ = bitsandbytes.functional.quantize_4bit(
                exact, quant_type="nf4", compress_statistics=True
            )
            assert torch.equal(layer.weight.data, numbers)

    def test_experts_straight_to_nf4(self, own: Callable[..., Path]) -> None:
        folder = own("mistral3 over mistral4")
        converted = load_base(folder, settings(folder)).model
        packed = load_base(folder, settings(folder, **QLORA_EXPERTS)).model
        for name in ("gate_up_proj", "down_proj"):
            module = f"model.language_model.layers.1.mlp.experts.{name}"
            exact: Any = converted.get_parameter(module)
            held: Any = packed.get_submodule(module)
            for expert in range(exact.shape[0]):
                assert 0.01 < error(held.matrix(expert), exact[expert]) < 0.12

    def test_the_report_counts_what_was_converted(self, own: Callable[..., Path]) -> None:
        folder = own()
        report = load_base(folder, settings(folder)).report
        stored = load_file(folder / "model.safetensors").values()
        assert report.from_fp8 == sum(t.numel() for t in stored if t.element_size() == 1)
        assert "of them were FP8 on the disk" in report.sentence()

    def test_saved_model_has_no_fp8(self, own: Callable[..., Path], tmp_path: Path) -> None:
        folder = own()
        load_base(folder, settings(folder)).model.save_pretrained(tmp_path / "saved")
        assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()


def _is_fp8(name: str) -> bool:
    return "layers" in name and "vision_tower" not in name and not name.endswith("mlp.gate.weight")


class TestRefused:
    @pytest.mark.parametrize(
        ("architecture", "weight"),
        [("ministral3", f"{UP}.weight"), ("mistral3 over mistral4", EXPERTS)],
        ids=["matrix", "experts"],
    )
    def test_fp8_without_scale(
        self, own: Callable[..., Path], architecture: str, weight: str
    ) -> None:
        folder = own(architecture)
        edit_weights(folder, {f"{weight}_scale_inv": None})
        assert f"without their scale: {weight}" in refused(folder).what

    @pytest.mark.parametrize(
        "name",
        [
            "model.norm.weight_scale_inv",
            f"{UP}.input_scale",
            f"{UP}.weight_scale",
            "model.layers.0.self_attn.k_scale",
        ],
    )
    def test_a_scale_that_belongs_to_nothing(self, name: str, own: Callable[..., Path]) -> None:
        folder = own()
        edit_weights(folder, {name: torch.ones(())})
        assert f"scales that belong to no 8-bit weight: {name}" in refused(folder).what

    @pytest.mark.parametrize("shape", [(2,), (3, 1), (5, 5), (128, 64, 1)])
    def test_scale_of_no_layout(self, shape: tuple[int, ...], own: Callable[..., Path]) -> None:
        folder = own()
        edit_weights(folder, {f"{UP}.weight_scale_inv": torch.ones(shape)})
        assert f"The scale of {UP}.weight" in refused(folder).what

    def test_a_grid_that_is_not_the_configs_block_size(self, own: Callable[..., Path]) -> None:
        folder = own(block=32)
        method = {"quant_method": "fp8", "weight_block_size": [64, 64]}
        edit_config(folder, quantization_config=method)
        assert "fits no way of scaling" in refused(folder).why

    @pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "bitsandbytes", None])
    def test_other_quantized_formats(self, method: str | None, own: Callable[..., Path]) -> None:
        folder = own()
        edit_config(folder, quantization_config={"quant_method": method})
        assert "quantized already" in refused(folder).what
        assert "BF16 or FP8" in refused(folder).fix

    def test_numbers_of_a_packed_format(self, own: Callable[..., Path]) -> None:
        folder = own()
        packed = {f"{UP}.weight": torch.zeros(128, 64, dtype=torch.int8)}
        edit_weights(folder, {**dict.fromkeys(SCALES), **packed})
        assert f"no floating-point numbers: {UP}.weight" in refused(folder).what


class TestDequantize:
    @pytest.mark.parametrize("block", [(128, 128), (48, 32), (1, 200)])
    def test_the_last_block_may_be_cut_off(self, block: tuple[int, int]) -> None:
        torch.manual_seed(0)
        weight = torch.randn(300, 200).to(torch.float8_e4m3fn)
        scale = torch.rand(-(-300 // block[0]), -(-200 // block[1]))
        out = torch.empty(300, 200)
        dequantize(weight, scale, block, out)
        rows = torch.arange(300)[:, None] // block[0]
        columns = torch.arange(200)[None] // block[1]
        assert torch.equal(out, weight.float() * scale[rows, columns])

    @pytest.mark.parametrize("block", [None, (32, 64)])
    def test_it_makes_no_difference_how_many_rows_are_wide_at_a_time(
        self, block: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        torch.manual_seed(0)
        weight, scale = quantize(torch.randn(256, 128), *(block or (256, 128)))
        scale = scale if block else scale.reshape(())
        whole, parts = torch.empty(256, 128), torch.empty(256, 128)
        dequantize(weight, scale, block, whole)
        monkeypatch.setattr("engine.train.quantize.CHUNK_NUMBERS", 70 * 128)
        dequantize(weight, scale, block, parts)
        assert torch.equal(whole, parts)
