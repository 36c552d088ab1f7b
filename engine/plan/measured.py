"""Measured figures that beat the formula: kept, found again, and put in its place.

A figure stands only for what it was measured on: every key of a config has to be the same except
those that have no part in memory: of rows, results and trackers, and some that are listed. Any
other new key separates runs until somebody says that it need not.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from engine.catalog import ModuleTable
from engine.config import RunConfig
from engine.config.keys import DataKeys, LearningKeys, OutputKeys, TrackerKeys
from engine.errors import WorkError
from engine.files import write_whole
from engine.hardware.packages import installed
from engine.plan.step import Step
from engine.plan.verdict import Estimate, judge
from engine.visible import visible

HOME_VARIABLE: Final = "WINDTUNNEL_MEASURED"
RANGE: Final = 0.02
"""How far the next run of the same may lie from a measured peak."""
STEP_MOMENTS: Final = ("backward pass", "loss", "optimizer step")
"""The moments of an estimate that a few steps go through."""
PACKAGES: Final = (
    *("windtunnel", "torch", "transformers", "peft", "bitsandbytes", "cut-cross-entropy"),
    *("flash-attn", "flash-attn-3", "flash-attn-4"),
)
"""Whose version a figure holds for, by its first two numbers."""
_SECTIONS: Final = (DataKeys, LearningKeys, OutputKeys, TrackerKeys)
_NAMES: Final = """
base_model revision_of_model tokenizer_config tokenizer_use_mistral_common trust_remote_code
processor_type lora_alpha peft_use_rslora peft_init_lora_weights lora_model_dir auto_fit
excess_length_strategy eval_sample_packing num_epochs max_steps learning_rate loraplus_lr_ratio
lr_scheduler cosine_min_lr_ratio warmup_steps warmup_ratio weight_decay adam_beta1 adam_beta2
adam_epsilon max_grad_norm loss_watchdog_threshold loss_watchdog_patience seed
"""
INDIFFERENT: Final = frozenset((*_NAMES.split(), *(k for s in _SECTIONS for k in s.model_fields)))
"""Keys of a config that change nothing in a step's memory, or are in the figure's key by what they
lead to: the model's shapes, the tokens at once."""
_COUNTING: Final = tuple(name for name in RunConfig.model_fields if name not in INDIFFERENT)
_SHAPES: Final = (
    *("num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window", "hidden_act"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_experts_per_tok", "patch_size"),
    *("image_size", "spatial_merge_size", "vision_feature_layer"),
)
"""What of a config.json decides memory and is in no parameter's shape."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one config took on one device, in a few steps of full batches. Sizes in bytes."""

    key: Mapping[str, Any]
    """What it was measured on, as `key_of` has it."""
    model: str
    """For people."""
    peak_allocated_bytes: int
    """Of the steps."""
    peak_reserved_bytes: int | None
    """What the allocator held; None on a CPU."""
    device_bytes: int | None
    """What the process took of the device, or of RAM at most; None where nobody said."""
    load_peak_bytes: int
    tokens_per_second: float
    formula_bytes: int
    """What the formula of the time said of the same."""
    measured_at: str
    """Day, in UTC."""


def key_of(step: Step) -> dict[str, Any]:
    """Everything that has to be the same for a figure to hold, as JSON has it."""
    run = {name: getattr(step.config, name) for name in _COUNTING}
    # From two forward passes on, gradients lie beside what a pass keeps: more change nothing.
    run["gradient_accumulation_steps"] = min(2, step.config.gradient_accumulation_steps)
    return {
        "model": _model(step),
        "run": run,
        "device": step.device.name,
        "tokens_at_once": step.tokens,
        "image_tokens": step.of_images,
        "versions": dict(_versions()),
    }


def find_measured(step: Step) -> Measurement | None:
    """The newest figure for exactly this, the person's own before ours; None where there is none.

    A package that is not installed here separates nothing: then the plan is for another computer.
    Made for every keystroke: without a figure for the model and the device it looks no further.
    """
    known = _known()
    if (_model(step), step.device.name) not in known.places:
        return None
    key = key_of(step)
    here = key["versions"]
    for found in known.by_digest.get(_digest(key), ()):
        there = found.key["versions"]
        if all(there.get(name) == version for name, version in here.items() if version):
            return found
    return None


def step_bytes(needs: Estimate) -> int:
    """What the formula says of the steps alone, which is what is measured."""
    return max(needs.moments[name] for name in STEP_MOMENTS)


def corrected(needs: Estimate, found: Measurement) -> Estimate:
    """The estimate with the measured peak of the steps in place of the formula's.

    Unchanged but for the pace where another moment of the run is fuller than its steps. The parts
    still add up: what was measured beyond them is `unexplained`, and where less was measured all
    are scaled down.
    """
    peak, formula = found.peak_allocated_bytes, needs.peak_allocated_bytes
    needs = replace(needs, tokens_per_second=found.tokens_per_second)
    others = (size for name, size in needs.moments.items() if name not in STEP_MOMENTS)
    if max(others, default=0) > peak:
        return needs
    around = needs.device_bytes - formula
    device_bytes = found.device_bytes or (found.peak_reserved_bytes or peak) + around
    return replace(
        needs,
        parts=_fitting(needs.parts, peak),
        peak_allocated_bytes=peak,
        device_bytes=device_bytes,
        host_bytes=device_bytes if needs.host_bytes == needs.device_bytes else needs.host_bytes,
        range_bytes=(int(peak * (1 - RANGE)), int(peak * (1 + RANGE))),
        verdict=judge(device_bytes, needs.can_give_bytes),
        source="measured",
    )


def _fitting(parts: Mapping[str, int], peak: int) -> dict[str, int]:
    total = sum(parts.values())
    if total <= peak:
        return {**parts, **({"unexplained": peak - total} if peak > total else {})}
    scaled = {name: size * peak // total for name, size in parts.items()}
    largest = max(scaled, key=lambda name: scaled[name])
    return scaled | {largest: scaled[largest] + peak - sum(scaled.values())}


def store(found: Measurement, folder: Path | None = None) -> Path:
    """Write a figure into `folder`, by default the person's own; returns its file.

    One for the same key replaces the older. Raises WorkError where it cannot be written.
    """
    place = folder or measured_home()
    path = place / f"{_digest(found.key)}-{_digest_of(found.key['versions'])[:8]}.json"
    try:
        place.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(found), indent=1).encode() + b"\n")
        _read_all.cache_clear()  # two files may appear within one tick of the folder's clock
    except OSError as error:
        raise WorkError(
            f"The measurement could not be written to {visible(str(place), one_line=True)}.",
            f"The system says: {error}.",
            f"Set {HOME_VARIABLE} to a folder that may be written to.",
        ) from error
    return path


