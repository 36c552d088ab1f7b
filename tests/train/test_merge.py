"""A merged folder is the model that stock PEFT merges, whatever the adapter and the base are."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine.catalog.rows import module_table
from engine.config import write_config
from engine.errors import UserError, WorkError
from engine.files import SUMS
from engine.runs import RunFolder
from engine.train.batches import Rows
from engine.train.merge import CONFIG, WEIGHTS, merge
from engine.train.weight_files import Entry, write_shards
from tests.fakes.processes import ROOT, printed_by, wait_until
from tests.support.fp8_checkpoints import write_fp8
from tests.support.stock import stock_model, write_dequantized
from tests.support.tiny import (
    MINISTRAL3,
    Models,
    files_at_most,
    flip,
    logits,
    settings,
    training,
    wake_adapter,
    write_model,
)

Finished = Callable[..., RunFolder]


@pytest.fixture
def finished(uneven: Rows, tmp_path: Path) -> Finished:
    """A finished adapter run on a base folder."""

    def make(base: Path, **keys: Any) -> RunFolder:
        run = training(tmp_path / "run", settings(base, **({"adapter": "lora"} | keys)), uneven)
        wake_adapter(run.model)
        run.finish([])
        folder = RunFolder(tmp_path / "run")
        folder.config.write_text(write_config(run.config))
        return folder

    return make


def assert_merged(folder: Path, base: Path, adapter: Path) -> None:
    """The folder answers as what stock PEFT merges."""
    found: Any = peft.PeftModel.from_pretrained(stock_model(base), str(adapter))
    expected = logits(found.merge_and_unload())
    torch.testing.assert_close(logits(loaded(folder)), expected, rtol=0, atol=1e-5)


def edit_settings(adapter: Path, changes: dict[str, Any]) -> None:
    """Change what an adapter says of itself."""
    path = adapter / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (adapter / SUMS).unlink()


def loaded(folder: Path) -> Any:
    """The folder in stock transformers; every weight has to be there, and none too many."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, name).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model


