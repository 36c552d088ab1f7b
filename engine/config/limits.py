"""What this engine does not act on: every such key, why, and what to do instead, as one table.

Separate from the rules because a rule says that a config contradicts itself, while a limit says
that Windtunnel is not there yet: a row leaves this table when a part learns to do it. An "error"
would train something else than the file says; a "note" changes no result.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple


class Limit(NamedTuple):
    """`applies` decides by the value alone; by default every value that is not false or empty."""

    severity: Literal["error", "note"]
    why: str
    fix: str
    applies: Callable[[object], object] = bool
    several_gpus: bool = False
    """Whether it belongs to a run on several GPUs, which can be planned."""


def _error(why: str, fix: str, applies: Callable[[object], object] = bool) -> Limit:
    return Limit("error", why, fix, applies)


def _note(why: str, applies: Callable[[object], object] = bool) -> Limit:
    return Limit("note", why, "It can stay in a file that Axolotl reads too.", applies)


def _is_set(value: object) -> bool:
    return value is not None


def _above_1(value: object) -> bool:
    return isinstance(value, int) and value > 1


_ONE_GPU = _error(
    "A run uses one GPU so far.",
    "Run this file with Axolotl, or remove it where one GPU is enough: `windtunnel estimate` counts"
    " the GPUs.",
)._replace(several_gpus=True)
_ANSWERS_ONLY = _error(
    "Windtunnel trains on answers, not on preferences or rewards.",
    "Remove it to learn the answers, or run this file with Axolotl.",
)
_OWN_TEMPLATE = _error(
    "Conversations are rendered by mistral-common, exactly as the model knows them.",
    "Remove it.",
)
_REMOVE = "Remove it, or run this file with Axolotl."
_KERNEL = _note("A faster kernel with the same result; Windtunnel uses its own.")
_TRACKER = _note("No tracker is attached yet: the figures go to the run's events.jsonl.")
_HUB = _note("The result is uploaded once, when it is finished.")


def _other_template(value: object) -> bool:
    return isinstance(value, str) and not value.startswith(("mistral", "tokenizer_default"))


def _more_than_padding(value: object) -> bool:
    return isinstance(value, dict) and any(key != "pad_token" for key in value)


SHARDED_OPTIMIZERS: Mapping[str, str] = MappingProxyType(
    {
        "adamw_bnb_8bit": "adamw_torch_8bit",
        "adamw_8bit": "adamw_torch_8bit",
        "paged_adamw_8bit": "adamw_torch_8bit",
        "paged_adamw_32bit": "adamw_torch_fused",
    }
)
"""bitsandbytes' optimizers, which cannot be sharded, and what takes their place in a run that is:
FSDP2 hands an optimizer parts of tensors of a type of its own, on which those kernels fail. Axolotl
refuses them with fsdp_config too."""
FP8_CONFIG = "FineGrainedFP8Config"
"""The value of `model_quantization_config` with which Axolotl reads FP8 weights."""


def _other_formats(value: object) -> bool:
    ours = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "blocksize": 64,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_threshold": 6.0,
    }
    return isinstance(value, dict) and any(
        not _is_names(item) if key == "llm_int8_skip_modules" else ours.get(key, ...) != item
        for key, item in value.items()
    )


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_BALANCE = ("output_router_logits", "router_aux_loss_coef")


def _is_no_rope(value: object) -> bool:
    return not isinstance(value, dict) or not all(
        isinstance(item, str if key in ("rope_type", "type") else int | float)
        for key, item in value.items()
    )


def _other_overrides(value: object) -> bool:
    """Anything but the router's balance and the rotation of positions."""
    if not isinstance(value, dict):
        return value is not None
    weight = value.get("router_aux_loss_coef", 0.0)
    text = value.get("text_config", {})
    parts = (value, text) if isinstance(text, dict) else ()
    return (
        not parts
        or not value.keys() <= {*_BALANCE, "rope_parameters", "text_config"}
        or not text.keys() <= {"rope_parameters"}
        or any(_is_no_rope(part.get("rope_parameters", {})) for part in parts)
        or not isinstance(value.get("output_router_logits", False), bool)
        or isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not 0 <= weight < math.inf
    )


def _other_plugins(value: object) -> bool:
    """Cut cross-entropy has a kernel here too; Liger and the expert kernels change no number."""
    same = ("CutCrossEntropyPlugin", "LigerPlugin", "KernelsPlugin")
    return isinstance(value, list) and any(
        not isinstance(name, str) or name.rsplit(".", 1)[-1] not in same for name in value
    )


