"""The definition of what cuflash computes, in float64 and plain loops; it shares nothing with the library."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Answer:
    """What a call must give.

    Attributes:
        out: The output in float64, in the shape of q but for the last dimension.
        lse: (batch, heads, sq) or, for ragged queries, (heads, total).
        magnitude: sum of p * |v| for every output element: what its error is to be measured by.
        k_cache: The key cache after the call, in its own dtype and layout.
        v_cache: The value cache after the call.
    """

    out: np.ndarray
    lse: np.ndarray
    magnitude: np.ndarray
    k_cache: np.ndarray
    v_cache: np.ndarray


def attention(
    q: np.ndarray,
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    *,
    cache_seqlens: Any,
    k: np.ndarray | None = None,
    v: np.ndarray | None = None,
    rotary_cos: np.ndarray | None = None,
    rotary_sin: np.ndarray | None = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    page_table: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k_new: Any = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    sinks: np.ndarray | None = None,
    layout: str = "NHD",
    **_: Any,
) -> Answer:
    """Attend by the definition; the arguments are those of ``flash_attn_with_kvcache``, the caches are not changed."""
    k_cache, v_cache = k_cache.copy(), v_cache.copy()
    batch = len(cache_seqlens)
    ragged = cu_seqlens_q is not None
    num_heads, headdim = q.shape[-2:]
    group = num_heads // (k_cache.shape[1] if layout == "HND" else k_cache.shape[2])
    scale = headdim**-0.5 if softmax_scale is None else softmax_scale
    left, right = window_size[0], 0 if causal else window_size[1]
    moves = causal or tuple(window_size) != (-1, -1) or attention_chunk > 0

    out = np.zeros((*q.shape[:-1], v_cache.shape[-1]))
    magnitude = np.zeros_like(out)
    lse = np.zeros((num_heads, len(q)) if ragged else (batch, num_heads, q.shape[1]))
    appends = []
    for b in range(batch):
        appends.append(0)
        if k is not None:
            new = slice(cu_seqlens_k_new[b], cu_seqlens_k_new[b + 1]) if cu_seqlens_k_new is not None else b
            appends[b] = len(k[new])
            for t, (key, value) in enumerate(zip(k[new], v[new], strict=True)):
                if rotary_cos is not None:
                    base = cache_seqlens[b] if rotary_seqlens is None else rotary_seqlens[b]
                    key = rotate(key, rotary_cos[base + t], rotary_sin[base + t], rotary_interleaved, np.float32)
                slot = find(b, cache_seqlens[b] + t, k_cache, layout, cache_batch_idx, page_table)
                k_cache[slot], v_cache[slot] = key, value

    for b in range(batch):
        leftpad = 0 if cache_leftpad is None else int(cache_leftpad[b])
        sk = int(cache_seqlens[b]) + appends[b] - leftpad
        rows = range(cu_seqlens_q[b], cu_seqlens_q[b + 1]) if ragged else range(q.shape[1])
        slots = [find(b, leftpad + j, k_cache, layout, cache_batch_idx, page_table) for j in range(sk)]
        for i, row in enumerate(rows):
            query = q[row] if ragged else q[b, row]
            if rotary_cos is not None:
                base = cache_seqlens[b] if rotary_seqlens is None else rotary_seqlens[b]
                at = base + i if moves else base
                query = rotate(query, rotary_cos[at], rotary_sin[at], rotary_interleaved, np.float64).astype(q.dtype)
            position = i + sk - len(rows)
            seen = [slots[j] for j in range(sk) if is_visible(j, position, left, right, attention_chunk)]
            keys = np.array([k_cache[slot] for slot in seen], np.float64)  # (seen, KV heads, d)
            values = np.array([v_cache[slot] for slot in seen], np.float64)
            for head in range(num_heads):
                exponents = [] if sinks is None else [float(sinks[head])]
                if seen:
                    scores = keys[:, head // group] @ query[head].astype(np.float64) * scale
                    if softcap > 0:
                        scores = softcap * np.tanh(scores / softcap)
                    exponents += scores.tolist()
                total = log_sum_exp(exponents)
                lse[(head, row) if ragged else (b, head, row)] = total
                if seen:
                    top = max(exponents)  # not the LSE, which of huge scores has no bits left for the sum
                    p = np.exp(scores - top) / math.fsum(math.exp(x - top) for x in exponents)
                    at_row = (row, head) if ragged else (b, row, head)
                    out[at_row] = p @ values[:, head // group]
                    magnitude[at_row] = p @ np.abs(values[:, head // group])
    return Answer(out, lse, magnitude, k_cache, v_cache)


def is_visible(j: int, position: int, left: int, right: int, chunk: int) -> bool:
    """Whether a query at ``position`` sees key ``j``; both count from the first valid key."""
    if left >= 0 and j < position - left:
        return False
    if right >= 0 and j > position + right:
        return False
    return not chunk or j // chunk == position // chunk


def find(b: int, position: int, cache: np.ndarray, layout: str, cache_batch_idx: Any, page_table: Any) -> tuple:
    """Return the index of one key of sequence ``b`` in a cache: it selects (KV heads, d)."""
    row = b if cache_batch_idx is None else int(cache_batch_idx[b])
    if page_table is not None:
        page_size = cache.shape[2] if layout == "HND" else cache.shape[1]
        row, position = int(page_table[row, position // page_size]), position % page_size
    return (row, slice(None), position) if layout == "HND" else (row, position)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool, dtype: type) -> np.ndarray:
    """Rotate the first 2 * len(cos) elements of x (heads, d) by the angles of one position."""
    x = x.astype(dtype)
    result = x.copy()
    for pair, (c, s) in enumerate(zip(cos.astype(dtype), sin.astype(dtype), strict=True)):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + len(cos))
        result[:, first] = x[:, first] * c - x[:, second] * s
        result[:, second] = x[:, first] * s + x[:, second] * c
    return result


def log_sum_exp(exponents: list[float]) -> float:
    """Return log(sum(exp(exponents))), -inf for none."""
    top = max(exponents, default=-math.inf)
    if top == -math.inf:
        return -math.inf
    return top + math.log(math.fsum(math.exp(x - top) for x in exponents))
