"""Raw arguments -> Problem and operands: everything is checked here, before anything is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from .arrays import (
    NativeArray,
    address_of,
    aligned,
    checks_values,
    empty,
    import_array,
    import_index,
    is_on_device,
    is_writeable,
    memory_of,
    overlaps,
    refuse_in_capture,
    span_of,
    strides_of,
)
from .dtypes import dtype_name, numpy_dtype
from .kv_cache import KVCache
from .metadata import SchedulerMetadata
from .operands import Lengths, Operands, Rotary
from .problem import (
    Problem,
    boolean,
    check_headdim,
    check_heads,
    first_difference,
    integer,
    make_problem,
    real,
    window_bounds,
)
from .values import check_call, check_lengths

# 32 bits of 16-byte units, the kernels' reach; the last unit means "none" there.
_MAX_CACHE_BYTES = 64 * 2**30 - 16
_INT32_MAX = 2**31 - 1
_UNIT = 16  # bytes that kernels read and write at once
_LEFT_TO_THE_PLAN = ("num_splits", "split_size", "sm_margin")  # a call may be silent about them

Given = dict[str, Any]


def plan_of(scheduler_metadata: Any) -> SchedulerMetadata | None:
    """Return the plan of a call, or None for a call that plans for itself.

    Raises:
        TypeError: For anything else.
    """
    if scheduler_metadata is not None and not isinstance(scheduler_metadata, SchedulerMetadata):
        raise TypeError(
            f"scheduler_metadata must come from get_scheduler_metadata, got {type(scheduler_metadata).__name__}"
        )
    return scheduler_metadata


# ---------------------------------------------------------------------------------------------------------- attention
def attention(given: Given, plan: SchedulerMetadata | None) -> tuple[Problem, Operands]:
    """Check the arguments of ``flash_attn_with_kvcache``.

    Args:
        given: All of them by name.
        plan: The plan among them.

    Returns:
        The problem, and the data as native arrays; copies of small arrays that cannot be used as they are.

    Raises:
        TypeError: For an argument of a wrong kind.
        ValueError: For a wrong value; naming the argument, the rule and what came.
    """
    for name in ("qv", "q_descale", "k_descale", "v_descale"):
        if given[name] is not None:
            raise NotImplementedError(f"{name} is not implemented yet")
    boolean("return_softmax_lse", given["return_softmax_lse"])
    q = import_array("q", given["q"])
    dtype_name("q", q.dtype)
    cache = _cache(given)
    batch_size, seqlen_q = _query_shape(q, given["cu_seqlens_q"], given["max_seqlen_q"])
    softcap = 0.0 if given["softcap"] is None else real("softcap", given["softcap"])
    if softcap < 0:
        raise ValueError(f"softcap must be at least 0, got {softcap}")
    check_heads("q: num_heads_q", q.shape[-2], "num_heads_kv of k_cache", cache.k.shape[2])
    check_headdim("q: headdim", q.shape[-1])
    check_headdim("v_cache: headdim_v", cache.v.shape[-1])
    problem = make_problem(
        batch_size,
        seqlen_q,
        q.shape[-2],
        cache.k.shape[2],
        q.shape[-1],
        qkv_dtype=q.dtype,
        kv_dtype=given["kv_dtype"],
        headdim_v=cache.v.shape[-1],
        cu_seqlens_q=given["cu_seqlens_q"] is not None,
        page_size=None if cache.page_table is None else cache.page_size,
        causal=given["causal"],
        window_size=given["window_size"],
        attention_chunk=given["attention_chunk"],
        has_softcap=softcap > 0,
        num_splits=given["num_splits"],
        split_size=given["split_size"],
        pack_gqa=given["pack_gqa"],
        sm_margin=given["sm_margin"],
    )
    if plan is not None:
        problem = _planned(problem, plan, given["pack_gqa"])

    _check_caches(problem, q, cache)
    _check_rows(problem, cache)
    k, v = _new_keys(problem, q, cache, given)
    rotary = _rotary(problem, q, k, given)
    lengths = _call_lengths(problem, q, cache, k, plan, given)
    scale = problem.headdim**-0.5 if given["softmax_scale"] is None else real("softmax_scale", given["softmax_scale"])
    sinks = _sinks(problem, given["sinks"])
    out, lse = _outputs(problem, q, given)
    operands = Operands(q, cache, out, lse, lengths, scale, softcap, k, v, rotary, sinks)
    _check_memory(operands, plan)
    if checks_values(is_on_device(q)):
        check_call(problem, operands)
    return problem, operands


def _query_shape(q: NativeArray, cu_seqlens_q: Any, max_seqlen_q: Any) -> tuple[int, int]:
    """Return (batch_size, max_seqlen_q)."""
    if max_seqlen_q is not None:
        max_seqlen_q = integer("max_seqlen_q", max_seqlen_q, 0)
    if cu_seqlens_q is None:
        if q.ndim != 4:
            raise ValueError(f"q must have shape (batch, seqlen_q, heads_q, headdim), got {q.shape}")
        return q.shape[0], q.shape[1]
    if q.ndim != 3:
        raise ValueError(f"q must have shape (total_q, heads_q, headdim) with cu_seqlens_q, got {q.shape}")
    if max_seqlen_q is None:
        raise ValueError("max_seqlen_q must be given with cu_seqlens_q, got None")
    starts = import_array("cu_seqlens_q", cu_seqlens_q)
    if starts.ndim != 1 or not starts.size:
        raise ValueError(f"cu_seqlens_q must have shape (batch + 1,), got {starts.shape}")
    return starts.shape[0] - 1, max_seqlen_q


def _planned(problem: Problem, plan: SchedulerMetadata, pack_gqa: bool | None) -> Problem:
    """Return the plan's problem, which must be the call's but for what the call leaves to the plan."""
    planned = plan.problem
    if planned == problem and pack_gqa is None:
        return planned
    silent = {name: getattr(planned, name) for name in _LEFT_TO_THE_PLAN if getattr(problem, name) in (0, None)}
    difference = first_difference(planned, replace(problem, **silent))
    if difference is None and pack_gqa is not None and pack_gqa != plan.pack_gqa:
        difference = "pack_gqa", plan.pack_gqa, pack_gqa
    if difference is not None:
        field, plans, calls = difference
        raise ValueError(f"scheduler_metadata was made for {field}={plans!r}, but this call has {field}={calls!r}")
    return planned


# -------------------------------------------------------------------------------------------------------------- caches
def _cache(given: Given) -> KVCache:
    """Import caches as views (pages, page_size, heads_kv, dim), and what says where in them a sequence lies."""
    layout = given["layout"]
    if layout not in ("NHD", "HND"):
        kind = ValueError if isinstance(layout, str) else TypeError
        raise kind(f'layout must be "NHD" or "HND", got {layout!r}')
    views = []
    for name in ("k_cache", "v_cache"):
        array = import_array(name, given[name])
        if array.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions, got shape {array.shape}")
        if array.dtype.itemsize == 1 and given["kv_dtype"] is None:
            raise NotImplementedError(f"{name}: quantised caches are not implemented yet, got {array.dtype}")
        views.append(array.swapaxes(1, 2) if layout == "HND" else array)
    k, v = views
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"v_cache must have the shape of k_cache but for the head dim, got {v.shape} (NHD)")
    table = _index("page_table", given["page_table"], 2, wraps=True)
    return KVCache(k, v, table, _index("cache_batch_idx", given["cache_batch_idx"], 1))


def _check_caches(problem: Problem, q: NativeArray, cache: KVCache) -> None:
    dtype = numpy_dtype(problem.kv_dtype)
    for name, array in (("k_cache", cache.k), ("v_cache", cache.v)):
        if array.dtype != dtype:
            raise ValueError(f"{name} must have the dtype of q ({dtype}), got {array.dtype}")
    if cache.k.shape[3] != problem.headdim:
        raise ValueError(f"k_cache must have q's head dim {problem.headdim}, got {cache.k.shape[3]}")
    for name, array in (("k_cache", cache.k), ("v_cache", cache.v)):
        if array.size == 0:
            continue
        *outer, last = strides_of(array)
        if last != array.itemsize:
            raise ValueError(f"{name} must have a contiguous last dimension, got strides {array.strides} bytes")
        if any(stride % _UNIT or stride < 0 for stride in outer) or address_of(array) % _UNIT:
            raise ValueError(
                f"{name} must begin at a multiple of 16 bytes and have strides that are non-negative multiples of 16 "
                f"bytes (a cache is never copied), got strides {array.strides}"
            )
        begin, end = span_of(array)
        if end - begin > _MAX_CACHE_BYTES:
            raise ValueError(f"{name} must span less than 64 GiB, got shape {array.shape}")


def _check_rows(problem: Problem, cache: KVCache) -> None:
    """Check that every sequence has a row of the cache, or of the page table."""
    _expect_shape("cache_batch_idx", cache.batch_idx, (problem.batch_size,))
    if cache.batch_idx is None and cache.num_rows != problem.batch_size:
        name = "k_cache" if cache.page_table is None else "page_table"
        raise ValueError(
            f"{name} must have a row per sequence ({problem.batch_size}) or cache_batch_idx, got {cache.num_rows}"
        )


# ------------------------------------------------------------------------------------------------------------ new keys
def _new_keys(
    problem: Problem, q: NativeArray, cache: KVCache, given: Given
) -> tuple[NativeArray | None, NativeArray | None]:
    """Import the keys and values to append."""
    k, v = given["k"], given["v"]
    if (k is None) != (v is None):
        raise ValueError(f"{'v' if v is None else 'k'} must be given too: k and v are appended together")
    if k is None:
        return None, None
    if given["cache_seqlens"] is None:
        raise ValueError("cache_seqlens must be given with k and v: it says where they go, got None")
    new: list[NativeArray] = []
    for name, dim in (("k", problem.headdim), ("v", problem.headdim_v)):
        array = import_array(name, given[name])
        if given["cu_seqlens_k_new"] is None:
            if array.ndim != 4:
                raise ValueError(f"{name} must have shape (batch, seqlen_new, heads_kv, headdim), got {array.shape}")
            leading = (problem.batch_size, array.shape[1] if name == "k" else new[0].shape[1])
        else:
            leading = array.shape[:1] if name == "k" else new[0].shape[:1]
        _expect_shape(name, array, (*leading, problem.num_heads_kv, dim))
        if array.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q ({q.dtype}), got {array.dtype}")
        new.append(array)
    for name, array in (("k_cache", cache.k), ("v_cache", cache.v)):
        if not is_writeable(array, given[name]):
            raise ValueError(f"{name} must be writeable to append to it, got a read-only array")
    # Keys that lie in the slots that they are written to would be read and written at once.
    return _apart("k", new[0], cache), _apart("v", new[1], cache)


def _apart(name: str, new: NativeArray, cache: KVCache) -> NativeArray:
    """Return new keys that share no memory with the caches: a copy of those that do."""
    if not (overlaps(new, cache.k) or overlaps(new, cache.v)):
        return new
    if is_on_device(new):
        refuse_in_capture(name, "share no memory with the caches")
    return new.copy()


def _rotary(problem: Problem, q: NativeArray, k: NativeArray | None, given: Given) -> Rotary | None:
    cos, sin = given["rotary_cos"], given["rotary_sin"]
    interleaved = boolean("rotary_interleaved", given["rotary_interleaved"])
    seqlens = _index("rotary_seqlens", given["rotary_seqlens"], 1)
    if (cos is None) != (sin is None):
        raise ValueError(f"rotary_{'sin' if sin is None else 'cos'} must be given too, got None")
    if cos is None:
        return None  # without tables, rotary_seqlens says nothing: callers of FlashAttention-3 always pass it
    if k is None:
        raise ValueError("rotary_cos needs k and v: it rotates the queries and the new keys, got None")
    cos, sin = import_array("rotary_cos", cos), import_array("rotary_sin", sin)
    if cos.ndim != 2:
        raise ValueError(f"rotary_cos must have shape (positions, rotary_dim / 2), got {cos.shape}")
    _expect_shape("rotary_sin", sin, cos.shape)
    rotary_dim = 2 * cos.shape[1]
    if rotary_dim > problem.headdim or rotary_dim % 16:
        raise ValueError(
            f"rotary_cos must have rotary_dim / 2 columns, rotary_dim a multiple of 16 up to "
            f"headdim={problem.headdim}, got {cos.shape[1]} columns"
        )
    for name, array in (("rotary_cos", cos), ("rotary_sin", sin)):
        if array.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q ({q.dtype}), got {array.dtype}")
        if not array.flags.c_contiguous or address_of(array) % array.itemsize:
            raise ValueError(f"{name} must be contiguous and aligned, got strides {array.strides}")
    _expect_shape("rotary_seqlens", seqlens, (problem.batch_size,))
    # The mask as the caller gave it decides, not the normalised one.
    moves = bool(given["causal"]) or window_bounds(given["window_size"]) != (-1, -1) or problem.attention_chunk > 0
    return Rotary(cos, sin, seqlens, interleaved, moves)


# ------------------------------------------------------------------------------------------------------------- lengths
def lengths(
    problem: Problem, given: Given, seqlen_k_new: int = 0, kept: dict[tuple[int, int], NativeArray] | None = None
) -> Lengths:
    """Import the lengths of a step and check them.

    Args:
        problem: The problem they belong to.
        given: ``cache_seqlens`` (batch,) or one int, ``cu_seqlens_q``, ``cu_seqlens_k_new`` and ``cache_leftpad``.
        seqlen_k_new: New keys of every sequence, where they are not ragged.
        kept: Arrays that a plan keeps.

    Raises:
        TypeError: If one is not an array of integers.
        ValueError: For a wrong shape, and for values that contradict each other, naming the argument.
    """
    batch = problem.batch_size
    arrays = {
        name: _index(name, given[name], 1)
        for name in ("cu_seqlens_q", "cu_seqlens_k_new", "cache_leftpad")
    }  # fmt: skip
    for name, array in arrays.items():
        _expect_shape(name, array, (batch + name.startswith("cu_"),))
    others = [array for array in arrays.values() if array is not None]
    if isinstance(given["cache_seqlens"], (int, np.integer)):
        number = integer("cache_seqlens", given["cache_seqlens"], 0)
        seqlens = filled(batch, number, others[0] if others else np.empty(0), kept)
    else:
        if given["cache_seqlens"] is None:
            raise TypeError("cache_seqlens must be an array or an int, got None")
        seqlens = _index("cache_seqlens", given["cache_seqlens"], 1)
        _expect_shape("cache_seqlens", seqlens, (batch,))
    if any(memory_of(array) != memory_of(seqlens) for array in others):
        raise ValueError("cache_seqlens, cu_seqlens_q, cu_seqlens_k_new and cache_leftpad must be in one memory")
    result = Lengths(seqlens, **arrays, seqlen_k_new=0 if arrays["cu_seqlens_k_new"] is not None else seqlen_k_new)
    if checks_values(is_on_device(seqlens)):
        check_lengths(problem, result)
    return result


def _call_lengths(
    problem: Problem,
    q: NativeArray,
    cache: KVCache,
    k: NativeArray | None,
    plan: SchedulerMetadata | None,
    given: Given,
) -> Lengths:
    """Return the lengths of a call: one int and none at all are numbers that stand for every sequence."""
    mine = {name: given[name] for name in ("cache_seqlens", "cu_seqlens_q", "cu_seqlens_k_new", "cache_leftpad")}
    if k is None:
        _index("cu_seqlens_k_new", mine.pop("cu_seqlens_k_new"), 1)  # without new keys it says nothing
        mine["cu_seqlens_k_new"] = None
    number = mine["cache_seqlens"]
    if number is None or isinstance(number, (int, np.integer)):
        if number is None and cache.capacity > _INT32_MAX:
            raise ValueError(f"cache_seqlens must be given for more than 2**31 - 1 slots, got {cache.capacity}")
        number = cache.capacity if number is None else integer("cache_seqlens", number, 0)
        kept = None if plan is None else plan.kept
        mine["cache_seqlens"] = filled(problem.batch_size, number, q, kept)
    return lengths(problem, mine, 0 if k is None or mine["cu_seqlens_k_new"] is not None else k.shape[1])


def filled(
    size: int, number: int, like: NativeArray, kept: dict[tuple[int, int], NativeArray] | None = None
) -> NativeArray:
    """Return an int32 array of equal numbers where ``like`` lives.

    Args:
        size: Its length.
        number: The number.
        like: An array.
        kept: Those that a plan keeps as long as it lives, so that a captured graph may use them.
    """
    array = None if kept is None else kept.get((size, number))
    if array is None:
        if is_on_device(like):
            refuse_in_capture("cache_seqlens", "be an array, or a number that an earlier call on the plan had, too,")
        array = empty((size,), np.int32, like)
        array[...] = number
        if kept is not None:
            kept[size, number] = array
    return array


# ----------------------------------------------------------------------------------------------------- sinks, outputs
def _sinks(problem: Problem, sinks: Any) -> NativeArray | None:
    """Import sinks as float32: there are few of them, and models keep them in their own dtype."""
    if sinks is None:
        return None
    array = import_array("sinks", sinks)
    _expect_shape("sinks", array, (problem.num_heads_q,))
    dtype_name("sinks", array.dtype)
    array = aligned("sinks", array, array.itemsize)
    if array.dtype == np.float32 and array.flags.c_contiguous:
        return array
    if is_on_device(array):
        refuse_in_capture("sinks", "be contiguous float32")
    return array.astype(np.float32)


def _outputs(problem: Problem, q: NativeArray, given: Given) -> tuple[NativeArray, NativeArray | None]:
    """Return where output and LSE go; no LSE on a GPU if nobody asks for it."""
    ragged, shape = problem.cu_seqlens_q, q.shape
    out = output("out", given["out"], q, (*shape[:-1], problem.headdim_v), q.dtype)
    if not given["return_softmax_lse"] and given["softmax_lse"] is None and is_on_device(q):
        return out, None
    lse_shape = (shape[1], shape[0]) if ragged else (shape[0], shape[2], shape[1])
    return out, output("softmax_lse", given["softmax_lse"], q, lse_shape, np.dtype(np.float32))


def output(name: str, given: Any, like: NativeArray, shape: tuple[int, ...], dtype: Any) -> NativeArray:
    """Return the caller's output array, checked, or a new one where ``like`` lives."""
    if given is None:
        return empty(shape, dtype, like)
    array = import_array(name, given)
    _expect_shape(name, array, shape)
    if array.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {array.dtype}")
    if not is_writeable(array, given):
        raise ValueError(f"{name} must be writeable, got a read-only array")
    if array.size and not array.flags.c_contiguous:
        raise ValueError(f"{name} must be contiguous, got strides {array.strides} bytes")
    # A row of the output is stored by vectors, an LSE is one number.
    boundary = _UNIT if name == "out" else array.itemsize
    if array.size and address_of(array) % boundary:
        raise ValueError(f"{name} must begin at a multiple of {boundary} bytes, got address {address_of(array):#x}")
    return array