LIMITS: Mapping[str, Limit] = MappingProxyType(
    {
        "model_type": _note("The class is chosen from the model's own config.json."),
        "tokenizer_type": _note("The tokenizer is always mistral-common's."),
        "tokenizer_use_mistral_common": _note(
            "Windtunnel always tokenizes with mistral-common.", lambda value: value is False
        ),
        "processor_type": _note("Images in the rows are trained as they are, without it."),
        "role_boundaries": _note("Windtunnel knows the source of every token without markers."),
        "overrides_of_model_config": _error(
            "The model is built as its own config.json says; only output_router_logits,"
            " router_aux_loss_coef and rope_parameters are taken here.",
            "Keep those at most: true or false, a number from 0, and names with numbers, which"
            " stand under text_config where the model reads images.",
            _other_overrides,
        ),
        "overrides_of_model_kwargs": _error(
            "How weights are loaded follows from adapter, load_in_4bit and bf16.", "Remove it."
        ),
        "model_quantization_config": _error(
            "FP8 is the only quantized format whose weights are read.",
            "Remove it, and name the model's BF16 or FP8 repository in base_model.",
            lambda value: value not in (None, FP8_CONFIG),
        ),
        "chat_template": _OWN_TEMPLATE._replace(applies=_other_template),
        "chat_template_jinja": _OWN_TEMPLATE,
        "special_tokens": _OWN_TEMPLATE._replace(applies=_more_than_padding),
        "tokens": _OWN_TEMPLATE,
        "added_tokens_overrides": _OWN_TEMPLATE,
        "eot_tokens": _note("Mistral models end every turn with the end-of-sequence token."),
        "default_system_message": _error(
            "Rows are rendered as they are.", "Put the system message into the rows."
        ),
        "nf4_backend": _error(
            "4-bit weights are made by bitsandbytes.",
            "Remove it.",
            lambda value: value != "bitsandbytes",
        ),
        "bnb_config_kwargs": _error(
            "Of these settings only llm_int8_skip_modules can be chosen; 4-bit weights are NF4 in"
            " blocks of 64 with double quantization.",
            "Keep llm_int8_skip_modules alone, or remove it.",
            _other_formats,
        ),
        "peft_init_lora_weights": _error(
            "The adapter starts as PEFT's default or as gaussian; the other ways change the base"
            " weights, which cannot be done to quantized ones.",
            "Remove it, or write gaussian.",
            lambda value: value not in (True, "gaussian"),
        ),
        "lora_mlp_kernel": _KERNEL,
        "lora_qkv_kernel": _KERNEL,
        "lora_o_kernel": _KERNEL,
        "dataset_num_proc": _note("The number of processes that tokenize is chosen for you."),
        "shuffle_merged_datasets": _error(
            "Rows are always shuffled.", _REMOVE, lambda value: value is False
        ),
        "dataset_exact_deduplication": _error(
            "Rows are learned as they are.", "Remove equal rows from the dataset first."
        ),
        "pretraining_dataset": _error("Windtunnel trains on conversations.", _REMOVE),
        "streaming": _note("Rows are read once, in a stream, and kept on the disk."),
        "skip_prepare_dataset": _note("Rows are always prepared first, so you can preview them."),
        "remove_unused_columns": _note("Only the columns that are needed are read.", _is_set),
        "eval_sequence_len": _error("Held-out rows follow sequence_len.", "Remove it."),
        "min_sample_len": _error("Short rows are kept.", _REMOVE),
        "pad_to_sequence_len": _note("Sequences are never longer than their rows; same result."),
        "group_by_length": _error(
            "It changes the order in which rows are learned.",
            "Write sample_packing: true instead, which wastes no padding either.",
        ),
        "batch_size": _error(
            "The number of GPUs decides what it means.",
            "Write micro_batch_size and gradient_accumulation_steps; their product is the batch.",
        ),
        "eval_batch_size": _note("The evaluation uses micro_batch_size; same result."),
        "optimizer": _error(
            "torchao's 8-bit AdamW is for weights that are sharded over several GPUs.",
            "Write optimizer: adamw_bnb_8bit, the same on one GPU.",
            lambda value: value == "adamw_torch_8bit",
        )._replace(several_gpus=True),
        "optim_args": _error(
            "Only AdamW's usual arguments are read.", "Write adam_beta1 and so on."
        ),
        "lr_scheduler_kwargs": _error("The schedules have no further arguments.", _REMOVE),
        "cosine_constant_lr_ratio": _error("The cosine runs to the last step.", _REMOVE),
        "neftune_noise_alpha": _error("Noise on the embeddings is not added.", _REMOVE),
        "early_stopping_patience": _error(
            "A run ends after its last step; the best save is kept all the same.", "Remove it."
        ),
        "rl": _ANSWERS_ONLY,
        "orpo_alpha": _ANSWERS_ONLY,
        "fp16": _error(
            "Half precision with loss scaling is not used.",
            "Write bf16: auto; GPUs without bfloat16 then train in float32.",
        ),
        "tf32": _note("Float32 products are computed in float32.", lambda value: value is True),
        "fp8": _error("The computation is in bfloat16 or float32.", "Remove it."),
        "gradient_checkpointing": _error(
            "Intermediate values are computed again, and kept in RAM by another key.",
            "Write gradient_checkpointing: true and activation_offloading: true.",
            lambda value: isinstance(value, str),
        ),
        "gradient_checkpointing_kwargs": _note("Both ways give the same result."),
        "activation_offloading": _error(
            "Intermediate values are kept in RAM, not on the disk.",
            "Write activation_offloading: true.",
            lambda value: value == "disk",
        ),
        "attn_implementation": _error(
            "The trainer runs sdpa, eager, flex_attention, and flash_attention_2, 3, 4 and _torch.",
            "Remove it: the best one that is installed is chosen.",
            lambda value: value in ("varlen", "sage", "fp8"),
        ),
        "scaling_softmax": _error("Attention is computed as the model was trained.", "Remove it."),
        "plugins": _error(
            "Plugins are not run; only the cut cross-entropy, Liger and kernel plugins are known.",
            "Remove the others.",
            _other_plugins,
        ),
        "use_kernels": _note("No compiled code is fetched from the hub."),
        "use_sonicmoe": _KERNEL,
        "use_scattermoe": _KERNEL,
        "torch_compile": _note("The model is not compiled; same result."),
        "deepspeed": _ONE_GPU,
        "fsdp": _error(
            "It is FSDP1, which Axolotl 0.21 does not read either.",
            "Remove it and fsdp_config to train on one GPU.",
        ),
        "fsdp_config": _ONE_GPU,
        "fsdp_version": _note("A run uses one GPU so far."),
        "qlora_sharded_model_loading": _note("A run uses one GPU so far."),
        "dp_shard_size": _ONE_GPU._replace(applies=_above_1),
        "dp_replicate_size": _ONE_GPU._replace(applies=_above_1),
        "tensor_parallel_size": _ONE_GPU._replace(applies=_above_1),
        "context_parallel_size": _ONE_GPU._replace(applies=_above_1),
        "expert_parallel_size": _ONE_GPU._replace(applies=_above_1),
        "ddp_find_unused_parameters": _note("A run uses one GPU so far."),
        "logging_steps": _note("Every step is recorded.", _above_1),
        "save_first_step": _note("The first save follows save_steps or saves_per_epoch."),
        "save_only_model": _note("Every save can be resumed."),
        "auto_resume_from_checkpoints": _note("`windtunnel resume RUN` goes on with a run."),
        "hub_strategy": _HUB,
        **{
            key: _TRACKER
            for key in (
                *("use_wandb", "wandb_project", "wandb_entity", "wandb_name", "wandb_run_id"),
                *("wandb_mode", "wandb_watch", "wandb_log_model"),
                *("use_tensorboard", "use_trackio"),
            )
        },
    }
)


