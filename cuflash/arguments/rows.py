"""What goes with the query rows: sinks, and where their results go."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import aligned, check_way_back, import_array, refuse_in_capture
from ..dtypes import FLOAT_DTYPES, dtype_name, numpy_dtype
from ..kv_cache import KVCache
from ..memory import (
    NativeArray,
    has_each_once,
    has_whole_rows,
    is_on_device,
    lie_alike,
    memory_of,
    overlaps,
)
from ..metadata import SchedulerMetadata
from ..operands import PAIRS, Operands
from ..problem import Problem, window_bounds
from .common import Given, expect_shape, lse_shape, output


def sinks_of(problem: Problem, sinks: Any) -> NativeArray | None:
    """Import sinks as float32: there are few of them, and models keep them in their own dtype."""
    if sinks is None:
        return None
    array = import_array("sinks", sinks)
    expect_shape("sinks", array, (problem.num_heads_q,))
    dtype_name("sinks", array.dtype, FLOAT_DTYPES)
    array = aligned("sinks", array)
    if array.dtype == np.float32 and array.flags.c_contiguous:
        return array
    if is_on_device(array):
        refuse_in_capture("sinks", "be contiguous float32")
    return array.astype(np.float32)


def outputs(problem: Problem, q: NativeArray, given: Given) -> tuple[NativeArray, NativeArray | None]:
    """Return where output and LSE go; no LSE on a GPU if nobody asks for it."""
    out = output("out", given["out"], q, (*q.shape[:-1], problem.headdim_v), numpy_dtype(problem.out_dtype), True)
    _check_kind("out", out, given)
    if not given["return_softmax_lse"] and given["softmax_lse"] is None and is_on_device(q):
        return out, None
    lse = output("softmax_lse", given["softmax_lse"], q, lse_shape(q.shape), np.dtype(np.float32), True)
    if given["return_softmax_lse"]:
        _check_kind("softmax_lse", lse, given)
    return out, lse


def _check_kind(name: str, native: NativeArray, given: Given) -> None:
    """Check that a result can be returned: as what the caller gave for it, or as an array of the queries' kind."""
    if given[name] is None:
        check_way_back("q", given["q"], native)
    else:
        check_way_back(name, given[name], native)


def query_values(problem: Problem, q: NativeArray, given: Given) -> NativeArray | None:
    """Import qv, what of a query meets the values."""
    if given["qv"] is None:
        return None
    if problem.out_dtype != problem.qkv_dtype:
        raise ValueError(f"qv must be None with queries of {problem.qkv_dtype}, got an array")
    if not problem.takes_qv:
        raise ValueError(
            f"qv must come with a headdim of at most 64 and a headdim_v of at least 256, got {problem.headdim} and "
            f"{problem.headdim_v}"
        )
    qv = import_array("qv", given["qv"])
    expect_shape("qv", qv, (*q.shape[:-1], problem.headdim_v))
    if qv.dtype != q.dtype:
        raise ValueError(f"qv must have the dtype of q ({q.dtype}), got {qv.dtype}")
    return qv


def tree_mask(problem: Problem, q: NativeArray, given: Given) -> NativeArray | None:
    """Import the mask among the last keys of every sequence, which rules out all other masks."""
    if given["tree_mask"] is None:
        return None
    mask = import_array("tree_mask", given["tree_mask"])
    others = {
        "causal": bool(given["causal"]),
        "window_size": window_bounds(given["window_size"]) != (-1, -1),
        "attention_chunk": problem.attention_chunk > 0,
        "rotary_cos": given["rotary_cos"] is not None,
    }
    for name, is_given in others.items():
        if is_given:
            raise ValueError(f"tree_mask must be alone: {name} must not be given with it, got {given[name]!r}")
    if mask.dtype not in (np.bool_, np.uint32):
        raise TypeError(f"tree_mask must be bool, or packed as uint32, got {mask.dtype}")
    columns = problem.max_seqlen_q if mask.dtype == np.bool_ else -(-problem.max_seqlen_q // 32)
    expect_shape("tree_mask", mask, (*((q.shape[0],) if problem.cu_seqlens_q else q.shape[:2]), columns))
    mask = aligned("tree_mask", mask)
    if not has_whole_rows(mask):
        if is_on_device(mask):
            refuse_in_capture("tree_mask", "have a contiguous last dimension")
        mask = mask.copy()
    return mask


def merged(out: NativeArray, given: Given) -> tuple[NativeArray | None, NativeArray | None]:
    """Import merge_with, the results of the same queries over other keys."""
    pair = given["merge_with"]
    if pair is None:
        return None, None
    if not isinstance(pair, tuple):
        raise TypeError(f"merge_with must be a pair (out, lse), got {type(pair).__name__}")
    if len(pair) != 2:
        raise ValueError(f"merge_with must be a pair (out, lse), got {len(pair)} arrays")
    other, other_lse = import_array("merge_with[0]", pair[0]), import_array("merge_with[1]", pair[1])
    expect_shape("merge_with[0]", other, out.shape)
    if other.dtype != out.dtype:
        raise ValueError(f"merge_with[0] must be {out.dtype}, got {other.dtype}")
    expect_shape("merge_with[1]", other_lse, lse_shape(out.shape))
    if other_lse.dtype != np.float32:
        raise ValueError(f"merge_with[1] must be float32, got {other_lse.dtype}")
    return aligned("merge_with[0]", other), aligned("merge_with[1]", other_lse)


def check_memory(operands: Operands, plan: SchedulerMetadata | None) -> None:
    """Check that all arrays lie in one memory, and that none that is written is another one."""
    arrays, cache = operands.arrays, operands.cache
    if plan is not None:
        arrays["scheduler_metadata"] = plan.array
    memory = memory_of(operands.q)
    for name, array in arrays.items():
        if array is not None and memory_of(array) != memory:
            raise ValueError(f"{_argument(name, cache)} must be in {memory} like q, got one in {memory_of(array)}")
    # An array may be overwritten by what is made of it, element by element: whoever writes has read it.
    in_place = {"out": ("q", "merge_out"), "softmax_lse": ("merge_lse",)}
    pairs = list(operands.kept_apart())
    if plan is not None:
        pairs += [(written, "scheduler_metadata") for written in dict(pairs)]
    for written, name in pairs:
        target, array = arrays[written], arrays[name]
        if not overlaps(target, array):
            continue
        if name not in in_place.get(written, ()) or not lie_alike(target, array):
            other = _argument(name, cache)
            raise ValueError(f"{written} must share no memory with {other}, got overlapping arrays")
    for name in operands.appended:
        target = arrays[name]
        if target is not None and not has_each_once(target):
            raise ValueError(
                f"{name} must have memory of its own for each element to append to it, got strides {target.strides}"
            )


def _argument(name: str, cache: KVCache) -> str:
    """Return what the caller has given as an array that has this name among operands."""
    if cache.is_packed and name == "page_indptr":
        return "cu_seqlens_k"
    given = {part: f"{pair}[{place}]" for pair, parts in PAIRS.items() for place, part in enumerate(parts)}
    return given.get(name, name)
