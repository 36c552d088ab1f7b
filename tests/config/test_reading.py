"""What a file may say, and the sentence for everything that it may not."""

import json
import os
import re
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import (
    ConfigError,
    DatasetConfig,
    RunConfig,
    config_schema,
    override,
    parse_config,
    read_config,
)
from engine.config.document import parse_document
from engine.errors import UserError
from tests.fakes.processes import printed_by


def config(text: str) -> RunConfig:
    return parse_config(f"base_model: ministral-3-3b\n{textwrap.dedent(text)}").config


def refusal(text: str) -> UserError:
    with pytest.raises(UserError) as caught:
        parse_config(textwrap.dedent(text))
    return caught.value


def faults(text: str) -> ConfigError:
    error = refusal(text)
    assert isinstance(error, ConfigError)
    return error


def notes(text: str) -> dict[str, str]:
    file = parse_config(f"base_model: ministral-3-3b\n{textwrap.dedent(text)}")
    return {finding.key: finding.severity for finding in file.findings()}


class TestMeaning:
    def test_nothing_but_a_model_is_a_full_fine_tune_with_axolotls_defaults(self) -> None:
        read = config("")
        assert read.adapter is None
        assert not read.load_in_4bit
        assert (read.sample_packing, read.sequence_len) == (False, 512)
        assert read.excess_length_strategy == "drop"
        assert read.learning_rate == 2e-5

    def test_an_empty_value_is_unset(self) -> None:
        read = config("max_steps:\nlora_dropout: ~\nwandb_project:\nval_set_size: null\nfp16:\n")
        assert (read.max_steps, read.lora_dropout, read.val_set_size) == (None, 0.0, 0.0)

    @pytest.mark.parametrize("spelling", ["2e-5", '"2e-5"', "0.00002", "2.0e-05", "2E-5"])
    def test_a_learning_rate_is_a_number_however_it_is_spelled(self, spelling: str) -> None:
        assert config(f"learning_rate: {spelling}").learning_rate == 2e-5

    @pytest.mark.parametrize(
        ("written", "meant"), [("yes", True), ("no", False), ("auto", "auto"), ("True", True)]
    )
    def test_words_for_true_and_false(self, written: str, meant: object) -> None:
        assert config(f"bf16: {written}").bf16 == meant

    @pytest.mark.parametrize(
        ("flag", "backend"),
        [
            ("flash_attention", "flash_attention_2"),
            ("sdp_attention", "sdpa"),
            ("flex_attention", "flex_attention"),
            ("xformers_attention", "xformers"),
            ("eager_attention", "eager"),
        ],
    )
    def test_an_older_attention_flag_is_read_with_a_note(self, flag: str, backend: str) -> None:
        assert config(f"{flag}: true").attn_implementation == backend
        assert notes(f"{flag}: true")[flag] == "note"
        assert config(f"{flag}: false").attn_implementation is None

    def test_what_is_said_of_an_older_spelling_names_its_line(self) -> None:
        file = parse_config("base_model: x\nnoisy_embedding_alpha: 5\nsage_attention: true\n")
        found = [(finding.line, finding.key) for finding in file.findings()]
        assert (2, "neftune_noise_alpha") in found
        assert (3, "attn_implementation") in found

    def test_older_names_of_other_keys(self) -> None:
        assert config("model_revision: main").revision_of_model == "main"
        assert config("bfloat16: true").bf16 is True
        assert config("evaluation_strategy: epoch").eval_strategy == "epoch"

    def test_defaults_follow_other_keys(self) -> None:
        adapted = config("adapter: lora\nlora_r: 64\n")
        assert (adapted.lora_alpha, adapted.learning_rate) == (128, 2e-4)
        assert adapted.lora_target_linear
        assert not config("adapter: lora\nlora_target_modules: [q_proj]\n").lora_target_linear

    def test_json_is_yaml(self) -> None:
        text = json.dumps({"base_model": "x", "datasets": [{"path": "a\u00e9/b"}]}, indent="\t")
        assert parse_config(text).config.datasets[0].path == "aé/b"

    def test_merged_keys_and_a_byte_order_mark(self, tmp_path: Path) -> None:
        path = tmp_path / "c.yml"
        text = "base_model: x\ndatasets:\n- &a {path: a, split: s}\n- {<<: *a, path: b}\n"
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        first, second = read_config(path).config.datasets
        assert (first.path, second.path, second.split) == ("a", "b", "s")

    def test_yaml_1_1_is_read_when_the_file_says_so(self) -> None:
        assert parse_config(
            "%YAML 1.1\n---\nbase_model: x\nsample_packing: on\n"
        ).config.sample_packing


