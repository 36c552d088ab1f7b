"""What is known of cards that need not be here: presets/gpus.yml, cuda.yml and attention.yml.

What a person types is matched by words, so that the driver's own name, a shop's name and "4090"
all find the same card; a name that fits two cards of different memory is refused, because a plan
for the wrong one is worth nothing. A card that is not listed can be planned for by its memory, and
its name may tell the generation.
"""

import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from typing import Literal

from engine.errors import UserError
from engine.files import read_preset
from engine.hardware.machine import Gpu, is_unified, short_name
from engine.units import GIB
from engine.visible import visible

Capability = tuple[int, int]

UNKNOWN_CAPABILITY = (8, 0)
"""A card that only its memory is known of is taken for Ampere, the oldest that most people have."""
FLASH_4 = "flash_attention_4"

_MOST_GPUS = 1024
_NODE_GPUS = 8
"""In most computers for training; more are in several."""
_MOST_GIGABYTES = 4096
_COUNT_FIRST = re.compile(r"^\s*(\d{1,9})\s*[x×*]\s*(?=\S)", re.IGNORECASE)
# Behind a number of computers: "8 H100", but neither "80 GB" nor "4090".
_COUNT_BARE = re.compile(r"^\s*(\d{1,3})\s+(?!g(?:i?b)?\b)(?=[a-z]|\d{4})", re.IGNORECASE)
# "h100x2" is two of them, "MX450" is a name.
_COUNT_LAST = re.compile(r"(?:(?<![a-z])x|(?<=gb)x|[×*:])\s*(\d{1,9})\s*$", re.IGNORECASE)
_SIZE = re.compile(r"^(\d+(?:\.\d+)?) ?(?:gb|gib|g)(?: gpus?)?$")
# A number of GB in a name: "RTX 3060 12GB".
_SIZE_WITHIN = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?) ?(?:gb|gib|g)\b", re.IGNORECASE)
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
    peer_bytes: float | None = None
    """To or from the other cards of its computer, where they have a link of their own."""
    network_bytes: float | None = None
    """To or from other computers, by the adapter that each card has in the usual one for it."""


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
    listed: bool = False
    """Whether tables of cards show it; the others are found by name."""
    speed: Speed | None = None

    @property
    def spellings(self) -> set[str]:
        return {_spell(each) for each in (self.name, *self.aliases)}


@cache
def known_gpus() -> tuple[KnownGpu, ...]:
    """The list, in the order of presets/gpus.yml: smaller memory first."""
    from pydantic import TypeAdapter

    content = read_preset("gpus.yml")
    for entry in content:
        entry["memory_total_bytes"] = entry.pop("memory_total_mib") * 2**20
        if "bf16_tflops" in entry:
            entry["speed"] = {
                "bf16_flops": entry.pop("bf16_tflops") * 1e12,
                "memory_bytes": entry.pop("memory_gb_s") * 1e9,
                "link_bytes": entry.pop("link_gb_s") * 1e9,
                "usd_an_hour": entry.pop("usd_an_hour", None),
                "peer_bytes": 1e9 * entry.pop("nvlink_gb_s", 0) or None,
                "network_bytes": 1e9 * entry.pop("network_gb_s", 0) or None,
            }
    return TypeAdapter(tuple[KnownGpu, ...]).validate_python(content)


def listed_gpus() -> tuple[KnownGpu, ...]:
    """Those that tables of cards show: one of each kind, not every card that there is."""
    return tuple(gpu for gpu in known_gpus() if gpu.listed)


@cache
def speed_of(name: str) -> Speed | None:
    """The speed of the card that the driver calls `name`; None for one that is not known."""
    return next((gpu.speed for gpu in known_gpus() if _spell(name) in gpu.spellings), None)


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """The wheels of torch for one version of CUDA."""

    cuda: tuple[int, int]
    capabilities: dict[str, tuple[Capability, ...]]
    """Compute capabilities with code of their own, by the computer's architecture."""
    ptx: Capability | None = None
    """The capability that code is held for which a driver compiles for newer cards."""
    until: tuple[int, int] | None = None
    """The last release of torch that has this build."""

    def runs_on(self, capability: Capability) -> bool:
        """Whether it holds code for a card of this capability."""
        own = self.capabilities.get(platform.machine(), ())
        return any(
            major == capability[0] and minor <= capability[1] for major, minor in own
        ) or bool(self.ptx and capability >= self.ptx)


@dataclass(frozen=True, slots=True)
class CudaFacts:
    """presets/cuda.yml."""

    drivers: dict[int, int]
    """Oldest driver of each major version of CUDA."""
    torch_builds: tuple[TorchBuild, ...]
    """The one to take first on top."""
    generations: tuple[tuple[str, Capability], ...]
    """Patterns of names, with the compute capability that they tell."""


