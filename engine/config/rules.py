"""The whole config of a run, and the rules that it keeps: no key against another, no unsafe value.

RULES is the table of those that contradict each other, Axolotl's own combinations where it has
them; the sentence that a person reads stands beside the condition.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

from pydantic import ValidationInfo, model_validator

from engine.config.finding import Finding, problem, shown
from engine.config.keys import DatasetConfig, RunKeys
from engine.hub_id import REPOSITORY_NAMES, hub_id_in, is_repository_name
from engine.pattern import PatternError, find_matches
from engine.visible import visible


@dataclass(frozen=True, slots=True)
class Rule:
    """`keys` are those that it reads; it is reported at the first of them that is set."""

    id: str
    keys: tuple[str, ...]
    broken: Callable[[RunKeys], object]
    what: str
    why: str
    fix: str


_ROWS = re.compile(r"\[\d*:\d*\]$")
"""Axolotl's range of rows at the end of an expression."""


def _once(id: str, first: str, second: str) -> Rule:  # noqa: A002
    return Rule(
        id,
        (first, second),
        lambda c: getattr(c, first) and getattr(c, second),
        f"{first} and {second} are both set.",
        "They say the same thing in two ways.",
        "Remove one of them.",
    )


RULES = (
    Rule(
        "qlora-needs-4bit",
        ("adapter", "load_in_4bit"),
        lambda c: c.adapter == "qlora" and not (c.load_in_4bit or c.load_in_8bit),
        "adapter is qlora without load_in_4bit: true.",
        "QLoRA is LoRA beside weights that are held in 4 bits.",
        "Add load_in_4bit: true, or write adapter: lora.",
    ),
    Rule(
        "4bit-needs-qlora",
        ("load_in_4bit", "adapter"),
        lambda c: c.load_in_4bit and c.adapter == "lora",
        "load_in_4bit is true with adapter: lora.",
        "Axolotl then leaves the weights in 16 bits without a word, which needs 4 times the"
        " memory.",
        "Write adapter: qlora, or remove load_in_4bit.",
    ),
    Rule(
        "quantized-needs-adapter",
        ("load_in_4bit", "load_in_8bit", "adapter"),
        lambda c: (c.load_in_4bit or c.load_in_8bit) and c.adapter is None,
        "The weights are quantized and there is no adapter.",
        "Quantized weights are frozen, so nothing would be trained.",
        "Add adapter: qlora, or remove load_in_4bit and load_in_8bit for a full fine-tune.",
    ),
    Rule(
        "4bit-or-8bit",
        ("load_in_8bit", "load_in_4bit"),
        lambda c: c.load_in_4bit and c.load_in_8bit,
        "load_in_4bit and load_in_8bit are both true.",
        "The weights can be held in one format only.",
        "Remove load_in_8bit.",
    ),
    Rule(
        "8bit-not-with-qlora",
        ("load_in_8bit", "adapter"),
        lambda c: c.load_in_8bit and not c.load_in_4bit and c.adapter == "qlora",
        "load_in_8bit is true with adapter: qlora.",
        "QLoRA is LoRA beside weights that are held in 4 bits.",
        "Write load_in_4bit: true instead of load_in_8bit.",
    ),
    Rule(
        "unfrozen-without-adapter",
        ("unfrozen_parameters", "adapter"),
        lambda c: c.unfrozen_parameters and c.adapter,
        "unfrozen_parameters is set with an adapter.",
        "It chooses what a full fine-tune trains; with an adapter the base weights stay frozen.",
        "Remove unfrozen_parameters, or remove adapter.",
    ),
    Rule(
        "adapter-needs-target",
        ("adapter", "lora_target_linear", "lora_target_modules", "lora_target_parameters"),
        lambda c: (
            c.adapter
            and not (c.lora_target_linear or c.lora_target_modules or c.lora_target_parameters)
        ),
        "adapter is set, and nothing gets one.",
        "Without a target no weight is trained.",
        "Remove lora_target_linear: false, or name the matrices in lora_target_modules.",
    ),
    Rule(
        "dropout-not-on-experts",
        ("lora_dropout", "lora_target_parameters"),
        lambda c: c.lora_target_parameters and c.lora_dropout > 0,
        "lora_dropout is above 0 with lora_target_parameters.",
        "PEFT cannot drop the input of a fused expert tensor.",
        "Write lora_dropout: 0.",
    ),
    Rule(
        "dora-not-on-experts",
        ("peft_use_dora", "lora_target_parameters"),
        lambda c: c.lora_target_parameters and c.peft_use_dora,
        "peft_use_dora is true with lora_target_parameters.",
        "DoRA needs the length of every weight row, and PEFT has it for linear layers only.",
        "Remove peft_use_dora, or remove lora_target_parameters.",
    ),
    Rule(
        "whole-parameters-only",
        ("unfrozen_parameters",),
        lambda c: any(_ROWS.search(pattern) for pattern in c.unfrozen_parameters or ()),
        "unfrozen_parameters names rows of a parameter.",
        "A parameter is trained whole or not at all; a range such as [:32000] is not read.",
        "Remove the range to train all rows.",
    ),
    Rule(
        "experts-not-all-linear",
        ("lora_target_linear", "quantize_moe_experts"),
        lambda c: c.quantize_moe_experts and c.lora_target_linear,
        "lora_target_linear is true with quantize_moe_experts.",
        "Quantized experts are fused tensors, which are no linear layers.",
        "Name them in lora_target_parameters and remove lora_target_linear.",
    ),
    Rule(
        "experts-not-8bit",
        ("quantize_moe_experts", "load_in_8bit"),
        lambda c: c.quantize_moe_experts and c.load_in_8bit,
        "quantize_moe_experts is true with load_in_8bit.",
        "Experts are quantized to 4 bits only.",
        "Write adapter: qlora and load_in_4bit: true, or remove quantize_moe_experts.",
    ),
    Rule(
        "experts-need-4bit",
        ("quantize_moe_experts", "load_in_4bit", "load_in_8bit", "adapter"),
        lambda c: (
            c.quantize_moe_experts
            and not (c.adapter is not None and (c.load_in_4bit or c.load_in_8bit))
        ),
        "quantize_moe_experts is true, but the model is not quantized.",
        "It goes with an adapter beside quantized weights.",
        "Add adapter: qlora and load_in_4bit: true, or remove quantize_moe_experts.",
    ),
    Rule(
        "reentrant-with-frozen",
        ("gradient_checkpointing_kwargs", "unfrozen_parameters"),
        lambda c: (
            c.unfrozen_parameters
            and (c.gradient_checkpointing_kwargs or {}).get("use_reentrant") is True
        ),
        "use_reentrant is true with unfrozen_parameters.",
        "Reentrant checkpointing gives no gradients behind frozen layers.",
        "Write gradient_checkpointing_kwargs: {use_reentrant: false}.",
    ),
    Rule(
        "offloading-needs-checkpointing",
        ("activation_offloading", "gradient_checkpointing"),
        lambda c: c.activation_offloading and not c.gradient_checkpointing,
        "activation_offloading is set without gradient_checkpointing.",
        "What is offloaded are the values that checkpointing keeps.",
        "Add gradient_checkpointing: true.",
    ),
    Rule(
        "layers-named-for-checkpointing",
        ("checkpointed_layers", "gradient_checkpointing"),
        lambda c: c.checkpointed_layers and not c.gradient_checkpointing,
        "checkpointed_layers is set without gradient_checkpointing: true.",
        "It says how many layers gradient_checkpointing computes a second time.",
        "Add gradient_checkpointing: true, or remove checkpointed_layers.",
    ),
    Rule(
        "layers-named-for-offloading",
        ("offloaded_layers", "layer_offloading"),
        lambda c: c.offloaded_layers and not c.layer_offloading,
        "offloaded_layers is set without layer_offloading: true.",
        "It says how many layers layer_offloading keeps in RAM.",
        "Add layer_offloading: true, or remove offloaded_layers.",
    ),
    Rule(
        "layer-offloading-needs-frozen",
        ("layer_offloading", "adapter"),
        lambda c: c.layer_offloading and c.adapter is None,
        "layer_offloading is true without an adapter.",
        "Only frozen weights are kept in RAM; a full fine-tune moves them all.",
        "Add adapter: lora or qlora, or remove layer_offloading.",
    ),
    Rule(
        "dora-not-with-layer-offloading",
        ("peft_use_dora", "layer_offloading"),
        lambda c: c.layer_offloading and c.peft_use_dora,
        "peft_use_dora is true with layer_offloading.",
        "DoRA reads every matrix before the first step, when the layers are in RAM already.",
        "Remove peft_use_dora, or remove layer_offloading.",
    ),
    Rule(
        "embeddings-offloaded-are-frozen",
        ("offload_embeddings", "adapter", "lora_modules_to_save"),
        lambda c: c.offload_embeddings and (c.adapter is None or c.lora_modules_to_save),
        "offload_embeddings is true, and the embedding or the head is trained.",
        "Weights that move stay on the GPU beside their gradients.",
        "Remove offload_embeddings, or train an adapter without lora_modules_to_save.",
    ),
    Rule(
        "bf16-adapter-needs-adapter",
        ("peft_autocast_adapter_dtype", "adapter"),
        lambda c: c.peft_autocast_adapter_dtype is False and c.adapter is None,
        "peft_autocast_adapter_dtype is false without an adapter.",
        "It says in which numbers the adapter is held.",
        "Remove it, or add adapter: lora or qlora.",
    ),
    _once("warmup-once", "warmup_steps", "warmup_ratio"),
    _once("saves-once", "save_steps", "saves_per_epoch"),
    Rule(
        "save-strategy-agrees",
        ("save_strategy", "save_steps"),
        lambda c: c.save_steps and c.save_strategy not in (None, "steps"),
        "save_steps is set, and save_strategy is not steps.",
        "The strategy says not to count steps.",
        "Remove save_strategy, or remove save_steps.",
    ),
    _once("evals-once", "eval_steps", "evals_per_epoch"),
    Rule(
        "eval-strategy-agrees",
        ("eval_strategy", "eval_steps", "evals_per_epoch"),
        lambda c: (c.eval_steps or c.evals_per_epoch) and c.eval_strategy not in (None, "steps"),
        "eval_strategy contradicts eval_steps or evals_per_epoch.",
        "Steps are only counted with eval_strategy: steps.",
        "Remove eval_strategy.",
    ),
    Rule(
        "eval-needs-rows",
        ("eval_steps", "val_set_size", "test_datasets"),
        lambda c: c.eval_steps and c.val_set_size == 0 and not c.test_datasets,
        "eval_steps is set, and no rows are held out.",
        "Without val_set_size or test_datasets there is nothing to evaluate.",
        "Add val_set_size: 0.05, or remove eval_steps.",
    ),
    Rule(
        "held-out-once",
        ("val_set_size", "test_datasets"),
        lambda c: c.val_set_size > 0 and c.test_datasets,
        "val_set_size and test_datasets are both set.",
        "It is not clear which rows to evaluate.",
        "Remove val_set_size to keep test_datasets whole.",
    ),
    Rule(
        "held-out-share-or-rows",
        ("val_set_size",),
        lambda c: c.val_set_size >= 1 and (c.val_set_size == 1 or c.val_set_size % 1 != 0),
        "val_set_size is neither a share nor a number of rows.",
        "Below 1 it is a share of the rows, from 2 on a whole number of rows.",
        "Write a share such as 0.05, or a number of rows such as 100.",
    ),
    Rule(
        "no-remote-code",
        ("trust_remote_code",),
        lambda c: c.trust_remote_code,
        "trust_remote_code is true.",
        "It would run Python from the model's repository with your rights; Windtunnel knows the"
        " Mistral architectures and needs none.",
        "Remove trust_remote_code.",
    ),
)