def _check_memory(operands: Operands, plan: SchedulerMetadata | None) -> None:
    """Check that all arrays lie in one memory, and that none that is written is another one."""
    arrays = operands.arrays
    if plan is not None:
        arrays["scheduler_metadata"] = plan.array
    memory = memory_of(operands.q)
    for name, array in arrays.items():
        if array is not None and memory_of(array) != memory:
            raise ValueError(f"{name} must be in {memory} like q, got one in {memory_of(array)}")
    # Queries may be overwritten by their own outputs: whoever writes has read them.
    q, out = operands.q, operands.out
    in_place = address_of(q) == address_of(out) and q.shape == out.shape and strides_of(q) == strides_of(out)
    for written in ("out", "softmax_lse"):
        target = arrays[written]
        for name, array in arrays.items():
            allowed = name == written or (written == "out" and name == "q" and in_place)
            if target is not None and array is not None and not allowed and overlaps(target, array):
                raise ValueError(f"{written} must share no memory with {name}, got overlapping arrays")


# ------------------------------------------------------------------------------------------------------------- helpers
def _index(name: str, x: Any, ndim: int, wraps: bool = False) -> NativeArray | None:
    """Import an optional index array with a contiguous last dimension."""
    if x is None:
        return None
    array = import_index(name, x, wraps)
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension{'s' * (ndim > 1)}, got shape {array.shape}")
    if array.size and strides_of(array)[-1] not in (0, array.itemsize):
        if ndim > 1:  # on a GPU, and too large to copy on every call
            raise ValueError(f"{name} must have a contiguous last dimension, got strides {array.strides} bytes")
        refuse_in_capture(name, "be contiguous")
        array = array.copy()
    return array


def _expect_shape(name: str, array: NativeArray | None, shape: tuple[int, ...]) -> None:
    if array is not None and array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
