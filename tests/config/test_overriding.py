"""`train CONFIG key=value`: one value changed, typed as in the file, refused as in the file."""

import pytest

from engine.config import DatasetConfig, RunConfig, override
from engine.errors import UserError

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
    assert changed.datasets == (
        DatasetConfig(path="a.jsonl", split="train"),
        DatasetConfig(path="b.jsonl"),
    )
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