_NAMES = (
    "base_model",
    "revision_of_model",
    "tokenizer_config",
    "lora_model_dir",
    "dataset_prepared_path",
    "image_folder",
    "output_dir",
    "resume_from_checkpoint",
    "hub_model_id",
)
_FILE_NAME_LETTERS = 255
_ROLES = ("system", "user", "assistant", "tool")
_MESSAGE_KEYS = (
    *("role", "content", "tool_calls", "tool_call_id", "name", "weight"),
    *("thinking", "reasoning", "reasoning_content"),
)


def broken_rules(config: RunKeys, unread: frozenset[str] = frozenset()) -> list[Finding]:
    """Every rule that `config` breaks, without lines; the keys of a dataset read datasets[0].path.

    `unread` names keys whose values are not the file's (they could not be read): what depends on
    them is not judged.
    """
    given = config.model_fields_set
    found = []
    for rule in RULES:
        if unread.isdisjoint(rule.keys) and rule.broken(config):
            key = next((key for key in rule.keys if key in given), rule.keys[0])
            found.append(problem(rule.id, key, rule.what, rule.why, rule.fix))
    for key in _NAMES:
        found.extend(_unsafe_name(key, getattr(config, key)))
    for key in ("base_model", "tokenizer_config"):
        found.extend(_bad_source(key, getattr(config, key)))
    if config.hub_model_id and not is_repository_name(config.hub_model_id):
        what = f"hub_model_id is {shown(config.hub_model_id)}, which is no name of a repository."
        fix = "Write you/your-model, or remove hub_model_id."
        found.append(problem("bad-hub-name", "hub_model_id", what, REPOSITORY_NAMES, fix))
    found.extend(_bad_patterns("lora_target_modules", config.lora_target_modules))
    found.extend(_bad_patterns("unfrozen_parameters", config.unfrozen_parameters))
    found.extend(_bad_settings("chat_template_kwargs", config.chat_template_kwargs))
    for key in ("datasets", "test_datasets"):
        for index, dataset in enumerate(getattr(config, key)):
            found.extend(_bad_dataset(f"{key}[{index}]", dataset))
    return found


