"""A machine that one does not have: known GPUs by name, and the text that asks for some of them.

The list is presets/gpus.yml. What a person types is matched by words, so that the driver's own
name, a shop's name and "4090" all find the same card; a name that fits two cards of different
memory is refused, because a plan for the wrong one is worth nothing.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Literal

from engine.errors import UserError
from engine.hardware.machine import Gpu, is_unified, short_name
from engine.units import GIB
from engine.visible import visible

_MOST_GPUS = 1024
_MOST_GIGABYTES = 4096
_COUNT_FIRST = re.compile(r"^\s*(\d{1,9})\s*[x×*]\s*(?=\S)", re.IGNORECASE)
# "h100x2" is two of them, "MX450" is a name.
_COUNT_LAST = re.compile(r"(?:(?<![a-z])x|(?<=gb)x|[×*:])\s*(\d{1,9})\s*$", re.IGNORECASE)
_SIZE = re.compile(r"^(\d+(?:\.\d+)?) ?(?:gb|gib|g)(?: gpus?)?$")
_EVIDENCE = {"measured": "as measured", "published": "as published", "assumed": "not checked"}
_NOISE = {"nvidia", "geforce", "tesla", "quadro", "gpu", "graphics", "card", "generation"}


@dataclass(frozen=True, slots=True)
class Speed:
    """What a card's maker says that it does, per second, and what an hour of it costs."""

    bf16_flops: float
    """Dense products in bfloat16."""
    memory_bytes: float
    """To and from its own memory."""
    link_bytes: float
    """To or from this computer's memory."""
    usd_an_hour: float | None = None


@dataclass(frozen=True, slots=True)
class KnownGpu:
    """A GPU by name, with the memory that the driver reports for it."""

    name: str
    """As the driver says it."""
    memory_total_bytes: int
    compute_capability: tuple[int, int]
    evidence: Literal["measured", "published", "assumed"]
    """Whether the memory was read here, in somebody's published output, or is from memory."""
    source: str
    """A link or words."""
    aliases: tuple[str, ...] = ()
    speed: Speed | None = None


@cache
def known_gpus() -> tuple[KnownGpu, ...]:
    """The list, in the order of presets/gpus.yml: smaller memory first."""
    # Imported here so that looking at real hardware does not wait for a YAML parser.
    from pydantic import TypeAdapter
    from ruamel.yaml import YAML

    text = (files("presets") / "gpus.yml").read_text(encoding="utf-8")
    content = YAML(typ="safe", pure=True).load(text)
    for entry in content:
        entry["memory_total_bytes"] = entry.pop("memory_total_mib") * 2**20
        entry["speed"] = {
            "bf16_flops": entry.pop("bf16_tflops") * 1e12,
            "memory_bytes": entry.pop("memory_gb_s") * 1e9,
            "link_bytes": entry.pop("link_gb_s") * 1e9,
            "usd_an_hour": entry.pop("usd_an_hour", None),
        }
    return TypeAdapter(tuple[KnownGpu, ...]).validate_python(content)


def speed_of(name: str) -> Speed | None:
    """The speed of the card that the driver calls `name`; None for one that is not listed."""
    wanted = "".join(_words(name))
    for gpu in known_gpus():
        if wanted in {"".join(_words(each)) for each in (gpu.name, *gpu.aliases)}:
            return gpu.speed
    return None


def plan_gpus(text: str) -> tuple[Gpu, ...]:
    """The GPUs that `text` asks for: "H100 x2", "4 x A100 80GB", "24 GB", "2x80GB".

    They are free: nothing else uses a card that one does not have yet. Raises UserError, with the
    nearest names, for a text that means no GPU or more than one kind.
    """
    name, count = _split_count(text)
    size = _SIZE.match(" ".join(name.casefold().split()))
    if size:
        return _planned(_unnamed(float(size[1]), text), count)
    return _planned(_find(name), count)


