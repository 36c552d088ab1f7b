"""What is read from a name, a folder or the hub's cache, and what a stranger's file may not do."""

import contextlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.catalog import (
    Architecture,
    attention_factor,
    contradictions,
    find_model,
    list_models,
    read_architecture,
    repaired_rope,
    with_overrides,
)
from engine.catalog.rows import ARCHITECTURES
from engine.config import ConfigError, read_config, require_supported
from engine.errors import UserError
from engine.plan import remarks
from tests.fakes.processes import printed_by
from tests.support.extras import needs_trainer
from tests.support.machines import config

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
        ("name", "what"),
        [
            *((name, "There is no") for name in ("no-such-model", "a\0b", "x" * 5000, "~nobody")),
            *((name, "There is no folder") for name in ("./missing", "/missing/model", "a/b/c")),
            (Path("missing"), "There is no folder"),
        ],
        ids=lambda each: str(each)[:20],
    )
    def test_a_name_or_a_folder_of_nothing_is_refused(self, name: str | Path, what: str) -> None:
        assert refusal(name).what.startswith(what)

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

    def test_a_config_json_that_is_no_text_or_not_there_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "config.json"
        assert "config.json" in refusal(tmp_path).what
        file.write_bytes(b"\xff\xfe\x00")
        assert "not valid JSON" in refusal(tmp_path).what
        file.unlink()
        file.mkdir()
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
        printed = printed_by("-c", code, HF_HUB_CACHE=str(tmp_path))
        # The file does not say whether the head is tied; the card of that repository does.
        assert printed.split() == ["(64,", "32)", "magistral-small-2509", "False"]


CODE = {"auto_map": {"AutoModel": "modeling_evil.Evil"}}


