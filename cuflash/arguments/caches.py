"""Caches, page tables, and the keys and values that are appended."""

from __future__ import annotations

from ..arrays import checks_values, import_array, is_writeable, refuse_in_capture
from ..dtypes import QUANTISED_DTYPES, dtype_name, numpy_dtype
from ..kv_cache import KVCache
from ..memory import NativeArray, address_of, has_whole_rows, is_on_device, overlaps, span_of, strides_of
from ..problem import Problem
from .common import UNIT, Given, expect_shape, import_codes, index
from .values import check_packed

# 32 bits of 16-byte units, the kernels' reach; the last unit means "none" there.
_MAX_CACHE_BYTES = 64 * 2**30 - 16


def cache_of(given: Given) -> KVCache:
    """Import caches as views (pages, page_size, heads_kv, dim), and what says where in them a sequence lies."""
    layout = given["layout"]
    if not isinstance(layout, str) or layout not in ("NHD", "HND"):
        kind = ValueError if isinstance(layout, str) else TypeError
        raise kind(f'layout must be "NHD" or "HND", got {layout!r}')
    kv_dtype = None if given["kv_dtype"] is None else dtype_name("kv_dtype", given["kv_dtype"])
    views, dtypes = [], []
    for name in ("k_cache", "v_cache"):
        array, dtype = import_codes(name, given[name], kv_dtype)
        if array.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions, got shape {array.shape}")
        views.append(array.swapaxes(1, 2) if layout == "HND" else array)
        dtypes.append(dtype)
    k, v = views
    if dtypes[0] != dtypes[1]:
        raise ValueError(f"v_cache must have the dtype of k_cache ({dtypes[0] or k.dtype}), got {dtypes[1] or v.dtype}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"v_cache must have the shape of k_cache but for the head dim, got {v.shape} (NHD)")
    batch_idx = index("cache_batch_idx", given["cache_batch_idx"], 1)
    if given.get("cu_seqlens_k") is not None:
        starts = index("cu_seqlens_k", given["cu_seqlens_k"], 1)
        if checks_values(is_on_device(k)):
            check_packed(starts, k.shape[1])
        return KVCache(k, v, page_indptr=starts, dtype=dtypes[0])
    table = given["page_table"]
    if not isinstance(table, tuple):
        return KVCache(k, v, index("page_table", table, 2, wraps=True), batch_idx=batch_idx, dtype=dtypes[0])
    if len(table) != 2:
        raise ValueError(f"page_table must be an array or a pair (indptr, indices), got {len(table)} arrays")
    if given["cache_seqlens"] is None:
        raise ValueError("cache_seqlens must be given with page_table=(indptr, indices), got None")
    indptr = index("page_table[0]", table[0], 1)
    indices = index("page_table[1]", table[1], 1, wraps=True)
    if indptr is None or indices is None:
        raise TypeError("page_table must be an array or a pair of arrays (indptr, indices), got None in it")
    if not indptr.size:
        raise ValueError(f"page_table[0] must have shape (rows + 1,), got {indptr.shape}")
    return KVCache(k, v, page_indptr=indptr, page_indices=indices, batch_idx=batch_idx, dtype=dtypes[0])


def other_layout(layout: str, heads: int, cache: KVCache) -> str:
    """Return a hint at the other layout, if its number of KV heads could be shared by the query heads."""
    heads_kv = 0 if cache.is_packed else cache.k.shape[1]
    other = "NHD" if layout == "HND" else "HND"
    shape = "(.., heads_kv, keys, headdim)" if other == "HND" else "(.., keys, heads_kv, headdim)"
    return f'; caches {shape} need layout="{other}"' if heads_kv and heads % heads_kv == 0 else ""


def check_caches(problem: Problem, cache: KVCache) -> None:
    """Check dtypes, head dims and strides of the caches."""
    for name, array in (("k_cache", cache.k), ("v_cache", cache.v)):
        dtype = cache.dtype or array.dtype.name
        if dtype != problem.kv_dtype:
            if not problem.is_quantised:
                rule = f"have the dtype of q ({problem.kv_dtype})"
            elif problem.qkv_dtype in QUANTISED_DTYPES and dtype not in QUANTISED_DTYPES:
                rule = f"be one of {', '.join(QUANTISED_DTYPES)} with queries of {problem.qkv_dtype}"
            else:
                rule = f"be {problem.kv_dtype}, as kv_dtype says"
            raise ValueError(f"{name} must {rule}, got {dtype}")
    if cache.k.shape[3] != problem.headdim:
        raise ValueError(f"k_cache must have q's head dim {problem.headdim}, got {cache.k.shape[3]}")
    for name, array in (("k_cache", cache.k), ("v_cache", cache.v)):
        if array.size == 0:
            continue
        if not has_whole_rows(array):
            raise ValueError(f"{name} must have a contiguous last dimension, got strides {array.strides} bytes")
        outer = strides_of(array)[:-1]
        if any(stride % UNIT or stride < 0 for stride in outer) or address_of(array) % UNIT:
            raise ValueError(
                f"{name} must begin at a multiple of 16 bytes and have strides that are non-negative multiples of 16 "
                f"bytes (a cache is never copied), got strides {array.strides}"
            )
        begin, end = span_of(array)
        if end - begin > _MAX_CACHE_BYTES:
            raise ValueError(f"{name} must span less than 64 GiB, got shape {array.shape}")


def check_rows(problem: Problem, cache: KVCache) -> None:
    """Check that every sequence has a row of the cache, or of the page table."""
    expect_shape("cache_batch_idx", cache.batch_idx, (problem.batch_size,))
    if cache.batch_idx is None and cache.num_rows != problem.batch_size:
        if cache.is_packed:
            raise ValueError(f"cu_seqlens_k must have shape ({problem.batch_size + 1},), got ({cache.num_rows + 1},)")
        name = "page_table" if cache.is_paged else "k_cache"
        pages = "" if cache.is_paged else f"; if these are pages of {cache.page_size} keys, page_table is missing"
        raise ValueError(
            f"{name} must have a row per sequence ({problem.batch_size}) or cache_batch_idx, "
            f"got {cache.num_rows}{pages}"
        )


# ------------------------------------------------------------------------------------------------------------ new keys
def new_keys(problem: Problem, cache: KVCache, given: Given) -> tuple[NativeArray | None, NativeArray | None]:
    """Import the keys and values to append; with joint rows the keys bring the values."""
    k, v = given["k"], given["v"]
    joint = cache.joint or (v is None and cache.may_be_joint)
    if joint and v is not None:
        raise ValueError("v must be None where values are the first columns of k_cache's rows: k brings them, got one")
    if not joint and (k is None) != (v is None):
        raise ValueError(f"{'v' if v is None else 'k'} must be given too: k and v are appended together")
    if k is None:
        return None, None
    if given["cache_seqlens"] is None:
        raise ValueError("cache_seqlens must be given with k and v: it says where they go, got None")
    is_ragged = index("cu_seqlens_k_new", given["cu_seqlens_k_new"], 1) is not None
    new: list[NativeArray] = []
    for name, dim in (("k", problem.headdim), ("v", problem.headdim_v))[: 2 - joint]:
        array = import_array(name, given[name])
        if not is_ragged:
            if array.ndim != 4:
                raise ValueError(f"{name} must have shape (batch, seqlen_new, heads_kv, headdim), got {array.shape}")
            leading = (problem.batch_size, array.shape[1] if name == "k" else new[0].shape[1])
        else:
            leading = array.shape[:1] if name == "k" else new[0].shape[:1]
        expect_shape(name, array, (*leading, problem.num_heads_kv, dim))
        if array.dtype != numpy_dtype(problem.out_dtype):
            raise ValueError(f"{name} must have the dtype of q ({problem.out_dtype}), got {array.dtype}")
        new.append(array)
    for name, array in (("k_cache", cache.k), ("v_cache", cache.v)):
        if not is_writeable(array, given[name]):
            raise ValueError(f"{name} must be writeable to append to it, got a read-only array")
    # Keys that lie in the slots that they are written to would be read and written at once.
    return apart("k", new[0], cache), None if joint else apart("v", new[1], cache)


def apart(name: str, new: NativeArray, cache: KVCache) -> NativeArray:
    """Return an array that shares no memory with the caches, which an append writes: a copy of one that does."""
    if not (overlaps(new, cache.k) or overlaps(new, cache.v)):
        return new
    if is_on_device(new):
        refuse_in_capture(name, "share no memory with the caches")
    return new.copy()