BAD_VALUES = [
    ("base_model: x\nlora_rank: 8", 2, '"lora_rank" is not a key.', "Did you mean lora_r?"),
    ("base_model: x\nlearning-rate: 1", 2, "not a key", "Did you mean learning_rate?"),
    ("base_model: x\nper_device_train_batch_size: 1", 2, "", "Did you mean micro_batch_size?"),
    ("base_model: x\nzzzz: 1", 2, '"zzzz" is not a key.', "`windtunnel schema` lists the keys."),
    ("base_model: x\nfield_messages: m", 2, "belongs to one dataset", "under its entry"),
    ("base_model: x\ndatasets:\n- path: a\n  seed: 1", 4, "belongs to the run", "Move it out"),
    ("base_model: x\ndatasets:\n- path: a\n  fields: m", 4, "key of a dataset", "field_"),
    ("lora_r: 8", None, "base_model is missing.", "Add base_model"),
    ("base_model: x\ndatasets:\n- split: a", 3, "datasets[0].path is missing.", "Add path"),
    (
        'base_model: x\nlora_r: "3x"',
        2,
        'lora_r is "3x". It must be a whole number',
        "explain lora_r",
    ),
    ("base_model: x\nlora_r: true", 2, "lora_r is true.", ""),
    ("base_model: x\nlora_r: 0", 2, "a whole number, 1 or more", ""),
    ("base_model: x\nmax_steps: 2.5", 2, "max_steps is 2.5.", ""),
    ("base_model: x\nnum_epochs: -1", 2, "a number above 0", ""),
    ("base_model: x\nlearning_rate: .nan", 2, "learning_rate is nan.", ""),
    ("base_model: x\nlearning_rate: fast", 2, 'learning_rate is "fast".', ""),
    ("base_model: x\nlora_dropout: 1", 2, "a number from 0 to below 1", ""),
    ("base_model: x\nlr_scheduler: cosin", 2, "cosine, linear, constant", "Did you mean cosine?"),
    ("base_model: x\nattn_implementation: flash", 2, "", "Did you mean flash_attention_2?"),
    ("base_model: x\nattn_implementation: org/kernel", 2, "It must be one of sdpa", ""),
    ("base_model: x\nadapter: dora", 2, "It must be lora or qlora.", ""),
    ("base_model: x\nbf16: maybe", 2, "one of true, false, auto", ""),
    ("base_model: x\nrevision_of_model: 1234567", 2, "It must be text.", "Put the text in quotes."),
    ("base_model: x\nsample_prompts: Hello", 2, "a list of text", "square brackets"),
    ("base_model: x\ndatasets: a.jsonl", 2, "a list of datasets", "- path:"),
    ("base_model: x\nlora_target_modules: [q_proj, 5]", 2, "lora_target_modules[1] is 5.", ""),
    ("base_model: x\nlora_target_modules: '(q'", 2, "not a regular expression", "plain names"),
    ("base_model: x\nbase_model: y", 2, "a second time; the first is on line 1", ""),
    ("base_model: x\nflash_attention: true\nattn_implementation: sdpa", 2, "both set", ""),
    ("base_model: x\nchat_template_kwargs: {reasoning_effort: low}", 2, "none or high", ""),
    ("base_model: x\ndatasets: [{path: a, roles: {human: [me]}}]", 2, "names", "user: [human]"),
]

