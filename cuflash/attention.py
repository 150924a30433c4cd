"""Attention of a decode step on a KV cache: arguments and arrays -> Problem + plan -> a backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import backends, repeat
from .arrays import (
    NativeArray,
    checks_values,
    empty,
    export_array,
    import_array,
    import_index,
    is_on_device,
    is_writeable,
    memory_of,
    to_host,
)
from .dtypes import dtype_name, numpy_dtype
from .problem import Problem, boolean, check_headdim, check_heads, first_difference, integer, make_problem, real
from .scheduling import Lengths, Refill, SchedulerMetadata, make_lengths, make_metadata

# 32 bits of 16-byte units, the kernels' reach; the last unit means "none" there.
_MAX_CACHE_BYTES = 64 * 2**30 - 16


@dataclass(frozen=True)
class Operands:
    """The data of one call, as native arrays that a backend can use.

    Attributes:
        q: (batch, seqlen_q, heads_q, headdim), or (total_q, heads_q, headdim) with ``cu_seqlens_q``.
        k_cache: (pages, page_size, heads_kv, headdim), or (rows, capacity, heads_kv, headdim) without a page table.
        v_cache: The same with headdim_v.
        out: As q with headdim_v; written.
        softmax_lse: (batch, heads_q, seqlen_q) or (heads_q, total_q) float32; written. None on a GPU if nobody asks.
        lengths: Lengths of the sequences.
        softmax_scale: Factor of the scores.
        softcap: Cap of the scores, 0 for none.
        k: New keys (batch, seqlen_new, heads_kv, headdim) or (total_new, heads_kv, headdim), or None.
        v: New values, likewise.
        rotary_cos: (positions, rotary_dim / 2) or None.
        rotary_sin: The same.
        rotary_seqlens: (batch,) base positions, or None: ``cache_seqlens``.
        rotary_interleaved: Pairs (0, 1), (2, 3) .. instead of (0, r / 2), (1, r / 2 + 1) ..
        rotary_moves: Query i stands at base + i, else all queries at base.
        cache_batch_idx: (batch,) row of the cache or of the page table, or None.
        page_table: (rows, pages per sequence) or None.
        sinks: (heads_q,) float32 or None.
    """

    q: NativeArray
    k_cache: NativeArray
    v_cache: NativeArray
    out: NativeArray
    softmax_lse: NativeArray | None
    lengths: Lengths
    softmax_scale: float
    softcap: float
    k: NativeArray | None = None
    v: NativeArray | None = None
    rotary_cos: NativeArray | None = None
    rotary_sin: NativeArray | None = None
    rotary_seqlens: NativeArray | None = None
    rotary_interleaved: bool = True
    rotary_moves: bool = False
    cache_batch_idx: NativeArray | None = None
    page_table: NativeArray | None = None
    sinks: NativeArray | None = None


def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    qv: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    page_table: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k_new: Any = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: SchedulerMetadata | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    sinks: Any = None,
    split_size: int | None = None,
    kv_dtype: Any = None,
    layout: str = "NHD",
    out: Any = None,
    softmax_lse: Any = None,
) -> Any:
    """Attend to a KV cache, optionally after appending new keys and values to it.

    Names, order and meaning of the arguments are those of FlashAttention-3's function of this name; its algorithm is
    Flash-Decoding (https://pytorch.org/blog/flash-decoding/) with the shares of ``get_scheduler_metadata``. Query
    head x uses KV head ``x // (heads_q / heads_kv)``. Query i of sq sees key j of sk (both counted from 0, keys from
    the leftpad) if ``j <= i + sk - sq`` when causal, ``i + sk - sq - left <= j <= i + sk - sq + right`` with a window,
    and if j is in the chunk of position ``i + sk - sq`` with ``attention_chunk``. A row that sees no key gives 0, and
    LSE -inf (with a sink: LSE = sink).

    Arrays may be NumPy, CuPy or anything with ``__dlpack__``; they are taken without a copy, and all lie in one memory.

    Args:
        q: (batch, seqlen_q, heads_q, headdim), or (total_q, heads_q, headdim) with ``cu_seqlens_q``; float16, bfloat16
            or float32.
        k_cache: (rows, capacity, heads_kv, headdim), or (pages, page_size, heads_kv, headdim) with ``page_table``;
            q's dtype. Its rows must be whole 16-byte units: a cache is never copied.
        v_cache: The same with headdim_v.
        k: (batch, seqlen_new, heads_kv, headdim) or (total_new, heads_kv, headdim) new keys, written in place at
            ``cache_seqlens`` before attending.
        v: New values, likewise.
        qv: Not implemented yet.
        rotary_cos: (positions, rotary_dim / 2) of q's dtype; rotates q and k. Needs ``k``.
        rotary_sin: The same.
        cache_seqlens: (batch,) int32 keys in the cache before the append, or one int; default: the capacity.
        cache_batch_idx: (batch,) int32 row of the cache, or of the page table, of each sequence.
        cache_leftpad: (batch,) int32 first valid key of each sequence.
        page_table: (batch, pages per sequence) int32; entries past the last needed page may hold anything.
        cu_seqlens_q: (batch + 1,) int32 first query of each sequence. Needs ``max_seqlen_q``.
        cu_seqlens_k_new: (batch + 1,) int32 first new key of each sequence.
        max_seqlen_q: Longest query length, with ``cu_seqlens_q``.
        rotary_seqlens: (batch,) int32 rotary position of the first new key; default ``cache_seqlens``.
        q_descale: Not implemented yet.
        k_descale: Not implemented yet.
        v_descale: Not implemented yet.
        softmax_scale: Factor of the scores; default ``headdim ** -0.5``.
        causal: Bottom-right aligned causal mask.
        window_size: (left, right) keys around a row's position, -1 for all.
        attention_chunk: Keys of a chunk, 0 for none.
        softcap: Scores become ``softcap * tanh(score / softcap)``; 0 for none.
        rotary_interleaved: Rotate pairs (0, 1), (2, 3) .. instead of (0, rotary_dim / 2) ..
        scheduler_metadata: The plan of ``get_scheduler_metadata``; without it the call plans for itself.
        num_splits: As in ``get_scheduler_metadata``; with a plan the plan's counts.
        pack_gqa: Accepted; query heads are always packed.
        sm_margin: As in ``get_scheduler_metadata``.
        return_softmax_lse: Whether to return the LSE too.
        sinks: (heads_q,) learnable logits that take part in the softmax with a value of zero.
        split_size: As in ``get_scheduler_metadata``: results independent of the batch.
        kv_dtype: Element type of a quantised cache; not implemented yet.
        layout: "NHD", or "HND" for caches (pages, heads_kv, page_size, dim) or (rows, heads_kv, capacity, dim).
        out: Where to write the output, as q with headdim_v.
        softmax_lse: Where to write the LSE, (batch, heads_q, seqlen_q) or (heads_q, total_q) float32.

    Returns:
        The output, of q's kind, shape (with headdim_v) and dtype; with ``return_softmax_lse`` also the LSE: natural
        log, float32.

    Raises:
        TypeError: For an argument of a wrong kind.
        ValueError: For a wrong value, or a plan made for another problem, naming the first field that differs. Values
            of index arrays are checked on the host, and on a GPU under ``CUFLASH_VALIDATE=1``. Nothing has been
            written then.
        NotImplementedError: For ``qv``, descales and quantised caches.

    Example:
        >>> import cuflash, numpy as np
        >>> rng = np.random.default_rng(0)
        >>> q = rng.standard_normal((2, 1, 8, 64), np.float32)
        >>> k_cache, v_cache = rng.standard_normal((2, 2, 128, 2, 64), np.float32)
        >>> lengths = np.array([100, 7], np.int32)
        >>> meta = cuflash.get_scheduler_metadata(2, 1, 128, 8, 2, 64, lengths, qkv_dtype="float32")
        >>> out = cuflash.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, scheduler_metadata=meta)
        >>> out.shape
        (2, 1, 8, 64)
    """
    if scheduler_metadata is None:
        calls, max_seqlen_k = repeat.unplanned, None  # the capacity, which the shapes say
    elif isinstance(scheduler_metadata, SchedulerMetadata):
        calls, max_seqlen_k = scheduler_metadata.calls, scheduler_metadata.max_seqlen_k
    else:
        raise TypeError(
            f"scheduler_metadata must come from get_scheduler_metadata, got {type(scheduler_metadata).__name__}"
        )
    given = {
        "q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin, "rotary_seqlens": rotary_seqlens, "cache_seqlens": cache_seqlens,
        "cache_leftpad": cache_leftpad, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k_new": cu_seqlens_k_new,
        "cache_batch_idx": cache_batch_idx, "page_table": page_table, "sinks": sinks, "out": out,
        "softmax_lse": softmax_lse,
    }  # fmt: skip
    options = (
        qv, q_descale, k_descale, v_descale, max_seqlen_q, softmax_scale, causal, attention_chunk, softcap,
        rotary_interleaved, num_splits, pack_gqa, sm_margin, return_softmax_lse, split_size, kv_dtype, layout,
        max_seqlen_k,
    )  # fmt: skip
    signature, call = repeat.find(calls, tuple(given.values()), options, window_size)
    if call is not None and _are_aligned(given):
        return call(given, scheduler_metadata)

    for name, value in (("qv", qv), ("q_descale", q_descale), ("k_descale", k_descale), ("v_descale", v_descale)):
        if value is not None:
            raise NotImplementedError(f"{name} is not implemented yet")
    if layout not in ("NHD", "HND"):
        kind = ValueError if isinstance(layout, str) else TypeError
        raise kind(f'layout must be "NHD" or "HND", got {layout!r}')
    boolean("rotary_interleaved", rotary_interleaved)
    boolean("return_softmax_lse", return_softmax_lse)

    queries = import_array("q", q)
    on_device = is_on_device(queries)
    keys, values = _cache("k_cache", k_cache, layout, kv_dtype), _cache("v_cache", v_cache, layout, kv_dtype)
    table = _index("page_table", page_table, 2)
    batch_idx = _index("cache_batch_idx", cache_batch_idx, 1)
    new_keys, new_values = _optional("k", k), _optional("v", v)
    cos, sin = _optional("rotary_cos", rotary_cos), _optional("rotary_sin", rotary_sin)
    scale_cap = real("softcap", softcap)
    if scale_cap < 0:
        raise ValueError(f"softcap must be at least 0, got {scale_cap}")

    dtype_name("q", queries.dtype)
    batch_size, seqlen_q = _query_shape(queries, cu_seqlens_q, max_seqlen_q)
    if keys.shape[:3] != values.shape[:3]:
        raise ValueError(f"v_cache must have the shape of k_cache but for the head dim, got {values.shape} (NHD)")
    check_heads("q: num_heads_q", queries.shape[-2], "num_heads_kv of k_cache", keys.shape[2])
    check_headdim("q: headdim", queries.shape[-1])
    check_headdim("v_cache: headdim_v", values.shape[-1])
    problem = make_problem(
        batch_size,
        seqlen_q,
        queries.shape[-2],
        keys.shape[2],
        queries.shape[-1],
        qkv_dtype=queries.dtype,
        kv_dtype=kv_dtype,
        headdim_v=values.shape[-1],
        cu_seqlens_q=cu_seqlens_q is not None,
        page_size=None if table is None else keys.shape[1],
        max_seqlen_k_new=_new_seqlen(new_keys, new_values, cu_seqlens_k_new),
        cu_seqlens_k_new=cu_seqlens_k_new is not None,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        has_softcap=scale_cap > 0,
        num_splits=num_splits,
        split_size=split_size,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
    )
    if scheduler_metadata is not None:
        problem = _planned(problem, scheduler_metadata, pack_gqa)

    _check_caches(problem, queries, keys, values)
    capacity = keys.shape[1] * (1 if table is None else table.shape[1])
    _check_rows(problem, keys, table, batch_idx)
    _check_new(problem, queries, new_keys, new_values, cache_seqlens)
    if new_keys is not None:
        for name, cache, given_cache in (("k_cache", keys, k_cache), ("v_cache", values, v_cache)):
            if not is_writeable(cache, given_cache):
                raise ValueError(f"{name} must be writeable to append to it, got a read-only array")
    _check_rotary(problem, queries, new_keys, cos, sin, rotary_seqlens)
    if isinstance(cache_seqlens, (int, np.integer)) or cache_seqlens is None:
        number = capacity if cache_seqlens is None else integer("cache_seqlens", cache_seqlens, 0)
        cache_seqlens = empty((batch_size,), np.int32, queries)
        cache_seqlens[...] = number
    lengths = make_lengths(problem, cache_seqlens, cu_seqlens_q, cu_seqlens_k_new, cache_leftpad)
    rotary_base = _index("rotary_seqlens", rotary_seqlens, 1)
    _expect_shape("rotary_seqlens", rotary_base, (batch_size,))
    sink_logits = _sinks(problem, sinks)
    scale = problem.headdim**-0.5 if softmax_scale is None else real("softmax_scale", softmax_scale)
    result = _output("out", out, queries, (*queries.shape[:-1], problem.headdim_v), queries.dtype)
    lse_shape = (queries.shape[1], queries.shape[0]) if problem.cu_seqlens_q else (
        batch_size, problem.num_heads_q, seqlen_q)  # fmt: skip
    result_lse = None  # on a GPU, one that nobody asks for is not made
    if return_softmax_lse or softmax_lse is not None or not on_device:
        result_lse = _output("softmax_lse", softmax_lse, queries, lse_shape, np.dtype(np.float32))

    operands = Operands(
        q=queries,
        k_cache=keys,
        v_cache=values,
        out=result,
        softmax_lse=result_lse,
        lengths=lengths,
        softmax_scale=scale,
        softcap=scale_cap,
        k=new_keys,
        v=new_values,
        rotary_cos=cos,
        rotary_sin=sin,
        rotary_seqlens=rotary_base,
        rotary_interleaved=rotary_interleaved,
        # The user's mask decides, not the normalised one: with one query the two agree anyway.
        rotary_moves=bool(causal) or tuple(window_size) != (-1, -1) or bool(attention_chunk),
        cache_batch_idx=batch_idx,
        page_table=table,
        sinks=sink_logits,
    )
    _check_one_memory(operands, scheduler_metadata)
    if checks_values(on_device):
        _check_values(problem, operands, capacity)

    backend = backends.select(queries)
    metadata, refill = scheduler_metadata, None
    if metadata is None and backend.USES_PLAN:
        longest = _longest(lengths, capacity, on_device, problem)
        metadata, refill = make_metadata(problem, lengths, longest, pack_gqa)
    launches = backend.attend(problem, operands, metadata)
    if launches is not None and _are_as_given(operands, given):
        repeat.remember(calls, signature, _Call(backend, launches, refill, result, lse_shape, return_softmax_lse))
    # Exported also where it was given: that makes a framework's own stream wait for the result.
    exported = export_array(result, q if out is None else out)
    answer = exported if out is None else out
    if not return_softmax_lse:
        return answer
    exported_lse = export_array(result_lse, q if softmax_lse is None else softmax_lse)
    return answer, exported_lse if softmax_lse is None else softmax_lse


def merge_attn_states(outs: Any, lses: Any) -> tuple[Any, Any]:
    """Merge partial results over disjoint keys into the result over all of them.

    ``lse = log(sum_i exp(lse_i))`` and ``out = sum_i exp(lse_i - lse) out_i`` (FlashInfer, "cascade inference"). A part
    that saw no key (LSE -inf) changes nothing.

    Args:
        outs: Sequence or stacked array of n outputs, each (batch, seqlen_q, heads, headdim) or (total_q, heads,
            headdim).
        lses: Sequence or stacked array of n LSEs, each (batch, heads, seqlen_q) or (heads, total_q), float32, natural
            log.

    Returns:
        (out, lse) of the shapes, kind and dtype of one part.

    Raises:
        TypeError: If an argument is not an array or a sequence of arrays.
        ValueError: If shapes or dtypes do not fit together.

    Example:
        >>> import cuflash, numpy as np
        >>> out, lse = np.ones((1, 1, 2, 64), np.float32), np.zeros((1, 2, 1), np.float32)
        >>> merged, total = cuflash.merge_attn_states([out, 3 * out], [lse, lse])
        >>> float(merged[0, 0, 0, 0]), round(float(total[0, 0, 0]), 4)
        (2.0, 0.6931)
    """
    stacked, like = _stack("outs", outs)
    stacked_lses, _ = _stack("lses", lses)
    dtype_name("outs", stacked.dtype)
    if stacked_lses.dtype != np.float32:
        raise TypeError(f"lses must be float32, got {stacked_lses.dtype}")
    if stacked.ndim not in (4, 5):
        raise ValueError(f"outs must be n arrays with 3 or 4 dimensions each, got shape {stacked.shape}")
    ragged = stacked.ndim == 4
    shape = stacked.shape
    expected = (shape[0], shape[2], shape[1]) if ragged else (shape[0], shape[1], shape[3], shape[2])
    if stacked_lses.shape != expected:
        raise ValueError(f"lses must have shape {expected} for outs of shape {shape}, got {stacked_lses.shape}")
    if not shape[0]:
        raise ValueError("outs must hold at least one part, got 0")
    if ragged:
        stacked, stacked_lses = stacked[:, None], stacked_lses[:, None]
    out, lse = empty(stacked.shape[1:], stacked.dtype, stacked), empty(stacked_lses.shape[1:], np.float32, stacked)
    backends.select(stacked).merge(stacked, stacked_lses, out, lse)
    if ragged:
        out, lse = out[0], lse[0]
    return export_array(out, like), export_array(lse, like)


# -------------------------------------------------------------------------------------------------------- repetition
class _Call:
    """A call that has been checked and prepared, for calls with the same signature."""

    def __init__(
        self,
        backend: Any,
        launches: Any,
        refill: Refill | None,
        out: NativeArray,
        lse_shape: tuple[int, ...],
        return_softmax_lse: bool,
    ) -> None:
        self._backend, self._launches, self._refill = backend, launches, refill
        self._out, self._lse = (out.shape, out.dtype), lse_shape
        self._return_lse = return_softmax_lse

    def __call__(self, arrays: dict[str, Any], metadata: SchedulerMetadata | None) -> Any:
        """Attend, on a new plan without one; the arrays are those of the caller, by the names of the arguments."""
        out, lse = arrays["out"], arrays["softmax_lse"]
        if out is None:
            arrays["out"] = out = empty(*self._out, arrays["q"])
        if lse is None and self._return_lse:
            arrays["softmax_lse"] = lse = empty(self._lse, np.float32, out)
        if metadata is not None:
            arrays["plan"] = metadata.array
        elif self._refill is not None:
            self._refill(arrays, empty(self._refill.shape, np.int32, out))
        self._backend.repeat(self._launches, arrays)
        return (out, lse) if self._return_lse else out


def _are_as_given(operands: Operands, given: dict[str, Any]) -> bool:
    """Whether no argument had to be copied: a repeated call hands them on as they are."""
    used = {**operands.__dict__, **operands.lengths.__dict__}
    # Caches are views of what was given, and never copied; outputs were made if they were not given.
    same = set(given) - {"k_cache", "v_cache", "out", "softmax_lse"}
    return all(used[name] is given[name] for name in same)


def _are_aligned(arrays: dict[str, Any]) -> bool:
    """Whether what kernels read by 16 bytes begins where they can."""
    bits = arrays["q"].data.ptr | arrays["k_cache"].data.ptr | arrays["v_cache"].data.ptr
    if arrays["k"] is not None:
        bits |= arrays["k"].data.ptr | arrays["v"].data.ptr
    return bits % 16 == 0


# ------------------------------------------------------------------------------------------------------------- checks
def _query_shape(q: NativeArray, cu_seqlens_q: Any, max_seqlen_q: Any) -> tuple[int, int]:
    """Return (batch_size, max_seqlen_q)."""
    if cu_seqlens_q is None:
        if q.ndim != 4:
            raise ValueError(f"q must have shape (batch, seqlen_q, heads_q, headdim), got {q.shape}")
        if max_seqlen_q is not None and integer("max_seqlen_q", max_seqlen_q, 0) != q.shape[1]:
            raise ValueError(f"max_seqlen_q must be q's length {q.shape[1]} without cu_seqlens_q, got {max_seqlen_q}")
        return q.shape[0], q.shape[1]
    if q.ndim != 3:
        raise ValueError(f"q must have shape (total_q, heads_q, headdim) with cu_seqlens_q, got {q.shape}")
    if max_seqlen_q is None:
        raise ValueError("max_seqlen_q must be given with cu_seqlens_q, got None")
    starts = import_array("cu_seqlens_q", cu_seqlens_q)
    if starts.ndim != 1 or not starts.size:
        raise ValueError(f"cu_seqlens_q must have shape (batch + 1,), got {starts.shape}")
    return starts.shape[0] - 1, max_seqlen_q


def _new_seqlen(k: NativeArray | None, v: NativeArray | None, cu_seqlens_k_new: Any) -> int:
    """Return the number of new keys per sequence; 0 without append or if they are ragged."""
    if (k is None) != (v is None):
        raise ValueError(f"{'v' if v is None else 'k'} must be given too: k and v are appended together")
    if k is None:
        if cu_seqlens_k_new is not None:
            raise ValueError("cu_seqlens_k_new needs k and v, got None")
        return 0
    if cu_seqlens_k_new is not None:
        return 0
    if k.ndim != 4:
        raise ValueError(f"k must have shape (batch, seqlen_new, heads_kv, headdim), got {k.shape}")
    return k.shape[1]


def _planned(problem: Problem, metadata: SchedulerMetadata, pack_gqa: bool | None) -> Problem:
    """Return the plan's problem, which must be the call's but for what the call leaves to the plan."""
    planned = metadata.problem
    if planned == problem and pack_gqa is None:
        return planned
    difference = first_difference(planned, problem)
    while difference is not None and difference[2] in (0, None) and difference[0] in _LEFT_TO_THE_PLAN:
        problem = _replaced(problem, difference[0], difference[1])
        difference = first_difference(planned, problem)
    if difference is None and pack_gqa is not None and pack_gqa != metadata.pack_gqa:
        difference = "pack_gqa", metadata.pack_gqa, pack_gqa
    if difference is not None:
        field, plans, calls = difference
        raise ValueError(f"scheduler_metadata was made for {field}={plans!r}, but this call has {field}={calls!r}")
    return planned


_LEFT_TO_THE_PLAN = ("num_splits", "split_size", "sm_margin")


def _replaced(problem: Problem, field: str, value: Any) -> Problem:
    return Problem(**{**problem.__dict__, field: value})


def _cache(name: str, cache: Any, layout: str, kv_dtype: Any) -> NativeArray:
    """Import a cache as a view (pages, page_size, heads_kv, dim)."""
    array = import_array(name, cache)
    if array.ndim != 4:
        raise ValueError(f"{name} must have 4 dimensions, got shape {array.shape}")
    if array.dtype.itemsize == 1 and kv_dtype is None:
        raise NotImplementedError(f"{name}: quantised caches are not implemented yet, got {array.dtype}")
    return array.swapaxes(1, 2) if layout == "HND" else array


def _check_caches(problem: Problem, q: NativeArray, k_cache: NativeArray, v_cache: NativeArray) -> None:
    dtype = numpy_dtype(problem.kv_dtype)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dtype != dtype:
            raise ValueError(f"{name} must have the dtype of q ({dtype}), got {cache.dtype}")
    if k_cache.shape[3] != problem.headdim:
        raise ValueError(f"k_cache must have q's head dim {problem.headdim}, got {k_cache.shape[3]}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.size == 0:
            continue
        *outer, last = cache.strides
        if last != cache.itemsize:
            raise ValueError(f"{name} must have a contiguous last dimension, got strides {cache.strides} bytes")
        if any(stride % 16 or stride < 0 for stride in outer) or _address(cache) % 16:
            raise ValueError(
                f"{name} must begin at a multiple of 16 bytes and have strides that are non-negative multiples of 16 "
                f"bytes (a cache is never copied), got strides {cache.strides}"
            )
        span = sum((size - 1) * stride for size, stride in zip(cache.shape, cache.strides, strict=True))
        if span >= _MAX_CACHE_BYTES:
            raise ValueError(f"{name} must span less than 64 GiB, got shape {cache.shape}")


def _check_rows(
    problem: Problem, k_cache: NativeArray, table: NativeArray | None, batch_idx: NativeArray | None
) -> None:
    """Check that every sequence has a row of the cache, or of the page table."""
    _expect_shape("cache_batch_idx", batch_idx, (problem.batch_size,))
    name, rows = ("k_cache", k_cache.shape[0]) if table is None else ("page_table", table.shape[0])
    if batch_idx is None and rows != problem.batch_size:
        raise ValueError(f"{name} must have a row per sequence ({problem.batch_size}) or cache_batch_idx, got {rows}")


def _check_new(
    problem: Problem,
    q: NativeArray,
    k: NativeArray | None,
    v: NativeArray | None,
    cache_seqlens: Any,
) -> None:
    if k is None or v is None:
        return
    if cache_seqlens is None:
        raise ValueError("cache_seqlens must be given with k and v: it says where they go, got None")
    leading = k.shape[:1] if problem.cu_seqlens_k_new else (problem.batch_size, problem.max_seqlen_k_new)
    for name, new, dim in (("k", k, problem.headdim), ("v", v, problem.headdim_v)):
        _expect_shape(name, new, (*leading, problem.num_heads_kv, dim))
        if new.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q ({q.dtype}), got {new.dtype}")


def _check_rotary(
    problem: Problem,
    q: NativeArray,
    k: NativeArray | None,
    cos: NativeArray | None,
    sin: NativeArray | None,
    rotary_seqlens: Any,
) -> None:
    if (cos is None) != (sin is None):
        raise ValueError(f"rotary_{'sin' if sin is None else 'cos'} must be given too, got None")
    if cos is None or sin is None:
        if rotary_seqlens is not None:
            raise ValueError("rotary_seqlens needs rotary_cos and rotary_sin, got None")
        return
    if k is None:
        raise ValueError("rotary_cos needs k and v: it rotates the queries and the new keys, got None")
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
        if not array.flags.c_contiguous:
            raise ValueError(f"{name} must be contiguous, got strides {array.strides}")


def _check_one_memory(operands: Operands, metadata: SchedulerMetadata | None) -> None:
    arrays = {**operands.__dict__, **operands.lengths.__dict__}
    if metadata is not None:
        arrays["scheduler_metadata"] = metadata.array
    memory = memory_of(operands.q)
    for name, array in arrays.items():
        if hasattr(array, "dtype") and memory_of(array) != memory:
            raise ValueError(f"{name} must be in {memory} like q, got one in {memory_of(array)}")


def _check_values(problem: Problem, operands: Operands, capacity: int) -> None:
    """Check what index arrays hold; on a GPU this copies them to the host."""
    lengths = operands.lengths
    seqlens = to_host(lengths.cache_seqlens).astype(np.int64)
    if lengths.cu_seqlens_k_new is not None and operands.k is not None:
        starts = to_host(lengths.cu_seqlens_k_new)
        if starts[-1] > operands.k.shape[0]:
            raise ValueError(f"cu_seqlens_k_new must end by k's {operands.k.shape[0]} rows, got {starts[-1]}")
        new = np.diff(starts)
    else:
        new = np.full(problem.batch_size, problem.max_seqlen_k_new)
    if lengths.cu_seqlens_q is not None:
        last = to_host(lengths.cu_seqlens_q)[-1]
        if last > operands.q.shape[0]:
            raise ValueError(f"cu_seqlens_q must end by q's {operands.q.shape[0]} rows, got {last}")
    total = seqlens + new
    if (total > capacity).any():
        worst = int(total.argmax())
        more = f" + {new[worst]} new keys" if new[worst] else ""
        raise ValueError(f"cache_seqlens must fit the capacity {capacity}, got {seqlens[worst]}{more} at [{worst}]")
    rows = operands.k_cache.shape[0] if operands.page_table is None else operands.page_table.shape[0]
    row = np.arange(problem.batch_size)
    if operands.cache_batch_idx is not None:
        row = to_host(operands.cache_batch_idx)
        if ((row < 0) | (row >= rows)).any():
            bad = int(((row < 0) | (row >= rows)).argmax())
            raise ValueError(f"cache_batch_idx must be in [0, {rows}), got {row[bad]} at [{bad}]")
    if operands.page_table is not None:
        _check_pages(problem, operands, row, total)
    if operands.rotary_cos is not None:
        base = seqlens if operands.rotary_seqlens is None else to_host(operands.rotary_seqlens).astype(np.int64)
        positions = operands.rotary_cos.shape[0]
        queries = np.full(problem.batch_size, problem.max_seqlen_q)
        if lengths.cu_seqlens_q is not None:
            queries = np.diff(to_host(lengths.cu_seqlens_q))
        # A sequence without queries and new keys needs no position at all.
        moved = queries if operands.rotary_moves else np.minimum(queries, 1)
        needed = np.where((queries > 0) | (new > 0), base + np.maximum(new, moved), 0)
        if (base < 0).any():
            bad = int((base < 0).argmax())
            raise ValueError(f"rotary_seqlens must be at least 0, got {base[bad]} at [{bad}]")
        if (needed > positions).any():
            bad = int((needed > positions).argmax())
            raise ValueError(
                f"rotary_cos must have a row for every position, got {positions} rows for positions {base[bad]} to "
                f"{needed[bad] - 1} at [{bad}]"
            )


def _check_pages(problem: Problem, operands: Operands, row: Any, total: Any) -> None:
    """Check the page numbers that the call follows: those of the pages from the leftpad to the last key."""
    pages, page_size = operands.k_cache.shape[:2]
    table = to_host(operands.page_table)[row]
    leftpad = operands.lengths.cache_leftpad
    first = 0 if leftpad is None else to_host(leftpad)[:, None] // page_size
    column = np.arange(table.shape[1])
    wrong = (column >= first) & (column * page_size < total[:, None]) & ((table < 0) | (table >= pages))
    if wrong.any():
        sequence, index = np.argwhere(wrong)[0]
        raise ValueError(
            f"page_table must hold page numbers in [0, {pages}) where keys are, got {table[sequence, index]} at "
            f"[{row[sequence]}, {index}]"
        )


# ------------------------------------------------------------------------------------------------------------ helpers
def _optional(name: str, x: Any) -> NativeArray | None:
    return None if x is None else import_array(name, x)


def _index(name: str, x: Any, ndim: int) -> NativeArray | None:
    """Import an optional index array with a contiguous last dimension."""
    if x is None:
        return None
    array = import_index(name, x)
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension{'s' * (ndim > 1)}, got shape {array.shape}")
    if array.size and array.strides[-1] != array.itemsize:
        raise ValueError(f"{name} must have a contiguous last dimension, got strides {array.strides} bytes")
    return array


def _expect_shape(name: str, array: NativeArray | None, shape: tuple[int, ...]) -> None:
    if array is not None and array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")


def _sinks(problem: Problem, sinks: Any) -> NativeArray | None:
    """Import sinks as float32: there are few of them, and models keep them in their own dtype."""
    array = _optional("sinks", sinks)
    _expect_shape("sinks", array, (problem.num_heads_q,))
    if array is None:
        return None
    dtype_name("sinks", array.dtype)
    return array if array.dtype == np.float32 and array.flags.c_contiguous else array.astype(np.float32)


def _output(name: str, given: Any, q: NativeArray, shape: tuple[int, ...], dtype: Any) -> NativeArray:
    """Return the caller's output array, checked, or a new one where q lives."""
    if given is None:
        return empty(shape, dtype, q)
    array = import_array(name, given)
    _expect_shape(name, array, shape)
    if array.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {array.dtype}")
    if not is_writeable(array, given):
        raise ValueError(f"{name} must be writeable, got a read-only array")
    if array.size and not array.flags.c_contiguous:
        raise ValueError(f"{name} must be contiguous, got strides {array.strides} bytes")
    return array


