"""What is written is read back equal, and a person's own comments survive every change."""

import os
import re
import stat
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import (
    DatasetConfig,
    RunConfig,
    override,
    parse_config,
    read_config,
    write_config,
)
from engine.config.document import HEADER, scalar
from engine.errors import UserError, WorkError
from tests.support.config_values import TEXTS, TRICKY, configs

slow_to_draw = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

LONG = textwrap.wrap("longest row has 1,213 tokens " * 5, 98)

OWN = textwrap.dedent(
    """\
    # my first run
    base_model: mistralai/Ministral-3-3B-Instruct-2512   # the small one

    datasets:   # all of it
      # the good rows
      - path: good.jsonl   # mine
        type: chat_template
      - path: more.jsonl
        message_property_mappings: {role: from, content: value}  # ShareGPT

    # how
    adapter: qlora
    load_in_4bit: true
    flash_attention: true # fast
    lora_r: 32   # big
    lora_target_modules:  # attention only
      - q_proj  # queries
      - k_proj
    max_steps:
    learning_rate: 2e-4   # as in the paper
    # the end
    """
)


def rewritten(text: str, *changes: str, reasons: Mapping[str, str] | None = None) -> str:
    """A file's text after `key=value` changes."""
    file = parse_config(text)
    return write_config(override(file.config, changes), reasons, document=file.document)


def comments(text: str) -> list[str]:
    return re.findall(r"#.*", text)


@slow_to_draw
@given(configs(), st.data())
def test_a_new_file_reads_back_equal(config: RunConfig, data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.sampled_from(sorted(RunConfig.model_fields)), max_size=6))
    reasons = {key: data.draw(TEXTS) for key in keys}
    text = write_config(config, reasons)
    assert parse_config(text).config == config


@slow_to_draw
@given(configs())
def test_axolotls_reader_gets_the_same_values(config: RunConfig) -> None:
    text = write_config(config)
    assert yaml.safe_load(text) == parse_config(text).document.values


@slow_to_draw
@given(configs(), configs(), st.dictionaries(st.sampled_from(["lora_r", "seed"]), TEXTS))
def test_any_config_becomes_any(
    first: RunConfig, second: RunConfig, reasons: dict[str, str]
) -> None:
    document = parse_config(write_config(first)).document
    text = write_config(second, reasons, document=document)
    assert parse_config(text).config == second


@pytest.mark.parametrize("text", TRICKY)
def test_text_that_yaml_takes_for_something_else_is_quoted(text: str) -> None:
    written = f"a: {scalar(text)}\nb: [{scalar(text, flow=True)}]"
    assert yaml.safe_load(written) == {"a": text, "b": [text]}


@pytest.mark.parametrize("number", [2e-5, 1e-4, 1.0, 1e22, 1.5e-300, 0.1])
def test_numbers_are_numbers_to_both_versions_of_yaml(number: float) -> None:
    assert yaml.safe_load(scalar(number)) == number
    written = f"base_model: x\nlearning_rate: {scalar(number)}"
    assert parse_config(written).config.learning_rate == number