class TestStrangersConfig:
    @pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
    @pytest.mark.parametrize(
        "changes",
        [
            {"hidden_act": "__import__('os')"},
            {"projector_hidden_act": "mishh"},
            {"dtype": "__import__"},
            {"torch_dtype": "uint8"},
            {"rope_parameters": {"rope_type": "\x1b[31m"}},
            {"rope_scaling": {"type": "su"}},
            {"rope_parameters": {"rope_type": "yarn", "factor": 10**400}},
            {"rope_parameters": "yarn"},
            {"max_position_embeddings": 10**400},
            {"sliding_window": -1},
        ],
        ids=lambda changes: str(changes)[:40],
    )
    def test_what_is_looked_up_later_is_refused_before_a_plan(
        self, tmp_path: Path, part: str | None, changes: dict[str, Any]
    ) -> None:
        config = SEEING | ({part: SEEING[part] | changes} if part else changes)
        error = refusal(write_config(tmp_path, config))
        assert ".".join([*([part] if part else []), *changes]) in error.why
        assert "\x1b" not in str(error)

    def test_a_rope_of_the_runs_own_is_held_against_the_same(self, tmp_path: Path) -> None:
        architecture = read_architecture(write_config(tmp_path, SMALL))
        with pytest.raises(UserError, match="overrides_of_model_config"):
            with_overrides(architecture, {"rope_parameters": {"rope_type": "su"}})

    @pytest.mark.parametrize(
        ("config", "part", "named"),
        [
            *(
                (SMALL | {"architectures": named}, "what", ["no architecture"])
                for named in (None, [], "MistralForCausalLM", [None])
            ),
            (
                SMALL | {"architectures": ["MixtralForCausalLM\x1b[2J"]},
                "what",
                ["MixtralForCausalLM"],
            ),
            (SMALL | {"architectures": ["MixtralForCausalLM"]}, "why", ARCHITECTURES),
            (SMALL | {"model_type": "ministral3"}, "what", ["ministral3"]),
            (SMALL | {"model_type": "ministral3"}, "why", ["mistral"]),
            (SEEING | {"text_config": {"model_type": "llama"}}, "what", ["llama", "text_config"]),
            (
                SEEING | {"vision_config": {"model_type": "siglip"}},
                "what",
                ["siglip", "vision_config"],
            ),
            (
                {k: v for k, v in SEEING.items() if k != "vision_config"},
                "what",
                ["no vision_config"],
            ),
            *(
                (SEEING | ({part: SEEING[part] | CODE} if part else CODE), "why", ["auto_map"])
                for part in (None, "text_config", "vision_config")
            ),
            *(
                (SMALL | {key: value}, "why", [f"`{key}` is {json.dumps(value)}"])
                for key, value in [
                    ("num_hidden_layers", 10**9),
                    ("num_hidden_layers", 0),
                    ("hidden_size", -1),
                    ("hidden_size", "4096"),
                    ("vocab_size", 1.5),
                    ("vocab_size", True),
                    ("vocab_size", None),
                    ("tie_word_embeddings", "yes"),
                ]
            ),
            (
                SEEING | {"text_config": {"model_type": "mistral", "hidden_size": [1]}},
                "why",
                ["`text_config.hidden_size` is a list"],
            ),
        ],
    )
    def test_what_may_not_or_cannot_be_built_is_refused_by_name(
        self, tmp_path: Path, config: Any, part: str, named: Iterable[str]
    ) -> None:
        error = refusal(write_config(tmp_path, config))
        assert all(each in getattr(error, part) for each in named)
        assert "\x1b" not in str(error)

    @pytest.mark.parametrize(
        "key",
        [
            *("_attn_implementation", "attn_implementation", "_attn_implementation_internal"),
            *("_experts_implementation", "experts_implementation"),
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


def header(*names: str) -> bytes:
    """The start of a file of weights with these names."""
    content = json.dumps({"__metadata__": {}, **{name: {} for name in names}}).encode()
    return struct.pack("<Q", len(content)) + content


INDEX = json.dumps(
    {"weight_map": {"language_model.lm_head.weight": "model-1.safetensors"}}
).encode()


@pytest.mark.parametrize(
    ("says", "file", "content", "tied", "note"),
    [
        ({}, "model.safetensors.index.json", INDEX, False, ""),
        ({}, "model.safetensors", header("model.embed_tokens.weight"), True, ""),
        ({"tie_word_embeddings": False}, None, b"", False, ""),
        ({}, None, b"", True, "counted once"),
        *(
            ({}, "model.safetensors", damage, True, "counted once")
            for damage in (b"", b"\xff" * 9, struct.pack("<Q", 2) + b"[]")
        ),
    ],
)
def test_a_head_is_tied_as_the_file_or_else_the_weights_say(
    tmp_path: Path, says: dict[str, Any], file: str | None, content: bytes, tied: bool, note: str
) -> None:
    write_config(tmp_path, SEEING | says)
    if file:
        (tmp_path / file).write_bytes(content)
    read = read_architecture(tmp_path)
    assert read.table.parameters[-1].tied == tied
    assert tied or read.config["tie_word_embeddings"] is False
    assert [note in each for each in read.notes] == [True] * bool(note)


RECIPES = Path(__file__).parents[2] / "presets" / "recipes"
CARDS = [card for card in list_models() if card.sources]
MEDIUM = find_model("mistral-medium-3.5")


def text_of(config: Any) -> Any:
    return config.get("text_config", config)


@pytest.fixture
def beside_weights(tmp_path: Path) -> Callable[..., Architecture]:
    """A card's config.json in a folder, with changes to its text part."""

    def write(name: str, **changes: object) -> Architecture:
        content = deepcopy(dict(find_model(name).config))
        for key, value in changes.items():
            if key == "rope_parameters" and isinstance(value, dict):
                text_of(content)[key] |= value
            elif value is ...:
                del text_of(content)[key]
            else:
                text_of(content)[key] = value
        (tmp_path / "config.json").write_text(json.dumps(content), "utf-8")
        return read_architecture(tmp_path)

    return write


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_card_is_consistent(card: Any, beside_weights: Callable[..., Architecture]) -> None:
    assert contradictions(beside_weights(card.name), card) == ()


def test_the_first_config_of_medium_is_mended(beside_weights: Callable[..., Architecture]) -> None:
    read = beside_weights(MEDIUM.name, rope_parameters={"mscale_all_dim": 1.0})
    # No name says which model the folder holds: its shape and the value do.
    (said,) = remarks(config(base_model=str(read.folder)), read)
    assert said.startswith("config.json says mscale_all_dim: 1.0, Mistral Medium 3.5 has 0.0: ")
    assert "attention is scaled by 1 instead of 1.416" in said
    override = said.partition("write ")[2]
    (Path(str(read.folder)) / "run.yml").write_text(
        f"base_model: {read.folder}\nadapter: lora\nlora_target_linear: true\n"
        f"datasets: [{{path: rows.jsonl, type: chat_template}}]\n{override}\n"
    )
    file = read_config(Path(str(read.folder)) / "run.yml")
    file.require_supported()
    assert remarks(file.config, read) == ()
    built = with_overrides(read, file.config.overrides_of_model_config)
    assert text_of(built.config)["rope_parameters"] == text_of(MEDIUM.config)["rope_parameters"]
    assert text_of(read.config)["rope_parameters"]["mscale_all_dim"] == 1.0


@pytest.mark.parametrize("rope", [{"rope_type": 3}, {"rope_type": "yarn", "factor": "16"}, "yarn"])
def test_a_rotation_that_is_no_numbers_is_refused(rope: object) -> None:
    with pytest.raises(ConfigError, match="overrides_of_model_config"):
        require_supported(config(overrides_of_model_config={"rope_parameters": rope}))


@pytest.mark.parametrize(
    ("name", "changes", "key"),
    [
        ("ministral-3-8b", {"rope_parameters": {"rope_theta": 1e9}}, "rope_parameters.rope_theta"),
        ("ministral-3-14b", {"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters.rope_theta"),
        ("ministral-3-8b", {"rope_parameters": ...}, "rope_parameters"),
        ("mistral-small-4", {"num_experts_per_tok": 8}, "num_experts_per_tok"),
        ("mistral-small-4", {"routed_scaling_factor": 2.5}, "routed_scaling_factor"),
        ("magistral-small-2507", {"rms_norm_eps": 1e-6}, "rms_norm_eps"),
        ("magistral-small-2507", {"sliding_window": ...}, "sliding_window"),  # 4,096 by default
        ("magistral-small-2509", {"rms_norm_eps": ...}, "rms_norm_eps"),
    ],
)
def test_what_a_source_vouches_for_is_compared(
    name: str, changes: dict[str, Any], key: str, beside_weights: Callable[..., Architecture]
) -> None:
    read = beside_weights(name, **changes)
    (found,) = contradictions(read, find_model(name))
    assert found.key == key
    (said,) = remarks(config(base_model=name), read)
    assert said.startswith("config.json says ")
    assert find_model(name).title in said


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        # Low confidence: of another model of the same shape.
        ("mistral-medium-3.5", {"rope_parameters": {"beta_fast": 32.0, "rope_theta": 5e6}}),
        ("mistral-medium-3.5", {"rope_parameters": {"mscale_all_dim": 0}}),
        ("mistral-medium-3.5", {"max_position_embeddings": 131072, "use_cache": False}),
    ],
)
def test_what_nobody_is_sure_of_is_not(
    name: str, changes: dict[str, Any], beside_weights: Callable[..., Architecture]
) -> None:
    assert contradictions(beside_weights(name, **changes), find_model(name)) == ()


def test_another_of_the_same_shape_is_not_it(beside_weights: Callable[..., Architecture]) -> None:
    # Mistral Small 2501 has the shape of Magistral Small 2507 and a tenth of its rope_theta.
    read = beside_weights("magistral-small-2507", rope_parameters={"rope_theta": 1e8})
    assert contradictions(read) == ()
    assert contradictions(read, find_model("magistral-small-2507"))


def test_files_of_transformers_4_are_read_alike(
    beside_weights: Callable[..., Architecture],
) -> None:
    rope = dict(text_of(find_model("ministral-3-8b").config)["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    old = {"rope_parameters": ..., "rope_theta": theta, "rope_scaling": {"type": kind, **rope}}
    read = beside_weights("ministral-3-8b", **old)
    assert contradictions(read, find_model("ministral-3-8b")) == ()
    wrong = old | {"rope_theta": 1e4}
    read = beside_weights("ministral-3-8b", **wrong)
    (found,) = contradictions(read, find_model("ministral-3-8b"))
    assert (found.key, found.given) == ("rope_parameters.rope_theta", 1e4)
    right = repaired_rope(read, (found,))
    assert right == text_of(find_model("ministral-3-8b").config)["rope_parameters"]


def copies() -> Iterator[Any]:
    """Each recipe, and one wrong value of a key that is vouched for."""
    for path in sorted(RECIPES.glob("*/*.yml")):
        sources = find_model(path.parent.name).sources
        vouched = [key for s in sources if s.confidence == "high" for key in s.keys]
        for key in vouched[:1]:
            section, _, name = key.rpartition(".")
            value = "linear" if name == "rope_type" else 2.0
            wrong = {section: {name: value}} if section else {key: value}
            yield pytest.param(path, wrong, id=f"{path.parent.name}/{path.stem}")


@pytest.mark.parametrize(("path", "wrong"), copies())
def test_the_copy_that_a_recipe_names_is_checked(
    path: Path, wrong: dict[str, Any], beside_weights: Callable[..., Architecture]
) -> None:
    run = read_config(path).config
    # The folder that the hub's files come to lie in has no card: the recipe's name says which.
    sound = beside_weights(path.parent.name)
    assert not any("config.json" in said for said in remarks(run, sound))
    read = beside_weights(path.parent.name, **wrong)
    assert any(said.startswith("config.json says") for said in remarks(run, read))


def test_words_for_numbers_are_contradictions(beside_weights: Callable[..., Architecture]) -> None:
    read = beside_weights("ministral-3-8b", rope_parameters={"factor": "16", "mscale": "one"})
    (said,) = remarks(config(base_model="ministral-3-8b"), read)
    assert said.startswith("config.json says ")


@needs_trainer
@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_attention_factor_is_transformers_own(card: Any) -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = getattr(transformers, card.config["architectures"][0]).config_class
    settings = kind.from_dict(deepcopy(dict(card.config))).get_text_config()
    rope = text_of(card.config)["rope_parameters"]
    if rope["rope_type"] == "yarn":
        _, expected = ROPE_INIT_FUNCTIONS["yarn"](settings, "cpu")
        assert attention_factor(rope) == pytest.approx(expected, abs=1e-12)
    else:
        assert attention_factor(rope) == 1.0


@needs_trainer
@pytest.mark.parametrize("kind", ["mistral", "ministral3", "mistral4"])
def test_what_a_silent_file_means_is_transformers_default(kind: str) -> None:
    from transformers import AutoConfig

    from engine.catalog.architecture import _LEFT_OUT_BY_TYPE

    default = AutoConfig.for_model(kind)
    for key, value in _LEFT_OUT_BY_TYPE[kind].items():
        assert getattr(default, key) == value