BROKEN_RULES = [
    ("adapter: qlora", "adapter", "Add load_in_4bit: true"),
    ("adapter: lora\nload_in_4bit: true", "load_in_4bit", "adapter: qlora"),
    ("load_in_4bit: true", "load_in_4bit", "Add adapter: qlora"),
    ("load_in_8bit: true\nload_in_4bit: true\nadapter: qlora", "load_in_8bit", "Remove"),
    ("load_in_8bit: true\nadapter: qlora", "load_in_8bit", "load_in_4bit: true"),
    ("adapter: lora\nunfrozen_parameters: [lm_head]", "unfrozen_parameters", "Remove"),
    ("adapter: lora\nlora_target_linear: false", "adapter", "lora_target_modules"),
    ("adapter: lora\nlora_dropout: 0.1\nlora_target_parameters: [e]", "lora_dropout", "dropout: 0"),
    ("quantize_moe_experts: true", "quantize_moe_experts", "adapter: qlora"),
    (
        "adapter: qlora\nload_in_4bit: true\nquantize_moe_experts: true\nlora_target_linear: true",
        "lora_target_linear",
        "lora_target_parameters",
    ),
    (
        "unfrozen_parameters: [a]\ngradient_checkpointing_kwargs: {use_reentrant: true}",
        "gradient_checkpointing_kwargs",
        "use_reentrant: false",
    ),
    ("activation_offloading: true", "activation_offloading", "gradient_checkpointing: true"),
    ("checkpointed_layers: 4", "checkpointed_layers", "gradient_checkpointing: true"),
    ("adapter: lora\noffloaded_layers: 2", "offloaded_layers", "layer_offloading: true"),
    ("layer_offloading: true", "layer_offloading", "adapter: lora or qlora"),
    (
        "adapter: lora\npeft_use_dora: true\nlayer_offloading: true",
        "peft_use_dora",
        "Remove peft_use_dora",
    ),
    ("offload_embeddings: true", "offload_embeddings", "Remove offload_embeddings"),
    (
        "adapter: lora\noffload_embeddings: true\nlora_modules_to_save: [lm_head]",
        "offload_embeddings",
        "lora_modules_to_save",
    ),
    ("peft_autocast_adapter_dtype: false", "peft_autocast_adapter_dtype", "adapter: lora"),
    ("warmup_steps: 5\nwarmup_ratio: 0.1", "warmup_steps", "Remove one"),
    ("save_steps: 5\nsaves_per_epoch: 1", "save_steps", "Remove one"),
    ("save_steps: 5\nsave_strategy: epoch", "save_strategy", "Remove save_strategy"),
    ("val_set_size: 9\neval_steps: 5\nevals_per_epoch: 1", "eval_steps", "Remove one"),
    ("val_set_size: 9\neval_steps: 5\neval_strategy: epoch", "eval_strategy", "Remove"),
    ("eval_steps: 5", "eval_steps", "val_set_size"),
    ("val_set_size: 0.1\ntest_datasets: [{path: a}]", "val_set_size", "test_datasets"),
    ("val_set_size: 1", "val_set_size", "0.05"),
    ("val_set_size: 2.5", "val_set_size", "0.05"),
    ("trust_remote_code: true", "trust_remote_code", "Remove"),
    ("datasets: [{path: a, trust_remote_code: true}]", "datasets[0].trust_remote_code", "Parquet"),
    ('output_dir: "runs\\nrm"', "output_dir", "letters"),
    ("output_dir: --help", "output_dir", "letters"),
    ('output_dir: " "', "output_dir", "Write a name"),
    ('datasets: [{path: "a\\u202eb"}]', "datasets[0].path", "letters"),
    (
        "datasets: [{path: a, message_property_mappings: {rolle: r}}]",
        "datasets[0].message_property_mappings",
        "role: from",
    ),
]


