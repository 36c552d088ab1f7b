"""`windtunnel explain` and `windtunnel schema`, through the command line that people type."""

import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML

import engine.config
from engine.cli import main
from engine.config import (
    SECTIONS,
    ConfigError,
    DatasetConfig,
    RunConfig,
    config_schema,
    parse_config,
    section_of,
    section_title,
    unsupported,
)
from engine.config.axolotl import Level, elsewhere, limits, renamed
from engine.config.keys import TrackerKeys
from engine.config.schema import explain_key
from engine.errors import UserError

Run = Callable[..., str]
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run_command(*arguments: str) -> str:
        assert main(arguments) == 0
        return capsys.readouterr().out

    return run_command


class TestExplain:
    def test_a_key_as_a_page(self, run: Run) -> None:
        assert run("explain", "warmup_ratio").splitlines() == [
            *("warmup_ratio  (Optimization)", ""),
            "The same as a share of all steps; 0.05 to 0.1 is usual. With neither key: 0.03,",
            *("at most 100 steps.", "", "takes     a number from 0 to below 1"),
            "default   not set",
        ]

    def test_every_key_fits_an_80_column_screen(self, run: Run) -> None:
        for key in (*RunConfig.model_fields, *limits(), *limits("dataset")):
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
        assert "not supported yet" in str(explain_key("tensor_parallel_size")[0].limit)
        assert "no effect" in str(explain_key("wandb_project")[0].limit)
        assert explain_key("processor_type")[0].limit is None  # a plan without rows reads it

    def test_a_key_of_axolotl_that_is_not_acted_on(self, run: Run) -> None:
        assert run("explain", "kd_alpha").splitlines() == [
            "kd_alpha  (Optimization)",
            "",
            "A key of Axolotl. A setting of distillation from a larger model (its plugin).",
            "",
            "here      It is not supported yet. Windtunnel learns from the rows, not from",
            "          another model. Remove it, or run this file with Axolotl.",
        ]
        for key, reach in (
            ("strict", "It has no effect here."),
            ("save_safetensors", "It has no effect here."),
            ("deepspeed", "It is not supported yet."),
            ("shuffle_merged_datasets", "Some values are not supported yet."),
            ("plugins", "Some values are not supported yet."),
            ("bnb_config_kwargs", "Some values are not supported yet."),
            ("overrides_of_model_config", "Some values are not supported yet."),
            ("datasets.weight", "It is not supported yet."),
        ):
            (found,) = explain_key(key)
            assert reach in str(found.limit), key
        both = [found.key for found in explain_key("chat_template")]
        assert both == ["chat_template", "datasets[].chat_template"]

    @pytest.mark.parametrize(
        ("key", "says"),
        [
            ("lora_rank", "Did you mean lora_r?"),
            ("xyzzy", "`windtunnel schema` lists all keys."),
            ("datasets.lora_r", "not a key"),
        ],
    )
    def test_a_key_that_is_none(self, key: str, says: str) -> None:
        with pytest.raises(UserError) as caught:
            explain_key(key)
        assert says in str(caught.value)


def axolotl_keys(part: str) -> list[str]:
    """Names from tests/golden/axolotl_keys.txt."""
    text = (GOLDEN / "axolotl_keys.txt").read_text("utf-8")
    return text.partition(f"[{part}]\n")[2].partition("[")[0].split()


class TestEveryKeyOfAxolotl:
    """A config of Axolotl 0.21 names nothing that nobody here knows."""

    @pytest.mark.parametrize("part", ["run", "plugins", "datasets"])
    def test_is_explained_as_what_is_done_with_it(self, part: str) -> None:
        keys = axolotl_keys(part)
        assert len(keys) > 50
        for key in keys:
            for found in explain_key(key):
                assert found.meaning.endswith((".", ")", "`", '"')), key
                assert found.takes or found.limit, key

    def test_of_a_run_is_read_or_named_as_not_supported(self) -> None:
        for key in [*axolotl_keys("run"), *axolotl_keys("plugins")]:
            for value in ("false", "[x]"):
                ids = problem_ids(f"base_model: x\n{key}: {value}\n")
                assert not ids & {"unknown-key"}, key
            if key not in RunConfig.model_fields and key in limits():
                refused = {"not-supported"} if limits()[key].severity == "error" else set()
                assert ids - {"secret"} == refused, key

    def test_of_a_dataset_is_read_or_named_as_not_supported(self) -> None:
        for key in set(axolotl_keys("datasets")) - {"path", "seed"}:
            ids = problem_ids(f"base_model: x\ndatasets: [{{path: x, {key}: [x]}}]\n")
            assert "unknown-key" not in ids, key
            if key not in DatasetConfig.model_fields:
                refused = limits("dataset")[key].severity == "error"
                assert ids == ({"not-supported"} if refused else set()), key


