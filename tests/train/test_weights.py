"""What a run leaves behind is what it trained, in a form that others read."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.catalog import find_model
from engine.chat.tokenizer import spec_of, write_tekken
from engine.errors import WorkError
from engine.train.batches import Rows
from engine.train.checkpoint import export_trained, load_trained, save_trained, trained_tensors
from engine.train.model import load_base
from tests.support.stock import stock_model
from tests.support.tiny import (
    MINISTRAL3,
    Begin,
    adapted,
    files_at_most,
    logits,
    settings,
    training,
    write_model,
)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal but for the last bits, which depend on how a file's weights lie in memory."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


class TestAdapter:
    def test_stock_peft_answers_alike(self, any_model: Path, uneven: Rows, tmp_path: Path) -> None:
        run = adapted(any_model, tmp_path, uneven)
        folder = export_trained(run.model, tmp_path, any_model, run.config)
        assert folder == tmp_path / "adapter"
        stock = peft.PeftModel.from_pretrained(stock_model(any_model), str(folder))
        assert_same(logits(stock), logits(run.model))
        plain = logits(stock_model(any_model))
        assert (plain - logits(run.model)).abs().max() > 0.1

    def test_config_names_the_base(self, ministral: Path, uneven: Rows, tmp_path: Path) -> None:
        run = adapted(ministral, tmp_path, uneven, lora_r=4, lora_alpha=8)
        folder = export_trained(run.model, tmp_path, ministral, run.config)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(ministral)
        assert config["inference_mode"] is True
        assert (config["r"], config["lora_alpha"], config["bias"]) == (4, 8, "none")

    def test_name_of_a_catalog_base(self, ministral: Path, uneven: Rows, tmp_path: Path) -> None:
        run = adapted(ministral, tmp_path, uneven)
        named = run.config.model_copy(update={"base_model": "ministral-3-3b"})
        folder = export_trained(run.model, tmp_path, ministral, named)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "mistralai/Ministral-3-3B-Instruct-2512-BF16"

    def test_tokenizer_and_licence_lie_beside_it(self, uneven: Rows, tmp_path: Path) -> None:
        base = write_model(tmp_path / "base", MINISTRAL3)
        (base / "tekken.json").write_text("the vocabulary")
        (base / "LICENSE").write_text("free")
        run = adapted(base, tmp_path, uneven)
        folder = export_trained(run.model, tmp_path, base, run.config)
        assert (folder / "tekken.json").read_text() == "the vocabulary"
        assert (folder / "LICENSE").read_text() == "free"

    @pytest.mark.parametrize("as_file", [True, False])
    def test_tokenizer_of_the_run(self, uneven: Rows, tmp_path: Path, as_file: bool) -> None:
        base = write_model(tmp_path / "base", MINISTRAL3)
        for name in ("tekken.json", "tokenizer_config.json"):
            (base / name).write_text("the base's own")
        other = tmp_path / "other" / "tekken.json"
        other.parent.mkdir()
        write_tekken(spec_of(find_model("demo-tiny")), other)
        used = str(other) if as_file else "demo-tiny"
        run = adapted(base, tmp_path, uneven, tokenizer_config=used)
        folder = export_trained(run.model, tmp_path, base, run.config)
        assert (folder / "tekken.json").read_bytes() == other.read_bytes()
        assert not (folder / "tokenizer_config.json").exists()

    def test_holds_the_adapter_alone(self, any_model: Path, uneven: Rows, tmp_path: Path) -> None:
        run = adapted(any_model, tmp_path, uneven)
        save_trained(run.model, tmp_path, run.config)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert all(".lora_A." in name or ".lora_B." in name for name in saved)
        assert len(saved) == len(run.parameters)
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}

    def test_it_comes_back_bit_for_bit(self, ministral: Path, uneven: Rows, tmp_path: Path) -> None:
        first = adapted(ministral, tmp_path / "one", uneven, seed=1)
        second = adapted(ministral, tmp_path / "two", uneven, seed=2)
        save_trained(first.model, tmp_path, first.config)
        load_trained(second.model, tmp_path)
        ours, theirs = trained_tensors(first.model), trained_tensors(second.model)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert torch.equal(logits(first.model), logits(second.model))

    @pytest.mark.parametrize("keys", [{"lora_r": 4}, {"lora_target_modules": ["q_proj"]}], ids=str)
    def test_another_shape_of_adapter_is_refused_and_nothing_is_changed(
        self, ministral: Path, uneven: Rows, tmp_path: Path, keys: dict[str, Any]
    ) -> None:
        saved = adapted(ministral, tmp_path / "saved", uneven)
        save_trained(saved.model, tmp_path, saved.config)
        other = adapted(ministral, tmp_path / "other", uneven, seed=2, **keys)
        before = {k: v.clone() for k, v in trained_tensors(other.model).items()}
        with pytest.raises(WorkError, match="belong to another model"):
            load_trained(other.model, tmp_path)
        after = trained_tensors(other.model)
        assert all(torch.equal(after[name], before[name]) for name in before)


class TestFullModel:
    def test_transformers_opens_it(self, any_model: Path, uneven: Rows, tmp_path: Path) -> None:
        run = training(tmp_path, settings(any_model, learning_rate=0.01), uneven)
        run.step(1, run.order.step(1))
        folder = export_trained(run.model, tmp_path, any_model, run.config)
        assert folder == tmp_path / "model"
        assert_same(logits(stock_model(folder)), logits(run.model))
        assert not torch.equal(logits(stock_model(folder)), logits(stock_model(any_model)))
        again = load_base(folder, settings(folder)).model
        assert torch.equal(logits(again), logits(run.model))

    def test_a_tied_head_stays_tied(self, uneven: Rows, tmp_path: Path) -> None:
        base = write_model(tmp_path / "tied", MINISTRAL3 | {"tie_word_embeddings": True})
        run = training(tmp_path / "run", settings(base, learning_rate=0.01), uneven)
        run.step(1, run.order.step(1))
        folder = export_trained(run.model, tmp_path, base, run.config)
        assert_same(logits(stock_model(folder)), logits(run.model))
        assert "lm_head.weight" not in load_file(folder / "model.safetensors")

    def test_its_tokenizer_lies_beside_it(self, uneven: Rows, tmp_path: Path) -> None:
        base = write_model(tmp_path / "base", MINISTRAL3)
        (base / "tekken.json").write_text("the vocabulary")
        run = training(tmp_path / "run", settings(base), uneven)
        folder = export_trained(run.model, tmp_path, base, run.config)
        assert (folder / "tekken.json").read_text() == "the vocabulary"

    def test_all_that_a_stock_load_reads_lies_beside_it(self, uneven: Rows, tmp_path: Path) -> None:
        base = write_model(tmp_path / "base", MINISTRAL3)
        kept = ("LICENSE", "SYSTEM_PROMPT.txt", "preprocessor_config.json", "tokenizer.json")
        for name in kept:
            (base / name).write_text(name)
        (base / "generation_config.json").write_text('{"temperature": 0.15, "do_sample": true}')
        for name in ("consolidated.safetensors", "params.json"):
            (base / name).write_text("the same weights once more")
        run = training(tmp_path / "run", settings(base), uneven)
        folder = export_trained(run.model, tmp_path, base, run.config)
        assert all((folder / name).read_text() == name for name in kept)
        assert not (folder / "params.json").exists()
        assert stock_model(folder).generation_config.temperature == 0.15

    def test_trained_tensors_come_back(self, ministral: Path, uneven: Rows, tmp_path: Path) -> None:
        config = settings(ministral, unfrozen_parameters=[r"model\.norm"], learning_rate=0.1)
        run = training(tmp_path / "one", config, uneven)
        run.step(1, run.order.step(1))
        save_trained(run.model, tmp_path, config)
        assert list(load_file(tmp_path / "trained.safetensors")) == ["model.norm.weight"]
        other = training(tmp_path / "two", config, uneven)
        load_trained(other.model, tmp_path)
        assert torch.equal(logits(other.model), logits(run.model))

    @pytest.mark.parametrize(
        "keys", [{"adapter": "lora"}, {"unfrozen_parameters": [r"model\.layers"]}], ids=str
    )
    def test_weights_of_another_training_are_refused(
        self, begin: Begin, ministral: Path, uneven: Rows, tmp_path: Path, keys: dict[str, Any]
    ) -> None:
        config = settings(ministral, unfrozen_parameters=[r"model\.norm"])
        save_trained(training(tmp_path / "one", config, uneven).model, tmp_path, config)
        other = begin("two", **keys)
        with pytest.raises(WorkError, match="belong to another model"):
            load_trained(other.model, tmp_path)

    def test_a_row_is_not_stretched_over_a_matrix(self, begin: Begin, tmp_path: Path) -> None:
        # Copying alone would spread one row of numbers over all of them.
        save_file({"lm_head.weight": torch.ones(1, 64)}, tmp_path / "trained.safetensors")
        with pytest.raises(WorkError, match=r"lm_head\.weight has no counterpart"):
            load_trained(begin("run", unfrozen_parameters=["lm_head"]).model, tmp_path)


@pytest.mark.parametrize("adapter", [None, "lora"])
class TestExport:
    def test_it_replaces_an_earlier_one_whole(
        self, begin: Begin, ministral: Path, tmp_path: Path, adapter: str | None
    ) -> None:
        run = begin(adapter=adapter)
        folder = export_trained(run.model, tmp_path, ministral, run.config)
        first = sorted(path.name for path in folder.iterdir())
        (folder / "stray").write_text("old")
        folder.with_name(f"{folder.name}.partial").mkdir()
        export_trained(run.model, tmp_path, ministral, run.config)
        assert sorted(path.name for path in folder.iterdir()) == first
        assert not list(tmp_path.glob("*.partial"))

    def test_a_full_disk_is_a_sentence_and_leaves_the_earlier_one(
        self, begin: Begin, ministral: Path, tmp_path: Path, adapter: str | None
    ) -> None:
        run = begin(adapter=adapter)
        folder = export_trained(run.model, tmp_path, ministral, run.config)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with files_at_most(4096), pytest.raises(WorkError, match="could not be written"):
            export_trained(run.model, tmp_path, ministral, run.config)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