NOT_SUPPORTED = [
    ("peft_layer_replication: [[0, 4]]", "peft_layer_replication", "Remove it"),
    ("scaling_softmax: true", "scaling_softmax", "Remove it"),
    ("tokenizer_use_mistral_common: true\nchat_template: chatml", "chat_template", "Remove it"),
    ("batch_size: 8\ngradient_accumulation_steps: 2", "batch_size", "micro_batch_size"),
    ("shuffle_merged_datasets: false", "shuffle_merged_datasets", "Remove it"),
    ("special_tokens: {eos_token: a}", "special_tokens", "Remove it"),
    ("nf4_backend: torchao", "nf4_backend", "Remove it"),
    ("datasets: [{path: a, weight: 2}]", "datasets[0].weight", "name the source twice"),
    ("datasets: [{path: a, roles_to_train: [user]}]", "datasets[0].roles_to_train", "Remove"),
    ("datasets: [{path: a, roles_to_train: []}]", "datasets[0].roles_to_train", "Remove"),
    ("datasets: [{path: a, train_on_eos: all}]", "datasets[0].train_on_eos", "Remove it"),
    ("tensor_parallel_size: 2", "tensor_parallel_size", "windtunnel estimate"),
    ("context_parallel_size: 2", "context_parallel_size", "gradient_checkpointing"),
    ("sequence_parallel_degree: 2", "context_parallel_size", "gradient_checkpointing"),
    ("deepspeed: zero3.json", "deepspeed", "fsdp_config: {reshard_after_forward: true}"),
]


class TestNotSupported:
    @pytest.mark.parametrize(("text", "key", "fix"), NOT_SUPPORTED)
    def test_training_is_refused_though_it_is_read(self, text: str, key: str, fix: str) -> None:
        file = parse_config(f"base_model: x\n{text}")
        with pytest.raises(ConfigError) as caught:
            file.require_supported()
        (finding,) = caught.value.findings
        assert (finding.id, finding.key) == ("not-supported", key)
        assert fix in finding.fix
        assert finding.line is not None

    def test_values_that_say_what_is_done_anyway_are_fine(self) -> None:
        assert not notes(
            """\
            chat_template: mistral_v7_tekken
            special_tokens: {pad_token: <pad>}
            shuffle_merged_datasets: true
            nf4_backend: bitsandbytes
            tf32: auto
            logging_steps: 1
            datasets: [{path: a, weight: 1, roles_to_train: [assistant], train_on_eos: turn}]
            """
        )

    def test_a_key_behind_the_command_is_refused_and_can_be_taken_back(self) -> None:
        file = parse_config("base_model: x\nrl: dpo\ntf32: true\n")
        with pytest.raises(ConfigError, match="rl: "):
            file.override(["max_steps=2"]).require_supported()
        kept = file.override(["rl=", "max_steps=2"])
        assert [note.key for note in kept.require_supported()] == ["tf32"]
        assert kept.config.max_steps == 2
        with pytest.raises(ConfigError, match="relora"):
            kept.override(["relora=true"]).require_supported()

    def test_a_bad_argument_hears_nothing_of_what_the_file_says(self) -> None:
        file = parse_config("base_model: x\nfsdp_config: {a: b}\n")
        with pytest.raises(ConfigError) as caught:
            file.override(["lora_rank=8"])
        assert [finding.key for finding in caught.value.findings] == ["lora_rank"]

    def test_what_several_gpus_need_can_be_planned(self) -> None:
        file = parse_config("base_model: x\nfsdp_config: {a: b}\ntensor_parallel_size: 2\n")
        file.require_supported(sharded=True)
        whole = parse_config("base_model: x\nfsdp_config: {a: b}\noptimizer: adamw_bnb_8bit\n")
        with pytest.raises(ConfigError, match="cannot be sharded"):
            whole.require_supported(sharded=True)


MAPPED = [
    ("fsdp: [full_shard, auto_wrap]", {"fsdp_config": {"reshard_after_forward": True}}),
    ("fsdp: [full_shard]\nfsdp_config: {a: b}", {"fsdp_config": {"a": "b"}}),
    ("fsdp_config: {activation_checkpointing: true}", {"gradient_checkpointing": True}),
    ("fsdp_config: {fsdp_activation_checkpointing: true}", {"gradient_checkpointing": True}),
    ("optimizer: adamw_torch_8bit", {"optimizer": "adamw_torch_8bit"}),
    ("fsdp_config: {offload_params: true}", {"fsdp_config": {"offload_params": True}}),
]


@pytest.mark.parametrize(("text", "values"), MAPPED)
def test_what_others_shard_by_is_read_with_a_note(text: str, values: dict[str, object]) -> None:
    file = parse_config(f"base_model: x\n{text}")
    assert {key: getattr(file.config, key) for key in values} == values
    (note,) = file.require_supported()
    assert note.severity == "note"