class TestNewFile:
    def test_reads_like_a_page(self) -> None:
        config = RunConfig(
            base_model="mistralai/Magistral-Small-2509",
            datasets=(DatasetConfig(path="sample:support"),),
            adapter="qlora",
            load_in_4bit=True,
            lora_r=32,
            sequence_len=2048,
            learning_rate=5e-5,
            sample_prompts=("Hello?",),
        )
        reasons = {
            "base_model": "largest that fits and thinks",
            "datasets": "456 rows learned from, 24 held out",
            "lora_r": "16 would save 0.9 GiB",
            "max_steps": "whole epochs",
            "sequence_len": "longest row has 1,213 tokens " * 5,
        }
        assert write_config(config, reasons) == textwrap.dedent(
            f"""\
            {HEADER}

            # Model
            base_model: mistralai/Magistral-Small-2509  # largest that fits and thinks

            # Data
            datasets:  # 456 rows learned from, 24 held out
              - path: sample:support
                type: chat_template

            # Adapter
            adapter: qlora
            load_in_4bit: true
            lora_r: 32  # 16 would save 0.9 GiB
            lora_alpha: 64
            lora_target_linear: true

            # Sequences
            # {LONG[0]}
            # {LONG[1]}
            sequence_len: 2048

            # Optimization
            max_steps:  # whole epochs
            learning_rate: 5.0e-5

            # Output
            sample_prompts: [Hello?]
            """
        ).replace("[Hello?]", '["Hello?"]')

    def test_names_what_axolotl_has_no_default_for(self) -> None:
        assert "learning_rate: 2.0e-5\n" in write_config(RunConfig(base_model="x"))
        adapted = write_config(RunConfig(base_model="x", adapter="lora"))
        for line in ("lora_r: 16", "lora_alpha: 32", "lora_target_linear: true"):
            assert f"{line}\n" in adapted

    def test_a_reason_cannot_leave_its_comment(self) -> None:
        text = write_config(
            RunConfig(base_model="x"), {"seed": "a\ntrust_remote_code: true\x1b[2J"}
        )
        assert "seed: 42  # a trust_remote_code: true␛[2J" in text

    def test_a_reason_for_no_key_is_our_own_mistake(self) -> None:
        with pytest.raises(ValueError, match="lora_rank"):
            write_config(RunConfig(base_model="x"), {"lora_rank": "big"})


class TestOwnFile:
    def test_an_override_changes_its_line_and_no_comment(self) -> None:
        changes = [
            *("lora_r=64", "max_steps=9", "lora_target_modules=[q_proj]", "flash_attention="),
            *("attn_implementation=sdpa", "warmup_ratio=0.1", "learning_rate=5e-5"),
            *("datasets[1].path=other rows.jsonl", "datasets[0].split=train"),
        ]
        text = rewritten(OWN, *changes, reasons={"warmup_ratio": "usual"})
        expected = OWN
        for old, new in (
            ("lora_r: 32 ", "lora_r: 64 "),
            ("max_steps:", "max_steps: 9"),
            ("lora_target_modules:  # attention only\n  - q_proj  # queries\n  - k_proj", ""),
            ("flash_attention: true #", "attn_implementation: sdpa #"),
            ("learning_rate: 2e-4   # as in the paper", ""),
            ("more.jsonl", "other rows.jsonl"),
            ("    type: chat_template\n", "    type: chat_template\n    split: train\n"),
        ):
            if new:
                expected = expected.replace(old, new)
        expected = expected.replace(
            "lora_target_modules:  # attention only\n  - q_proj  # queries\n  - k_proj\n",
            "lora_target_modules: [q_proj]  # attention only\n",
        ).replace(
            "learning_rate: 2e-4   # as in the paper\n",
            "learning_rate: 5.0e-5   # as in the paper\nwarmup_ratio: 0.1  # usual\n",
        )
        assert text == expected

    def test_a_reason_stands_above_a_line_with_its_own_comment(self) -> None:
        text = rewritten(OWN, "lora_r=64", reasons={"lora_r": "fits"})
        assert "# fits\nlora_r: 64   # big\n" in text

    @slow_to_draw
    @given(configs())
    def test_no_comment_is_lost_unless_its_list_is_rewritten(self, config: RunConfig) -> None:
        file = parse_config(OWN)
        datasets = file.config.datasets
        kept = file.config.model_dump() | config.model_dump(exclude={"base_model", "datasets"})
        kept |= {"datasets": [dataset.model_dump() for dataset in datasets]}
        text = write_config(RunConfig.model_validate(kept), document=file.document)
        lost = {comment for comment in comments(OWN) if comment not in text}
        assert lost <= {"# queries"}

    def test_of_several_older_flags_the_one_that_counts_is_changed(self) -> None:
        old = "base_model: x\nflash_attention:\nsdp_attention: true\n"
        text = rewritten(old, "attn_implementation=eager")
        assert text == "base_model: x\nflash_attention:\nattn_implementation: eager\n"

    def test_windows_line_ends_stay(self) -> None:
        file = parse_config(OWN.replace("\n", "\r\n"))
        changed = override(file.config, ["lora_r=64", "seed=7", "sequence_len=4096"])
        text = write_config(changed, {"seed": "lucky " * 30}, document=file.document)
        assert text.replace("\r\n", "").count("\n") == 0
        assert parse_config(text).config == changed

    def test_json_stays_json(self) -> None:
        old = '{"base_model": "x",\n "adapter": "lora",\n "lora_r": 8}'
        changes = ("lora_r=4", "output_dir=a b", "num_epochs=3")
        text = rewritten(old, *changes, reasons={"lora_r": "small"})
        assert text == (
            '{"base_model": "x",\n "adapter": "lora",\n "lora_r": 4, "num_epochs": 3.0,'
            ' "output_dir": "a b"}'
        )

    def test_an_old_reason_of_ours_gives_way_to_the_new_one(self) -> None:
        config = RunConfig(base_model="x", adapter="lora")
        long = "it is long enough to stand above the line, as it would not fit beside it; " * 2
        old = write_config(config, {"lora_r": long, "learning_rate": "usual"})
        changes = ("lora_r=64", "learning_rate=1e-3")
        text = rewritten(old + "# my own note\n", *changes, reasons={"lora_r": "fits"})
        assert "lora_r: 64  # fits\n" in text
        assert "learning_rate: 0.001\n" in text
        assert "long enough" not in text
        assert "# Adapter\n" in text
        assert "# my own note" in text

    def test_a_value_of_its_own_wins_over_a_merged_one(self) -> None:
        text = (
            "base_model: x\ndatasets:\n  - &first\n    path: a.jsonl\n    split: train\n"
            "  - <<: *first\n    path: b.jsonl\n"
        )
        assert parse_config(text).config.datasets[1].split == "train"
        assert rewritten(text, "datasets[1].split=test") == text + "    split: test\n"

    def test_a_shared_value_is_refused_not_broken(self) -> None:
        text = "base_model: x\nsave_steps: &often 50\neval_steps: *often\nval_set_size: 9\n"
        with pytest.raises(UserError, match="cannot be changed without rewriting"):
            rewritten(text, "eval_steps=10")


