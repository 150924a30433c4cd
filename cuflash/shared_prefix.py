"""Attention of sequences that begin alike: the keys that they share are read once for all of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .arguments.common import expect_apart, output, renamed
from .array_types import Array
from .arrays import check_way_back, exporter, import_array
from .attention import check, flash_attn_with_kvcache
from .memory import NativeArray, overlaps
from .metadata import SchedulerMetadata
from .problem import integer, window_bounds

# What both calls are given; everything else is the suffixes'.
_COMMON = (
    "softmax_scale", "softcap", "layout", "kv_dtype", "q_descale", "k_descale", "v_descale",
    "num_splits", "split_size", "sm_margin",
)  # fmt: skip
# What the first call is given under other names.
_PREFIX = {
    "page_table": "prefix_page_table",
    "cache_seqlens": "prefix_seqlens",
    "cu_seqlens_q": "prefix_cu_seqlens_q",
    "max_seqlen_q": "prefix_max_seqlen_q",
    "scheduler_metadata": "prefix_metadata",
    "softmax_lse": "prefix_lse",
}


def shared_prefix_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    *,
    prefix_page_table: Array | tuple[Array, Array],
    prefix_seqlens: Array,
    prefix_cu_seqlens_q: Array,
    prefix_max_seqlen_q: int,
    prefix_metadata: SchedulerMetadata | None = None,
    prefix_lse: Array | None = None,
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
        prefix_lse: Where to write the prefix's LSE, (heads_q, total_q) float32, which shares memory with no other
            array; default: new memory.
        **suffix: Arguments of ``flash_attn_with_kvcache`` for the suffixes: ``page_table``, ``cache_seqlens``,
            ``causal``, ``k`` and ``v``, ``sinks``, ``scheduler_metadata``, ``out`` and so on. Lengths and positions are
            those of the suffixes. Numbers such as ``softmax_scale`` hold for both calls, and so do ``q_descale``,
            ``k_descale`` and ``v_descale``: one number, or of keys and values one per key and head. ``out`` holds the
            prefix's results in between.

    Returns:
        What ``flash_attn_with_kvcache`` returns.

    Raises:
        ValueError: For windows, chunks, rotary embedding and context parallelism, which count positions from the
            beginning of the prefix, for ``merge_with``, for scales per sequence, and for an ``out`` in the memory of q.

    Example:
        >>> # Three sequences share the 32 keys of pages 0 and 1; their own are in pages 2, 3 and 4.
        >>> import cuflash, numpy as np
        >>> rng = np.random.default_rng(0)
        >>> q = rng.standard_normal((3, 1, 8, 64), np.float32)
        >>> k_cache, v_cache = rng.standard_normal((2, 5, 16, 2, 64), np.float32)
        >>> own = np.array([16, 3, 9], np.int32)
        >>> out = cuflash.shared_prefix_attention(
        ...     q, k_cache, v_cache, prefix_page_table=np.array([[0, 1]], np.int32),
        ...     prefix_seqlens=np.array([32], np.int32), prefix_cu_seqlens_q=np.array([0, 3], np.int32),
        ...     prefix_max_seqlen_q=3, cache_seqlens=own,
        ...     page_table=np.array([[2], [3], [4]], np.int32))
        >>> table = np.array([[0, 1, 2], [0, 1, 3], [0, 1, 4]], np.int32)
        >>> whole = cuflash.flash_attn_with_kvcache(
        ...     q, k_cache, v_cache, page_table=table, cache_seqlens=32 + own)
        >>> bool(np.allclose(out, whole, atol=1e-6))
        True
    """
    chunk = suffix.get("attention_chunk")
    refused = {
        "rotary_cos": suffix.get("rotary_cos") is not None,
        "window_size": window_bounds(suffix.get("window_size")) != (-1, -1),
        "attention_chunk": chunk is not None and integer("attention_chunk", chunk, 0) > 0,
        "cp_world_size": integer("cp_world_size", suffix.get("cp_world_size", 1), 1) > 1,
        "merge_with": suffix.get("merge_with") is not None,
    }
    for name, is_given in refused.items():
        if is_given:
            raise ValueError(f"{name} must not be given to shared_prefix_attention, got {suffix[name]!r}")
    for name in ("q_descale", "k_descale", "v_descale"):
        if hasattr(suffix.get(name), "__dlpack__"):
            array = import_array(name, suffix[name])
            if array.ndim == 2 and array.size != 1:
                rule = "be one number" if name == "q_descale" else "be one number, or one per key and head"
                raise ValueError(f"{name} must {rule}, which prefixes and suffixes share, got shape {array.shape}")
    native = import_array("q", q)
    if native.ndim not in (3, 4):
        raise ValueError(f"q must have 3 or 4 dimensions, got shape {native.shape}")
    given = {"q": native, "qv": suffix.get("qv"), "out": suffix.get("out")}
    if given["out"] is not None and overlaps(import_array("out", given["out"]), native):
        raise ValueError("out must share no memory with q, which the suffixes read, too, got overlapping arrays")
    rows = {name: _rows(name, array) for name, array in given.items() if array is not None}  # copies, if they must be
    second, lse = {"q": q, "k_cache": k_cache, "v_cache": v_cache, **suffix}, None
    if "out" in rows or prefix_lse is not None:
        # The first call writes there: what is wrong with the second one must be known by then.
        shape = native.shape[-2], rows["q"].shape[0]
        lse = output("prefix_lse", prefix_lse, native, shape, np.dtype(np.float32), strided=True)
        if prefix_lse is not None:  # what the first call is not given it cannot compare
            expect_apart("prefix_lse", lse, {name: second[name] for name in second if name != "merge_with"})
        if "out" in rows and rows["out"].shape[:-1] == rows["q"].shape[:-1]:
            second["merge_with"] = _results(native, rows["out"], lse)
        check(second)
    with renamed(_PREFIX):
        rows_out, lse = flash_attn_with_kvcache(
            k_cache=k_cache,
            v_cache=v_cache,
            page_table=prefix_page_table,
            cache_seqlens=prefix_seqlens,
            cu_seqlens_q=prefix_cu_seqlens_q,
            max_seqlen_q=prefix_max_seqlen_q,
            scheduler_metadata=prefix_metadata,
            softmax_lse=lse,
            return_softmax_lse=True,
            **rows,
            **{name: suffix[name] for name in _COMMON if name in suffix},
        )
    if second.get("merge_with") is None:
        second["merge_with"] = _results(native, rows_out, lse)
    if second.get("out") is not None:
        return flash_attn_with_kvcache(**second)
    # What becomes of it in q's kind may be read-only.
    second["out"] = rows_out = second["merge_with"][0]
    check_way_back("q", q, rows_out)
    results = flash_attn_with_kvcache(**second)
    if not suffix.get("return_softmax_lse"):
        return exporter(q)(results)
    return exporter(q)(results[0]), results[1]


def _results(q: NativeArray, rows_out: NativeArray, lse: NativeArray) -> tuple[NativeArray, NativeArray]:
    """Return the prefix's results as the suffixes' call takes them: of queries that may have four dimensions."""
    if q.ndim == 3:
        return rows_out, lse
    # lse becomes (batch, heads, seqlen_q)
    return rows_out.reshape(*q.shape[:3], rows_out.shape[-1]), lse.reshape(lse.shape[0], *q.shape[:2]).swapaxes(0, 1)


def _rows(name: str, array: Any) -> NativeArray:
    """Return queries, or what has their shape, as (total_q, heads, dim)."""
    native = import_array(name, array)
    return native if native.ndim == 3 else native.reshape(math.prod(native.shape[:2]), *native.shape[2:])
