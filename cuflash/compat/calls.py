"""The functions behind all interfaces: their arguments become those of the library's own functions."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import attention
from ..arguments.common import Given, lse_shape, renamed
from ..arguments.lengths import filled
from ..arguments.values import check_packed
from ..arrays import checks_values, empty, exporter, import_array, import_index
from ..layouts import new_tensor
from ..memory import is_on_device
from ..metadata import SchedulerMetadata
from ..problem import boolean, integer, make_problem
from . import torch_tensors
from .plans import make_plan, plan_around, problem_of

_FLOAT8 = "bfloat16"  # what queries of one byte give


def metadata(
    *,
    cache_seqlens: Any,
    max_seqlen_k: int,
    cu_seqlens_q: Any = None,
    cu_seqlens_k_new: Any = None,
    cache_leftpad: Any = None,
    max_seqlen_k_new: int = 0,
    **problem: Any,
) -> Any:
    """Plan a step into an int32 array of the kind of ``cache_seqlens``.

    Args:
        cache_seqlens: (batch,) int32.
        max_seqlen_k: Accepted; nothing follows from it.
        cu_seqlens_q: (batch + 1,) int32.
        cu_seqlens_k_new: (batch + 1,) int32.
        cache_leftpad: (batch,) int32.
        max_seqlen_k_new: New keys of every sequence.
        problem: The arguments of ``make_problem``.
    """
    if cache_seqlens is None or isinstance(cache_seqlens, int):
        raise TypeError(f"cache_seqlens must be an array, got {cache_seqlens!r}")
    with torch_tensors.stream_of(cache_seqlens):
        lengths = {
            "cache_seqlens": cache_seqlens, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k_new": cu_seqlens_k_new,
            "cache_leftpad": cache_leftpad, "max_seqlen_k_new": max_seqlen_k_new,
        }  # fmt: skip
        made = make_problem(**problem, cu_seqlens_q=cu_seqlens_q is not None)
        return make_plan(made, lengths, integer("max_seqlen_k", max_seqlen_k, 0))[0]


def attend(**options: Any) -> Any:
    """Attend; the arguments are those of ``cuflash.flash_attn_with_kvcache``, with a bare array as metadata.

    Returns:
        out, or (out, softmax_lse, scratch, scratch) with ``return_softmax_lse``: the scratch of theirs, empty.
    """
    if options.get("pack_gqa") is not None:
        boolean("pack_gqa", options["pack_gqa"])
    given = {**attention.DEFAULTS, **options, "pack_gqa": None}  # heads are always packed
    returns_lse = boolean("return_softmax_lse", given["return_softmax_lse"])
    q = given["q"]
    with torch_tensors.stream_of(q):
        if torch_tensors.is_tensor(q):
            _take_tensors(given)
        bare = given["scheduler_metadata"]
        if bare is not None and not isinstance(bare, SchedulerMetadata):
            _take_lengths(given)
            given["scheduler_metadata"] = plan_around(bare, given)
        elif bare is None and torch_tensors.is_captured(q):
            # The library would plan in memory of CuPy's, which is gone when the call returns.
            _take_lengths(given)
            given["scheduler_metadata"] = _plan_of(given)
        if not returns_lse:
            return attention.flash_attn_with_kvcache(**given)
        scratch = _nothing(q)
        out, lse = attention.flash_attn_with_kvcache(**given)
    return out, lse, scratch, scratch


def attend_varlen(
    q: Any, k: Any, v: Any, cu_seqlens_k: Any, seqused_q: Any, seqused_k: Any, max_seqlen_k: Any = None, **options: Any
) -> Any:
    """Attend to keys that lie one sequence behind the other, or in a dense batch, or in pages.

    They are one row of a cache in which every sequence begins at its own first valid key: nothing is copied.

    Args:
        q: (total_q, heads, headdim), or (batch, seqlen_q, heads, headdim) without ``cu_seqlens_q``.
        k: (total_k, heads_kv, headdim), or (batch, seqlen_k, ..) without ``cu_seqlens_k``, or pages.
        v: The same with headdim_v.
        cu_seqlens_k: (batch + 1,) int32 first key of each sequence, or None.
        seqused_q: Not implemented.
        seqused_k: (batch,) int32 keys that count of each sequence.
        max_seqlen_k: Longest keys, or None; decides nothing.
        options: Others of :func:`attend`.
    """
    if seqused_q is not None:
        raise NotImplementedError("flash_attn_varlen_func: seqused_q is not implemented")
    if max_seqlen_k is not None:
        integer("max_seqlen_k", max_seqlen_k, 0)
    q, k, v = (torch_tensors.without_gradient(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    is_paged = options.get("page_table") is not None
    is_packed = cu_seqlens_k is not None and not is_paged
    k, v = (_indexable(name, x, 3 if is_packed else 4) for name, x in (("k", k), ("v", v)))
    seqused_k = None if seqused_k is None else _indexable("seqused_k", seqused_k, 1)
    lengths = "cu_seqlens_k" if seqused_k is None else "seqused_k"
    with renamed({"k_cache": "k", "v_cache": "v", "cache_seqlens": lengths}):
        if is_paged and seqused_k is None:
            raise ValueError("seqused_k must be given with page_table, got None")
        if not is_packed:
            number = k.shape[1] if seqused_k is None else seqused_k
            return attend(q=q, k_cache=k, v_cache=v, cache_seqlens=number, **options)
        starts_and_end = _indexable("cu_seqlens_k", cu_seqlens_k, 1)
        starts = starts_and_end[:-1]
        if seqused_k is not None and seqused_k.shape != starts.shape:
            raise ValueError(f"seqused_k must have shape {tuple(starts.shape)}, got {tuple(seqused_k.shape)}")
        with torch_tensors.stream_of(starts_and_end):
            native = import_index("cu_seqlens_k", starts_and_end)
            used = None if seqused_k is None else import_index("seqused_k", seqused_k)
            if checks_values(is_on_device(native)):
                check_packed(native, k.shape[0], used)
        ends = starts_and_end[1:] if seqused_k is None else _wide(starts) + _wide(seqused_k)
        more = {"cache_leftpad": starts, "cache_batch_idx": starts * 0}
        with renamed(dict.fromkeys(more, "cu_seqlens_k")):
            return attend(q=q, k_cache=k[None], v_cache=v[None], cache_seqlens=ends, **more, **options)


def _indexable(name: str, x: Any, ndim: int) -> Any:
    """Return an array of which views can be made, which DLPack does not ask for, and that has so many dimensions."""
    array = _with_shape(name, x)
    if len(array.shape) != ndim:
        raise ValueError(f"{name} must have {ndim} dimension{'s' * (ndim > 1)}, got shape {tuple(array.shape)}")
    return array


def _wide(x: Any) -> Any:
    """Return an index array of NumPy's as int64: the sum of unsigned and signed ones would be float64."""
    return x.astype(np.int64) if isinstance(x, np.ndarray) and x.dtype.kind in "iu" else x


