"""What is read from a name, a folder or the hub's cache, and what a stranger's file may not do."""

import contextlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.catalog import find_model, read_architecture
from engine.errors import UserError

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "torch_dtype": "bfloat16",
}
SEEING: dict[str, Any] = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "text_config": {k: v for k, v in SMALL.items() if k != "architectures"},
    "vision_config": {"model_type": "pixtral", "num_hidden_layers": 1},
}


def write_config(folder: Path, config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def refusal(model: str | Path) -> UserError:
    with pytest.raises(UserError) as caught:
        read_architecture(model)
    assert "Traceback" not in str(caught.value)
    return caught.value


class TestReading:
    def test_a_catalog_name_needs_no_file(self) -> None:
        read = read_architecture("mistral-small-4")
        assert (read.class_name, read.checkpoint) == ("Mistral3ForConditionalGeneration", "fp8")
        assert read.folder is None
        assert read.card is find_model("mistral-small-4")

    def test_what_is_read_may_be_changed_without_harm_to_the_catalog(self) -> None:
        config: Any = read_architecture("demo-tiny").config
        config["rope_parameters"]["factor"] = 1
        assert find_model("demo-tiny").config["rope_parameters"]["factor"] == 16

    def test_a_folder_is_read_by_path_and_by_name(self, tmp_path: Path) -> None:
        folder = write_config(tmp_path / "mine", SMALL)
        for model in (folder, str(folder)):
            read = read_architecture(model)
            assert (read.class_name, read.checkpoint) == ("MistralForCausalLM", "bf16")
            assert (read.folder, read.card, read.notes) == (folder, None, ())

    def test_a_folder_named_like_a_model_is_meant_only_by_its_path(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_config(tmp_path / "demo-tiny", SMALL)
        monkeypatch.chdir(tmp_path)
        assert read_architecture("demo-tiny").class_name == "Ministral3ForCausalLM"
        assert read_architecture("./demo-tiny").class_name == "MistralForCausalLM"
        assert read_architecture(Path("demo-tiny")).class_name == "MistralForCausalLM"

    def test_an_fp8_checkpoint_says_so(self, tmp_path: Path) -> None:
        config = SMALL | {"quantization_config": {"quant_method": "fp8"}}
        assert read_architecture(write_config(tmp_path, config)).checkpoint == "fp8"

    @pytest.mark.parametrize(
        "name", ["no-such-model", "a\0b", "x" * 5000, "~nobody-here"], ids=lambda name: name[:20]
    )
    def test_a_name_of_nothing_is_refused(self, name: str) -> None:
        assert refusal(name).what.startswith("There is no")

    @pytest.mark.parametrize("path", ["./missing", "/missing/model", "a/b/c", Path("missing")])
    def test_a_missing_folder_is_refused(self, path: str | Path) -> None:
        assert "There is no folder" in refusal(path).what

    def test_a_folder_without_config_json_is_refused(self, tmp_path: Path) -> None:
        assert "config.json" in refusal(tmp_path).what

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "[1]",
            "null",
            "\ufeff{}",
            "[" * 100_000,
            '{"a": ' * 900 + "1" + "}" * 900,
            '{"architectures": ' + "[" * 900 + "]" * 900 + "}",
            '{"vocab_size": 1' + "0" * 5000 + "}",
        ],
        ids=lambda text: text[:20],
    )
    def test_a_broken_config_json_is_refused(self, tmp_path: Path, text: str) -> None:
        refusal(write_config(tmp_path, text))

    def test_a_config_json_that_is_no_text_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
        assert "not valid JSON" in refusal(tmp_path).what

    def test_a_config_json_that_is_a_folder_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").mkdir()
        assert "cannot be read" in refusal(tmp_path).what


class TestHub:
    def test_a_listed_hub_id_is_known_without_its_files(self) -> None:
        read = read_architecture("mistralai/Ministral-3-8B-Base-2512")
        assert (read.checkpoint, read.folder) == ("bf16", None)
        assert read.card is find_model("ministral-3-8b")

    def test_an_unknown_hub_id_is_not_fetched(self) -> None:
        error = refusal("someone/some-finetune")
        assert "nothing is fetched" in error.why
        assert "hf download someone/some-finetune config.json" in error.fix

    def test_a_cached_config_json_wins_over_the_catalog(self, tmp_path: Path) -> None:
        repository = tmp_path / "models--mistralai--Magistral-Small-2509"
        write_config(repository / "snapshots" / "abc", SEEING)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
        code = (
            "from engine.catalog import read_architecture as read; "
            "r = read('mistralai/Magistral-Small-2509'); "
            "print(r.table.parameters[-1].shape, r.card.name, r.table.parameters[-1].tied)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env=os.environ | {"HF_HUB_CACHE": str(tmp_path)},
        )
        # The file does not say whether the head is tied; the card of that repository does.
        assert done.stdout.split() == ["(64,", "32)", "magistral-small-2509", "False"]


