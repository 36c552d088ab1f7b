"""Which attention code a run uses, and why: of the installed ones the best that fits the card.

The trainer asks the same table before it loads anything. What each one can do is data,
presets/attention.yml; here is how a row of it is found for a model, a card and rows with or without
images.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.catalog import Architecture
from engine.config import RunConfig
from engine.errors import UserError
from engine.hardware import attention_backends, flash_4_on
from engine.hardware.known import FLASH_4, Backend
from engine.plan.device import Device
from engine.plan.trainer import computes_in_bf16

PATH_ON_CPU = "sdpa"


@dataclass(frozen=True, slots=True)
class Heads:
    """What attention looks like in one model's language layers."""

    architecture: str
    """model_type of the language model."""
    query: int
    """Numbers of a query's and a key's head."""
    value: int
    """Numbers of a value's head; another width than `query` in multi-head latent attention."""
    dropout: float = 0.0
    """The share of attention weights that the model's config leaves out while training."""


@dataclass(frozen=True, slots=True)
class Task:
    """What the attention code has to do."""

    heads: Heads
    images: bool = False
    """Whether rows have images."""
    half: bool = True
    """Whether the run computes in 16-bit numbers."""


def task_of(
    config: RunConfig, architecture: Architecture, device: Device, images: bool | None = None
) -> Task:
    """What the attention code of a run has to do; rows have images by `processor_type` where nobody
    knows better."""
    seen = config.processor_type is not None if images is None else images
    return Task(heads_of(architecture), seen, computes_in_bf16(config, device))


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


def find_backend(name: str) -> Backend:
    """The backend of a value of `attn_implementation`; KeyError for one that is none of ours."""
    backends = attention_backends()
    other = (found for found in backends.values() if name in found.also_named)
    return backends.get(name) or next(other, None) or backends[name]


def heads_of(architecture: Architecture) -> Heads:
    """The attention heads of the language model."""
    text = architecture.config.get("text_config", architecture.config)
    if "kv_lora_rank" in text:
        query, value = text["qk_nope_head_dim"] + text["qk_rope_head_dim"], text["v_head_dim"]
    else:
        query = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        value = query
    return Heads(text["model_type"], query, value, text.get("attention_dropout") or 0.0)


def choose_attention(device: Device, task: Task) -> Attention:
    """The backend for `task` on `device`."""
    if device.kind == "cpu":
        return Attention(PATH_ON_CPU, "the one that a CPU runs")
    suited = list(_suited(device, task))
    backend, reason = next((item for item in suited if _installed(item[0], device)), suited[-1])
    return Attention(
        backend.name,
        reason,
        worth_installing=_worth_installing(suited[0][0], backend, device),
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
    if device.planned or _installed(backend, device):
        return None
    if clash := _overwritten(backend, device):
        return (
            f"{backend.title} may be broken: {clash} is installed too, with files of the same name."
        )
    where = f"(package {backend.package})" if backend.on_index else "and on no package index"
    return f"{backend.title} is not installed {where}."


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
        support = backend.on(device.compute_capability)
        if support and support.backward == "yes" and not _unsuited(backend, device, task):
            yield backend, support.reason


def _unsuited(backend: Backend, device: Device, task: Task) -> str:
    """What speaks against a backend, installed or not; empty where nothing does."""
    support, heads = backend.on(device.compute_capability), task.heads
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
    if heads.dropout and not backend.dropout:
        return f"it has no dropout, and this model's attention_dropout is {heads.dropout:g}"
    wide = heads.query > support.largest_query_head or heads.value > support.largest_value_head
    if wide and heads.query not in support.also_heads:
        return f"its heads are up to {support.largest_query_head} wide, this model's {heads.query}"
    if heads.query != heads.value and not support.uneven:
        return f"it wants heads of one width, this model's are {heads.query} and {heads.value}"
    return ""


def _flash_4(device: Device, task: Task) -> str:
    """Whether FlashAttention 4 is eligible here, and why, in a sentence without its full stop."""
    backend = attention_backends()[FLASH_4]
    if backend.on(device.compute_capability) and (reason := _unsuited(backend, device, task)):
        return f"{backend.title} is not eligible: {reason}"
    return f"{backend.title} is {flash_4_on(device.compute_capability)}"


def _worth_installing(best: Backend, chosen: Backend, device: Device) -> str | None:
    """The package to install for `best`; none where it would overwrite one that is installed."""
    support = best.on(device.compute_capability)
    if best is chosen or support is None or not support.worth_installing:
        return None
    return None if _overwritten(best, device) else best.package


def _overwritten(backend: Backend, device: Device) -> str:
    """An installed package that has files of the same name; empty where none is."""
    stack = device.stack or {}
    return next((package for package in backend.overwritten_by if stack.get(package)), "")


def _installed(backend: Backend, device: Device) -> bool:
    """Whether its package is there, and whole; torch is what every run brings."""
    if backend.package == "torch":
        return True
    return bool((device.stack or {}).get(backend.package)) and not _overwritten(backend, device)
