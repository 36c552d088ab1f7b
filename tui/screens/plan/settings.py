"""Which values the Plan page shows, how they are spelled, and what stands beside each.

Pure: from a draft to the lines of the list.
"""

from typing import Final

from engine.config import FULL, spell
from engine.plan import Recommendation
from tui.draft import Draft
from tui.widgets.fields import Field

_POWERS: Final = tuple(str(2**n) for n in range(7, 18))
_FIRST: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("adapter", ("qlora", "lora", FULL)),
    ("sequence_len", _POWERS),
    ("micro_batch_size", ("1", "2", "4", "8", "16")),
    ("gradient_accumulation_steps", ("1", "2", "4", "8", "16", "32")),
    ("lora_r", ("8", "16", "32", "64", "128")),
    ("lora_alpha", ("8", "16", "32", "64", "128", "256")),
    ("learning_rate", ("1e-05", "2e-05", "5e-05", "0.0001", "0.0002", "0.0005", "0.001", "0.005")),
    ("num_epochs", ("1", "2", "3", "5", "10")),
    ("max_steps", ("none", "50", "100", "150", "500", "1000")),
    (
        "optimizer",
        ("adamw_torch_fused", "adamw_torch", "adamw_bnb_8bit", "paged_adamw_8bit"),
    ),
    ("attn_implementation", ("none", "sdpa", "flash_attention_2", "flash_attention_3")),
    ("sample_packing", ("false", "true")),
    ("gradient_checkpointing", ("false", "true")),
    ("lora_dropout", ("0", "0.05", "0.1")),
)
_MORE: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("val_set_size", ("0", "0.05", "0.1", "0.2")),
    ("lr_scheduler", ("cosine", "linear", "constant")),
    ("warmup_ratio", ("none", "0", "0.03", "0.05", "0.1")),
    ("weight_decay", ("0", "0.01", "0.1")),
    ("max_grad_norm", ("0.5", "1", "2")),
    ("saves_per_epoch", ("none", "1", "2", "4")),
    ("evals_per_epoch", ("none", "1", "2", "4")),
    ("train_on_thinking", ("true", "false")),
    ("history_thinking", ("keep", "drop")),
    ("bf16", ("auto", "true", "false")),
    ("seed", ("0", "1", "42")),
)
_ADAPTER_ONLY: Final = ("lora_r", "lora_alpha", "lora_dropout")


def list_fields(draft: Draft, *, every: bool, wrong: tuple[str, str] | None) -> list[Field]:
    """The lines of the page. `wrong` is a key with what is wrong with its typed value."""
    advice = draft.advice()
    fields = []
    for key, usual in _FIRST + (_MORE if every else ()):
        if advice.config.adapter is None and key in _ADAPTER_ONLY:
            continue
        bad = wrong is not None and wrong[0] == key
        fields.append(
            Field(
                key,
                spell(key, getattr(advice.config, key)),
                usual,
                wrong[1] if wrong and bad else _reason(advice, key),
                chosen=key in draft.changes,
                wrong=bad,
            )
        )
    return fields


def _reason(advice: Recommendation, key: str) -> str:
    if key == "num_epochs" and advice.config.max_steps:
        return "max_steps ends it"
    without = {"attn_implementation": "the best that is installed", "max_steps": "all epochs"}
    return advice.reasons.get(key) or without.get(key, "the usual value")
