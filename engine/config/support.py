"""Whether this engine does what a config says: the table of limits, applied.

Separate from the table because that is data, and from the rules because a config that breaks none
of them is valid: it is only not carried out here.
"""

from collections.abc import Mapping
from dataclasses import replace

from pydantic import BaseModel

from engine.config.document import Document
from engine.config.finding import ConfigError, Finding, shown
from engine.config.limits import (
    DATASET_LIMITS,
    FP8_CONFIG,
    LIMITS,
    SHARDED_OPTIMIZERS,
    Limit,
)
from engine.config.run import RunConfig

WHOLE_STATES = "cannot-be-sharded"


def unsupported(config: RunConfig, document: Document | None = None) -> list[Finding]:
    """Every key of `config` that this engine does not act on, in the order of the fields.

    "error" means that training would not do what the file says. `document` gives the lines.
    """
    found = _limited(config, LIMITS, "")
    for key in ("datasets", "test_datasets"):
        for index, dataset in enumerate(getattr(config, key)):
            found += _limited(dataset, DATASET_LIMITS, f"{key}[{index}].")
    found += [*_whole_states(config), *_without_effect(config)]
    if document is None:
        return found
    return [replace(finding, line=document.line(finding.key)) for finding in found]


def require_supported(
    config: RunConfig, document: Document | None = None, *, sharded: bool = False
) -> list[Finding]:
    """The notes about `config`. Raises ConfigError when training would not do what it says.

    With `sharded` a config for several GPUs passes: it can be planned, and not run.
    """
    found = unsupported(config, document)
    allowed = {key for key, limit in LIMITS.items() if limit.several_gpus} if sharded else set()
    errors = [
        f for f in found if f.severity == "error" and (f.id == WHOLE_STATES or f.key not in allowed)
    ]
    if errors:
        raise ConfigError(document.name if document else "The config", errors)
    return found


def _limited(section: BaseModel, limits: Mapping[str, Limit], prefix: str) -> list[Finding]:
    found = []
    for key in type(section).model_fields:
        value = getattr(section, key)
        limit = limits.get(key)
        if limit is not None and limit.applies(value):
            verb = "is not supported" if limit.severity == "error" else "has no effect"
            what = f"{prefix}{key}: {shown(value)} {verb}."
            found.append(
                Finding(
                    "not-supported" if limit.severity == "error" else "no-effect",
                    limit.severity,
                    f"{prefix}{key}",
                    None,
                    what,
                    limit.why,
                    limit.fix,
                )
            )
    return found


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