def _unsafe_name(key: str, value: object) -> Iterator[Finding]:
    if not isinstance(value, str):
        return
    if not value.strip():
        what, fix = f"{key} is blank.", "Write a name or a path."
    elif not value.isprintable() or value.startswith("-"):
        what = f"{key} starts with a dash or holds invisible characters: {shown(value)}."
        fix = "Use letters, digits, spaces, dots, slashes, dashes and underscores."
    else:
        return
    why = "It becomes a file name, a hub id or an argument of a command."
    yield problem("unsafe-name", key, what, why, fix)


def _bad_source(key: str, value: str | None) -> Iterator[Finding]:
    """What can be no file, no folder, no hub id and no name of the catalog."""
    if not value:
        return
    named = hub_id_in(value)
    what, fix = f"{key} is {shown(value)}.", "Name the hub id, or the file or folder here."
    if named or "://" in value:
        why = "That is a web address; a hub id is read by its name, other addresses not at all."
        yield problem("web-address", key, what, why, f"Write {named}." if named else fix)
    elif any(len(part) > _FILE_NAME_LETTERS for part in value.split("/")):
        why = "Neither the hub nor a disk has so long a name."
        yield problem("bad-hub-name", key, what, why, fix)


def _bad_patterns(key: str, patterns: list[str] | str | None) -> Iterator[Finding]:
    for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
        try:
            find_matches(pattern)
        except PatternError as error:
            yield problem(
                "bad-pattern",
                key,
                f"{key} holds {shown(pattern)}, which is not a regular expression that is read.",
                visible(str(error), one_line=True),
                "Correct the pattern, or write a list of plain names.",
            )