def _split_count(text: str) -> tuple[str, int]:
    for pattern in (_COUNT_FIRST, _COUNT_LAST):
        if match := pattern.search(text):
            count = int(match[1])
            if not 1 <= count <= _MOST_GPUS:
                raise UserError(
                    f"{count} GPUs cannot be planned for.",
                    f"A machine has 1 to {_MOST_GPUS} of them.",
                    "Write the number before or after the name, as in --assume 'H100 x8'.",
                )
            return (text[: match.start()] + text[match.end() :]).strip(), count
    return text.strip(), 1


def _unnamed(gigabytes: float, text: str) -> KnownGpu:
    if not 0 < gigabytes <= _MOST_GIGABYTES:
        raise UserError(
            f"A GPU of {visible(text, one_line=True)} cannot be planned for.",
            f"Memory is more than 0 and at most {_MOST_GIGABYTES} GB.",
            "Give the memory of one card, as in --assume '24 GB'.",
        )
    # Makers say GB and mean GiB; of that a card with ECC (A10, L4, L40S) reports 94 parts in 100.
    return KnownGpu(
        f"{gigabytes:g} GB GPU",
        int(gigabytes * GIB),
        (0, 0),
        "assumed",
        "the size that was asked for, in GiB",
    )


def _find(name: str) -> KnownGpu:
    wanted = _words(name)
    spelled = "".join(wanted)
    for gpu in known_gpus():
        if spelled and spelled in {"".join(_words(each)) for each in (gpu.name, *gpu.aliases)}:
            return gpu
    fitting = [gpu for gpu in known_gpus() if wanted and set(wanted) <= _all_words(gpu)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        choices = _either(fitting)
        raise UserError(
            f"{visible(name, one_line=True)} means more than one GPU.",
            f"It can be {choices}, and their memory or generation differ.",
            f"Write which: --assume '{short_name(fitting[0].name)}'.",
        )
    nearest = _nearest(name)
    raise UserError(
        f"There is no GPU named {visible(name, one_line=True)}." if name else "No GPU is named.",
        f"Known are {', '.join(short_name(gpu.name) for gpu in known_gpus())}.",
        (f"Did you mean {_either(nearest)}? " if nearest else "")
        + "The memory of one card works too: --assume '24 GB'.",
    )


def _nearest(name: str) -> list[KnownGpu]:
    spellings = {
        "".join(_words(each)): gpu for gpu in known_gpus() for each in (gpu.name, *gpu.aliases)
    }
    close = get_close_matches("".join(_words(name)), spellings, n=6, cutoff=0.5)
    return list(dict.fromkeys(spellings[spelling] for spelling in close))[:3]


def _words(name: str) -> list[str]:
    """Lower-case words; "80 GB" is one, "RTX4090" are two, the maker's name is none."""
    text = re.sub(r"(\d)\s+g(?:i?b)?\b", r"\1gb", name.casefold())
    text = re.sub(r"(?<=\d)g(?:ib)?\b", "gb", re.sub(r"\brtx(?=\d)", "rtx ", text))
    return [word for word in re.findall(r"[a-z0-9]+", text) if word not in _NOISE]


def _all_words(gpu: KnownGpu) -> set[str]:
    return {word for each in (gpu.name, *gpu.aliases) for word in _words(each)}


def _either(gpus: Sequence[KnownGpu]) -> str:
    names = [f"{short_name(gpu.name)} ({gpu.memory_total_bytes / GIB:.1f} GiB)" for gpu in gpus]
    return " or ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _planned(known: KnownGpu, count: int) -> tuple[Gpu, ...]:
    note = f"its memory is {_EVIDENCE[known.evidence]}: {known.source}"
    return tuple(
        Gpu(
            uuid=f"planned-{index}",
            index=index,
            name=known.name,
            memory_total_bytes=known.memory_total_bytes,
            memory_free_bytes=known.memory_total_bytes,
            memory_used_bytes=0,
            compute_capability=known.compute_capability if any(known.compute_capability) else None,
            state="ready",
            unified=is_unified(known.name),
            processes=(),
            note=note,
        )
        for index in range(count)
    )
