"""Lengths of the sequences: arrays, or one number for all."""

from __future__ import annotations

import numpy as np

from ..arrays import checks_values, empty, refuse_in_capture
from ..kv_cache import KVCache
from ..memory import NativeArray, is_on_device, memory_of
from ..metadata import SchedulerMetadata
from ..operands import Lengths
from ..problem import Problem, integer
from .common import Given, expect_shape, index
from .values import check_lengths

_INT32_MAX = 2**31 - 1


def lengths(problem: Problem, given: Given, seqlen_k_new: int = 0, plan: SchedulerMetadata | None = None) -> Lengths:
    """Import the lengths of a step and check them.

    Args:
        problem: The problem they belong to.
        given: ``cache_seqlens`` (batch,) or one int, ``cu_seqlens_q``, ``cu_seqlens_k_new`` and ``cache_leftpad``.
        seqlen_k_new: New keys of every sequence, where they are not ragged.
        plan: The plan that is made of them, if it is not a new one.

    Raises:
        TypeError: If one is not an array of integers.
        ValueError: For a wrong shape, and for values that contradict each other, naming the argument.
    """
    batch = problem.batch_size
    arrays = {
        name: index(name, given[name], 1)
        for name in ("cu_seqlens_q", "cu_seqlens_k_new", "cache_leftpad")
    }  # fmt: skip
    for name, array in arrays.items():
        expect_shape(name, array, (batch + name.startswith("cu_"),))
    others = [array for array in arrays.values() if array is not None]
    if isinstance(given["cache_seqlens"], (int, np.integer)):
        number = integer("cache_seqlens", given["cache_seqlens"], 0)
        like = others[0] if others else np.empty(0) if plan is None else plan.array
        seqlens = filled(batch, number, like, plan)
    else:
        if given["cache_seqlens"] is None:
            raise TypeError("cache_seqlens must be an array or an int, got None")
        seqlens = index("cache_seqlens", given["cache_seqlens"], 1)
        expect_shape("cache_seqlens", seqlens, (batch,))
    if any(memory_of(array) != memory_of(seqlens) for array in others):
        raise ValueError("cache_seqlens, cu_seqlens_q, cu_seqlens_k_new and cache_leftpad must be in one memory")
    if problem.cp_world_size > 1 and arrays["cache_leftpad"] is not None:
        raise ValueError(f"cache_leftpad must be None with cp_world_size={problem.cp_world_size}, got an array")
    result = Lengths(seqlens, **arrays, seqlen_k_new=0 if arrays["cu_seqlens_k_new"] is not None else seqlen_k_new)
    if checks_values(is_on_device(seqlens)):
        check_lengths(problem, result)
    return result


def call_lengths(
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
        index("cu_seqlens_k_new", mine.pop("cu_seqlens_k_new"), 1)  # without new keys it says nothing
        mine["cu_seqlens_k_new"] = None
    if cache.is_packed and mine["cache_seqlens"] is None:  # keys lie between the sequences' beginnings
        mine |= {"cache_seqlens": 0, "cu_seqlens_k_new": cache.page_indptr}
    number = mine["cache_seqlens"]
    if number is None and problem.cp_world_size > 1:
        raise ValueError(f"cache_seqlens must be given with cp_world_size={problem.cp_world_size}, got None")
    if number is None or isinstance(number, (int, np.integer)):
        if number is None and cache.capacity > _INT32_MAX:
            raise ValueError(f"cache_seqlens must be given for more than 2**31 - 1 slots, got {cache.capacity}")
        number = cache.capacity if number is None else integer("cache_seqlens", number, 0)
        mine["cache_seqlens"] = filled(problem.batch_size, number, q, plan)
    ragged = mine["cu_seqlens_k_new"] is not None
    return lengths(problem, mine, 0 if k is None or ragged else k.shape[1])


def filled(size: int, number: int, like: NativeArray, plan: SchedulerMetadata | None = None) -> NativeArray:
    """Return an int32 array of equal numbers where ``like`` lives.

    Args:
        size: Its length.
        number: The number.
        like: An array.
        plan: A plan in the same memory keeps the array as long as it lives, so that a captured graph may use it.
    """
    kept = {} if plan is None or memory_of(plan.array) != memory_of(like) else plan.kept
    array = kept.get((size, number))
    if array is None:
        if is_on_device(like):
            refuse_in_capture("cache_seqlens", "be an array, or a number that an earlier call on the plan had, too,")
        array = empty((size,), np.int32, like)
        array[...] = number
        kept[size, number] = array
    return array
