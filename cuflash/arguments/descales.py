"""Scales of quantised queries, keys and values."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import import_array, is_writeable
from ..dtypes import QUANTISED_DTYPES
from ..kv_cache import KVCache, Scales
from ..memory import is_aligned, lie_alike
from ..problem import Problem, factor
from .common import Given


def query_scales(problem: Problem, given: Given) -> Scales:
    """Import ``q_descale``."""
    return _scales("q_descale", given["q_descale"], problem, problem.qkv_dtype, None)


def cache_scales(problem: Problem, cache: KVCache, appends: bool, given: Given) -> tuple[Scales, Scales]:
    """Import ``k_descale`` and ``v_descale``.

    Args:
        problem: The problem.
        cache: The caches.
        appends: Whether scales per key and head are written.
        given: All arguments.
    """
    scales = []
    for name in ("k_descale", "v_descale"):
        scales.append(_scales(name, given[name], problem, problem.kv_dtype, cache, given["layout"]))
        array = scales[-1].array
        if appends and array is not None and scales[-1].per_key and not is_writeable(array, given[name]):
            raise ValueError(f"{name} must be writeable: an append finds the scales of its keys, got a read-only array")
    k, v = scales
    if (cache.joint or problem.is_joint) and given["v_descale"] is not None and not _are_equal(k, v):
        raise ValueError(
            "v_descale must be None or k_descale where values are the first columns of k_cache's rows, got others"
        )
    # One row has one scale. A kernel that takes values for a part of the keys relies on it, also where there are none.
    is_joint = cache.joint or (cache.may_be_joint and problem.headdim > problem.headdim_v)
    return (k, k) if is_joint else (k, v)


def _scales(name: str, value: Any, problem: Problem, dtype: str, cache: KVCache | None, layout: str = "NHD") -> Scales:
    if value is None:
        return Scales()
    if dtype not in QUANTISED_DTYPES:
        raise ValueError(f"{name} must be None where nothing is quantised, got scales for {dtype}")
    if isinstance(value, (bool, int, float, str, bytes, np.number)):
        return Scales(factor(name, value))
    array = import_array(name, value)
    if array.dtype != np.float32:
        raise TypeError(f"{name} must be a number or float32, got {array.dtype}")
    if not is_aligned(array):
        raise ValueError(f"{name} must be aligned to its elements, got strides {array.strides} bytes")
    if array.ndim < 3 and array.size == 1:
        return Scales(array=array.reshape(1, 1))
    if array.ndim == 3 and layout == "HND":
        array = array.swapaxes(1, 2)
    shapes = [(problem.batch_size, problem.num_heads_kv), *([] if cache is None else [tuple(cache.k.shape[:3])])]
    if array.shape not in shapes:
        more = "" if cache is None else f", or one per key and head {shapes[1]} (NHD)"
        raise ValueError(f"{name} must be one number, (batch, heads_kv) {shapes[0]}{more}, got shape {array.shape}")
    return Scales(array=array)


def _are_equal(one: Scales, other: Scales) -> bool:
    if one.array is None or other.array is None:
        return one.array is other.array and one.number == other.number
    return one.number == other.number and lie_alike(one.array, other.array)
