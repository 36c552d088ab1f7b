"""Libraries that only a CUDA card runs: each computes by a slow reference and asserts its contract.

The contracts were read in torch 2.13.0, flash-attn 2.8.3 (csrc/flash_attn/flash_api.cpp),
flash-attn-4 4.0.0b36 (flash_attn/cute/interface.py) and cut-cross-entropy 25.1.1 (cce.py). The
references are written anew, with nothing of the engine's, so that one error cannot be in both.
"""

import inspect
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen

CALLS: Counter[str] = Counter()
"""How often each attention was asked, by its name in `attn_implementation`."""
HALVES = (torch.bfloat16, torch.float16)
VECTOR_BYTES = 16
REAL_VARLEN = inspect.signature(varlen.varlen_attn)


def matrix_product(left: Tensor, right: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """torch.mm(..., out_dtype=)."""
    check_product(left, right, out_dtype)
    return torch.mm(left.float(), right.float())


def check_product(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> None:
    """What it asks for on a card: half precision in, float32 out, and no gradient wanted of it."""
    assert left.dtype == right.dtype, f"{left.dtype} times {right.dtype}"
    assert left.dtype in HALVES, f"out_dtype widens half precision, not {left.dtype}"
    assert out_dtype == torch.float32, out_dtype
    assert left.dim() == right.dim() == 2
    assert not (torch.is_grad_enabled() and (left.requires_grad or right.requires_grad))
    for matrix in (left, right):
        assert 1 in matrix.stride() or 1 in matrix.shape, "cuBLAS takes rows or columns"


def check_grouped_product(rows: Tensor, stack: Tensor, *, offs: Tensor) -> None:
    """torch.nn.functional.grouped_mm of rows that are sorted by matrix: (rows, k) x (n, k, m)."""
    assert rows.dtype == stack.dtype
    assert rows.dtype in (*HALVES, torch.float32)
    assert (rows.dim(), stack.dim()) == (2, 3)
    assert rows.shape[1] == stack.shape[1]
    assert offs.dtype == torch.int32, f"int32 offsets, not {offs.dtype}"
    assert offs.shape == stack.shape[:1]
    assert int(offs[-1]) == rows.shape[0], "rows behind the last offset are never written"
    for tensor in (rows, stack):
        assert tensor.data_ptr() % VECTOR_BYTES == 0, "not aligned"
        assert 1 in tensor.stride()[-2:]
        wide = [side for side in tensor.stride()[-2:] if side != 1]
        assert all(side * tensor.element_size() % VECTOR_BYTES == 0 for side in wide)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    scale: float | None,
    window: tuple[int, int],
    causal: bool,
) -> Tensor:
    """Attention of each row alone, by all scores at once; `window`: left and right, -1 for all."""
    tokens, heads, width = query.shape
    key, value = (s.float().repeat_interleave(heads // s.shape[1], 1) for s in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.float(), key) * (
        width**-0.5 if scale is None else scale
    )
    place = torch.arange(tokens)
    row = torch.bucketize(place, bounds[1:].long(), right=True)
    apart = place[:, None] - place[None]
    seen = row[:, None] == row[None]
    left, right = window
    seen &= apart <= left if left >= 0 else True
    right = 0 if causal else right
    seen &= -apart <= right if right >= 0 else True
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).to(query.dtype)


def check_rows(
    states: tuple[Tensor, Tensor, Tensor], bounds: tuple[Any, Any], longest: tuple[Any, Any]
) -> None:
    """What every kernel for rows of different lengths asserts, or silently takes for granted."""
    query, key, value = states
    for state in states:
        assert state.dtype in HALVES, f"half precision only, not {state.dtype}"
        assert state.dtype == query.dtype
        assert state.dim() == 3, "(tokens, heads, width)"
        assert state.stride(-1) == 1, "the last dimension must be contiguous"
        assert state.data_ptr() % VECTOR_BYTES == 0, "not aligned"
        assert all(side * state.element_size() % VECTOR_BYTES == 0 for side in state.stride()[:-1])
    assert query.shape[-1] == key.shape[-1]
    assert key.shape[:2] == value.shape[:2]
    assert query.shape[-1] <= 256
    assert query.shape[1] % key.shape[1] == 0, "heads of keys must divide those of queries"
    for ends, state, most in zip(bounds, (query, key), longest, strict=True):
        assert isinstance(ends, Tensor)
        assert ends.dtype == torch.int32, f"int32 bounds, not {ends.dtype}"
        assert ends.dim() == 1
        assert ends.is_contiguous()
        assert ends.device == state.device
        assert type(most) is int, f"an int, not {type(most).__name__}"
        assert int(ends[0]) == 0
        assert int(ends[-1]) == state.shape[0]
        assert int(ends.diff().max()) <= most, "a row is longer than was said"


def varlen_attn(*args: Any, **options: Any) -> Tensor:
    """torch.nn.attention.varlen's, by its real signature."""
    CALLS["flash_attention_torch"] += 1
    bound = REAL_VARLEN.bind(*args, **options)
    bound.apply_defaults()
    given = bound.arguments
    states = (given["query"], given["key"], given["value"])
    bounds = (given["cu_seq_q"], given["cu_seq_k"])
    check_rows(states, bounds, (given["max_q"], given["max_k"]))
    assert len({state.shape[-1] for state in states}) == 1, "one width of all heads"
    assert states[0].shape[-1] % 8 == 0
    assert given["enable_gqa"] or states[0].shape[1] == states[1].shape[1], "set enable_gqa"
    assert given["scale"] is None or type(given["scale"]) is float
    window = given["window_size"]
    assert [type(side) for side in window] == [int, int]
    return attend(*states, bounds[0], given["scale"], window, causal=window == (-1, 0))


def flash_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: None = None,
) -> Tensor:
    """flash_attn_varlen_func of flash-attn 2.8.3."""
    CALLS["flash_attention_2"] += 1
    check_rows((q, k, v), (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k))
    assert q.shape[-1] == v.shape[-1], "one width of all heads"
    assert [type(side) for side in window_size] == [int, int]
    assert not softcap
    assert not dropout_p
    return attend(q, k, v, cu_seqlens_q, softmax_scale, window_size, causal)


