"""Which attention code a run uses, and why: of the installed ones the best that fits the card.

Separate from `recommend` because the trainer asks the same table before it loads anything. What
each one can do is data, presets/attention.yml; here is how a row of it is found for a model, a
card and rows with or without images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

from engine.catalog import Architecture
from engine.errors import UserError
from engine.plan.device import Device

PATH_ON_CPU = "sdpa"
UNKNOWN_CAPABILITY = (8, 0)
"""A card that only its memory is known of is taken for Ampere, the oldest that most people have."""


@dataclass(frozen=True, slots=True)
class Heads:
    """What attention looks like in one model's language layers."""

    architecture: str
    """model_type of the language model."""
    query: int
    """Numbers of a query's and a key's head."""
    value: int
    """Numbers of a value's head; another width than `query` in multi-head latent attention."""


@dataclass(frozen=True, slots=True)
class Task:
    """What the attention code has to do."""

    heads: Heads
    images: bool = False
    """Whether rows have images."""
    half: bool = True
    """Whether the run computes in 16-bit numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """One backend on one range of cards."""

    first: tuple[int, int]
    """Compute capability; also `last`, which is included."""
    last: tuple[int, int]
    forward: Literal["yes", "no"]
    backward: Literal["yes", "no", "source"]
    """`source`: only in a build from source, which nothing but a run shows."""
    largest_query_head: int
    largest_value_head: int
    uneven: bool = False
    """Whether queries and values may have heads of different widths."""
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
    also_named: tuple[str, ...] = ()
    """Other values of `attn_implementation` that this one carries out, with the same result."""
    stands_in_for: tuple[str, ...] = ()
    """Backends whose work it does, as exactly, where their package or a GPU is missing."""
    architectures: tuple[str, ...]
    packing: Literal["cut", "mask", "blocks"]
    """How it keeps packed rows apart; a mask grows with sequence_len squared."""
    vision: bool
    vision_reason: str = ""
    vision_source: str = ""
    half_only: bool = False
    """Whether it computes in 16-bit numbers alone."""
    cpu: bool = False
    cards: tuple[Support, ...]

    def on(self, device: Device) -> Support | None:
        """What is known of it on cards as `device` is one."""
        capability = device.compute_capability or UNKNOWN_CAPABILITY
        return next((card for card in self.cards if card.first <= capability <= card.last), None)


@dataclass(frozen=True, slots=True)
class Attention:
    """The choice for one model on one device."""

    backend: str
    """A value of `attn_implementation`."""
    reason: str
    worth_installing: str | None = None
    """A package that would serve better here."""
    flash_4: str = ""
    """Whether FlashAttention 4 is eligible, in a sentence."""


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


def find_backend(name: str) -> Backend:
    """The backend of a value of `attn_implementation`; KeyError for one that is none of ours."""
    backends = attention_backends()
    other = (found for found in backends.values() if name in found.also_named)
    return backends.get(name) or next(other, None) or backends[name]


def heads_of(architecture: Architecture) -> Heads:
    """The attention heads of the language model."""
    text = architecture.config.get("text_config", architecture.config)
    if "kv_lora_rank" in text:
        query = text["qk_nope_head_dim"] + text["qk_rope_head_dim"]
        return Heads(text["model_type"], query, text["v_head_dim"])
    width = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    return Heads(text["model_type"], width, width)


def choose_attention(device: Device, task: Task) -> Attention:
    """The backend for `task` on `device`."""
    if device.kind == "cpu":
        return Attention(PATH_ON_CPU, "the one that a CPU runs")
    suited = list(_suited(device, task))
    backend, reason = next((item for item in suited if _installed(item[0], device)), suited[-1])
    best = suited[0][0]
    return Attention(
        backend.name,
        reason,
        worth_installing=None if _installed(best, device) else best.package,
        flash_4=_flash_4(device, task),
    )


def why_not(name: str, device: Device, task: Task) -> str | None:
    """Why the backend `name` cannot carry out `task` on `device`, in one sentence, or None.

    Nobody knows what will be installed beside a planned card.
    """
    backend = find_backend(name)
    if device.kind == "cpu":
        return None if backend.cpu else f"{backend.title} needs a GPU."
    if reason := _unsuited(backend, device, task):
        return f"{backend.title}: {reason}."
    if not device.planned and not _installed(backend, device):
        return f"{backend.title} is not installed (package {backend.package})."
    return None


def follow_attention(name: str, device: Device, task: Task) -> Attention:
    """The backend that carries out a config's `attn_implementation: name` here.

    FlashAttention 2 is what most files name: where only its package or a GPU is missing, what
    PyTorch has of it stands in. Raises UserError where the request does not suit card or task.
    """
    reason = why_not(name, device, task)
    if reason is None:
        return Attention(name, "as the config says")
    if other := _stand_in(find_backend(name), device, task):
        return Attention(other.name, f"{reason} This computes the same")
    better = choose_attention(device, task)
    raise UserError(
        f"attn_implementation: {name} cannot be used here.",
        reason,
        f"Write attn_implementation: {better.backend} ({better.reason}), or remove the key.",
    )


def _stand_in(backend: Backend, device: Device, task: Task) -> Backend | None:
    if device.kind == "cuda" and _unsuited(backend, device, task):
        return None
    others = (o for o in attention_backends().values() if backend.name in o.stands_in_for)
    return next((other for other in others if why_not(other.name, device, task) is None), None)


def needs_mask(name: str | None, device: Device) -> bool:
    """Whether packed rows cost a mask of sequence_len squared under backend `name` on `device`.

    None is the one that is chosen by itself.
    """
    if name is None or device.kind == "cpu":
        return device.kind == "cpu"
    return find_backend(name).packing == "mask"


def _suited(device: Device, task: Task) -> Iterator[tuple[Backend, str]]:
    """The backends whose both passes exist ready-made, best first, each with what speaks for it.

    The last of them are part of PyTorch and run on every card.
    """
    for backend in attention_backends().values():
        support = backend.on(device)
        if support and support.backward == "yes" and not _unsuited(backend, device, task):
            yield backend, support.reason


def _unsuited(backend: Backend, device: Device, task: Task) -> str:
    """What speaks against a backend, installed or not; empty where nothing does."""
    support, heads = backend.on(device), task.heads
    if heads.architecture not in backend.architectures:
        return f"it does not know {heads.architecture}"
    if support is None:
        return f"it does not run on {device.name}"
    if "no" in (support.forward, support.backward):
        return support.reason
    if task.images and not backend.vision:
        return backend.vision_reason
    if backend.half_only and not task.half:
        return "it computes in 16-bit numbers only, and this run in float32"
    if heads.query > support.largest_query_head or heads.value > support.largest_value_head:
        return f"its heads are up to {support.largest_query_head} wide, this model's {heads.query}"
    if heads.query != heads.value and not support.uneven:
        return f"it wants heads of one width, this model's are {heads.query} and {heads.value}"
    return ""


def _flash_4(device: Device, task: Task) -> str:
    """Whether FlashAttention 4 is eligible here, in a sentence."""
    backend = attention_backends()["flash_attention_4"]
    if reason := _unsuited(backend, device, task):
        return f"FlashAttention 4 is not eligible: {reason}"
    support = backend.on(device)
    if support and support.backward == "source":
        return f"FlashAttention 4 is {support.reason}"
    return "FlashAttention 4 is eligible"


def _installed(backend: Backend, device: Device) -> bool:
    """Whether its package is there; torch is what every run brings."""
    return backend.package == "torch" or bool((device.stack or {}).get(backend.package))
