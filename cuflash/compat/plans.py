"""Plans as bare arrays: int32 arrays of the caller's kind, and a SchedulerMetadata around one while a call lasts.

How a plan is read must follow from what a call knows by itself, so nothing here depends on ``max_seqlen_k``.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import Any

import numpy as np

from .. import arguments, backends
from ..arguments.common import UNIT, Given
from ..arrays import checks_values, empty, exporter, import_array, to_host
from ..device import Device, host_device
from ..kernels import choose
from ..layouts import new_tensor
from ..memory import NativeArray, address_of, is_on_device
from ..metadata import SchedulerMetadata
from ..planner import plan_cuts, plan_words
from ..problem import Problem, integer
from ..scheduling import get_scheduler_metadata
from . import torch_tensors

_LONGEST = 2**31 - 1  # no call has longer keys
_MOST = 256  # problems that are remembered


def scheduler_metadata_size(batch_size: int) -> int:
    """Return how many int32 a buffer for the metadata of any batch up to this size needs.

    It is enough for every GPU in this machine and for host memory: what ``get_scheduler_metadata`` returns may be
    shorter.

    Args:
        batch_size: The largest number of sequences.

    Example:
        >>> import numpy as np
        >>> from cuflash.compat import scheduler_metadata_size
        >>> from cuflash.compat.flash_attn_interface import get_scheduler_metadata
        >>> buffer = np.zeros(scheduler_metadata_size(64), np.int32)
        >>> metadata = get_scheduler_metadata(3, 1, 4096, 32, 8, 128, np.array([4096, 100, 9], np.int32))
        >>> buffer[: metadata.size] = metadata
    """
    batch_size = integer("batch_size", batch_size, 0)
    return max(plan_words(batch_size, device) for device in _devices())


@lru_cache(maxsize=1)
def _gpus() -> tuple[Device, ...]:
    try:
        import cupy

        number = cupy.cuda.runtime.getDeviceCount() if cupy.cuda.is_available() else 0
    except ImportError:
        return ()
    from ..backends.cuda import BACKEND

    devices = []
    for which in range(number):
        with cupy.cuda.Device(which):
            devices.append(BACKEND.device(cupy.empty(0)))
    return tuple(devices)


def _devices() -> tuple[Device, ...]:
    return (host_device(), *_gpus())


def make_plan(problem: Problem, lengths: Given, max_seqlen_k: int = _LONGEST) -> tuple[Any, SchedulerMetadata]:
    """Plan a problem into a new array of the caller's kind.

    Args:
        problem: The problem.
        lengths: The arguments ``cache_seqlens``, ``cu_seqlens_q``, ``cu_seqlens_k_new``, ``cache_leftpad`` and
            ``max_seqlen_k_new`` of ``get_scheduler_metadata``.
        max_seqlen_k: As given; only checked.

    Returns:
        The array, and the plan around it.
    """
    like = lengths["cache_seqlens"]
    native = import_array("cache_seqlens", like)
    words = plan_words(problem.batch_size, backends.select(native).device(native))
    array = new_tensor((words,), "int32", like) if torch_tensors.is_tensor(like) else None
    own = empty((words,), np.int32, native) if array is None else import_array("scheduler_metadata", array)
    plan = _around(own, problem)
    get_scheduler_metadata(
        problem.batch_size,
        problem.max_seqlen_q,
        max_seqlen_k,
        problem.num_heads_q,
        problem.num_heads_kv,
        problem.headdim,
        qkv_dtype=problem.qkv_dtype,
        headdim_v=problem.headdim_v,
        page_size=problem.page_size,
        window_size=problem.window_size,
        attention_chunk=problem.attention_chunk,
        has_softcap=problem.has_softcap,
        num_splits=problem.num_splits,
        sm_margin=problem.sm_margin,
        kv_dtype=problem.kv_dtype,
        out=plan,
        **lengths,
    )
    return exporter(like)(own) if array is None else array, plan


def plan_around(array: Any, given: Given) -> SchedulerMetadata:
    """Return the plan of a call whose ``scheduler_metadata`` is a bare array.

    Args:
        array: The array.
        given: The arguments of ``cuflash.flash_attn_with_kvcache`` by name.

    Raises:
        TypeError: If it is not an int32 array.
        ValueError: If it cannot be a plan of the call's problem.
    """
    native, problem = import_array("scheduler_metadata", array), problem_of(given)
    if native.dtype != np.int32:
        raise TypeError(f"scheduler_metadata must be an int32 array, got {native.dtype}")
    words = plan_words(problem.batch_size, backends.select(native).device(native))
    if native.shape != (words,):
        raise ValueError(
            f"scheduler_metadata must have shape ({words},) for {problem.batch_size} sequences, as "
            f"get_scheduler_metadata returned it, got {native.shape}"
        )
    if not native.flags.c_contiguous or address_of(native) % UNIT:
        raise ValueError(f"scheduler_metadata must be contiguous and begin at a multiple of {UNIT} bytes")
    plan = _around(native, problem)
    if checks_values(is_on_device(native)):
        _check(to_host(native), plan)
    return plan


def _around(native: NativeArray, problem: Problem) -> SchedulerMetadata:
    """Return a plan of its own for every call, which shares what calls on plans of this problem have prepared."""
    known = _known(problem, backends.select(native).device(native))
    plan = SchedulerMetadata(problem, known.device, known.partition, _LONGEST, native)
    plan.calls = known.calls
    return plan


@lru_cache(maxsize=_MOST)
def _known(problem: Problem, device: Device) -> SchedulerMetadata:
    return SchedulerMetadata(problem, device, choose(problem, device, None), _LONGEST, None)


def _check(array: Any, plan: SchedulerMetadata) -> None:
    """Refuse an array that no planner makes for this problem: it was made for another one, or not filled."""
    problem, partition = plan.problem, plan.partition
    items = problem.batch_size * problem.num_heads_kv * partition.row_blocks
    cuts, used = plan_cuts(array, problem.batch_size), int(array[0])
    fits = 0 <= used <= partition.num_blocks and cuts["item"][used] == items
    if fits and used:
        mine = cuts[:used]
        order = np.lexsort((mine["key"], mine["item"]))
        fits = (
            (mine["item"][0], mine["key"][0]) == (0, 0)
            and bool((mine["item"] < items).all() and (mine["key"] >= 0).all())
            and bool((order == np.arange(used)).all())
        )
    if not fits:
        raise ValueError(
            f"scheduler_metadata is no plan for num_heads_q={problem.num_heads_q}, num_heads_kv="
            f"{problem.num_heads_kv}, headdim={problem.headdim}, max_seqlen_q={problem.max_seqlen_q} and "
            f"{problem.qkv_dtype}: it was made for another problem, or not filled"
        )


_problems: dict[Hashable, Problem] = {}


def problem_of(given: Given) -> Problem:
    """Return the problem of a call, from its own shapes alone; remembered by what decides."""
    q, k_cache, v_cache, starts, window = (
        given[name] for name in ("q", "k_cache", "v_cache", "cu_seqlens_q", "window_size")
    )
    try:
        key: Hashable = (
            (tuple(q.shape), q.dtype, tuple(k_cache.shape), k_cache.dtype, v_cache.shape[-1]),
            (given["page_table"] is None, None if starts is None else tuple(starts.shape), given["max_seqlen_q"]),
            (given["causal"], window and tuple(window), given["attention_chunk"], bool(given["softcap"])),
            (given["num_splits"], given["sm_margin"], given["kv_dtype"], type(q)),
        )
        problem = _problems.get(key)
    except (AttributeError, IndexError, TypeError, ValueError):  # what is wrong is said below
        return arguments.problem_of(given)[0]
    if problem is None:
        problem = arguments.problem_of(given)[0]
        if len(_problems) >= _MOST:
            _problems.clear()
        _problems[key] = problem
    return problem