def test_what_the_file_says_of_checkpointing_counts() -> None:
    text = "gradient_checkpointing: false\nfsdp_config: {activation_checkpointing: true}"
    assert parse_config(f"base_model: x\n{text}").config.gradient_checkpointing is False


class TestOneRound:
    """A file with several faults hears all of them: none of them hides the others."""

    def findings(self, text: str) -> list[tuple[int | None, str, str]]:
        error = faults(text)
        return [(finding.line, finding.id, finding.key) for finding in error.findings]

    def test_a_broken_rule_hides_nothing_that_is_not_supported(self) -> None:
        assert self.findings(
            """\
            base_model: x
            trust_remote_code: true
            rl: dpo
            deepspeed: zero2.json
            datasets:
              - path: a
                type: alpaca
                weight: 2
            tf32: true
            """
        ) == [
            (2, "no-remote-code", "trust_remote_code"),
            (3, "not-supported", "rl"),
            (4, "not-supported", "deepspeed"),
            (7, "not-supported", "datasets[0].type"),
            (8, "not-supported", "datasets[0].weight"),
        ]

    def test_a_key_that_stands_there_twice_hides_no_other_fault(self) -> None:
        assert self.findings(
            "base_model: x\nlora_rank: 8\nseed: 1\nseed: 2\nneftune_noise_alpha: 5\n"
        ) == [
            (2, "unknown-key", "lora_rank"),
            (4, "yaml", "seed"),
            (5, "not-supported", "neftune_noise_alpha"),
        ]

    def test_one_value_of_a_dataset_hides_no_fault_of_the_others(self) -> None:
        assert self.findings(
            """\
            base_model: x
            datasets:
              - path: 5
                trust_remote_code: true
              - split: train
                type: alpaca
              - path: b
                field_messages: [a]
                revision: " "
            """
        ) == [
            (3, "bad-value", "datasets[0].path"),
            (4, "no-remote-code", "datasets[0].trust_remote_code"),
            (5, "missing", "datasets[1].path"),
            (6, "not-supported", "datasets[1].type"),
            (8, "bad-value", "datasets[2].field_messages"),
            (9, "unsafe-name", "datasets[2].revision"),
        ]

    def test_of_several_arguments_each_is_heard(self) -> None:
        with pytest.raises(ConfigError) as caught:
            override(
                RunConfig(base_model="x"), ["lora_r", "max_steps=[", "seed=x", "rl=dpo", "q.x=1"]
            )
        found = [(finding.id, finding.key) for finding in caught.value.findings]
        assert found == [
            ("argument", "lora_r"),
            ("argument", "max_steps"),
            ("not-supported", "rl"),
            ("unknown-key", "q"),
            ("bad-value", "seed"),
        ]


class TestRefusals:
    @pytest.mark.parametrize(("text", "line", "says", "fix"), BAD_VALUES)
    def test_a_bad_value(self, text: str, line: int | None, says: str, fix: str) -> None:
        error = faults(text)
        (finding,) = error.findings
        assert finding.line == line
        assert says in str(error)
        assert fix in error.fix
        assert error.exit_status == 2

    @pytest.mark.parametrize(("text", "key", "fix"), BROKEN_RULES)
    def test_a_broken_rule(self, text: str, key: str, fix: str) -> None:
        error = faults(f"base_model: x\n{text}")
        (finding,) = error.findings
        assert finding.key == key
        assert fix in finding.fix
        assert finding.line is not None
        values = parse_document(f"base_model: x\n{text}", "config.yml").values
        with pytest.raises(ValueError, match=re.escape(fix)):  # no config in code either
            RunConfig.model_validate(values)

    def test_all_problems_come_at_once_in_the_order_of_the_file(self) -> None:
        error = faults(
            """\
            lora_rank: 8
            adapter: qlora
            base_model: x
            num_epochs: none
            warmup_steps: 3
            warmup_ratio: 0.1
            datasets:
              - split: train
              - path: 5
            """
        )
        assert [(finding.line, finding.id) for finding in error.findings] == [
            (1, "unknown-key"),
            (2, "qlora-needs-4bit"),
            (4, "bad-value"),
            (5, "warmup-once"),
            (8, "missing"),
            (9, "bad-value"),
        ]
        assert error.what == "config.yml has 6 problems."
        assert error.why.count("\n") == 5

    def test_a_rule_is_not_judged_by_a_value_that_could_not_be_read(self) -> None:
        error = faults("base_model: x\nadapter: qlora\nload_in_4bit: ture")
        assert [finding.id for finding in error.findings] == ["bad-value"]
        assert error.fix == "Did you mean true?"


