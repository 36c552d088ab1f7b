"""Devices, configs and datasets that the tests of the plan share."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from engine.catalog import Architecture, list_models, read_architecture
from engine.config import RunConfig
from engine.hardware import assume
from engine.plan import Device, Place, Statistics, best_device, cpu_device
from engine.units import GIB

MODELS = tuple(card.name for card in list_models())


@cache
def card(name: str) -> Device:
    """A planned GPU, as `--assume` makes it."""
    return best_device(assume(name))


def sized(gibibytes: float) -> Device:
    """A GPU that can give exactly so much."""
    return replace(card("24 GB"), can_give_bytes=int(gibibytes * GIB))


def cpu(gibibytes: float = 64) -> Device:
    """A computer without a GPU that can give exactly so much."""
    return replace(cpu_device(assume("24 GB")), can_give_bytes=int(gibibytes * GIB))


@cache
def model(name: str | Path) -> Architecture:
    """A model of the catalog."""
    return read_architecture(name)


def at(name: str | Path, device: Device | str, rows: Statistics | None = None) -> Place:
    """A model of the catalog or in a folder on `device`, or on the card of that name."""
    where = card(device) if isinstance(device, str) else device
    return Place(model(name), where, rows)


def config(**keys: Any) -> RunConfig:
    """A LoRA config; `adapter="qlora"` brings its precision along."""
    defaults: dict[str, Any] = {"base_model": "ministral-3-3b", "adapter": "lora"}
    given = defaults | keys
    if given["adapter"] == "qlora":
        given = {"load_in_4bit": True} | given
    return RunConfig.model_validate(given)


def dataset(rows: int, mean: int, longest: int, **more: Any) -> Statistics:
    """A dataset of `rows` usable rows, whose longest are 10 tokens apart."""
    lengths = tuple(max(mean, longest - 10 * n) for n in range(min(rows, 1000)))
    return Statistics(
        usable_rows=rows,
        total_tokens=rows * mean,
        thinking_tokens=more.pop("thinking", 0),
        mean_tokens=float(mean),
        longest_tokens=longest,
        longest_rows=lengths,
        p99_tokens=lengths[min(len(lengths) - 1, rows // 100)],
        longest_row=1,
        prompts=more.pop("prompts", ()),
    )
