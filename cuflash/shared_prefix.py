"""Attention of sequences that begin alike: the keys that they share are read once for all of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .arguments.common import output
from .arrays import empty, exporter, import_array
from .attention import flash_attn_with_kvcache

# What both calls are given; everything else is the suffixes'.
_COMMON = (
    "softmax_scale", "softcap", "layout", "kv_dtype", "q_descale", "k_descale", "v_descale",
    "num_splits", "split_size", "sm_margin",
)  # fmt: skip
_REFUSED = ("rotary_cos", "window_size", "attention_chunk", "merge_with", "cp_world_size")


def shared_prefix_attention(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    *,
    prefix_page_table: Any,
    prefix_seqlens: Any,
    prefix_cu_seqlens_q: Any,
    prefix_max_seqlen_q: int,
    prefix_metadata: Any = None,
    prefix_lse: Any = None,
    **suffix: Any,
) -> Any:
    """Attend to a prefix that groups of sequences share, and to each sequence's own keys behind it.

    Two calls of :func:`cuflash.flash_attn_with_kvcache`, each on a plan of its own: in the first a group is one
    sequence, whose rows are the queries of all its members, so that the prefix is read once a group instead of once a
    sequence; the second reads the suffixes and merges the first one's results as it writes its own. ``members - 1``
    times the prefix's bytes are not read: with 32 sequences in one group, 8,192 shared keys and 8 KV heads of 128
    bfloat16 elements, that is 31 x 32 MiB of 1,024 MiB a layer.

    Args:
        q: (batch, seqlen_q, heads_q, headdim), or (total_q, heads_q, headdim) with ``cu_seqlens_q``. The members of a
            group stand side by side.
        k_cache: Pages of prefixes and suffixes.
        v_cache: Likewise.
        prefix_page_table: (groups, pages) int32, or (indptr, indices).
        prefix_seqlens: (groups,) int32 keys of each prefix.
        prefix_cu_seqlens_q: (groups + 1,) int32 first query of each group, counted through the batch. Queries before
            the first group and behind the last one have no prefix.
        prefix_max_seqlen_q: Most queries of a group.
        prefix_metadata: Plan of ``groups`` sequences with these ``cu_seqlens_q``, ``max_seqlen_q``, ``prefix_seqlens``
            and no mask.
        prefix_lse: Where to write the prefix's LSE, (heads_q, total_q) float32; default: new memory.
        **suffix: Arguments of ``flash_attn_with_kvcache`` for the suffixes: ``page_table``, ``cache_seqlens``,
            ``causal``, ``k`` and ``v``, ``sinks``, ``scheduler_metadata``, ``out`` and so on. Lengths and positions are
            those of the suffixes. Numbers such as ``softmax_scale`` hold for both calls.

    Returns:
        What ``flash_attn_with_kvcache`` returns.

    Raises:
        ValueError: For windows, chunks, rotary embedding and context parallelism, which count positions from the
            beginning of the prefix, and for ``merge_with``.

    Example:
        Three sequences share the 32 keys of pages 0 and 1; their own keys begin in pages 2, 3 and 4.

        >>> import cuflash, numpy as np
        >>> rng = np.random.default_rng(0)
        >>> q = rng.standard_normal((3, 1, 8, 64), np.float32)
        >>> k_cache, v_cache = rng.standard_normal((2, 5, 16, 2, 64), np.float32)
        >>> own = np.array([16, 3, 9], np.int32)
        >>> out = cuflash.shared_prefix_attention(
        ...     q, k_cache, v_cache, prefix_page_table=np.array([[0, 1]], np.int32),
        ...     prefix_seqlens=np.array([32], np.int32), prefix_cu_seqlens_q=np.array([0, 3], np.int32),
        ...     prefix_max_seqlen_q=3, page_table=np.array([[2], [3], [4]], np.int32), cache_seqlens=own)
        >>> table = np.array([[0, 1, 2], [0, 1, 3], [0, 1, 4]], np.int32)
        >>> whole = cuflash.flash_attn_with_kvcache(q, k_cache, v_cache, page_table=table, cache_seqlens=32 + own)
        >>> bool(np.allclose(out, whole, atol=1e-6))
        True
    """
    for name in _REFUSED:
        value = suffix.get(name)
        if value is not None and value not in (0, (-1, -1), [-1, -1]) and not (name[:2] == "cp" and value == 1):
            raise ValueError(f"{name} must not be given to shared_prefix_attention, got one")
    native = import_array("q", q)
    rows = native if native.ndim == 3 else native.reshape(-1, *native.shape[2:])
    if native.ndim not in (3, 4):
        raise ValueError(f"q must have shape (batch, seqlen_q, heads_q, headdim), got {native.shape}")
    given_qv = suffix.get("qv")
    qv = None if given_qv is None else import_array("qv", given_qv)
    headdim_v = import_array("v_cache", v_cache).shape[-1]
    dtype = native.dtype
    out = output("out", suffix.pop("out", None), native, (*native.shape[:-1], headdim_v), dtype)
    if prefix_lse is None:
        prefix_lse = empty((rows.shape[1], len(rows)), np.float32, native)
    flash_attn_with_kvcache(
        rows,
        k_cache,
        v_cache,
        qv=None if qv is None else qv.reshape(*rows.shape[:-1], qv.shape[-1]),
        page_table=prefix_page_table,
        cache_seqlens=prefix_seqlens,
        cu_seqlens_q=prefix_cu_seqlens_q,
        max_seqlen_q=prefix_max_seqlen_q,
        scheduler_metadata=prefix_metadata,
        out=out.reshape(*rows.shape[:-1], headdim_v),
        softmax_lse=prefix_lse,
        **{name: suffix[name] for name in _COMMON if name in suffix},
    )
    lse = import_array("prefix_lse", prefix_lse)
    if native.ndim == 4:  # (heads, batch, seqlen_q) -> (batch, heads, seqlen_q)
        lse = lse.reshape(lse.shape[0], *native.shape[:2]).swapaxes(0, 1)
    return flash_attn_with_kvcache(native, k_cache, v_cache, out=out, merge_with=(out, lse), **suffix)
