"""Ranks that read their own rows of a model hold what one rank holds of it, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.train.checkpoint import save_trained
from engine.train.quantize import _four_bit as four_bit
from engine.train.quantize import (
    find_layout,
    hold_quantized,
    quantize_part,
    statistics,
)
from engine.train.ranks import LONE
from engine.train.weight_files import list_tensors
from tests.support.fp8_checkpoints import write_fp8
from tests.support.methods import METHODS
from tests.support.rank_group import RankGroup
from tests.support.rank_loads import loaded
from tests.support.tiny import ARCHITECTURES, MINISTRAL3, Models, adapted, write_model

TIED: dict[str, Any] = {"adapter": "lora", "lora_modules_to_save": ["lm_head", "embed_tokens"]}


def assert_same_bits(group: RankGroup, folder: Path, keys: dict[str, Any]) -> None:
    alone = loaded(LONE, str(folder), keys)
    for rank in group.run("rank_loads:loaded", folder=str(folder), keys=keys):
        assert rank["digests"] == alone["digests"]
        assert rank["weights"] == alone["weights"]
        assert rank["right"]
        assert rank["heard"] == [alone["heard"][1] // 2] * 2


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("ministral3", "full"),
        pytest.param("ministral3", "int8 LoRA", marks=pytest.mark.slow),
        ("mistral3 over ministral3", "NF4 LoRA"),
        ("mistral4", "full bfloat16"),
        ("mistral4", "LoRA on experts"),
        ("mistral4", "NF4 LoRA on NF4 experts"),
    ],
)
def test_bits_are_those_of_one_rank(
    two_ranks: RankGroup, model_folder: Models, name: str, method: str
) -> None:
    assert_same_bits(two_ranks, model_folder(name), METHODS[method].keys)


@pytest.mark.parametrize(
    ("name", "block", "method"),
    [
        ("ministral3", None, "full bfloat16"),
        ("ministral3", 32, "NF4 LoRA"),
        ("mistral4", None, "NF4 LoRA on NF4 experts"),
    ],
)
def test_fp8_is_converted_as_by_one_rank(
    two_ranks: RankGroup, tmp_path: Path, name: str, block: int | None, method: str
) -> None:
    folder = write_fp8(write_model(tmp_path, ARCHITECTURES[name]), block)
    assert_same_bits(two_ranks, folder, METHODS[method].keys)


def test_what_is_trained_beside_the_adapter_is_read_too(
    two_ranks: RankGroup, tmp_path: Path, uneven: Any
) -> None:
    """A tied pair, with the values of an adapter to go on from."""
    folder = write_model(
        tmp_path / "m", ARCHITECTURES["ministral3"] | {"tie_word_embeddings": True}
    )
    assert_same_bits(two_ranks, folder, TIED)
    run = adapted(folder, tmp_path / "run", uneven, **TIED)
    with torch.no_grad():
        for parameter in run.parameters:
            parameter.add_(1.0)
    (tmp_path / "adapter").mkdir()
    save_trained(run.model, tmp_path / "adapter", run.config)
    assert_same_bits(two_ranks, folder, TIED | {"lora_model_dir": str(tmp_path / "adapter")})


def test_dora_reads_the_whole_model_for_its_lengths(
    two_ranks: RankGroup, model_folder: Models
) -> None:
    folder, keys = model_folder("ministral3"), {"adapter": "lora", "peft_use_dora": True}
    alone = loaded(LONE, str(folder), keys)
    for rank in two_ranks.run("rank_loads:loaded", folder=str(folder), keys=keys):
        assert rank["digests"] == alone["digests"]
        assert rank["heard"] == alone["heard"]


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_blocks_of_nf4_that_two_ranks_have_a_part_of(ranks: int) -> None:
    """21 rows of 20 numbers: no rank's bytes begin where a block or a row does."""
    torch.manual_seed(0)
    weight = torch.randn(21, 20)
    whole = four_bit(nn.Linear(20, 21), torch.float32)
    hold_quantized(whole, weight)
    module = four_bit(nn.Linear(20, 21, device="meta"), torch.float32)
    packed: Tensor = whole.weight.data
    known: list[Tensor] = []

    def merge(scales: Tensor) -> Tensor:
        known.append(scales)
        return torch.stack(known).amax(0)

    found, first = [], 0
    for part in torch.empty_like(packed).chunk(ranks):
        quantize_part(module, part, first, lambda start, stop: weight[start:stop], merge)
        found.append(part)
        first += len(part)
    assert torch.equal(torch.cat(found), packed)
    assert isinstance(module, Linear4bit)
    for ours, theirs in zip(statistics(module), statistics(whole), strict=True):
        assert torch.equal(ours, theirs)


def test_rows_of_fp8_begin_inside_a_block(tmp_path: Path) -> None:
    folder = write_fp8(write_model(tmp_path, ARCHITECTURES["ministral3"]), 16)
    tensors = list_tensors(folder)
    layout = find_layout(tensors, folder, {"quantization_config": {"weight_block_size": [16, 16]}})
    name = "model.layers.0.mlp.up_proj.weight"
    given = (name, tensors[name], torch.device("cpu"), torch.float32)
    assert torch.equal(layout.read(*given, slice(21, 70)), layout.read(*given)[21:70])
    assert load_file(folder / "model.safetensors")[name].dtype == torch.float8_e4m3fn


WIDE = MINISTRAL3 | {
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "dtype": "bfloat16",
}
"""1.07 GB in bfloat16."""


@pytest.mark.slow  # writes and reads a model of 1 GB
def test_four_ranks_have_one_copy_in_ram_between_them(
    four_ranks: RankGroup, model_folder: Models, tmp_path: Path
) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        folder = write_model(tmp_path, WIDE)
    finally:
        torch.set_default_dtype(before)
    size = sum(tensor.size_bytes for tensor in list_tensors(folder).values())
    assert size > 2**30 * 0.99
    given = {"folder": str(folder), "small": str(model_folder("ministral3"))}
    held = four_ranks.run("rank_loads:memory", keys={"bf16": True}, **given)
    assert sum(rank["most"] - rank["empty"] for rank in held) <= 1.2 * size