def cute_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: None = None,
    seqused_k: None = None,
    gather_kv_indices: None = None,
    page_table: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, None]:
    """flash_attn_varlen_func of flash-attn-4 4.0.0b36, as far as a training run may give."""
    CALLS["flash_attention_4"] += 1
    check_rows((q, k, v), (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k))
    assert q.shape[-1] % 8 == v.shape[-1] % 8 == 0
    assert not softcap
    left, right = (-1 if side is None else side for side in window_size)
    assert cu_seqlens_q is not None
    return attend(q, k, v, cu_seqlens_q, softmax_scale, (left, right), causal), None


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool = False,
    filter_eps: float | str | None = "high",
    impl: str = "cce",
) -> Tensor:
    """cut_cross_entropy's; the states' gradient comes in their own precision, as there."""
    assert e.dtype == c.dtype
    assert e.dtype in HALVES, f"its backward pass is for half precision, not {e.dtype}"
    assert e.shape[:-1] == targets.shape
    assert e.shape[-1] == c.shape[-1]
    assert e.shape[-1] % 8 == 0
    assert (c.shape[0] * c.element_size()) % VECTOR_BYTES == 0
    assert targets.dtype == torch.int64
    assert impl == "cce"
    assert reduction == "sum"
    logits = e.float() @ c.float().t()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


KERNELS: dict[str, Any] = {
    "torch.nn.attention.varlen.varlen_attn": varlen_attn,
    "cut_cross_entropy.linear_cross_entropy": linear_cross_entropy,
}
"""Where each stands in, by its place."""
