"""Files that are broken, hostile or hold secrets: a sentence at once, and nothing repeated."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import ConfigError, config_schema, parse_config, read_config
from engine.errors import UserError


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

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="was not found"):
            read_config(tmp_path / "none.yml")

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="cannot be read"):
            read_config(tmp_path)

    def test_other_encodings_and_control_characters(self, tmp_path: Path) -> None:
        path = tmp_path / "c.yml"
        path.write_bytes("base_model: x\n# é\n".encode("latin-1"))
        with pytest.raises(UserError, match="line 2: this is not UTF-8"):
            read_config(path)
        path.write_bytes("base_model: x".encode("utf-16"))
        with pytest.raises(UserError, match="not UTF-8"):
            read_config(path)
        path.write_bytes(b"base_model: \x07")
        with pytest.raises(UserError, match="does not allow"):
            read_config(path)

    def test_a_dataset_by_mistake(self, tmp_path: Path) -> None:
        path = tmp_path / "big.yml"
        with path.open("wb") as file:
            os.truncate(file.fileno(), 1 << 31)
        with pytest.raises(UserError, match="larger than 1 MiB"):
            read_config(path)

    @pytest.mark.parametrize("key", ["datasets[x]", "datasets[7]", "datasets[0].path", "[", "a."])
    def test_a_key_that_looks_like_a_place_and_stands_there_twice(self, key: str) -> None:
        text = f"'{key}': 1\n'{key}': 2\nlora_r: x\ndatasets: [{{path: a}}]\n"
        error = refusal(f"base_model: x\n{text}")
        assert isinstance(error, ConfigError)
        assert {"yaml", "bad-value"} <= {finding.id for finding in error.findings}

    @given(st.text(max_size=200) | st.text("ab:-[]{}#&*!|>'\"%@`\n \t,?", max_size=60))
    def test_no_text_gives_anything_but_a_config_or_a_sentence(self, text: str) -> None:
        error = outcome(text)
        assert error is None or error.fix

    @given(st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=5))
    def test_no_value_gives_anything_but_a_config_or_a_sentence(self, values: object) -> None:
        error = outcome(json.dumps(values))
        assert error is None or error.fix


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
        error = refusal(f"base_model: x\n{text}")
        assert isinstance(error, ConfigError)
        assert [(finding.id, finding.key) for finding in error.findings] == [("secret", key)]
        assert not re.search(r"abc|aaaa|xxxx|pass@", str(error))

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
            result = subprocess.run(
                [sys.executable, "-c", script], capture_output=True, text=True, check=True
            )
            pydantic_seconds, seconds, *modules = result.stdout.split()
            measured.append(float(seconds) / float(pydantic_seconds))
            assert not {"numpy", "torch", "mistral_common", "rich", "textual"} & set(modules)
        # pydantic alone takes 0.07 s on an idle machine, and this package as much again: 0.15 s.
        assert min(measured) < 2.0