class TestMerged:
    def test_every_architecture(self, any_model: Path, finished: Finished, tmp_path: Path) -> None:
        run = finished(any_model)
        folder = merge(run, tmp_path / "merged")
        assert_merged(folder, any_model, run.adapter)
        difference = logits(stock_model(any_model)) - logits(loaded(folder))
        assert difference.abs().max() > 0.1

    @pytest.mark.parametrize(
        "keys",
        [
            {"peft_use_rslora": True, "lora_r": 4},
            {"peft_use_dora": True},
            {"lora_modules_to_save": ["lm_head", "embed_tokens"]},
            {"adapter": "qlora", "load_in_4bit": True},
        ],
        ids=["rslora", "dora", "modules to save", "qlora"],
    )
    def test_every_variant_of_lora_is_merged(
        self, keys: dict[str, Any], ministral: Path, finished: Finished, tmp_path: Path
    ) -> None:
        run = finished(ministral, **keys)
        _change_saved(run.adapter)
        folder = merge(run, tmp_path / "merged")
        assert_merged(folder, ministral, run.adapter)

    def test_adapted_experts(
        self, model_folder: Models, finished: Finished, tmp_path: Path
    ) -> None:
        base = model_folder("mistral4")
        targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        run = finished(base, lora_target_parameters=targets, lora_r=4)
        folder = merge(run, tmp_path / "merged")
        assert_merged(folder, base, run.adapter)
        before, after = (
            load_file(f / "model.safetensors")["model.layers.0.mlp.experts.down_proj"]
            for f in (base, folder)
        )
        assert all((before[e] - after[e]).abs().max() > 1e-3 for e in range(len(before)))

    def test_alpha_patterns(self, ministral: Path, finished: Finished, tmp_path: Path) -> None:
        run = finished(ministral)
        patterns = {"q_proj": 7, r"layers\.1\.mlp\.up_proj": 3}
        edit_settings(run.adapter, {"alpha_pattern": patterns})
        folder = merge(run, tmp_path / "merged")
        assert_merged(folder, ministral, run.adapter)

    def test_rope_override(self, ministral: Path, finished: Finished, tmp_path: Path) -> None:
        rope = json.loads((ministral / "config.json").read_text())["rope_parameters"]
        other = rope | {"rope_theta": 5e5}
        run = finished(ministral, overrides_of_model_config={"rope_parameters": other})
        folder = merge(run, tmp_path / "merged")
        assert json.loads((folder / "config.json").read_text())["rope_parameters"] == other

    @pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
    def test_tied_pair_stays_tied(self, saved: str, finished: Finished, tmp_path: Path) -> None:
        base = write_model(tmp_path / "base", MINISTRAL3 | {"tie_word_embeddings": True})
        run = finished(base, lora_modules_to_save=[saved])
        tensors = load_file(run.adapter / WEIGHTS)
        moved = load_file(base / "model.safetensors")["model.embed_tokens.weight"] + 0.3
        for name in tensors:
            if ".lora_" not in name:
                tensors[name] = moved.clone()
        save_file(tensors, run.adapter / WEIGHTS, {"format": "pt"})
        (run.adapter / SUMS).unlink()
        folder = merge(run, tmp_path / "merged")
        written = load_file(folder / "model.safetensors")
        assert set(written) == set(load_file(base / "model.safetensors"))
        torch.testing.assert_close(written["model.embed_tokens.weight"], moved)
        assert_merged(folder, base, run.adapter)

    def test_head_trained_alone(self, uneven: Rows, finished: Finished, tmp_path: Path) -> None:
        base = write_model(tmp_path / "base", MINISTRAL3 | {"tie_word_embeddings": True})
        run = finished(base)
        tensors = load_file(run.adapter / WEIGHTS)
        embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
        tensors["base_model.model.lm_head.weight"] = embedding + 0.5
        save_file(tensors, run.adapter / WEIGHTS)
        (run.adapter / SUMS).unlink()
        folder = merge(run, tmp_path / "merged")
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
        written = load_file(folder / "model.safetensors")
        torch.testing.assert_close(written["lm_head.weight"], embedding + 0.5)
        torch.testing.assert_close(written["model.embed_tokens.weight"], embedding)
        loaded(folder)

    def test_fp8_weights_become_bfloat16(self, finished: Finished, tmp_path: Path) -> None:
        base = write_fp8(write_model(tmp_path / "base", MINISTRAL3))
        expected = load_file(write_dequantized(base, tmp_path / "meant") / "model.safetensors")
        run = finished(base)
        folder = merge(run, tmp_path / "merged")
        written = load_file(folder / "model.safetensors")
        stored = {n: t.dtype for n, t in load_file(base / "model.safetensors").items()}
        becomes = {torch.float8_e4m3fn: torch.bfloat16}
        assert {name: tensor.dtype for name, tensor in written.items()} == {
            name: becomes.get(stored[name], stored[name]) for name in expected
        }
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        tensors = load_file(run.adapter / WEIGHTS)
        name = "model.layers.0.self_attn.q_proj"
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        exact = expected[f"{name}.weight"] + 2.0 * b @ a  # alpha 32 over rank 16
        torch.testing.assert_close(written[f"{name}.weight"], exact.bfloat16(), rtol=0, atol=0)

    def test_folder_holds_what_a_model_needs(self, finished: Finished, tmp_path: Path) -> None:
        base = write_model(tmp_path / "base", MINISTRAL3)
        for name in ("tekken.json", "LICENSE", "params.json", "consolidated.safetensors"):
            (base / name).write_text(name)
        folder = merge(finished(base), tmp_path / "merged")
        assert {path.name for path in folder.iterdir()} == {
            *("config.json", "generation_config.json", "model.safetensors"),
            *("tekken.json", "LICENSE", "README.md"),
        }

    def test_every_file_is_on_the_disk_before_the_folder_has_its_name(
        self, ministral: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced: set[int] = set()
        fsync = os.fsync

        def noting_fsync(descriptor: int) -> None:
            fsync(descriptor)
            synced.add(os.fstat(descriptor).st_ino)

        monkeypatch.setattr(os, "fsync", noting_fsync)
        run = finished(ministral)
        out = merge(run, tmp_path / "out")
        for folder in (run.adapter, out):
            names = {path.name for path in folder.iterdir() if path.stat().st_ino not in synced}
            assert (names, folder.stat().st_ino in synced) == (set(), True)
            assert folder.parent.stat().st_ino in synced

    def test_shards_and_index(self, ministral: Path, finished: Finished, tmp_path: Path) -> None:
        run = finished(ministral)
        folder = merge(run, tmp_path / "merged", shard_bytes=60_000)
        files = sorted(folder.glob("*.safetensors"))
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert {path.name for path in files} == set(index["weight_map"].values())
        for path in files:
            with safe_open(path, "pt") as file:
                names = list(file.keys())
            assert len(names) == 1 or path.stat().st_size < 60_000 + 2048
        assert_merged(folder, ministral, run.adapter)


def _change_saved(adapter: Path) -> None:
    """Move whole modules and lengths too, which are the base's own until they are trained."""
    tensors = load_file(adapter / WEIGHTS)
    drawn = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if ".lora_A" not in name and ".lora_B" not in name:
            tensors[name] = tensor * (1 + 0.2 * torch.randn(tensor.shape, generator=drawn))
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
    (adapter / SUMS).unlink()


class TestRefused:
    def test_a_full_fine_tune_has_nothing_to_merge(self, ministral: Path, tmp_path: Path) -> None:
        run = RunFolder(tmp_path)
        run.config.write_text(f"base_model: {ministral}\nlearning_rate: 0.001\n")
        run.model.mkdir()
        with pytest.raises(UserError, match="nothing to merge") as refused:
            merge(run, tmp_path / "out")
        assert str(run.model) in refused.value.why

    def test_folder_in_use(self, ministral: Path, finished: Finished, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("mine")
        with pytest.raises(UserError, match="already holds"):
            merge(finished(ministral), tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]

    def test_other_base(self, ministral: Path, finished: Finished, tmp_path: Path) -> None:
        run = finished(ministral)
        other = write_model(tmp_path / "other", MINISTRAL3 | {"intermediate_size": 192})
        run.config.write_text(run.config.read_text().replace(str(ministral), str(other)))
        with pytest.raises(WorkError, match="does not fit its base"):
            merge(run, tmp_path / "out")
        assert not (tmp_path / "out.partial").exists()

    @pytest.mark.parametrize(
        "said",
        [{"peft_type": "LOHA"}, {"lora_bias": True}, {"init_lora_weights": "pissa"}],
        ids=["loha", "bias", "pissa"],
    )
    def test_an_adapter_that_would_be_merged_wrongly_is_refused(
        self, said: dict[str, Any], ministral: Path, finished: Finished, tmp_path: Path
    ) -> None:
        run = finished(ministral)
        edit_settings(run.adapter, said)
        with pytest.raises(UserError, match="cannot be merged"):
            merge(run, tmp_path / "out")

    def test_a_changed_adapter_is_refused_until_the_change_is_owned(
        self, ministral: Path, finished: Finished, tmp_path: Path
    ) -> None:
        run = finished(ministral)
        flip(run.adapter / WEIGHTS)
        with pytest.raises(WorkError, match="adapter of run is damaged") as caught:
            merge(run, tmp_path / "out")
        assert WEIGHTS in caught.value.why
        assert f"remove {SUMS}" in caught.value.fix
        (run.adapter / SUMS).unlink()
        merge(run, tmp_path / "out")

    def test_full_disk(self, ministral: Path, finished: Finished, tmp_path: Path) -> None:
        run = finished(ministral)
        with files_at_most(50_000), pytest.raises(WorkError, match="could not be written"):
            merge(run, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()


MEMORY = """
import resource, sys
from pathlib import Path
from engine.runs import RunFolder
from engine.train.merge import merge
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge(RunFolder(Path(sys.argv[1])), Path(sys.argv[2]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.fixture
def large(tmp_path: Path) -> tuple[RunFolder, int]:
    """A run on 600 MB of weights in layers of 18 MB, an adapter on one of them; the bytes."""
    base = tmp_path / "base"
    base.mkdir()
    config = MINISTRAL3 | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 32}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 64}
    tensors = [Entry(p.name, p.shape, torch.bfloat16) for p in module_table(config).parameters]
    write_shards(base, tensors, lambda each: iter([torch.ones(each.shape, dtype=torch.bfloat16)]))
    (base / "config.json").write_text(json.dumps(config))
    run = RunFolder(tmp_path / "run")
    run.adapter.mkdir(parents=True)
    run.config.write_text(f"base_model: {base}\nadapter: lora\nlearning_rate: 0.001\n")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora"
    pair = {f"{name}_A.weight": torch.ones(8, 1024), f"{name}_B.weight": torch.ones(3072, 8)}
    save_file(pair, run.adapter / WEIGHTS)
    (run.adapter / CONFIG).write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 8}))
    return run, sum(tensor.size_bytes for tensor in tensors)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(large: tuple[RunFolder, int], tmp_path: Path) -> None:
    run, size = large
    assert size > 600e6
    assert int(printed_by("-c", MEMORY, str(run.path), str(tmp_path / "out"))) < 150e6


@pytest.mark.slow
def test_a_merge_that_is_ended_leaves_no_part(large: tuple[RunFolder, int], tmp_path: Path) -> None:
    command = ["merge", str(large[0].path), str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-m", "engine.train", *command], cwd=ROOT)
    wait_until((tmp_path / "out.partial").exists)
    process.terminate()
    assert process.wait(60) == 130
    assert not (tmp_path / "out.partial").exists()
