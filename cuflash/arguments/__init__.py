"""Raw arguments -> Problem and operands: everything is checked here, before anything is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..arrays import checks_values, import_array
from ..dtypes import QUERY_DTYPES, dtype_name
from ..kv_cache import KVCache
from ..memory import NativeArray, is_on_device
from ..metadata import SchedulerMetadata
from ..operands import Operands
from ..problem import (
    Problem,
    boolean,
    cap,
    check_headdims,
    check_heads,
    factor,
    first_difference,
    integer,
    make_problem,
)
from .caches import apart, cache_of, check_caches, check_rows, new_keys, other_layout
from .common import Given, import_codes
from .descales import cache_scales, query_scales
from .lengths import call_lengths, lengths
from .rotary import rotary as rotary_of
from .rows import check_memory, merged, outputs, query_values, sinks_of, tree_mask
from .values import check_call

__all__ = ["attention", "lengths", "plan_of", "problem_of"]

_LEFT_TO_THE_PLAN = ("num_splits", "split_size", "sm_margin")  # a call may be silent about them


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
    problem, q, cache, softcap = problem_of(given)
    if plan is not None:
        problem = _planned(problem, plan, given["pack_gqa"])

    check_caches(problem, cache)
    check_rows(problem, cache)
    k, v = new_keys(problem, cache, given)
    q = q if k is None else apart("q", q, cache)
    if problem.is_joint and not cache.may_be_joint:
        raise ValueError(
            f"v_cache must be the first columns of k_cache's rows for headdim={problem.headdim}, got other values"
        )
    q_scales = query_scales(problem, given)
    k_scales, v_scales = cache_scales(problem, cache, k is not None, given)
    cache = replace(cache, k_scales=k_scales, v_scales=v_scales)
    rotary = rotary_of(problem, k, cache.joint, given)
    qv = query_values(problem, q, given)
    qv = qv if k is None or qv is None else apart("qv", qv, cache)
    step_lengths = call_lengths(problem, q, cache, k, plan, given)
    scale = (problem.headdim + (0 if qv is None else problem.headdim_v)) ** -0.5
    if given["softmax_scale"] is not None:
        scale = factor("softmax_scale", given["softmax_scale"])
    sinks = sinks_of(problem, given["sinks"])
    out, lse = outputs(problem, q, given)
    tree, (merge_out, merge_lse) = tree_mask(problem, q, given), merged(out, given)
    operands = Operands(
        q, cache, out, lse, step_lengths, scale, softcap, k, v, rotary, sinks, qv, tree, merge_out, merge_lse, q_scales
    )
    check_memory(operands, plan)
    if checks_values(is_on_device(q)):
        check_call(problem, operands, given["page_table"])
    return problem, operands


def problem_of(given: Given) -> tuple[Problem, NativeArray, KVCache, float]:
    """Return the problem of a call, which its shapes, dtypes and numbers say, with what it was read from.

    Args:
        given: The arguments of ``flash_attn_with_kvcache`` by name.

    Returns:
        The problem, the queries, the cache and the softcap.

    Raises:
        TypeError: For an argument of a wrong kind.
        ValueError: For a wrong value.
    """
    boolean("return_softmax_lse", given["return_softmax_lse"])
    q, codes = import_codes("q", given["q"], "float8_e4m3fn")
    q_dtype = dtype_name("q", codes or q.dtype, QUERY_DTYPES)
    cache = cache_of(given)
    batch_size, seqlen_q = _query_shape(q, given["cu_seqlens_q"], given["max_seqlen_q"])
    softcap = cap(given["softcap"])
    check_heads(
        "q: num_heads_q", q.shape[-2], "k_cache's num_heads_kv", cache.k.shape[2],
        other_layout(given["layout"], q.shape[-2], cache),
    )  # fmt: skip
    check_headdims("q: headdim", q.shape[-1], "v_cache: headdim_v", cache.v.shape[-1])
    problem = make_problem(
        batch_size,
        seqlen_q,
        q.shape[-2],
        cache.k.shape[2],
        q.shape[-1],
        qkv_dtype=q_dtype,
        kv_dtype=cache.dtype if given["kv_dtype"] is None else given["kv_dtype"],
        headdim_v=cache.v.shape[-1],
        cu_seqlens_q=given["cu_seqlens_q"] is not None,
        page_size=cache.page_size if cache.is_paged else None,
        causal=given["causal"],
        window_size=given["window_size"],
        attention_chunk=given["attention_chunk"],
        has_softcap=softcap > 0,
        num_splits=given["num_splits"],
        split_size=given["split_size"],
        pack_gqa=given["pack_gqa"],
        sm_margin=given["sm_margin"],
        cp_world_size=given["cp_world_size"],
        cp_rank=given["cp_rank"],
        cp_interleave=given["cp_interleave"],
    )
    return problem, q, cache, softcap


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
        raise ValueError(
            f"scheduler_metadata was made for {field}={plans!r}, but this call has {field}={calls!r}"
            f"{_likely_reason(field, plan, problem)}"
        )
    return planned


def _likely_reason(field: str, plan: SchedulerMetadata, call: Problem) -> str:
    """Return what is often behind a difference between a plan and a call, for its error."""
    planned = plan.problem
    if field == "page_size" and call.page_size is None:
        return ": page_table is missing"
    if field == "max_seqlen_q" and plan.max_seqlen_k == call.max_seqlen_q:
        return ": max_seqlen_q and max_seqlen_k of the plan look swapped"
    if field == "num_heads_kv" and (planned.page_size, planned.num_heads_kv) == (call.num_heads_kv, call.page_size):
        return ": is the layout of the caches the other one?"
    return ""