class TestStrangersConfig:
    def test_an_unknown_architecture_is_refused_with_the_allowed_ones(self, tmp_path: Path) -> None:
        config = SMALL | {"architectures": ["MixtralForCausalLM\x1b[2J"]}
        error = refusal(write_config(tmp_path, config))
        assert "MixtralForCausalLM" in error.what
        assert "\x1b" not in str(error)
        for allowed in (
            "MistralForCausalLM",
            "Ministral3ForCausalLM",
            "Mistral4ForCausalLM",
            "Mistral3ForConditionalGeneration",
        ):
            assert allowed in error.why

    @pytest.mark.parametrize("architectures", [None, [], "MistralForCausalLM", [None]])
    def test_a_missing_architecture_is_refused(self, tmp_path: Path, architectures: Any) -> None:
        config = SMALL | {"architectures": architectures}
        assert "no architecture" in refusal(write_config(tmp_path, config)).what

    def test_a_class_and_a_model_type_that_differ_are_refused(self, tmp_path: Path) -> None:
        error = refusal(write_config(tmp_path, SMALL | {"model_type": "ministral3"}))
        assert "ministral3" in error.what
        assert "mistral" in error.why

    def test_an_unknown_text_or_vision_model_is_refused(self, tmp_path: Path) -> None:
        for part, name in (("text_config", "llama"), ("vision_config", "siglip")):
            config = SEEING | {part: {"model_type": name}}
            error = refusal(write_config(tmp_path, config))
            assert name in error.what
            assert part in error.what

    def test_a_missing_vision_tower_is_refused(self, tmp_path: Path) -> None:
        config = {k: v for k, v in SEEING.items() if k != "vision_config"}
        assert "no vision_config" in refusal(write_config(tmp_path, config)).what

    @pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
    def test_code_that_came_with_the_model_is_refused(
        self, tmp_path: Path, part: str | None
    ) -> None:
        code = {"auto_map": {"AutoModel": "modeling_evil.Evil"}}
        config = SEEING | ({part: SEEING[part] | code} if part else code)
        assert "auto_map" in refusal(write_config(tmp_path, config)).why

    @pytest.mark.parametrize(
        "key",
        [
            "_attn_implementation",
            "attn_implementation",
            "_attn_implementation_internal",
            "_experts_implementation",
            "experts_implementation",
        ],
    )
    @pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
    def test_a_kernel_from_the_hub_is_refused_and_a_built_in_one_ignored(
        self, tmp_path: Path, key: str, part: str | None
    ) -> None:
        def config(value: Any) -> Any:
            choice = {key: value}
            return SEEING | ({part: SEEING[part] | choice} if part else choice)

        for value in ("someone/kernel", ["sdpa"], {"": "someone/kernel"}):
            error = refusal(write_config(tmp_path, config(value)))
            assert key in error.why
        read = read_architecture(write_config(tmp_path, config("sdpa")))
        assert key not in json.dumps(dict(read.config))
        assert any(f"`{key}`" in note for note in read.notes)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("num_hidden_layers", 10**9),
            ("num_hidden_layers", 0),
            ("hidden_size", -1),
            ("hidden_size", "4096"),
            ("vocab_size", 1.5),
            ("vocab_size", True),
            ("vocab_size", None),
            ("tie_word_embeddings", "yes"),
        ],
    )
    def test_sizes_that_no_model_has_are_refused_by_name(
        self, tmp_path: Path, key: str, value: Any
    ) -> None:
        error = refusal(write_config(tmp_path, SMALL | {key: value}))
        assert f"`{key}` is {json.dumps(value)}" in error.why

    def test_a_wrong_size_inside_says_where(self, tmp_path: Path) -> None:
        config = SEEING | {"text_config": {"model_type": "mistral", "hidden_size": [1]}}
        assert "`text_config.hidden_size` is a list" in refusal(write_config(tmp_path, config)).why

    @settings(max_examples=150, deadline=None)
    @given(
        st.dictionaries(
            st.sampled_from([*SEEING, *SMALL, "auto_map", "attn_implementation", "dtype"]),
            st.recursive(
                st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(),
                lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*SMALL]), inner),
                max_leaves=4,
            ),
        ),
        st.sampled_from([SMALL, SEEING, {}]),
    )
    def test_any_json_object_is_read_or_refused_and_never_crashes(
        self, tmp_path_factory: pytest.TempPathFactory, changes: Any, base: Any
    ) -> None:
        folder = write_config(tmp_path_factory.mktemp("model"), base | changes)
        with contextlib.suppress(UserError):
            assert read_architecture(folder).table.total_parameters > 0


class TestTiedHead:
    def test_a_head_among_the_weights_is_the_models_own(self, tmp_path: Path) -> None:
        write_config(tmp_path, SEEING)
        index = {"weight_map": {"language_model.lm_head.weight": "model-1.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        read = read_architecture(tmp_path)
        assert not read.table.parameters[-1].tied
        assert (read.config["tie_word_embeddings"], read.notes) == (False, ())

    def test_a_head_missing_from_the_weights_is_the_embeddings(self, tmp_path: Path) -> None:
        write_config(tmp_path, SEEING)
        header = json.dumps({"__metadata__": {}, "model.embed_tokens.weight": {}}).encode()
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        read = read_architecture(tmp_path)
        assert read.table.parameters[-1].tied
        assert read.notes == ()

    @pytest.mark.parametrize("damage", [None, b"", b"\xff" * 9, struct.pack("<Q", 2) + b"[]"])
    def test_without_weights_the_assumption_is_said(
        self, tmp_path: Path, damage: bytes | None
    ) -> None:
        write_config(tmp_path, SEEING)
        if damage is not None:
            (tmp_path / "model.safetensors").write_bytes(damage)
        read = read_architecture(tmp_path)
        assert read.table.parameters[-1].tied
        assert "counted once" in read.notes[0]

    def test_what_the_file_says_is_not_doubted(self, tmp_path: Path) -> None:
        write_config(tmp_path, SEEING | {"tie_word_embeddings": False})
        read = read_architecture(tmp_path)
        assert not read.table.parameters[-1].tied
        assert read.notes == ()