@cache
def cuda_facts() -> CudaFacts:
    """What is known of drivers, builds of torch and generations of cards."""
    from pydantic import TypeAdapter

    return TypeAdapter(CudaFacts).validate_python(read_preset("cuda.yml"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """One backend on one range of cards."""

    first: Capability
    """Compute capability; also `last`, which is included."""
    last: Capability
    forward: Literal["yes", "no"]
    backward: Literal["yes", "no"]
    largest_query_head: int
    largest_value_head: int
    also_heads: tuple[int, ...] = ()
    """Wider heads of queries that it takes too."""
    uneven: bool = False
    """Whether queries and values may have heads of different widths."""
    worth_installing: bool = False
    """Whether its package is expected to be faster here than what PyTorch has of its own."""
    reason: str
    source: str
    confidence: Literal["high", "medium", "low"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One attention code, and the cards that it runs on."""

    name: str
    """A value of `attn_implementation`."""
    title: str
    package: str
    on_index: bool = True
    """Whether the package can be installed by its name; the others are for who built them."""
    also_named: tuple[str, ...] = ()
    """Other values of `attn_implementation` that this one carries out, with the same result."""
    stands_in_for: tuple[str, ...] = ()
    """Backends whose work it does, as exactly, where their package or a GPU is missing."""
    overwritten_by: tuple[str, ...] = ()
    """Packages that hold files of the same name: of two that are installed the later one wins."""
    architectures: tuple[str, ...]
    packing: Literal["cut", "mask", "blocks"]
    """How it keeps packed rows apart; a mask grows with sequence_len squared."""
    vision: bool
    vision_reason: str = ""
    vision_source: str = ""
    half_only: bool = False
    """Whether it computes in 16-bit numbers alone."""
    dropout: bool = True
    """Whether it can leave out a share of the attention weights."""
    cpu: bool = False
    cards: tuple[Support, ...]

    def on(self, capability: Capability | None) -> Support | None:
        """What is known of it on cards of this compute capability, None where it does not run."""
        asked = capability or UNKNOWN_CAPABILITY
        return next((card for card in self.cards if card.first <= asked <= card.last), None)


@cache
def attention_backends() -> dict[str, Backend]:
    """The table of presets/attention.yml by name, best first."""
    from pydantic import TypeAdapter

    content = read_preset("attention.yml")
    for entry in content:
        for card in entry["cards"]:
            card["first"], card["last"] = card.pop("from"), card.pop("to")
    found = TypeAdapter(tuple[Backend, ...]).validate_python(content)
    return {backend.name: backend for backend in found}


def flash_4_on(capability: Capability | None) -> str:
    """Whether FlashAttention 4 trains on a card, and why: "eligible: …" or "not eligible: …"."""
    backend = attention_backends()[FLASH_4]
    support = backend.on(capability)
    if support is None:
        return "not eligible: it needs Hopper or newer to train"
    if support.backward == "no":
        return f"not eligible: {support.reason}"
    return f"eligible: {support.reason}"


def worth_installing(capabilities: Sequence[Capability]) -> Backend | None:
    """The one package of attention code that serves all these cards better than PyTorch's own."""
    for backend in attention_backends().values():
        found = [backend.on(capability) for capability in capabilities]
        if found and all(support and support.worth_installing for support in found):
            return backend
    return None


def plan_gpus(text: str) -> tuple[tuple[Gpu, ...], int]:
    """(the GPUs of one computer, how many such computers) that `text` asks for: "H100 x2", "4 x
    A100 80GB", "24 GB", "2x80GB", "8 x 8 H100".

    They are free: nothing else uses a card that one does not have yet. More cards than a computer
    holds are taken to be in several. Raises UserError, with the nearest names, for a text that
    means no GPU or more than one kind.
    """
    name, counts = _split_counts(text)
    count, nodes = counts[-1], counts[0] if counts[1:] else 1
    if len(counts) == 1 and count > _NODE_GPUS and count % _NODE_GPUS == 0:
        count, nodes = _NODE_GPUS, count // _NODE_GPUS
    if not 1 <= count * nodes <= _MOST_GPUS:
        raise UserError(
            f"{count * nodes} GPUs cannot be planned for.",
            f"A plan is for 1 to {_MOST_GPUS} of them.",
            "Write the number before or after the name, as in --assume 'H100 x8'; computers before"
            " cards, as in '8 x 8 H100'.",
        )
    size = _SIZE.match(" ".join(name.casefold().split()))
    known = _unnamed(float(size[1]), text) if size else _find(name)
    return _planned(known, count), nodes


def _split_counts(text: str) -> tuple[str, list[int]]:
    """A name without the numbers around it, at most two: computers, and cards in each."""
    counts: list[int] = []
    while len(counts) < 2:
        bare = (_COUNT_BARE,) if counts and not _SIZE.match(text.casefold()) else ()
        found = (pattern.search(text) for pattern in (_COUNT_FIRST, *bare, _COUNT_LAST))
        match = next((each for each in found if each), None)
        if match is None:
            break
        counts.append(int(match[1]))
        text = (text[: match.start()] + text[match.end() :]).strip()
    return text.strip(), counts or [1]


def _unnamed(gigabytes: float, text: str) -> KnownGpu:
    if not 0 < gigabytes <= _MOST_GIGABYTES:
        raise UserError(
            f"A GPU of {visible(text, one_line=True)} cannot be planned for.",
            f"Memory is more than 0 and at most {_MOST_GIGABYTES} GB.",
            "Give the memory of one card, as in --assume '24 GB'.",
        )
    # Makers say GB and mean GiB; of that a card with ECC (A10, L4, L40S) reports 94 %.
    source = "the size that was asked for, in GiB"
    return KnownGpu(f"{gigabytes:g} GB GPU", int(gigabytes * GIB), (0, 0), "assumed", source)


def _find(name: str) -> KnownGpu:
    rest, gigabytes = _split_size(name)
    fitting = _called(name)
    if gigabytes and not fitting:
        # Before words are compared: all those of "RTX 4060 8GB" are in "RTX 4060 Ti 8GB" too.
        fitting = [gpu for gpu in _called(rest) if _holds(gpu, gigabytes)]
    fitting = fitting or _fitting(name)
    if gigabytes and not fitting:
        fitting = [gpu for gpu in _fitting(rest) if _holds(gpu, gigabytes)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(
            f"{visible(name, one_line=True)} means more than one GPU.",
            f"It can be {_either(fitting)}, and their memory or generation differ.",
            f"Write which: --assume '{short_name(fitting[0].name)}'.",
        )
    capability = _capability_of(rest)
    oldest = min(cuda_facts().torch_builds[0].capabilities["x86_64"])
    if capability and capability < oldest:
        raise UserError(
            f"{visible(rest, one_line=True)} is too old to plan for.",
            "Its compute capability is {}.{}, and the torch of the package index begins with"
            " {}.{}.".format(*capability, *oldest),
            "Name a card from Turing on, as in --assume 'T4'.",
        )
    if capability is None or gigabytes is None:
        raise _unknown(name, capability)
    return replace(
        _unnamed(gigabytes, name),
        name=f"{rest} {gigabytes:g}GB",
        compute_capability=capability,
    )


def _fitting(name: str) -> list[KnownGpu]:
    """The cards that a name means: those that are called so, else those that have all its words."""
    words = set(_words(name))
    every = ((gpu, _words(", ".join((gpu.name, *gpu.aliases)))) for gpu in known_gpus())
    return _called(name) or [gpu for gpu, all_words in every if words and words <= {*all_words}]


def _called(name: str) -> list[KnownGpu]:
    return [gpu for gpu in known_gpus() if _spell(name) in gpu.spellings]


def _split_size(name: str) -> tuple[str, float | None]:
    """A name without the memory that it says, and that in GB."""
    match = _SIZE_WITHIN.search(name)
    if match is None:
        return name, None
    rest = " ".join((name[: match.start()] + " " + name[match.end() :]).split())
    return rest, float(match[1])


def _holds(gpu: KnownGpu, gigabytes: float) -> bool:
    """Whether a shop would say this memory of the card, of which the driver reports less."""
    return 0.98 * gpu.memory_total_bytes <= gigabytes * GIB <= 1.11 * gpu.memory_total_bytes


def _capability_of(name: str) -> tuple[int, int] | None:
    spoken = " ".join(_words(name))
    for pattern, capability in cuda_facts().generations:
        if re.search(rf"\b(?:{pattern})\b", spoken):
            return capability
    return None


def _unknown(name: str, capability: tuple[int, int] | None) -> UserError:
    shown = visible(name, one_line=True)
    nearest = _nearest(name)
    guess = f"Did you mean {_either(nearest)}? " if nearest else ""
    if capability:
        why = "Its memory is not known here."
        fix = f"Write that too, as in --assume '{shown} 8GB'."
    else:
        why = f"It is none of the {len(known_gpus())} cards that are known."
        if not nearest:
            listed = ", ".join(short_name(gpu.name) for gpu in listed_gpus())
            why = f"Known are {listed} and {len(known_gpus()) - len(listed_gpus())} more."
        fix = "The memory of one card works too: --assume '24 GB'."
    return UserError(
        f"There is no GPU named {shown}." if name else "No GPU is named.", why, guess + fix
    )


def _nearest(name: str) -> list[KnownGpu]:
    spellings = {spelling: gpu for gpu in known_gpus() for spelling in gpu.spellings}
    close = get_close_matches(_spell(name), spellings, n=6, cutoff=0.5)
    return list(dict.fromkeys(spellings[spelling] for spelling in close))[:3]


def _spell(name: str) -> str:
    return "".join(_words(name))


def _words(name: str) -> list[str]:
    """Lower-case words; "80 GB" is one, "RTX4090" are two, the maker's name is none."""
    text = re.sub(r"(\d)\s+g(?:i?b)?\b", r"\1gb", name.casefold())
    text = re.sub(r"\b(\d+)g(?:ib)?\b", r"\1gb", re.sub(r"\brtx(?=\d)", "rtx ", text))
    return [word for word in re.findall(r"[a-z0-9]+", text) if word not in _NOISE]


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