def _bad_settings(key: str, settings: dict[str, str] | None) -> Iterator[Finding]:
    for name, value in (settings or {}).items():
        if name != "reasoning_effort" or value not in ("none", "high"):
            yield problem(
                "bad-template-setting",
                key,
                f"{key} holds {shown(name)}: {shown(value)}.",
                "mistral-common renders one setting, reasoning_effort, as none or high.",
                "Write {reasoning_effort: high}, {reasoning_effort: none}, or remove the key.",
            )


def _bad_dataset(key: str, dataset: DatasetConfig) -> Iterator[Finding]:
    yield from _bad_source(f"{key}.path", dataset.path)
    for field in ("path", "name", "split", "revision"):
        yield from _unsafe_name(f"{key}.{field}", getattr(dataset, field))
    yield from _bad_settings(f"{key}.chat_template_kwargs", dataset.chat_template_kwargs)
    if dataset.trust_remote_code:
        yield problem(
            "no-remote-code",
            f"{key}.trust_remote_code",
            f"{key}.trust_remote_code is true.",
            "It would run Python from the dataset's repository with your rights.",
            "Remove it; use the dataset's Parquet files if it has no others.",
        )
    for field, known, example in (
        ("roles", _ROLES, "user: [human]"),
        ("message_property_mappings", _MESSAGE_KEYS, "role: from"),
    ):
        for name in getattr(dataset, field) or {}:
            if name not in known:
                yield problem(
                    "unknown-name",
                    f"{key}.{field}",
                    f"{key}.{field} names {shown(name)}.",
                    f"Left of the colon stands one of {', '.join(known)}.",
                    f"Write ours: theirs, for example {example}.",
                )


WITHOUT_RULES = {"rules": False}
"""Validation context under which only types and ranges are checked."""


class RunConfig(RunKeys):
    """One run."""

    @model_validator(mode="after")
    def _keep_the_rules(self, info: ValidationInfo) -> Self:
        if info.context != WITHOUT_RULES:
            broken = broken_rules(self)
            if broken:
                raise ValueError("\n".join(finding.sentence() for finding in broken))
        return self
