"""What may be loaded and what is refused: a model that would train broken never starts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.train.device import pick_device, pick_dtype
from engine.train.forward import half_precision, head_of, hidden_states
from engine.train.model import load_base
from tests.support.tiny import (
    ARCHITECTURES,
    MINISTRAL3,
    YARN,
    Models,
    edit_config,
    edit_weights,
    refused,
    settings,
    with_vision,
    write_model,
)

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def own(tmp_path: Path, ministral: Path) -> Path:
    """A copy of the text model that a test may spoil."""
    return Path(shutil.copytree(ministral, tmp_path / "own"))


class TestWhatIsLoaded:
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_class_comes_from_the_config(self, name: str, model_folder: Models) -> None:
        folder = model_folder(name)
        base = load_base(folder, settings(folder))
        assert [type(base.model).__name__] == ARCHITECTURES[name]["architectures"]

    @pytest.mark.parametrize("sees", [False, True])
    def test_an_override_of_its_rotation_is_what_is_built(self, sees: bool, tmp_path: Path) -> None:
        wrong = dict(YARN, factor=64.0, mscale=1.0, mscale_all_dim=1.0)
        text = MINISTRAL3 | {"rope_parameters": wrong}
        folder = write_model(tmp_path / "base", with_vision(text) if sees else text)
        right = {"rope_parameters": wrong | {"mscale_all_dim": 0.0}}
        override = {"text_config": right} if sees else right
        factors = []
        for keys in ({}, {"overrides_of_model_config": override}):
            model = load_base(folder, settings(folder, **keys)).model
            text_model = model.model.language_model if sees else model.model
            factors.append(text_model.rotary_emb.attention_scaling)
        assert factors == [1.0, pytest.approx(1.4159, abs=1e-4)]

    def test_every_weight_is_the_files(self, ministral: Path) -> None:
        loaded = load_base(ministral, settings(ministral)).model.state_dict()
        written = load_file(ministral / "model.safetensors")
        assert loaded.keys() == written.keys()
        assert all(torch.equal(loaded[name], written[name]) for name in written)

    @pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
    def test_weights_have_the_dtype(self, ministral: Path, bf16: bool, dtype: torch.dtype) -> None:
        base = load_base(ministral, settings(ministral, bf16=bf16))
        assert base.dtype == dtype
        assert {p.dtype for p in base.model.parameters()} == {dtype}

    def test_a_cpu_computes_in_float32_unless_asked(self) -> None:
        assert pick_dtype(settings(bf16="auto"), torch.device("cpu")) == torch.float32
        assert pick_device().type in ("cpu", "cuda")

    def test_a_tied_head_is_the_embedding_and_need_not_be_in_the_file(self, tmp_path: Path) -> None:
        folder = write_model(tmp_path / "tied", MINISTRAL3 | {"tie_word_embeddings": True})
        assert "lm_head.weight" not in load_file(folder / "model.safetensors")
        model = load_base(folder, settings(folder)).model
        assert head_of(model) is model.get_input_embeddings().weight


class TestWhatIsRefused:
    def test_a_missing_weight(self, own: Path) -> None:
        edit_weights(own, {UP: None})
        assert f"lacks weights that the model needs: {UP}" in refused(own).what

    def test_a_missing_head_that_is_not_tied(self, own: Path) -> None:
        edit_weights(own, {"lm_head.weight": None})
        assert "lm_head.weight" in refused(own).what

    @pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "visual.weight"])
    def test_a_weight_that_the_model_has_no_place_for(self, own: Path, name: str) -> None:
        edit_weights(own, {name: torch.ones(2, 2)})
        assert f"no place for: {name}" in refused(own).what

    def test_a_weight_of_another_shape(self, own: Path) -> None:
        edit_weights(own, {UP: torch.ones(64, 64)})
        assert f"of another shape: {UP}" in refused(own).what

    def test_many_wrong_weights_are_shown_in_part(self, own: Path) -> None:
        edit_weights(own, {f"extra.{n}": torch.ones(1) for n in range(5)})
        assert "extra.0, extra.1, extra.2 and 2 more" in refused(own).what

    def test_a_name_that_would_disturb_a_terminal_is_shown_harmless(self, own: Path) -> None:
        edit_weights(own, {"extra\x1b[2J": torch.ones(2, 2)})
        assert "\x1b" not in str(refused(own))

    def test_weights_that_are_quantized_already(self, own: Path) -> None:
        edit_config(own, quantization_config={"quant_method": "gptq"})
        assert "quantized already" in refused(own).what
        assert "quantized already" in refused(own, adapter="qlora", load_in_4bit=True).what

    @pytest.mark.parametrize("content", [None, b"", b"<html>", b"\xff" * 64])
    def test_weights_that_cannot_be_read(self, own: Path, content: bytes | None) -> None:
        weights = own / "model.safetensors"
        weights.unlink() if content is None else weights.write_bytes(content)
        assert "cannot be read" in refused(own).what

    def test_half_a_download(self, own: Path) -> None:
        weights = own / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
        assert "cannot be read" in refused(own).what

    def test_pickled_weights_are_not_even_opened(self, own: Path) -> None:
        (own / "model.safetensors").unlink()
        (own / "pytorch_model.bin").write_bytes(b"cos\nabort\n(tR.")  # ends a process that reads it
        assert "as safetensors files" in refused(own).fix

    def test_an_adapter_that_would_lead_to_another_base(self, own: Path, tmp_path: Path) -> None:
        other = write_model(tmp_path / "other", MINISTRAL3, seed=9)
        adapter = {"peft_type": "LORA", "base_model_name_or_path": str(other)}
        (own / "adapter_config.json").write_text(json.dumps(adapter))
        assert "holds an adapter" in refused(own).what

    def test_an_architecture_that_is_not_one_of_mistrals(self, own: Path) -> None:
        edit_config(own, architectures=["LlamaForCausalLM"], model_type="llama")
        refused(own)

    def test_code_that_came_with_the_model(self, own: Path) -> None:
        edit_config(own, auto_map={"AutoModelForCausalLM": "evil.Model"})
        (own / "evil.py").write_text("raise SystemExit('ran')")
        assert "wants to run code" in refused(own).what

    def test_an_attention_backend_that_is_not_installed(self, ministral: Path) -> None:
        error = refused(ministral, attn_implementation="flash_attention_3")
        assert "attn_implementation" in error.fix


class TestWhoChoosesTheKernels:
    def test_a_models_config_does_not(self, own: Path, ministral: Path) -> None:
        edit_config(own, _attn_implementation="eager", attn_implementation="eager")
        edit_config(own, _experts_implementation="batched_mm", experts_implementation="batched_mm")
        model, untouched = (
            load_base(folder, settings(folder)).model for folder in (own, ministral)
        )
        assert model.config._attn_implementation == "sdpa"
        for name in ("_experts_implementation", "experts_implementation"):
            chosen = getattr(untouched.config, name, None)
            assert chosen != "batched_mm"
            assert getattr(model.config, name, None) == chosen

    def test_nor_does_a_part_of_it(self, tmp_path: Path, model_folder: Models) -> None:
        source = model_folder("mistral3 over ministral3")
        folder = Path(shutil.copytree(source, tmp_path / "own"))
        config = json.loads((folder / "config.json").read_text())
        for part in ("text_config", "vision_config"):
            edit_config(folder, **{part: config[part] | {"_attn_implementation": "eager"}})
        model = load_base(folder, settings(folder)).model
        parts = (model.config, model.config.text_config, model.config.vision_config)
        assert [part._attn_implementation for part in parts] == ["sdpa"] * 3

    def test_a_kernel_from_the_hub_is_refused(self, own: Path) -> None:
        edit_config(own, _attn_implementation="someone/kernel")
        assert "fetch compiled code" in refused(own).what

    def test_the_run_does(self, ministral: Path) -> None:
        model = load_base(ministral, settings(ministral, attn_implementation="eager")).model
        assert model.config._attn_implementation == "eager"


class TestHalfPrecision:
    @pytest.mark.parametrize(
        ("keys", "dtype"),
        [
            ({"bf16": True}, torch.bfloat16),
            ({"bf16": False}, torch.float32),
            ({"bf16": False, "adapter": "qlora", "load_in_4bit": True}, torch.float32),
            ({"bf16": True, "adapter": "qlora", "load_in_4bit": True}, torch.bfloat16),
        ],
        ids=str,
    )
    def test_compute_dtype(self, any_model: Path, keys: dict[str, Any], dtype: torch.dtype) -> None:
        model = load_base(any_model, settings(any_model, **keys)).model
        wide = torch.ones(2, 2)
        with half_precision(model):
            assert (wide @ wide).dtype == dtype
        assert (wide @ wide).dtype == torch.float32
        ids = torch.arange(8)[None]
        assert hidden_states(model, {"input_ids": ids, "position_ids": ids}).dtype == dtype