class TestSaving:
    def test_the_file_is_replaced_whole_and_keeps_its_mode(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "config.yml"
        config = RunConfig(base_model="x")
        text = write_config(config, path=path)
        assert path.read_text("utf-8") == text
        path.chmod(0o600)
        write_config(override(config, ["seed=1"]), path=path)
        assert read_config(path).config.seed == 1
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert os.listdir(path.parent) == ["config.yml"]

    def test_a_link_is_followed(self, tmp_path: Path) -> None:
        real = tmp_path / "real.yml"
        link = tmp_path / "link.yml"
        write_config(RunConfig(base_model="x"), path=real)
        link.symlink_to(real)
        write_config(RunConfig(base_model="y"), path=link)
        assert link.is_symlink()
        assert read_config(real).config.base_model == "y"

    def test_a_folder_in_the_way_is_one_sentence(self, tmp_path: Path) -> None:
        with pytest.raises(WorkError, match="could not be written"):
            write_config(RunConfig(base_model="x"), path=tmp_path)
        assert os.listdir(tmp_path) == []


def test_a_reason_that_was_written_is_read_again_and_a_title_is_none(tmp_path: Path) -> None:
    long = "the longest row of yours has 1,213 tokens, so that nothing is cut at this length " * 2
    reasons = {"lora_r": "enough for 104 conversations # of ours", "sequence_len": long.strip()}
    path = tmp_path / "config.yml"
    config = RunConfig(base_model="demo-tiny", adapter="lora", lora_r=16, sequence_len=2048)
    write_config(config, reasons, path)
    document = read_config(path).document
    assert {key: document.reason(key) for key in reasons} == reasons
    assert "# " in document.text.split("lora_r")[0]
    assert document.reason("adapter") == ""
    assert document.reason("no_such_key") == ""
