"""Files written and read piece by piece: safetensors' own reader finds the same in them."""

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.train import weight_files
from engine.train.slices import list_wholes
from engine.train.weight_files import (
    DTYPES,
    Entry,
    entries_of,
    in_pieces,
    list_entries,
    write_file,
    write_tensors,
)

PIECE_BYTES, FILE = 64, "some.safetensors"


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


def read(folder: Path) -> dict[str, Tensor]:
    """All that the folder's file holds."""
    return {name: whole.load() for name, whole in list_wholes(folder, FILE).items()}


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
    write_tensors(tmp_path / FILE, tensors)
    found = load_file(tmp_path / FILE)
    assert {name: bits(t) for name, t in found.items()} == {n: bits(t) for n, t in tensors.items()}


@pytest.mark.parametrize("by", ["ours", "safetensors"])
def test_what_either_writer_wrote_comes_back(tmp_path: Path, by: str) -> None:
    tensors = {name: tensor.detach().contiguous() for name, tensor in one_of_each().items()}
    if by == "ours":
        write_tensors(tmp_path / FILE, tensors)
    else:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / FILE)
    found = read(tmp_path)
    assert {name: bits(t) for name, t in found.items()} == {n: bits(t) for n, t in tensors.items()}


def test_what_is_read_fits_a_place_of_any_layout_and_type(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.zeros(50, 30, dtype=torch.bfloat16).t())
    written = torch.randn(30, 50)
    write_tensors(tmp_path / FILE, {"weight": written})
    list_wholes(tmp_path, FILE)["weight"].read(weight)
    assert torch.equal(weight.detach(), written.bfloat16())


def test_two_names_may_share_one_memory(tmp_path: Path) -> None:
    head = torch.randn(5, 5)
    write_tensors(tmp_path / FILE, {"head": head, "embedding": head})
    assert set(load_file(tmp_path / FILE)) == {"head", "embedding"}


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
                tmp_path / FILE,
                entries_of(tensors),
                lambda entry, times=times: iter([tensors[entry.name]] * times),  # type: ignore[misc]
            )


def test_another_header_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that safetensors can read, and that is not what was to be written."""
    other = weight_files._header([Entry("one", (2, 2), torch.float32)])
    monkeypatch.setattr(weight_files, "_header", lambda entries, starts: other)
    with pytest.raises(OSError, match="does not read back"):
        write_tensors(tmp_path / FILE, {"one": torch.ones(4)})


@pytest.mark.parametrize("kept", [0, 7, 50, -1])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / FILE
    write_tensors(path, {"one": torch.ones(40), "two": torch.ones(40)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(SafetensorError):
        list_wholes(tmp_path, FILE)


def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / FILE
    write_tensors(path, {name: torch.ones(5000) for name in ("one", "two")})
    two = list_wholes(tmp_path, FILE)["two"]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(OSError, match="ends before its last tensor"):
        two.read(torch.empty(5000))


def test_numbers_of_a_type_that_no_weight_has_are_refused(tmp_path: Path) -> None:
    save_file({"one": torch.ones(4, dtype=torch.complex64)}, tmp_path / FILE)
    with pytest.raises(SafetensorError, match="type C64"):
        list_entries(tmp_path / FILE)
