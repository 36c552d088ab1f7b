"""Which attention code runs on which card: the table of presets/attention.yml.

`engine.plan.attention` chooses from it for a model and its rows; what is said of a card alone, and
which package is worth installing for it, is here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

UNKNOWN_CAPABILITY = (8, 0)
"""A card that only its memory is known of is taken for Ampere, the oldest that most people have."""
FLASH_4 = "flash_attention_4"

Capability = tuple[int, int]


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
    from ruamel.yaml import YAML

    text = (files("presets") / "attention.yml").read_text(encoding="utf-8")
    content = YAML(typ="safe", pure=True).load(text)
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
