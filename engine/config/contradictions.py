"""The table of keys that contradict each other: what, why, and what to do.

Separate from `rules`, which applies it and looks at names and patterns: here is only data, the
combinations Axolotl's own where it has them.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.config.run import RunConfig


@dataclass(frozen=True, slots=True)
class Rule:
    """`keys` are those that it reads; it is reported at the first of them that is set."""

    id: str
    keys: tuple[str, ...]
    broken: "Callable[[RunConfig], object]"
    what: str
    why: str
    fix: str


_ROWS = re.compile(r"\[\d*:\d*\]$")
"""Axolotl's range of rows at the end of an expression."""

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
    Rule(
        "softmax-needs-flex",
        ("scaling_softmax", "attn_implementation"),
        lambda c: c.scaling_softmax and c.attn_implementation != "flex_attention",
        "scaling_softmax is true without attn_implementation: flex_attention.",
        "No other attention code can scale by the length of a row.",
        "Add attn_implementation: flex_attention, or remove scaling_softmax.",
    ),
    Rule(
        "own-tokens-with-mistral-common",
        (
            "special_tokens",
            "tokens",
            "added_tokens_overrides",
            "chat_template",
            "tokenizer_use_mistral_common",
        ),
        lambda c: (
            c.tokenizer_use_mistral_common
            and (c.special_tokens or c.tokens or c.added_tokens_overrides or c.chat_template)
        ),
        "Tokens or a template are changed with tokenizer_use_mistral_common: true.",
        "mistral-common's vocabulary and rendering are fixed.",
        "Remove special_tokens, tokens, added_tokens_overrides and chat_template.",
    ),
    Rule(
        "batch-size-once",
        ("batch_size", "gradient_accumulation_steps"),
        lambda c: c.batch_size and c.gradient_accumulation_steps > 1,
        "batch_size and gradient_accumulation_steps are both set.",
        "Each follows from the other.",
        "Remove batch_size.",
    ),
    Rule(
        "warmup-once",
        ("warmup_steps", "warmup_ratio"),
        lambda c: c.warmup_steps and c.warmup_ratio,
        "warmup_steps and warmup_ratio are both set.",
        "They say the same thing in two ways.",
        "Remove one of them.",
    ),
    Rule(
        "saves-once",
        ("save_steps", "saves_per_epoch"),
        lambda c: c.save_steps and c.saves_per_epoch,
        "save_steps and saves_per_epoch are both set.",
        "They say the same thing in two ways.",
        "Remove one of them.",
    ),
    Rule(
        "save-strategy-agrees",
        ("save_strategy", "save_steps"),
        lambda c: c.save_steps and c.save_strategy not in (None, "steps"),
        "save_steps is set, and save_strategy is not steps.",
        "The strategy says not to count steps.",
        "Remove save_strategy, or remove save_steps.",
    ),
    Rule(
        "evals-once",
        ("eval_steps", "evals_per_epoch"),
        lambda c: c.eval_steps and c.evals_per_epoch,
        "eval_steps and evals_per_epoch are both set.",
        "They say the same thing in two ways.",
        "Remove one of them.",
    ),
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