def _stack(name: str, arrays: Any) -> tuple[NativeArray, Any]:
    """Return n arrays as one contiguous native array (n, ...), and one of the caller's arrays."""
    if not isinstance(arrays, (list, tuple)):
        stacked = import_array(name, arrays)
        return (stacked if stacked.flags.c_contiguous else stacked.copy()), arrays
    if not arrays:
        raise ValueError(f"{name} must hold at least one part, got 0")
    parts = [import_array(f"{name}[{i}]", array) for i, array in enumerate(arrays)]
    for i, part in enumerate(parts):
        if part.dtype != parts[0].dtype or is_on_device(part) != is_on_device(parts[0]):
            raise ValueError(
                f"{name}[{i}] must have the dtype and memory of {name}[0] ({parts[0].dtype}), got {part.dtype}"
            )
        _expect_shape(f"{name}[{i}]", part, parts[0].shape)
    stacked = empty((len(parts), *parts[0].shape), parts[0].dtype, parts[0])
    for i, part in enumerate(parts):
        stacked[i] = part
    return stacked, arrays[0]


def _longest(lengths: Lengths, capacity: int, on_device: bool, problem: Problem) -> int:
    """Return an upper bound of the key lengths: exact on the host, the capacity where reading them would sync."""
    if on_device or problem.cu_seqlens_k_new or not problem.batch_size:
        return capacity
    return int(lengths.cache_seqlens.max()) + problem.max_seqlen_k_new


def _address(array: NativeArray) -> int:
    return array.data.ptr if is_on_device(array) else array.ctypes.data