def outcome(text: str) -> UserError | None:
    try:
        parse_config(textwrap.dedent(text))
    except UserError as error:
        return error
    return None


KEYS = sorted(config_schema()["properties"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=4,
)
SYNTAX = [
    ("a: [1\nb: 2", 2, "Close the quote or bracket"),
    ("a: 1\n\tb: 2", 2, "spaces"),
    ('a: "x', 1, "Close the quote"),
    ("a: b: c", 1, "quotes"),
    ("lora_r: 16\n  lora_alpha: 32", 2, "Indent it like the line above"),
    ("a: *here", 1, "quotes"),
    ("a: @x", 1, "quotes"),
    ("a: 1\n---\nb: 2", 2, "Keep one"),
    ("base_model: x\n? [1, 2]\n: 3", 2, "remove"),
    ("base_model: !!python/object/apply:os.system [id]", 1, "remove"),
    ("base_model: !secret x", 1, "remove"),
    ("base_model: !!set {b, c}", 1, "remove"),
    ('base_model: "\\ud800"', 1, "remove"),
]


class TestFiles:
    @pytest.mark.parametrize(("text", "line", "fix"), SYNTAX)
    def test_broken_yaml_names_its_line(self, text: str, line: int, fix: str) -> None:
        error = refusal(text)
        assert f"config.yml, line {line}:" in error.what
        assert fix in error.fix

    @pytest.mark.parametrize(
        ("text", "found"), [("", "empty"), ("# only\n", "empty"), ("- a", "a list"), ("a", "plain")]
    )
    def test_a_file_that_is_no_mapping(self, text: str, found: str) -> None:
        assert found in refusal(text).what

    @pytest.mark.parametrize(
        "bomb",
        [
            "a: &a [*a]",
            "[" * 100_000,
            "a: " + "{b: " * 40 + "1" + "}" * 40,
            "a0: &a0 [1, 1]\n"
            + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)),
        ],
        ids=["recursive", "brackets", "nested", "aliases"],
    )
    def test_a_file_made_to_hurt_is_refused_at_once(self, bomb: str) -> None:
        assert "nested too deeply" in refusal(bomb).what

    def test_a_missing_file_a_folder_and_a_dataset_by_mistake(self, tmp_path: Path) -> None:
        big = tmp_path / "big.yml"
        big.touch()
        os.truncate(big, 1 << 31)
        for path, says in (
            (tmp_path / "none.yml", "was not found"),
            (tmp_path, "cannot be read"),
            (big, "larger than 1 MiB"),
        ):
            with pytest.raises(UserError, match=says):
                read_config(path)

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("base_model: x\n# é\n".encode("latin-1"), "line 2: this is not UTF-8"),
            ("base_model: x".encode("utf-16"), "not UTF-8"),
            (b"base_model: \x07", "does not allow"),
        ],
    )
    def test_encodings_and_control_codes(self, tmp_path: Path, content: bytes, says: str) -> None:
        (tmp_path / "c.yml").write_bytes(content)
        with pytest.raises(UserError, match=says):
            read_config(tmp_path / "c.yml")

    @pytest.mark.parametrize("key", ["datasets[x]", "datasets[7]", "datasets[0].path", "[", "a."])
    def test_a_key_that_looks_like_a_place_and_stands_there_twice(self, key: str) -> None:
        text = f"'{key}': 1\n'{key}': 2\nlora_r: x\ndatasets: [{{path: a}}]\n"
        error = faults(f"base_model: x\n{text}")
        assert {"yaml", "bad-value"} <= {finding.id for finding in error.findings}

    @given(st.text(max_size=200) | st.text("ab:-[]{}#&*!|>'\"%@`\n \t,?", max_size=60))
    def test_no_text_gives_anything_but_a_config_or_a_sentence(self, text: str) -> None:
        error = outcome(text)
        assert error is None or error.fix

    @given(st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=5))
    def test_no_value_gives_anything_but_a_config_or_a_sentence(self, values: object) -> None:
        error = outcome(json.dumps(values))
        assert error is None or error.fix


