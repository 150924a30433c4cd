"""The append's launch: writes new keys and values into the cache, and rotates the queries if the call does."""

from __future__ import annotations

import math
from typing import Any

from ..operands import Operands
from ..problem import Problem
from .launch import ABSENT, ROW_WARPS, Launch, element_strides, make_launch, row_strides
from .source import Variant, element_defines


def append_variant(dtype: str) -> Variant:
    """Return the kernel."""
    return Variant("append", (*element_defines(dtype), ("WARPS", ROW_WARPS)))


def append_launch(problem: Problem, operands: Operands) -> Launch | None:
    """Return the launch, or None if there is nothing to write."""
    q, k, v, cache, rotary = operands.q, operands.k, operands.v, operands.cache, operands.rotary
    if k is None:
        return None
    query_tokens, new_tokens = 0 if rotary is None else math.prod(q.shape[:-2]), math.prod(k.shape[:-2])
    rows = query_tokens * problem.num_heads_q + 2 * new_tokens * problem.num_heads_kv
    if not rows:
        return None
    ragged = operands.lengths.cu_seqlens_k_new is not None
    values: dict[str, Any] = {
        **row_strides("q", element_strides(q), problem.cu_seqlens_q),
        "page_table_stride": 0 if cache.page_table is None else element_strides(cache.page_table)[0],
        "capacity": min(cache.capacity, 2**31 - 1),
        "batch_size": problem.batch_size,
        "query_tokens": query_tokens,
        "new_tokens": new_tokens,
        "max_seqlen_q": problem.max_seqlen_q,
        "max_seqlen_k_new": operands.lengths.seqlen_k_new,
        "num_heads_q": problem.num_heads_q,
        "num_heads_kv": problem.num_heads_kv,
        "headdim": problem.headdim,
        "headdim_v": problem.headdim_v,
        "page_size": cache.page_size,
        "rotary_dim": 0 if rotary is None else rotary.dim,
        "rotary_interleaved": rotary is not None and rotary.interleaved,
        "rotary_moves": rotary is not None and rotary.moves,
    }
    for name, new, kept in (("k", k, cache.k), ("v", v, cache.v)):
        strides = element_strides(new)
        values[f"{name}_batch_stride"] = 0 if ragged else strides[0]
        values[f"{name}_token_stride"], values[f"{name}_new_head_stride"] = strides[-3], strides[-2]
        for axis, stride in zip(("page", "row", "head"), element_strides(kept)):
            values[f"{name}_{axis}_stride"] = stride
    grid, arrays = -(-rows // ROW_WARPS), {} if rotary else {"q_rotated": ABSENT}
    return make_launch(append_variant(problem.qkv_dtype), "AppendParams", grid, 32 * ROW_WARPS, 0, values, arrays)
