"""The append's launch: writes new keys and values into the cache, and rotates the queries if the call does."""

from __future__ import annotations

import math
from typing import Any

from ..operands import Operands
from ..problem import Problem
from .fields import cache_arrays, cache_fields, length_fields, scale_fields, shard_fields
from .launch import ABSENT, ROW_WARPS, Launch, element_strides, make_launch, row_strides
from .source import Variant, element_defines


def append_variant(q_dtype: str, kv_dtype: str, new_dtype: str | None = None) -> Variant:
    """Return the kernel.

    Args:
        q_dtype: Element type of queries.
        kv_dtype: That of the cache.
        new_dtype: That of new keys and values, of rotary tables and rotated queries; by default that of queries.
    """
    return Variant("append", (*element_defines(q_dtype, kv_dtype, new_dtype or q_dtype), ("WARPS", ROW_WARPS)))


def append_launch(problem: Problem, operands: Operands) -> Launch | None:
    """Return the launch, or None if there is nothing to write."""
    q, k, v, rotary = operands.q, operands.k, operands.v, operands.rotary
    if k is None:
        return None
    query_tokens, new_tokens = 0 if rotary is None else math.prod(q.shape[:-2]), math.prod(k.shape[:-2])
    rows = query_tokens * problem.num_heads_q + (1 if v is None else 2) * new_tokens * problem.num_heads_kv
    if not rows:
        return None
    ragged = operands.lengths.cu_seqlens_k_new is not None
    values: dict[str, Any] = {
        **row_strides("q", element_strides(q), problem.cu_seqlens_q),
        **length_fields(problem, operands.lengths),
        **cache_fields(operands.cache),
        **shard_fields("shard", problem.mask.shard),
        "k_scale": operands.cache.k_scales.number,
        "v_scale": operands.cache.v_scales.number,
        "finds_k_scales": operands.cache.k_scales.per_key,
        "finds_v_scales": operands.cache.v_scales.per_key,
        **scale_fields("k_descale", operands.cache.k_scales),
        **scale_fields("v_descale", operands.cache.v_scales),
        "batch_size": problem.batch_size,
        "query_tokens": query_tokens,
        "new_tokens": new_tokens,
        "num_heads_q": problem.num_heads_q,
        "num_heads_kv": problem.num_heads_kv,
        "headdim": problem.headdim,
        "headdim_v": problem.headdim_v,
        "rotary_first": 0 if rotary is None else rotary.first,
        "rotary_dim": 0 if rotary is None else rotary.dim,
        "rotary_interleaved": rotary is not None and rotary.interleaved,
        "rotary_moves": rotary is not None and rotary.moves,
    }
    for name, new in (("k", k), ("v", v)):
        strides = (0, 0, 0) if new is None else element_strides(new)
        values[f"{name}_batch_stride"] = 0 if ragged else strides[0]
        values[f"{name}_token_stride"], values[f"{name}_new_head_stride"] = strides[-3], strides[-2]
    grid, arrays = -(-rows // ROW_WARPS), cache_arrays(operands.cache) | ({} if rotary else {"q_rotated": ABSENT})
    variant = append_variant(problem.qkv_dtype, problem.kv_dtype, problem.out_dtype)
    return make_launch(variant, "AppendParams", grid, 32 * ROW_WARPS, 0, values, arrays)
