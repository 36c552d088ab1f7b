"""FP8 checkpoints: converted with their scales, or refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from safetensors.torch import load_file
from torch import Tensor

from engine.train import fp8
from engine.train.fp8 import dequantize
from engine.train.model import load_base
from tests.support.fp8_checkpoints import quantize, write_fp8
from tests.support.tiny import ARCHITECTURES, Models, edit_config, edit_weights, refused, settings

UP = "model.layers.1.mlp.up_proj"
EXPERTS = "language_model.model.layers.1.mlp.experts.gate_up_proj"
NF4 = {"adapter": "qlora", "load_in_4bit": True}
NF4_EXPERTS = NF4 | {"quantize_moe_experts": True, "lora_target_modules": ["o_proj"]}


@pytest.fixture
def own(tmp_path: Path, model_folder: Models) -> Callable[..., Path]:
    """A copy of a tiny model in FP8 that a test may spoil."""

    def make(name: str = "ministral3", block: int | None = None) -> Path:
        folder = Path(shutil.copytree(model_folder(name), tmp_path / "fp8"))
        return write_fp8(folder, block)

    return make


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
        loaded = load_base(folder, settings(folder, bf16=True)).model.get_parameter(f"{UP}.weight")
        exact = stored[f"{UP}.weight"].double() * stored[f"{UP}.weight_scale_inv"].double()
        assert torch.equal(loaded, exact.to(torch.bfloat16))

    def test_mistrals_own_names_of_scales(self, own: Callable[..., Path]) -> None:
        folder = own()
        before = load_base(folder, settings(folder)).model.get_parameter(f"{UP}.weight")
        stored = load_file(folder / "model.safetensors")
        renamed = {
            f"{UP}.weight_scale_inv": None,
            f"{UP}.activation_scale": None,
            f"{UP}.qscale_weight": stored[f"{UP}.weight_scale_inv"],
            f"{UP}.qscale_act": stored[f"{UP}.activation_scale"],
        }
        edit_weights(folder, renamed)
        after = load_base(folder, settings(folder)).model.get_parameter(f"{UP}.weight")
        assert torch.equal(after, before)

    @pytest.mark.parametrize("shape", [(1,), (1, 1)])
    def test_scale_in_another_shape(self, shape: tuple[int, ...], own: Callable[..., Path]) -> None:
        folder = own()
        before = load_base(folder, settings(folder)).model.get_parameter(f"{UP}.weight")
        scale = load_file(folder / "model.safetensors")[f"{UP}.weight_scale_inv"]
        edit_weights(folder, {f"{UP}.weight_scale_inv": scale.reshape(shape)})
        after = load_base(folder, settings(folder)).model.get_parameter(f"{UP}.weight")
        assert torch.equal(after, before)

    def test_straight_to_nf4_is_nf4_of_the_converted(self, own: Callable[..., Path]) -> None:
        folder = own("mistral3 over ministral3")
        converted = load_base(folder, settings(folder)).model
        packed = load_base(folder, settings(folder, **NF4)).model
        layers = {n: m for n, m in packed.named_modules() if isinstance(m, Linear4bit)}
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
        packed = load_base(folder, settings(folder, **NF4_EXPERTS)).model
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
    def test_fp8_numbers_without_their_scale(self, own: Callable[..., Path]) -> None:
        folder = own()
        edit_weights(folder, {f"{UP}.weight_scale_inv": None})
        assert f"without their scale: {UP}.weight" in refused(folder).what

    def test_experts_without_their_scale(self, own: Callable[..., Path]) -> None:
        folder = own("mistral3 over mistral4")
        edit_weights(folder, {f"{EXPERTS}_scale_inv": None})
        assert f"without their scale: {EXPERTS}" in refused(folder).what

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
        edit_config(
            folder, quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]}
        )
        assert "fits no way of scaling" in refused(folder).why

    @pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "bitsandbytes", None])
    def test_other_quantized_formats(self, method: str | None, own: Callable[..., Path]) -> None:
        folder = own()
        edit_config(folder, quantization_config={"quant_method": method})
        assert "quantized already" in refused(folder).what
        assert "BF16 or FP8" in refused(folder).fix

    def test_numbers_of_a_packed_format(self, own: Callable[..., Path]) -> None:
        folder = own()
        packed = torch.zeros(128, 64, dtype=torch.int8)
        edit_weights(folder, {f"{UP}.weight": packed, f"{UP}.weight_scale_inv": None})
        edit_weights(folder, {f"{UP}.activation_scale": None})
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
        monkeypatch.setattr(fp8, "CHUNK_NUMBERS", 70 * 128)
        dequantize(weight, scale, block, parts)
        assert torch.equal(whole, parts)
