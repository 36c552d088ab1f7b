"""A stranger's pattern finds what Python's re finds, or is given up in a sentence."""

import re

import pytest

from engine.catalog import read_architecture
from engine.config import ConfigError, RunConfig, parse_config
from engine.errors import UserError
from engine.pattern import How, PatternError, find_matches
from engine.plan.targets import choose_targets, trainable_names

NAMES = ("model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj", "model.norm", "lm_head")
ENDLESS = "((([a-z._0-9]+)+)+)+!"


@pytest.mark.parametrize(
    ("pattern", "how", "found"),
    [
        (r".*\.1\..*", "whole", NAMES[:1]),
        (r"model\.layers\.\d+\.mlp\.(up|down)_proj", "whole", NAMES[:2]),
        ("model.layers.*", "start", NAMES[:2]),
        ("norm", "start", ()),
        ("norm", "part", NAMES[2:3]),
        (r"(layers|norm)\b", "part", NAMES[:3]),
        ("lm_head", "whole", NAMES[3:]),
        (r"(?i)LM_HEAD$", "start", NAMES[3:]),
    ],
)
def test_it_finds_what_re_finds(pattern: str, how: How, found: tuple[str, ...]) -> None:
    assert find_matches(pattern, NAMES, how) == found


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(q", "missing )"),
        (ENDLESS, "repeats inside repeats"),
        ("a" * 3000, "3,000 letters"),
        ("(" * 900 + ")" * 900, "re module"),
    ],
    ids=lambda text: text[:20],
)
def test_what_is_not_waited_for(pattern: str, words: str) -> None:
    with pytest.raises(PatternError, match=re.escape(words)):
        find_matches(pattern, NAMES)


def test_every_place_of_a_config_that_takes_a_pattern_ends() -> None:
    table = read_architecture("demo-tiny").table
    adapter = RunConfig(base_model="demo-tiny", adapter="lora", lora_target_modules=ENDLESS)
    whole = RunConfig(base_model="demo-tiny", unfrozen_parameters=[ENDLESS])
    for choose, config in ((choose_targets, adapter), (trainable_names, whole)):
        with pytest.raises(UserError, match="not a regular expression that is read"):
            choose(table, config)
    with pytest.raises(ConfigError, match="letters"):
        parse_config(f"base_model: x\nunfrozen_parameters: ['{'a' * 3000}']")