NAMES = [
    *(
        (f"hub_model_id: {name!r}", "bad-hub-name", "Write you/your-model")
        for name in (
            *("../../evil", "user/..", "a/b/c", "u/r;rm -rf", "a--b/c", "a/b.git", "a/.b"),
            *("https://evil.com/x", f"a/{'b' * 97}"),
        )
    ),
    ("base_model: https://evil.com/x", "web-address", "Name the hub id"),
    ("base_model: https://huggingface.co/a/b.c/tree/main", "web-address", "Write a/b.c."),
    ("tokenizer_config: hf.co/a/b", "web-address", "Write a/b."),
    (f"base_model: a/{'b' * 300}", "bad-hub-name", "Name the hub id"),
    ("datasets: [{path: 'https://huggingface.co/datasets/a/b'}]", "web-address", "Write a/b."),
    ("datasets: [{path: 's3://bucket/rows.jsonl'}]", "web-address", "Name the hub id"),
]

NUMBERS = [
    (f"micro_batch_size: 1{'0' * 400}", "at most 1,000,000,000,000"),
    (f"learning_rate: 1{'0' * 400}", "a number above 0"),
    (f"learning_rate: 1{'0' * 400}.0", "a number above 0"),
    ("sequence_len: -1000000000000000", "1 or more"),
    (f"lora_r: {'9' * 5000}", "a whole number"),
    (f"? '{'9' * 5000}'\n: 1", "is not a key"),
    (f"datasets:\n- path: a\n  ? '{'9' * 5000}'\n  : 1", "is not a key"),
]

SECRETS = [
    ("hf_token: abc", "hf_token"),
    ("comet_api_key: abc", "comet_api_key"),
    ("wandb_name: hf_" + "a" * 34, "wandb_name"),
    ("datasets: [{path: 'https://me:pass@host/a.jsonl'}]", "datasets[0].path"),
    ("gradient_checkpointing_kwargs: {token: abc}", "gradient_checkpointing_kwargs.token"),
    ("sample_prompts: [ok, sk-" + "x" * 40 + "]", "sample_prompts[1]"),
]


class TestSafety:
    @pytest.mark.parametrize(("text", "key"), SECRETS)
    def test_a_secret_is_refused_and_not_repeated(self, text: str, key: str) -> None:
        error = faults(f"base_model: x\n{text}")
        assert [(finding.id, finding.key) for finding in error.findings] == [("secret", key)]
        assert not re.search(r"abc|aaaa|xxxx|pass@", str(error))

    @pytest.mark.parametrize(("text", "finding", "fix"), NAMES)
    def test_a_name_that_no_hub_takes_is_found_at_once(self, text, finding, fix) -> None:
        base = "" if text.startswith("base_model") else "base_model: x\n"
        (found,) = faults(f"{base}{text}").findings
        assert (found.id, found.key) == (
            finding,
            re.split(r"[: ]", text)[0] if "datasets" not in text else "datasets[0].path",
        )
        assert found.fix.startswith(fix)

    @pytest.mark.parametrize("name", ["you/your-model", "model", "A_b/c.d-e_1"])
    def test_a_name_that_the_hub_takes(self, name: str) -> None:
        assert config(f"hub_model_id: {name}").hub_model_id == name

    @pytest.mark.parametrize(("text", "words"), NUMBERS, ids=lambda text: text[:20])
    def test_a_huge_number_is_a_sentence(self, text: str, words: str) -> None:
        (found,) = faults(f"base_model: x\n{text}").findings
        assert words in found.sentence()
        assert len(found.sentence()) < 400

    def test_keys_that_only_sound_like_secrets_are_fine(self) -> None:
        text = "special_tokens: {pad_token: <pad>}\neot_tokens: [a]\nhf_use_auth_token: true\n"
        found = parse_config(f"base_model: x\n{text}").findings()
        assert {finding.severity for finding in found} == {"note"}

    def test_a_hostile_key_cannot_write_on_the_terminal(self) -> None:
        for text in (
            '"a\\x1b[2J\\u202e": 1',
            'datasets: [{path: a, roles: {"\\x1b]0;": 5}}]',
            'lora_target_modules: "\\x1b["',
            'gradient_checkpointing_kwargs: {"\\x1b": {token: a}}',
        ):
            assert str(refusal(f"base_model: x\n{text}\n")).isprintable()