def measured_home() -> Path:
    """The folder of the person's own figures: $WINDTUNNEL_MEASURED, else in the data folder."""
    import platformdirs

    chosen = os.environ.get(HOME_VARIABLE)
    if chosen:
        return Path(os.path.abspath(os.path.expanduser(chosen)))
    return platformdirs.user_data_path("windtunnel", False) / "measured"


@dataclass(frozen=True, slots=True)
class _Known:
    """All figures, read once."""

    by_digest: Mapping[str, tuple[Measurement, ...]]
    places: frozenset[tuple[str, str]]
    """Model and device of each."""


def _known() -> _Known:
    home = measured_home()
    try:
        changed = os.stat(home).st_mtime_ns  # each figure is a file that appears by a rename
    except OSError:
        changed = 0
    return _read_all(home, changed)


@lru_cache(maxsize=2)
def _read_all(home: Path, _changed: int) -> _Known:
    found: dict[str, list[Measurement]] = {}
    ours = files("presets") / "measured"
    for folder in (home, ours):
        entries = [each for each in folder.iterdir()] if folder.is_dir() else []
        read = [_read(each) for each in entries if each.name.endswith(".json")]
        newest = sorted((m for m in read if m), key=lambda m: m.measured_at, reverse=True)
        for each in newest:
            found.setdefault(_digest(each.key), []).append(each)
    places = {(m.key["model"], m.key["device"]) for several in found.values() for m in several}
    return _Known({key: tuple(several) for key, several in found.items()}, frozenset(places))


def _read(path: Any) -> Measurement | None:
    """One file; None where it is damaged or of another version, which only costs the figure."""
    try:
        content = json.loads(path.read_text("utf-8"))
        found = Measurement(**{each.name: content[each.name] for each in fields(Measurement)})
        numbers = (found.peak_allocated_bytes, found.load_peak_bytes, found.formula_bytes)
        whole = all(type(number) is int and number > 0 for number in numbers)
        names = ("model", "run", "device", "tokens_at_once", "image_tokens", "versions")
        return found if whole and all(name in found.key for name in names) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _digest(key: Mapping[str, Any]) -> str:
    return _digest_of({name: value for name, value in key.items() if name != "versions"})


def _digest_of(content: object) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@cache
def _versions() -> tuple[tuple[str, str | None], ...]:
    found = ((package, installed(package)) for package in PACKAGES)
    return tuple((name, has and ".".join(has.split(".")[:2])) for name, has in found)


def _model(step: Step) -> str:
    return _model_digest(step.table, _shapes(step.place.architecture.config))


def _shapes(config: Mapping[str, Any]) -> tuple[str, ...]:
    parts = (config, config.get("text_config"), config.get("vision_config"))
    return tuple(
        f"{name} {part[name]}"
        for part in parts
        if isinstance(part, Mapping)
        for name in _SHAPES
        if part.get(name) is not None
    )


@lru_cache(maxsize=32)
def _model_digest(table: ModuleTable, shapes: tuple[str, ...]) -> str:
    rows = [[p.name, p.shape, p.group, p.quantizable, p.tied] for p in table.parameters]
    return _digest_of([table.class_name, str(table.routed_share), shapes, rows])
