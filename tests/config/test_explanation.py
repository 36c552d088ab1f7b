"""`windtunnel explain` and `windtunnel schema`, through the command line that people type."""

import json
from collections.abc import Callable

import cyclopts
import jsonschema
import pytest

from engine.cli import explain
from engine.config import SECTIONS, DatasetConfig, RunConfig, unsupported
from engine.config.explanation import explain_key
from engine.config.limits import DATASET_LIMITS, LIMITS
from engine.config.other_keys import CHANGING, DATASET_CHANGING, ELSEWHERE, HARMLESS, RENAMED
from engine.errors import UserError

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    app = cyclopts.App(name="windtunnel")
    explain.register(app)

    def run_command(*arguments: str) -> str:
        status = app(
            list(arguments), exit_on_error=False, print_error=False, result_action="return_value"
        )
        assert status == 0
        return capsys.readouterr().out

    return run_command


class TestExplain:
    def test_a_key_as_a_page(self, run: Run) -> None:
        assert run("explain", "warmup_ratio").splitlines() == [
            "warmup_ratio  (Optimization)",
            "",
            "The same as a share of all steps; 0.05 to 0.1 is usual. With neither key: 0.03,",
            "at most 100 steps.",
            "",
            "takes     a number from 0 to below 1",
            "default   not set",
        ]

    def test_every_key_fits_an_80_column_screen(self, run: Run) -> None:
        for key in RunConfig.model_fields:
            assert max(map(len, run("explain", key).splitlines())) <= 80, key

    def test_as_json(self, run: Run) -> None:
        (found,) = json.loads(run("explain", "lr_scheduler", "--json"))["keys"]
        assert found["allowed"] == ["cosine", "linear", "constant"]
        assert found["default"] == "cosine"
        assert found["limit"] is None

    def test_a_default_that_follows_another_key_is_said_in_words(self) -> None:
        assert explain_key("lora_alpha")[0].default == "twice lora_r"

    def test_a_name_of_both_levels_shows_both(self) -> None:
        both = [found.key for found in explain_key("chat_template_kwargs")]
        assert both == ["chat_template_kwargs", "datasets[].chat_template_kwargs"]
        assert [found.key for found in explain_key("datasets[0].split")] == ["datasets[].split"]

    def test_an_older_spelling_leads_to_its_key(self) -> None:
        (found,) = explain_key("flash_attention")
        assert found.key == "attn_implementation"
        assert "flash_attention is an older spelling" in found.meaning

    def test_what_is_not_acted_on_says_so(self) -> None:
        assert "not supported yet" in str(explain_key("deepspeed")[0].limit)
        assert "no effect" in str(explain_key("wandb_project")[0].limit)

    @pytest.mark.parametrize(
        ("key", "says"),
        [
            ("lora_rank", "Did you mean lora_r?"),
            ("xyzzy", "`windtunnel schema` lists all keys."),
            ("peft_layers_pattern", "does not support"),
            ("strict", "no effect"),
            ("datasets.lora_r", "not a key"),
        ],
    )
    def test_a_key_that_is_none(self, key: str, says: str) -> None:
        with pytest.raises(UserError) as caught:
            explain_key(key)
        assert says in str(caught.value)


class TestSchema:
    def test_is_a_json_schema_with_every_key_described(self, run: Run) -> None:
        schema = json.loads(run("schema"))
        jsonschema.Draft202012Validator.check_schema(schema)
        assert set(RunConfig.model_fields) <= set(schema["properties"])
        for entry in schema["properties"].values():
            assert entry["description"].endswith((".", ")"))

    def test_a_typo_is_seen_by_an_editor(self, run: Run) -> None:
        schema = json.loads(run("schema"))
        jsonschema.validate({"base_model": "x", "fp16": None}, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"base_model": "x", "lora_rank": 8}, schema)


class TestTables:
    """The tables name keys; a key that is renamed or leaves must leave them too."""

    def test_every_section_is_part_of_the_config(self) -> None:
        keys = [key for section in SECTIONS for key in section.model_fields]
        assert sorted(keys) == sorted(RunConfig.model_fields)

    def test_limits_are_about_keys(self) -> None:
        assert set(LIMITS) <= set(RunConfig.model_fields)
        assert set(DATASET_LIMITS) <= set(DatasetConfig.model_fields)

    def test_other_names_are_no_keys(self) -> None:
        keys = set(RunConfig.model_fields)
        assert not (HARMLESS | CHANGING | set(RENAMED)) & keys
        assert not DATASET_CHANGING & set(DatasetConfig.model_fields)
        assert not HARMLESS & CHANGING
        assert not set(ELSEWHERE) & keys
        assert {new.key for new in RENAMED.values()} <= keys
        assert set(ELSEWHERE.values()) <= keys | set(DatasetConfig.model_fields)

    def test_a_default_is_never_a_finding(self) -> None:
        plain = RunConfig(base_model="x", datasets=(DatasetConfig(path="a"),))
        assert unsupported(plain) == []

    def test_axolotl_s_word_for_fp8_weights_is_a_note(self) -> None:
        known = RunConfig(base_model="x", model_quantization_config="FineGrainedFP8Config")
        (note,) = unsupported(known)
        assert (note.severity, note.key) == ("note", "model_quantization_config")
        other = RunConfig(base_model="x", model_quantization_config="Mxfp4Config")
        assert [found.severity for found in unsupported(other)] == ["error"]
