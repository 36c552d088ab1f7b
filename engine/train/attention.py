"""Attention that cuts packed rows apart where each begins, and which backend a run gets.

transformers keeps packed rows apart by a mask of length squared, or under FlashAttention by their
positions, and the latter in batches of one sequence only: with two it mixes the rows without a
word. Here the mask that a model makes is replaced by the places where rows begin, once a forward
pass, and every backend that can cut gets them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from engine.catalog import Architecture
from engine.config import RunConfig
from engine.hardware import attention_backends
from engine.plan import choose_attention
from engine.plan.attention import Attention, find_backend, follow_attention, task_of
from engine.train.device import as_planned

TORCH_VARLEN = "torch_varlen"
"""Our name in transformers for PyTorch's kernel; one that holds "flash" is taken for the package
flash-attn there."""
KERNEL_CAPABILITY = (8, 0)
KERNEL_WIDTH = 256
"""The widest head that PyTorch's kernel takes."""

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, slots=True)
class Segments:
    """Where rows lie when all sequences of a batch are laid end to end."""

    bounds: Tensor
    """int32 (rows + 1,): where each row begins, and the end of the last one."""
    longest: int
    """Tokens of the longest row."""


def find_segments(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    device: torch.device,
    attention_mask: Tensor | None = None,
    **_: object,
) -> Segments | None:
    """What stands in for a mask: a row begins where a token may not see the one before it.

    None while text is generated with a cache, where a query is shorter than what it sees. Raises
    ValueError for a mask of padding, which would be ignored.
    """
    if attention_mask is not None:
        raise ValueError("rows are kept apart by their positions: pass no attention mask")
    if q_length != kv_length:
        return None
    token = torch.arange(q_length, device=device)[None]
    sequence = torch.arange(batch_size, device=device)[:, None]
    sees = mask_function(sequence, 0, token, (token - 1).clamp(min=0))
    begins = ~torch.broadcast_to(sees, (batch_size, q_length)) | (token == 0)
    starts = begins.flatten().nonzero().flatten()
    bounds = functional.pad(starts, (0, 1), value=batch_size * q_length).to(torch.int32)
    return Segments(bounds, int(bounds.diff().max()))