def _with_shape(name: str, x: Any) -> Any:
    """Return an array of any kind, which may tell its shape by DLPack alone, as one that has a shape."""
    return x if torch_tensors.is_tensor(x) else import_array(name, x)


def shape_of(name: str, x: Any) -> tuple[int, ...]:
    """Return the shape of an array of any kind."""
    return tuple(_with_shape(name, x).shape)


def _nothing(q: Any) -> Any:
    """Return an empty float32 array of the kind of q."""
    if torch_tensors.is_tensor(q):
        return new_tensor((0,), "float32", q)
    return exporter(q)(empty((0,), np.float32, import_array("q", q)))


def _plan_of(given: Given) -> SchedulerMetadata:
    """Return a plan for a call that has none, in memory of the caller's framework."""
    k, starts_new = given["k"], given["cu_seqlens_k_new"]
    new = 0 if k is None or starts_new is not None else shape_of("k", k)[1]
    lengths = {name: given[name] for name in ("cache_seqlens", "cu_seqlens_q", "cache_leftpad")}
    lengths |= {"cu_seqlens_k_new": None if k is None else starts_new, "max_seqlen_k_new": new}
    return make_plan(problem_of(given), lengths)[1]


def _take_lengths(given: Given) -> None:
    """Make an array of one length for all sequences, or of none: the library would keep it with the plan."""
    number, q = given["cache_seqlens"], given["q"]
    if number is None and given["page_table"] is None:
        number = shape_of("k_cache", given["k_cache"])[1]
    elif number is None and not isinstance(given["page_table"], tuple):
        number = shape_of("page_table", given["page_table"])[1] * shape_of("k_cache", given["k_cache"])[1]
    if not isinstance(number, int):
        return
    number = integer("cache_seqlens", number, 0)
    starts = given["cu_seqlens_q"]
    size = shape_of("q", q)[0] if starts is None else shape_of("cu_seqlens_q", starts)[0] - 1
    is_tensor = torch_tensors.is_tensor(q)
    given["cache_seqlens"] = (
        torch_tensors.filled(size, number, q) if is_tensor else filled(size, number, import_array("q", q))
    )


def _take_tensors(given: Given) -> None:
    """Prepare torch's tensors: no gradients, the copies that FlashAttention-3 makes, results in torch's memory."""
    for name, x in given.items():
        given[name] = torch_tensors.without_gradient(name, x)
    q, v_cache, sinks, table = (given[name] for name in ("q", "v_cache", "sinks", "page_table"))
    if torch_tensors.is_tensor(sinks):
        given["sinks"] = sinks.float()
    if torch_tensors.is_tensor(table) and table.ndim and table.stride(-1) != 1:
        given["page_table"] = table.contiguous()
    if not torch_tensors.is_tensor(v_cache) or q.ndim < 3 or not v_cache.ndim:
        return
    if given["out"] is None:
        dtype = _FLOAT8 if q.element_size() == 1 else str(q.dtype).removeprefix("torch.")
        given["out"] = new_tensor((*q.shape[:-1], v_cache.shape[-1]), dtype, q)
    if given["return_softmax_lse"] and given["softmax_lse"] is None:
        given["softmax_lse"] = new_tensor(lse_shape(tuple(q.shape)), "float32", q)
