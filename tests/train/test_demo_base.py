"""The demo's base is the same on every machine, and a model folder like any other."""

import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.catalog import find_model
from engine.catalog.rows import module_table
from engine.chat.tokenizer import open_tokenizer
from engine.errors import WorkError
from engine.train import fetch
from engine.train.fetch import EMBEDDING, SPREAD, draw_embedding, write_base
from engine.train.forward import head_of
from engine.train.generate import generate
from engine.train.model import load_base
from tests.support.tiny import files_at_most, settings

CONFIG = find_model("demo-tiny").config


def random_layers(seed: int) -> dict[str, Tensor]:
    """Layers that learned nothing, as they are shipped: bfloat16, without embedding and head."""
    generator = torch.Generator().manual_seed(seed)
    return {
        p.name: (torch.randn(p.shape, generator=generator) * 0.06).to(torch.bfloat16)
        for p in module_table(CONFIG).parameters
        if p.name != EMBEDDING and not p.tied
    }


class TestEmbedding:
    @pytest.mark.parametrize(
        ("rows", "width", "seed", "digest"),
        [
            (64, 128, 0, "bc9bcb2fc7d4ec2933e97599b7cc81eefff0c2849623954e3a78d0ed53f0ed1a"),
            # More than one block, and a block that does not end where a row of 128 would.
            (9000, 3, 7, "f95e3aa16f8526f2bd9dc403b3a519d3bed1e8887f68b86f3cc839955a6e84b4"),
        ],
    )
    def test_every_bit_is_as_it_was(self, rows: int, width: int, seed: int, digest: str) -> None:
        drawn = draw_embedding(rows, width, seed).numpy().astype("<f4")
        assert hashlib.sha256(drawn.tobytes()).hexdigest() == digest

    def test_each_number_is_a_sum_of_hashed_bytes(self) -> None:
        scale = np.float32(SPREAD / math.sqrt(8 * (256**2 - 1) / 12))
        drawn = draw_embedding(8, 16, seed=3).flatten().tolist()
        for counter, number in enumerate(drawn):
            eight = splitmix64(counter, 3).to_bytes(8, "little")
            assert number == float(np.float32(sum(eight) - 1020) * scale)

    def test_it_is_nearly_normal_with_the_stated_spread(self) -> None:
        drawn = draw_embedding(8192, 128)
        assert abs(drawn.mean().item()) < 0.001
        assert drawn.std().item() == pytest.approx(SPREAD, rel=0.002)
        inside = [(drawn.abs() < k * SPREAD).float().mean().item() for k in (1, 2, 3)]
        assert inside == pytest.approx([0.683, 0.954, 0.997], abs=0.01)

    def test_the_vocabulary_decides_nothing_of_the_first_rows(self) -> None:
        assert torch.equal(draw_embedding(100, 128), draw_embedding(9000, 128)[:100])


def splitmix64(counter: int, seed: int) -> int:
    """Steele, Lea and Flood 2014, in whole numbers of Python."""
    all_bits = 2**64 - 1
    state = (counter + 0x9E3779B97F4A7C15 * (2 * seed + 1)) & all_bits
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & all_bits
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & all_bits
    return state ^ (state >> 31)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache that is emptied in the end: a base has 90 MB."""
    folder = tmp_path_factory.mktemp("cache")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def base(cache: Path) -> Path:
    return write_base("demo-tiny", random_layers(0), cache)


class TestFolder:
    def test_it_is_a_model_with_the_real_vocabulary(self, base: Path) -> None:
        tokenizer = open_tokenizer(base)
        model = load_base(base, settings(base)).model
        assert type(model).__name__ == "Ministral3ForCausalLM"
        assert head_of(model).shape == (131072, 128)
        assert head_of(model) is model.get_input_embeddings().weight
        assert torch.equal(head_of(model)[:64], draw_embedding(64, 128))
        layers = random_layers(0)
        loaded = model.state_dict()
        assert all(torch.equal(loaded[name], layers[name].float()) for name in layers)
        ids = tokenizer.tekken.encode("Tide", bos=True, eos=False)
        made = generate(model, torch.device("cpu"), ids, end=-1, max_new_tokens=3)
        assert len(made) == 3

    def test_it_is_written_once(self, base: Path, cache: Path) -> None:
        before = (base / "model.safetensors").stat()
        assert write_base("demo-tiny", random_layers(0), cache) == base
        assert (base / "model.safetensors").stat() == before
        assert [path.name for path in cache.iterdir()] == [base.name]

    def test_the_weights_hold_the_embedding_once(self, base: Path) -> None:
        assert set(load_file(base / "model.safetensors")) == {EMBEDDING, *random_layers(0)}


class TestWriting:
    """With a vocabulary of 500 words, so that a base is made in no time."""

    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fetch, "draw_embedding", lambda rows, width: draw_embedding(500, width))
        monkeypatch.setattr(fetch, "write_tekken", lambda spec, path: path.write_text("words"))

    def test_other_layers_are_another_folder(self, tmp_path: Path) -> None:
        one, other = (write_base("demo-tiny", random_layers(n), tmp_path) for n in (0, 1))
        assert one != other
        assert set(tmp_path.iterdir()) == {one, other}
        assert write_base("demo-tiny", random_layers(0), tmp_path) == one

    def test_a_single_bit_is_another_folder(self, tmp_path: Path) -> None:
        changed = random_layers(0)
        next(iter(changed.values())).view(torch.int16).flatten()[0] ^= 1
        one, other = (
            write_base("demo-tiny", layers, tmp_path) for layers in (random_layers(0), changed)
        )
        assert one != other

    def test_seed_and_spread_matter(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made = {write_base("demo-tiny", random_layers(0), tmp_path)}
        for name, value in (("SEED", 1), ("SPREAD", 0.5)):
            monkeypatch.setattr(fetch, name, value)
            made.add(write_base("demo-tiny", random_layers(0), tmp_path))
        assert len(made) == 3

    def test_a_full_disk_is_a_sentence_and_leaves_nothing(self, tmp_path: Path) -> None:
        with files_at_most(10_000), pytest.raises(WorkError, match="could not be written") as error:
            write_base("demo-tiny", random_layers(0), tmp_path)
        assert "File too large" in error.value.why
        assert not list(tmp_path.iterdir())

    def test_a_cache_that_is_a_file_is_a_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("")
        with pytest.raises(WorkError, match="could not be written"):
            write_base("demo-tiny", random_layers(0), tmp_path / "cache")

    def test_two_at_once_share_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def finish_elsewhere(spec: object, path: Path) -> None:
            path.write_text("words")
            other = path.parent.with_suffix("")
            shutil.copytree(path.parent, other)

        monkeypatch.setattr(fetch, "write_tekken", finish_elsewhere)
        base = write_base("demo-tiny", random_layers(0), tmp_path)
        assert sorted(os.listdir(base)) == ["config.json", "model.safetensors", "tekken.json"]
        assert list(tmp_path.iterdir()) == [base]