def _other_shape(value: object) -> bool:
    return value != "chat_template"


DATASET_LIMITS: Mapping[str, Limit] = MappingProxyType(
    {
        "type": _error(
            "Only conversations are trained.",
            "Write type: chat_template, with field_messages and message_property_mappings if the"
            " rows name things differently.",
            _other_shape,
        ),
        "ds_type": _note("The format is told from the file's name."),
        "message_field_training_detail": _error(
            "A message is learned or not, as a whole.", "Use message_field_training."
        ),
        "chat_template": _OWN_TEMPLATE._replace(applies=_other_template),
        "roles_to_train": _error(
            "The assistant's messages are learned, or all with train_on_inputs: true.",
            "Remove it.",
            lambda value: value not in (None, ["assistant"]),
        ),
        "train_on_eos": _error(
            "The end of every learned message is learned, and no other.",
            "Remove it.",
            lambda value: value not in (None, "turn"),
        ),
        "train_on_eot": _note("Mistral models have no end-of-turn token of their own."),
        "message_field_role": _error(
            "Roles are read by message_property_mappings.",
            "Write message_property_mappings: {role: ...}.",
        ),
        "message_field_content": _error(
            "Content is read by message_property_mappings.",
            "Write message_property_mappings: {content: ...}.",
        ),
        "field_thinking": _error(
            "Thinking is read by message_property_mappings.",
            "Write message_property_mappings: {thinking: ...}.",
        ),
        "template_thinking_key": _note("mistral-common has its own place for thinking."),
        "split_thinking": _note("Thinking is recognised in all its spellings."),
        "drop_system_message": _error(
            "Rows are rendered as they are.", "Remove the system messages from the rows."
        ),
        "weight": _error(
            "Every row is learned once an epoch.",
            "Remove it, or name the source twice to learn it twice.",
            lambda value: value not in (None, 1),
        ),
        "field_chosen": _ANSWERS_ONLY,
        "field_rejected": _ANSWERS_ONLY,
    }
)