def attend_cut(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Segments | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function `torch_varlen`.

    (batch, heads, length, width) -> (batch, length, heads, width), like every one of them.
    """
    if attention_mask is None:
        return attend_stock(
            module, query, key, value, None, dropout=dropout, scaling=scaling, **options
        )
    dtype = query.dtype
    if dtype == torch.float32 and torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    q, k, v = (state.transpose(1, 2).flatten(0, 1).to(dtype) for state in (query, key, value))
    if not dropout and _fits_kernel(q, v):
        mixed = attend_by_kernel(q, k, v, attention_mask, scaling, sliding_window)
    else:
        mixed = attend_row_by_row(q, k, v, attention_mask, scaling, sliding_window, dropout)
    return mixed.unflatten(0, (query.shape[0], query.shape[2])), None


def attend_stock(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' `sdpa`, with as many heads of keys as of queries where that saves memory."""
    holder: Any = module
    if query.shape[2] > 1 and needs_equal_heads(query):
        key, value = (repeat_heads(state, query.shape[1], 1) for state in (key, value))
        holder = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    return sdpa_attention_forward(holder, query, key, value, *rest, **options)


def needs_equal_heads(query: Tensor) -> bool:
    """Whether PyTorch would keep every score if keys had fewer heads than queries.

    In float32 a card has one kernel that keeps none, the memory-efficient one, and that takes no
    grouped heads (`can_use_mem_efficient_attention` in sdp_utils.cpp).
    """
    return query.device.type == "cuda" and query.dtype == torch.float32


def repeat_heads(state: Tensor, heads: int, dim: int) -> Tensor:
    """Each head of `dim` as often as it takes to make so many."""
    shared = heads // state.shape[dim]
    return state.repeat_interleave(shared, dim) if shared > 1 else state


def attend_row_by_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Segments,
    scaling: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention inside each row, one after another, on any device and in any precision.

    (tokens, heads, width) -> (tokens, heads, width of a value); keys may have fewer heads. A
    `window` lets a token see so many up to itself.
    """
    if needs_equal_heads(query):
        key, value = (repeat_heads(state, query.shape[1], 1) for state in (key, value))
    sizes = rows.bounds.diff().tolist()
    states = [state.transpose(0, 1).split(sizes, 1) for state in (query, key, value)]
    mixed = []
    for size, q, k, v in zip(sizes, *states, strict=True):
        band = None
        if window is not None and size > window:
            band = torch.ones(size, size, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        row = functional.scaled_dot_product_attention(
            q[None],
            k[None],
            v[None],
            attn_mask=band,
            dropout_p=dropout,
            is_causal=band is None,
            scale=scaling,
            enable_gqa=True,
        )
        mixed.append(row[0])
    return torch.cat(mixed, 1).transpose(0, 1)


def attend_by_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Segments,
    scaling: float | None = None,
    window: int | None = None,
) -> Tensor:
    """The same by PyTorch's kernel, which wants one width of all heads."""
    from torch.nn.attention.varlen import varlen_attn

    width = value.shape[-1]
    mixed = varlen_attn(
        query,
        key,
        functional.pad(value, (0, query.shape[-1] - width)),
        rows.bounds,
        rows.bounds,
        rows.longest,
        rows.longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),  # none of what follows
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(mixed, Tensor)
    return mixed[..., :width]


def _fits_kernel(query: Tensor, value: Tensor) -> bool:
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(query.device) >= KERNEL_CAPABILITY
        and value.shape[-1] <= query.shape[-1] <= KERNEL_WIDTH
    )


def hand_over_rows(stock: AttentionFunction) -> AttentionFunction:
    """A FlashAttention function of transformers that is given where rows begin.

    Given nothing, it looks for rows in batches of one sequence only.
    """

    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Segments | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if attention_mask is not None:
            options |= {
                "cu_seq_lens_q": attention_mask.bounds,
                "cu_seq_lens_k": attention_mask.bounds,
                "max_length_q": attention_mask.longest,
                "max_length_k": attention_mask.longest,
            }
        return stock(module, query, key, value, None, **options)

    return attend


def use_attention(settings: PreTrainedConfig, backend: str) -> None:
    """Set a model's config to `backend`, a value of `attn_implementation`.

    The vision tower keeps PyTorch's own attention: it has a mask of its own, and few tokens.
    """
    register_backends()
    name = find_backend(backend).name
    name = TORCH_VARLEN if name == "flash_attention_torch" else name
    towers = {key: "sdpa" for key in settings.sub_configs if key != "text_config"}
    settings._attn_implementation = {"": name, "text_config": name, **towers}


def register_backends() -> None:
    """Make transformers cut rows apart under our backend and under every FlashAttention."""
    AttentionInterface.register(TORCH_VARLEN, attend_cut)
    AttentionInterface.register("sdpa", attend_stock)
    AttentionMaskInterface.register(TORCH_VARLEN, find_segments)
    for name in attention_backends():
        if name in ("flash_attention_2", "flash_attention_3", "flash_attention_4"):
            AttentionInterface.register(name, hand_over_rows(flash_attention_forward))
            AttentionMaskInterface.register(name, find_segments)


def pick_attention(
    config: RunConfig, architecture: Architecture, device: torch.device, *, images: bool = False
) -> Attention:
    """The config's backend, else the best of those that are installed and suit.

    Raises UserError where the config asks for one that cannot train this model here.
    """
    place = as_planned(device)
    task = task_of(config, architecture, place, images)
    if config.attn_implementation is None:
        return choose_attention(place, task)
    return follow_attention(config.attn_implementation, place, task)