class TestImport:
    def test_is_light(self) -> None:
        script = (
            "import sys, time\n"
            "begin = time.process_time()\n"
            "import pydantic, pydantic.fields, pydantic.functional_validators\n"
            "middle = time.process_time()\n"
            "import engine.config\n"
            "print(middle - begin, time.process_time() - middle, *sys.modules)\n"
        )
        measured = []
        for _ in range(3):
            pydantic_seconds, seconds, *modules = printed_by("-c", script).split()
            measured.append(float(seconds) / float(pydantic_seconds))
            assert not {"numpy", "torch", "mistral_common", "rich", "textual"} & set(modules)
        # pydantic alone takes 0.07 s on an idle machine, and this package as much again: 0.15 s.
        assert min(measured) < 2.0


BASE = RunConfig(
    base_model="ministral-3-3b",
    adapter="lora",
    lora_r=32,
    datasets=(DatasetConfig(path="a.jsonl"),),
    warmup_ratio=0.1,
)


@pytest.mark.parametrize(
    ("assignment", "key", "value"),
    [
        ("learning_rate=1e-4", "learning_rate", 1e-4),
        ("num_epochs=3", "num_epochs", 3.0),
        ("sample_packing=true", "sample_packing", True),
        ("warmup_ratio=", "warmup_ratio", None),
        ("output_dir=runs/a b=c", "output_dir", "runs/a b=c"),
        ("lora_target_modules=[q_proj, k_proj]", "lora_target_modules", ["q_proj", "k_proj"]),
        ('sample_prompts=["Why: because?"]', "sample_prompts", ("Why: because?",)),
        ("flash_attention=true", "attn_implementation", "flash_attention_2"),
        ("chat_template_kwargs.reasoning_effort=high", "chat_template_kwargs",
         {"reasoning_effort": "high"}),
    ],
)  # fmt: skip
def test_one_value_changes_and_no_other(assignment: str, key: str, value: object) -> None:
    changed = override(BASE, [assignment])
    assert getattr(changed, key) == value
    others = set(RunConfig.model_fields) - {key, "lora_target_linear"}
    assert {name for name in others if getattr(changed, name) != getattr(BASE, name)} == set()


def test_a_path_reaches_into_the_datasets() -> None:
    changed = override(BASE, ["datasets[0].split=train", "datasets[1].path=b.jsonl"])
    first = DatasetConfig(path="a.jsonl", split="train")
    assert changed.datasets == (first, DatasetConfig(path="b.jsonl"))
    assert BASE.datasets == (DatasetConfig(path="a.jsonl"),)


def test_defaults_that_follow_others_follow_but_given_values_stay() -> None:
    assert override(BASE, ["lora_r=8"]).lora_alpha == 16
    given = override(BASE, ["lora_alpha=64"])
    assert override(given, ["lora_r=8"]).lora_alpha == 64


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("lora_rank=3", "Did you mean lora_r?"),
        ("lora_r", "key=value"),
        ("=3", "key=value"),
        ("lora-r=3", "key=value"),
        ("lora_r=big", "whole number"),
        ("lora_r=[", "not YAML"),
        ("seed=1\nlora_r: 2", "line break"),
        ("warmup_steps=5", "Remove one of them."),
        ("datasets[2].path=x", "has no place"),
        ("datasets[0][1]=x", "key=value"),
        ("datasets.path=x", "has no place"),
        ("lora_r.x=1", "has no place"),
        ("datasets[0].pathh=x", "Did you mean path?"),
        ("trust_remote_code=true", "Remove trust_remote_code."),
        ("hf_token=abc", "token or password"),
    ],
)
def test_a_bad_argument_is_one_sentence(assignment: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        override(BASE, [assignment])
    assert says in str(caught.value)
    assert caught.value.exit_status == 2
