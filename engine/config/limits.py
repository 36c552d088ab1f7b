"""What this engine does not act on among the keys of a config: why, and what to do instead.

A rule says that a config contradicts itself; a limit says that Windtunnel is not there yet, and
leaves this table when a part learns to do it. An "error" would train something else than the file
says; a "note" changes no result. Axolotl's other keys, of which no value is acted on, are in
axolotl_keys.yml.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Literal, NamedTuple

from engine.config.document import Document
from engine.config.finding import ConfigError, Finding, shown
from engine.config.run import RunConfig
from engine.config.section import Section

Later = Literal["several GPUs", "trackers", "prompt formats"]


class Limit(NamedTuple):
    """`applies` decides by the value alone; by default every value that is not false or empty."""

    severity: Literal["error", "note"]
    why: str
    fix: str
    applies: Callable[[object], object] = bool
    later: Later | None = None
    """The part of Windtunnel that will act on the key. Several GPUs can be planned already."""

    @property
    def whole(self) -> bool:
        """Whether no value of the key does anything."""
        return self.applies in (bool, _above_1)

    def finding(self, key: str, value: object) -> Finding | None:
        """What is to be said of `key`, as it is written in findings, with this value."""
        if not self.applies(value):
            return None
        error = self.severity == "error"
        return Finding(
            "not-supported" if error else "no-effect",
            self.severity,
            key,
            None,
            f"{key}: {shown(value)} {'is not supported' if error else 'has no effect'}.",
            self.why,
            self.fix,
        )


def _error(why: str, fix: str, applies: Callable[[object], object] = bool) -> Limit:
    return Limit("error", why, fix, applies)


def _note(why: str, applies: Callable[[object], object] = bool) -> Limit:
    return Limit("note", why, CAN_STAY, applies)


def _is_set(value: object) -> bool:
    return value is not None


def _above_1(value: object) -> bool:
    return isinstance(value, int) and value > 1


CAN_STAY = "It can stay in a file that Axolotl reads too."
_ONE_GPU = _error(
    "A run uses one GPU so far.",
    "Run this file with Axolotl, or remove it where one GPU is enough: `windtunnel estimate` counts"
    " the GPUs.",
)._replace(later="several GPUs")
_SHARDED = _note("A run uses one GPU so far.")._replace(later="several GPUs")
_KERNEL = _note("A faster kernel with the same result; Windtunnel uses its own.")
_TRACKER = _note("No tracker is attached yet: the figures go to the run's events.jsonl.")._replace(
    later="trackers"
)

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
        "tokenizer_use_mistral_common": _note(
            "Windtunnel always tokenizes with mistral-common.", lambda value: value is False
        ),
        "processor_type": _note("Images in the rows are trained as they are, without it."),
        "overrides_of_model_config": _error(
            "The model is built as its own config.json says; only output_router_logits,"
            " router_aux_loss_coef and rope_parameters are taken here.",
            "Keep those at most: true or false, a number from 0, and names with numbers, which"
            " stand under text_config where the model reads images.",
            _other_overrides,
        ),
        "model_quantization_config": _error(
            "FP8 is the only quantized format whose weights are read.",
            "Remove it, and name the model's BF16 or FP8 repository in base_model.",
            lambda value: value not in (None, FP8_CONFIG),
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
        "skip_prepare_dataset": _note("Rows are always prepared first, so you can preview them."),
        "remove_unused_columns": _note("Only the columns that are needed are read.", _is_set),
        "optimizer": _error(
            "torchao's 8-bit AdamW is for weights that are sharded over several GPUs.",
            "Write optimizer: adamw_bnb_8bit, the same on one GPU.",
            lambda value: value == "adamw_torch_8bit",
        )._replace(later="several GPUs"),
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
        "plugins": _error(
            "Plugins are not run; only the cut cross-entropy, Liger and kernel plugins are known.",
            "Remove the others.",
            _other_plugins,
        ),
        "deepspeed": _ONE_GPU,
        "fsdp_config": _ONE_GPU,
        "fsdp_version": _SHARDED,
        "qlora_sharded_model_loading": _SHARDED,
        "dp_shard_size": _ONE_GPU._replace(applies=_above_1),
        "dp_replicate_size": _ONE_GPU._replace(applies=_above_1),
        "tensor_parallel_size": _ONE_GPU._replace(applies=_above_1),
        "context_parallel_size": _ONE_GPU._replace(applies=_above_1),
        "expert_parallel_size": _ONE_GPU._replace(applies=_above_1),
        "ddp_find_unused_parameters": _SHARDED,
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
        )._replace(later="prompt formats"),
    }
)

WHOLE_STATES = "cannot-be-sharded"


def unsupported(config: RunConfig, document: Document | None = None) -> list[Finding]:
    """Every key of `config` that this engine does not act on, in the order of the fields.

    "error" means that training would not do what the file says. `document` gives the lines.
    """
    found = [*_limited(config, LIMITS, "")]
    for key in ("datasets", "test_datasets"):
        for index, dataset in enumerate(getattr(config, key)):
            found += _limited(dataset, DATASET_LIMITS, f"{key}[{index}].")
    found += [*_whole_states(config), *_without_effect(config)]
    if document is None:
        return found
    return [replace(finding, line=document.line(finding.key)) for finding in found]


def require_supported(config: RunConfig, *, sharded: bool = False) -> None:
    """Raises ConfigError when training would not do what a config without a file says.

    With `sharded` one for several GPUs passes, which can be planned and not run.
    """
    refuse_errors("The config", unsupported(config), sharded=sharded)


def refuse_errors(name: str, found: Sequence[Finding], *, sharded: bool = False) -> None:
    """Raises ConfigError with the errors among what was found in the file `name`.

    `sharded`: see `require_supported`.
    """
    planned = {key for key, limit in LIMITS.items() if sharded and limit.later == "several GPUs"}
    errors = [
        finding
        for finding in found
        if finding.severity == "error"
        and (finding.id == WHOLE_STATES or finding.key not in planned)
    ]
    if errors:
        raise ConfigError(name, errors)


def _limited(section: Section, limits: Mapping[str, Limit], prefix: str) -> Iterator[Finding]:
    for key in type(section).model_fields:
        if key in limits:
            found = limits[key].finding(f"{prefix}{key}", getattr(section, key))
            if found is not None:
                yield found


def _whole_states(config: RunConfig) -> list[Finding]:
    """An optimizer that cannot be sharded, in a config that shards."""
    instead = SHARDED_OPTIMIZERS.get(config.optimizer)
    if config.fsdp_config is None or instead is None:
        return []
    what = f"optimizer: {config.optimizer} cannot be sharded, and fsdp_config is set."
    why = "bitsandbytes' optimizers take whole tensors, and FSDP2 gives each GPU parts of them."
    return [
        Finding(WHOLE_STATES, "error", "optimizer", None, what, why, f"Write optimizer: {instead}.")
    ]


def _without_effect(config: RunConfig) -> list[Finding]:
    """Keys that are supported and yet do nothing beside the others of this config."""
    given = config.model_fields_set
    found = []

    def note(key: str, what: str, why: str, fix: str) -> None:
        found.append(Finding("no-effect", "note", key, None, what, why, fix))

    prefixes = ("lora", "peft_")
    lora = [key for key in type(config).model_fields if key.startswith(prefixes) and key in given]
    if config.adapter is None and lora:
        note(
            lora[0],
            f"{lora[0]} is set without an adapter.",
            "Without adapter every weight is trained.",
            "Write adapter: lora or qlora, unless a full fine-tune is meant.",
        )
    if config.evals_per_epoch and not config.val_set_size and not config.test_datasets:
        note(
            "evals_per_epoch",
            "evals_per_epoch is set, and no rows are held out.",
            "Without val_set_size or test_datasets there is nothing to evaluate.",
            "Write val_set_size: 0.05 to see whether the model memorises.",
        )
    if config.model_quantization_config == FP8_CONFIG:
        note(
            "model_quantization_config",
            f"model_quantization_config: {FP8_CONFIG} has no effect.",
            "FP8 weights are recognised in their files and converted while they are loaded.",
            "It can stay in a file that Axolotl reads too.",
        )
    if config.cosine_min_lr_ratio and config.lr_scheduler != "cosine":
        note(
            "cosine_min_lr_ratio",
            f"cosine_min_lr_ratio is set with lr_scheduler: {config.lr_scheduler}.",
            "Only a cosine has such an end.",
            "Write lr_scheduler: cosine, or remove it.",
        )
    return found