def problem_ids(text: str) -> set[str]:
    try:
        found = parse_config(text).findings()
    except ConfigError as error:
        found = list(error.findings)
    return {finding.id for finding in found if finding.severity == "error"}


class TestSchema:
    def test_what_does_nothing_is_marked_and_not_offered(self, run: Run) -> None:
        keys = json.loads(run("schema"))["properties"]
        assert keys["tf32"] == {
            "description": "Let float32 products use the faster 19-bit format of Ampere and newer"
            " GPUs.",
            "deprecated": True,
            "doNotSuggest": True,
        }
        assert keys["rl"]["deprecationMessage"].startswith("It is not supported. Windtunnel trains")
        assert keys["flash_attention"]["deprecationMessage"] == "Write attn_implementation."
        assert keys["wandb_project"]["doNotSuggest"]
        assert keys["deepspeed"]["deprecationMessage"].startswith("It is not supported.")
        for key in ("lora_r", "optimizer", "plugins", "datasets", "bnb_config_kwargs"):
            assert not {"deprecated", "doNotSuggest", "deprecationMessage"} & set(keys[key])

    def test_offers_every_key_that_acts_and_no_other(self) -> None:
        keys = config_schema()["properties"]
        offered = {key for key in keys if "deprecated" not in keys[key]}
        limited = {key for key, limit in limits().items() if limit.whole}
        assert offered == set(RunConfig.model_fields) - limited
        dataset = config_schema()["$defs"]["DatasetConfig"]["properties"]
        assert dataset["weight"]["deprecated"]
        assert "deprecated" not in dataset["path"]

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

    def test_limits_without_words_of_their_own_are_about_fields(self) -> None:
        fields_of: dict[Level, set[str]] = {
            "run": set(RunConfig.model_fields),
            "dataset": set(DatasetConfig.model_fields),
        }
        for level, fields in fields_of.items():
            for key, limit in limits(level).items():
                assert (limit.meaning is None) == (key in fields), key
                assert limit.later is None or key in fields, key

    def test_a_limit_stands_in_the_section_of_its_key(self) -> None:
        for section in SECTIONS:
            for key in section.model_fields.keys() & limits().keys():
                assert section_of(key) == section_title(section)

    def test_other_names_are_no_keys(self) -> None:
        keys = set(RunConfig.model_fields) | set(limits())
        assert not set(renamed()) & keys
        assert not set(elsewhere()) & set(RunConfig.model_fields)
        assert {new.key for new in renamed().values()} <= keys
        assert set(elsewhere().values()) <= keys | set(DatasetConfig.model_fields)

    def test_no_key_of_axolotl_stands_there_twice(self) -> None:
        table = (Path(engine.config.__file__).parent / "axolotl_keys.yml").read_text("utf-8")
        groups = YAML(typ="safe", pure=True).load(table)["limits"]
        levels: tuple[Level, ...] = ("run", "dataset")
        for level in levels:
            names = [
                key for group in groups if group.get("of", "run") == level for key in group["keys"]
            ]
            assert sorted(names) == sorted(limits(level))

    def test_every_key_of_axolotl_is_its_own(self) -> None:
        theirs = {*axolotl_keys("run"), *axolotl_keys("plugins")}
        assert set(limits()) - theirs == {"fsdp", "model_type"}
        assert set(limits("dataset")) <= set(axolotl_keys("datasets"))

    def test_keys_of_later_parts_say_so_in_one_way(self) -> None:
        parts = {limit.later for limit in (*limits().values(), *limits("dataset").values())}
        assert parts == {None, "several GPUs", "trackers", "prompt formats"}
        assert {limits()[key].later for key in TrackerKeys.model_fields} == {"trackers"}

    def test_a_default_is_never_a_finding(self) -> None:
        plain = RunConfig(base_model="x", datasets=(DatasetConfig(path="a"),))
        assert unsupported(plain) == []

    def test_axolotl_s_word_for_fp8_weights_is_a_note(self) -> None:
        known = RunConfig(base_model="x", model_quantization_config="FineGrainedFP8Config")
        (note,) = unsupported(known)
        assert (note.severity, note.key) == ("note", "model_quantization_config")
        other = RunConfig(base_model="x", model_quantization_config="Mxfp4Config")
        assert [found.severity for found in unsupported(other)] == ["error"]
