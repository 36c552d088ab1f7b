"""Files written and read piece by piece: safetensors' own reader finds the same in them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.train import weight_files
from engine.train.model import load_base
from engine.train.quantize import dequantize
from engine.train.weight_files import (
    DTYPES,
    Entry,
    entries_of,
    in_pieces,
    list_entries,
    read_tensors,
    write_file,
    write_tensors,
)
from tests.support.fp8_checkpoints import quantize, write_fp8
from tests.support.tiny import ARCHITECTURES, Models, edit_config, edit_weights, refused, settings

PIECE_BYTES = 64


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "PIECE_BYTES", PIECE_BYTES)


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], list[int]]:
    """A tensor of any type, to compare."""
    plain = tensor.detach().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), plain.view(torch.uint8).tolist()


def numbers(dtype: torch.dtype, *shape: int) -> Tensor:
    """Every bit pattern may come."""
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def one_of_each() -> dict[str, Tensor]:
    """Every type and shape that a model, an adapter or an optimizer's state has, and more."""
    torch.manual_seed(0)
    found = {f"matrix {word}": numbers(dtype, 7, 5) for word, dtype in DTYPES.items()}
    found |= {f"empty {word}": numbers(dtype, 0, 3) for word, dtype in DTYPES.items()}
    found |= {f"number {word}": numbers(dtype, 1)[0] for word, dtype in DTYPES.items()}
    return found | {
        "long vector": torch.randn(1000),
        "wide rows": torch.randn(2, 3, 400),
        "turned": torch.randn(30, 50).t(),
        "every other": torch.randn(40, 60)[::2, ::3],
        "expanded": torch.randn(1, 30).expand(20, 30),
        "weight": torch.nn.Parameter(torch.randn(20, 20)),
        '名 of "odd" letters|step': torch.tensor(3.0),
    }


def test_safetensors_own_reader_finds_every_bit(tmp_path: Path) -> None:
    tensors = one_of_each()
    write_tensors(tmp_path / "file", tensors)
    found = load_file(tmp_path / "file")
    assert {name: bits(t) for name, t in found.items()} == {n: bits(t) for n, t in tensors.items()}


@pytest.mark.parametrize("by", ["ours", "safetensors"])
def test_what_either_writer_wrote_comes_back(tmp_path: Path, by: str) -> None:
    tensors = {name: tensor.detach().contiguous() for name, tensor in one_of_each().items()}
    if by == "ours":
        write_tensors(tmp_path / "file", tensors)
    else:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "file")
    found: dict[str, Tensor] = {}

    def place(entry: Entry) -> Tensor:
        return found.setdefault(entry.name, torch.empty(entry.shape, dtype=entry.dtype))

    read_tensors(tmp_path / "file", place)
    assert {name: bits(t) for name, t in found.items()} == {n: bits(t) for n, t in tensors.items()}


def test_what_is_read_fits_a_place_of_any_layout_and_type(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.zeros(50, 30, dtype=torch.bfloat16).t())
    written = torch.randn(30, 50)
    write_tensors(tmp_path / "file", {"weight": written})
    read_tensors(tmp_path / "file", lambda _: weight)
    assert torch.equal(weight.detach(), written.bfloat16())


def test_two_names_may_share_one_memory(tmp_path: Path) -> None:
    head = torch.randn(5, 5)
    write_tensors(tmp_path / "file", {"head": head, "embedding": head})
    assert set(load_file(tmp_path / "file")) == {"head", "embedding"}


@pytest.mark.parametrize("name", ["long vector", "wide rows", "turned", "expanded", "matrix F64"])
def test_no_piece_is_larger_than_one_may_be(name: str) -> None:
    tensor = one_of_each()[name]
    pieces = list(in_pieces(tensor))
    assert max(piece.nbytes for piece in pieces) <= PIECE_BYTES
    assert len(pieces) <= 4 * tensor.nbytes / PIECE_BYTES
    assert torch.equal(torch.cat([piece.reshape(-1) for piece in pieces]), tensor.reshape(-1))


def test_a_file_that_does_not_read_back_is_an_error(tmp_path: Path) -> None:
    """As where a part of a tensor never came, or came twice."""
    tensors = {"one": torch.ones(4), "two": torch.ones(4)}
    for times in (0, 2):
        with pytest.raises(OSError, match="does not read back"):
            write_file(
                tmp_path / "file",
                entries_of(tensors),
                lambda entry, times=times: iter([tensors[entry.name]] * times),  # type: ignore[misc]
            )


def test_another_header_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that safetensors can read, and that is not what was to be written."""
    other = weight_files._header([Entry("one", (2, 2), torch.float32)])
    monkeypatch.setattr(weight_files, "_header", lambda entries: other)
    with pytest.raises(OSError, match="does not read back"):
        write_tensors(tmp_path / "file", {"one": torch.ones(4)})


@pytest.mark.parametrize("kept", [0, 7, 50, -1])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "file"
    write_tensors(path, {"one": torch.ones(40), "two": torch.ones(40)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(SafetensorError):
        read_tensors(path, lambda entry: torch.empty(entry.shape))


def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_tensors(path, {name: torch.ones(5000) for name in ("one", "two")})

    def place(entry: Entry) -> Tensor:
        path.write_bytes(path.read_bytes()[:1000])
        return torch.empty(entry.shape)

    with pytest.raises(OSError, match="ends before its last tensor"):
        read_tensors(path, place)


def test_numbers_of_a_type_that_no_weight_has_are_refused(tmp_path: Path) -> None:
    save_file({"one": torch.ones(4, dtype=torch.complex64)}, tmp_path / "file")
    with pytest.raises(SafetensorError, match="type C64"):
        list_entries(tmp_path / "file")


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
        monkeypatch.setattr("engine.train.quantize.CHUNK_NUMBERS", 70 * 128)
        dequantize(weight, scale, block, parts)
        assert torch.equal(whole, parts)
