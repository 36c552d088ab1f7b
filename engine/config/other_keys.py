"""Keys that are no fields here: older spellings, other tools' names for ours, Axolotl's others.

They let an error say what a key is, instead of guessing a typo.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from ruamel.yaml import YAML

from engine.config.limits import CAN_STAY, Limit

_REMOVE = "Remove it, or run this file with Axolotl."


class Renamed(NamedTuple):
    """An older spelling: the key it became, and the value that `true` stands for, if any."""

    key: str
    value: str | None = None


RENAMED: Mapping[str, Renamed] = MappingProxyType(
    {
        "flash_attention": Renamed("attn_implementation", "flash_attention_2"),
        "sdp_attention": Renamed("attn_implementation", "sdpa"),
        "flex_attention": Renamed("attn_implementation", "flex_attention"),
        "xformers_attention": Renamed("attn_implementation", "xformers"),
        "sage_attention": Renamed("attn_implementation", "sage"),
        "eager_attention": Renamed("attn_implementation", "eager"),
        "bfloat16": Renamed("bf16"),
        "float16": Renamed("fp16"),
        "model_config": Renamed("overrides_of_model_config"),
        "model_kwargs": Renamed("overrides_of_model_kwargs"),
        "model_revision": Renamed("revision_of_model"),
        "type_of_model": Renamed("model_type"),
        "evaluation_strategy": Renamed("eval_strategy"),
        "dataset_processes": Renamed("dataset_num_proc"),
        "noisy_embedding_alpha": Renamed("neftune_noise_alpha"),
        "sequence_parallel_degree": Renamed("context_parallel_size"),
    }
)

ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        "model": "base_model",
        "model_name": "base_model",
        "model_name_or_path": "base_model",
        "model_id": "base_model",
        "data": "datasets",
        "dataset": "datasets",
        "train_data": "datasets",
        "eval_dataset": "test_datasets",
        "lora_rank": "lora_r",
        "rank": "lora_r",
        "r": "lora_r",
        "alpha": "lora_alpha",
        "target_modules": "lora_target_modules",
        "lora_target": "lora_target_modules",
        "quantization_bit": "load_in_4bit",
        "finetuning_type": "adapter",
        "method": "adapter",
        "lr": "learning_rate",
        "lr_scheduler_type": "lr_scheduler",
        "optim": "optimizer",
        "epochs": "num_epochs",
        "num_train_epochs": "num_epochs",
        "per_device_train_batch_size": "micro_batch_size",
        "train_batch_size": "micro_batch_size",
        "grad_accum": "gradient_accumulation_steps",
        "max_seq_length": "sequence_len",
        "max_seq_len": "sequence_len",
        "max_length": "sequence_len",
        "cutoff_len": "sequence_len",
        "seq_len": "sequence_len",
        "packing": "sample_packing",
        "attention": "attn_implementation",
        "gradient_clipping": "max_grad_norm",
        "max_norm": "max_grad_norm",
        "val_size": "val_set_size",
        "validation_split": "val_set_size",
        "save_dir": "output_dir",
        "run_dir": "output_dir",
        "thinking": "train_on_thinking",
        "prompts": "sample_prompts",
        "file": "path",
        "messages": "field_messages",
        "tools": "field_tools",
    }
)
"""Names that Hugging Face's trainers and other tools use, for the suggestion in an error."""


_TABLE = Path(__file__).with_name("axolotl_keys.yml")


@dataclass(frozen=True, slots=True)
class OtherKey:
    """A key of Axolotl of which no value is acted on."""

    section: str
    meaning: str
    limit: Limit


@functools.cache
def other_keys(level: Literal["run", "dataset"] = "run") -> Mapping[str, OtherKey]:
    """Axolotl's keys that are no fields here, of the run or of an entry in `datasets`.

    Read when they are first needed: our own files have none of them.
    """
    with _TABLE.open(encoding="utf-8") as file:
        groups: list[dict[str, Any]] = YAML(typ="safe", pure=True).load(file)
    return MappingProxyType(
        {
            name: OtherKey(group["section"], meaning or group["means"], limit)
            for group in groups
            if group.get("of", "run") == level
            for limit in [_limit(group)]
            for name, meaning in group["keys"].items()
        }
    )


def _limit(group: Mapping[str, Any]) -> Limit:
    effect: Literal["error", "note"] = group["effect"]
    fix = group.get("fix", CAN_STAY if effect == "note" else _REMOVE)
    applies = functools.partial(_is_other, group["unless"]) if "unless" in group else bool
    return Limit(effect, group["why"], fix, applies)


def _is_other(unless: Sequence[object], value: object) -> bool:
    """Whether `value` is none of `unless`; of a mapping its names count."""
    if isinstance(value, dict):
        return any(_is_other(unless, name) for name in value)
    if isinstance(value, str):
        return not any(fnmatchcase(value, str(pattern)) for pattern in unless)
    return value not in unless
