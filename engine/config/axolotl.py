"""What this engine does not act on: axolotl_keys.yml, and the keys that do nothing beside others.

A rule says that a config contradicts itself; a limit says that Windtunnel is not there yet, and
leaves the file when a part learns to do it. An "error" would train something else than the file
says; a "note" changes no result.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from ruamel.yaml import YAML

from engine.config.finding import ConfigError, Finding, shown
from engine.config.keys import Section
from engine.config.rules import RunConfig

Level = Literal["run", "dataset"]

_FIX = {
    "note": "It can stay in a file that Axolotl reads too.",
    "error": "Remove it, or run this file with Axolotl.",
}


@dataclass(frozen=True, slots=True)
class Renamed:
    """An older spelling: the key it became, and the value that `true` stands for, if any."""

    key: str
    value: str | None = None


@dataclass(frozen=True, slots=True)
class Limit:
    """A key of which some values are not acted on, or none is; the file says what `unless` is."""

    section: str
    meaning: str | None
    """None for a field of the config, which says itself what it means."""
    severity: Literal["error", "note"]
    why: str
    fix: str
    unless: list[object] | None = field(hash=False)
    only: list[object] | None = field(hash=False)
    partly: bool
    """Whether a part of the value is acted on."""
    later: Literal["several GPUs", "trackers", "prompt formats"] | None
    """The part of Windtunnel that will act on a field. Several GPUs can be planned already."""

    @property
    def whole(self) -> bool:
        """Whether no value does anything; 1, and true where others change nothing, are none."""
        nothing = (True, 1) if self.severity == "note" else (1,)
        return (
            self.only is None
            and not self.partly
            and all(
                any(value == same and type(value) is type(same) for same in nothing)
                for value in self.unless or ()
            )
        )

    def applies(self, value: object) -> bool:
        if value is None:
            return False
        if self.only is not None:
            return value in self.only
        return bool(value) if self.unless is None else self._is_other(value)

    def _is_other(self, value: object) -> bool:
        assert self.unless is not None
        whole = any(isinstance(each, list) for each in self.unless)
        if isinstance(value, (dict, list)) and not whole:
            return any(self._is_other(part) for part in value)
        if isinstance(value, str):
            return not any(fnmatchcase(value, str(pattern)) for pattern in self.unless)
        return value not in self.unless

    def finding(self, key: str, value: object) -> Finding:
        """What is to be said of `key`, as it is written in findings, with this value."""
        error = self.severity == "error"
        what = f"{key}: {shown(value)} {'is not supported' if error else 'has no effect'}."
        id_ = "not-supported" if error else "no-effect"
        return Finding(id_, self.severity, key, None, what, self.why, self.fix)


def limits(level: Level = "run") -> Mapping[str, Limit]:
    """The keys on which this engine does not act, of the run or of an entry in `datasets`."""
    return _table()[level]


def renamed() -> Mapping[str, Renamed]:
    """Older spellings of a run's keys."""
    return {old: Renamed(**new) for old, new in _file()["renamed"].items()}


def elsewhere() -> Mapping[str, str]:
    """Names that Hugging Face's trainers and other tools use, and the keys that they mean."""
    names: Mapping[str, str] = _file()["elsewhere"]
    return names


@functools.cache
def _file() -> dict[str, Any]:
    """The file; read when it is first needed, as it takes a twentieth of a second."""
    with Path(__file__).with_name("axolotl_keys.yml").open(encoding="utf-8") as file:
        content: dict[str, Any] = YAML(typ="safe", pure=True).load(file)
    return content


@functools.cache
def _table() -> Mapping[Level, Mapping[str, Limit]]:
    table: dict[Level, dict[str, Limit]] = {"run": {}, "dataset": {}}
    for group in _file()["limits"]:
        for key, meaning in group["keys"].items():
            table[group.get("of", "run")][key] = Limit(
                section=group["section"],
                meaning=meaning or group.get("means"),
                severity=group["effect"],
                why=group["why"],
                fix=group.get("fix", _FIX[group["effect"]]),
                unless=group.get("unless"),
                only=group.get("only"),
                partly=group.get("partly", False),
                later=group.get("later"),
            )
    return table


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
        not (isinstance(item, list) and all(isinstance(name, str) for name in item))
        if key == "llm_int8_skip_modules"
        else ours.get(key, ...) != item
        for key, item in value.items()
    )


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


_PARTLY: Mapping[str, Callable[[object], bool]] = {
    "overrides_of_model_config": _other_overrides,
    "bnb_config_kwargs": _other_formats,
}
"""Mappings of which some values are acted on: whether one holds any other."""

WHOLE_STATES = "cannot-be-sharded"


def unsupported(config: RunConfig) -> list[Finding]:
    """Every key of `config` that this engine does not act on, in the order of the fields.

    "error" means that training would not do what the file says.
    """
    found = [*_limited(config, "run", "")]
    for key in ("datasets", "test_datasets"):
        for index, dataset in enumerate(getattr(config, key)):
            found += _limited(dataset, "dataset", f"{key}[{index}].")
    return [*found, *_whole_states(config), *_without_effect(config)]


def require_supported(config: RunConfig, *, sharded: bool = False) -> None:
    """Raises ConfigError when training would not do what a config without a file says.

    With `sharded` one for several GPUs passes, which can be planned and not run.
    """
    refuse_errors("The config", unsupported(config), sharded=sharded)


def refuse_errors(name: str, found: Sequence[Finding], *, sharded: bool = False) -> None:
    """Raises ConfigError with the errors among what was found in the file `name`.

    `sharded`: see `require_supported`.
    """
    planned = {key for key, limit in limits().items() if sharded and limit.later == "several GPUs"}
    errors = [
        finding
        for finding in found
        if finding.severity == "error"
        and (finding.id == WHOLE_STATES or finding.key not in planned)
    ]
    if errors:
        raise ConfigError(name, errors)


def _limited(section: Section, level: Level, prefix: str) -> Iterator[Finding]:
    for key in type(section).model_fields:
        limit, value = limits(level).get(key), getattr(section, key)
        if limit is None or not limit.applies(value):
            continue
        if not limit.partly or _PARTLY[key](value):
            yield limit.finding(f"{prefix}{key}", value)


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
    if config.optimizer == "adamw_torch_8bit":
        note(
            "optimizer",
            "optimizer: adamw_torch_8bit is torchao's in Axolotl.",
            "Here it is bitsandbytes' 8-bit AdamW, whose state has the same size: each rank's own"
            " rows of a sharded weight are a plain tensor.",
            "It can stay in a file that Axolotl reads too.",
        )
    settings = config.fsdp_config or {}
    if settings.get("offload_params") or settings.get("fsdp_offload_params"):
        note(
            "fsdp_config",
            "fsdp_config's offload_params has no effect.",
            "Each rank keeps its part of the weights on its GPU, and the plan counts it there.",
            "Write a larger dp_shard_size where that does not fit.",
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
