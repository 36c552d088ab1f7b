"""Which values the Plan page shows, how they are spelled, and what stands beside each.

Pure: from a draft to the lines of the list.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from engine.config import FULL, NONE
from engine.hardware import attention_backends
from engine.plan import Attention, Recommendation, changed, estimate
from engine.plan.attention import task_of, why_not
from engine.report.plan import steps_text
from engine.units import gib
from engine.wizard.draft import Draft
from engine.wizard.values import EXPERTS, expert_tensors, spelled

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
    ("attn_implementation", (NONE,)),
    ("sample_packing", ("false", "true")),
    ("gradient_checkpointing", ("false", "true")),
    ("checkpointed_layers", ("none", "4", "8", "16", "32")),
    ("lora_dropout", ("0", "0.05", "0.1")),
)
_EXPERTS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("quantize_moe_experts", ("false", "true")),
    ("lora_target_parameters", (NONE, EXPERTS)),
)
_IMAGES: Final = (("image_size", (NONE, "448", "672", "1024", "1540")),)
_THINKING: Final = (("train_on_thinking", ("true", "false")),)
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
_WAITING: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("offload_embeddings", ("false", "true")),
    ("activation_offloading", ("none", "true")),
    ("layer_offloading", ("none", "true")),
    ("offloaded_layers", ("none", "4", "8", "16", "32")),
)
"""What can wait in RAM: shown where it does, and among all settings."""
_ADAPTER_ONLY: Final = ("lora_r", "lora_alpha", "lora_dropout")


@dataclass(frozen=True, slots=True)
class Field:
    """One value: as the file spells it, the usual ones, and why it is what it is."""

    key: str
    value: str
    usual: tuple[str, ...]
    reason: str
    chosen: bool = False
    """By the person: marked with a star."""
    wrong: bool = False
    """The reason says what is wrong with what was typed."""


def list_fields(draft: Draft, *, every: bool, wrong: tuple[str, str] | None = None) -> list[Field]:
    """The lines of the page. `wrong` is a key with what is wrong with its typed value."""
    advice = draft.advice()
    fields = []
    for key, usual in _keys(draft, every):
        bad = wrong is not None and wrong[0] == key
        fields.append(
            Field(
                key,
                spelled(key, advice.config),
                usual,
                wrong[1] if wrong and bad else _reason(draft, advice, key),
                chosen=key in draft.changes,
                wrong=bad,
            )
        )
    return fields


def amounts_text(advice: Recommendation) -> str:
    """What the run amounts to: steps, time and price where they are known, and what moves."""
    needs, duration = advice.estimate, advice.duration
    a_step = needs.tokens_at_once * advice.config.gradient_accumulation_steps
    words = [f"{a_step:,} tokens a step", f"{needs.trainable_parameters:,} trainable"]
    if duration is not None:
        words[:1] = [steps_text(duration)]
        words += [f"about ${duration.usd:,.2f}"] if duration.usd is not None else []
    elif advice.tokens_per_second:
        words.append(f"about {advice.tokens_per_second:,.0f} tokens a second")
    return " · ".join([*words, f"{gib(needs.disk_bytes)} of disk"])


def _keys(draft: Draft, every: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each key of the page with its usual values, the keys of what this model has among them."""
    config, known = draft.config(), draft.statistics
    special = _EXPERTS if expert_tensors(draft.architecture()) and config.adapter else ()
    special += _IMAGES if known and known.image_tokens else ()
    thinks = bool(known and known.thinking_tokens)
    for key, usual in (*_FIRST[:1], *special, *(_THINKING * thinks), *_FIRST[1:]):
        if config.adapter is None and key in _ADAPTER_ONLY:
            continue
        if key == "checkpointed_layers" and not (config.checkpointed_layers or every):
            continue
        yield key, (NONE, *_attention_here(draft)) if key == "attn_implementation" else usual
    yield from (entry for entry in _WAITING if every or getattr(config, entry[0]))
    if every:
        yield from _MORE if thinks else (*_MORE, *_THINKING)


def _attention_here(draft: Draft) -> Iterator[str]:
    """The attention codes that can carry out the plan on its device."""
    config, device = draft.config(), draft.device
    assert device is not None
    task = task_of(config, draft.architecture(), device)
    return (name for name in attention_backends() if why_not(name, device, task) is None)


def _reason(draft: Draft, advice: Recommendation, key: str) -> str:
    if key == "num_epochs" and advice.config.max_steps:
        return "max_steps ends it"
    if key in dict(_EXPERTS):
        return _price_of_experts(draft, advice, key)
    without = {
        "attn_implementation": _attention_reason(advice.attention),
        "max_steps": "all epochs",
        "image_size": "the model's own limit; less gives an image fewer tokens",
    }
    if draft.own is not None and key not in advice.reasons:
        return _reason_of_own(draft, advice, key) or without.get(key, "left out: as usual")
    return advice.reasons.get(key) or without.get(key, "the usual value")


def _attention_reason(chosen: Attention) -> str:
    """What runs where the config names none, and whether FlashAttention 4 could; F1 shows all."""
    if not chosen.flash_4:
        return f"{chosen.backend}: {chosen.reason}"
    return f"{chosen.backend}; {chosen.flash_4}; {chosen.reason}"


def _reason_of_own(draft: Draft, advice: Recommendation, key: str) -> str:
    """What is known of a value of an opened config; empty where the file does not name it."""
    if key == "sequence_len":
        return advice.estimate.decided_by
    if draft.opened is None or key not in draft.opened.document.values:
        return ""
    return draft.opened.document.reason(key) or "in the config"


def _price_of_experts(draft: Draft, advice: Recommendation, key: str) -> str:
    """What the value of a key about experts means, and what the other one would need."""
    architecture, device = draft.architecture(), draft.device
    assert device is not None
    here = getattr(advice.config, key)
    other: dict[str, object]
    if key == "lora_target_parameters":
        other = {key: None if here else expert_tensors(architecture)}
        means = "all experts learn too" if here else "attention and shared experts learn"
    else:
        other = {key: not here}
        means = "experts in 4 bits" if here else "experts in 16 bits"
    needs = estimate(changed(advice.config, other), architecture, device, draft.statistics)
    return f"{'without' if here else 'with'}: {gib(needs.device_bytes)}; {means}"
