"""Rows of queries, keys and values on the host: in float32, rotated, appended to a cache."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import numpy_dtype
from ..kv_cache import Scales
from ..operands import Lengths, Operands, Rotary
from ..problem import Problem

Array = NDArray[Any]
Floats = NDArray[np.float32]

_LARGEST_CODE = {"float8_e4m3fn": np.float32(448), "float8_e5m2": np.float32(57344), "int8": np.float32(127)}
_TINY = np.finfo(np.float32).tiny


def append(problem: Problem, operands: Operands) -> None:
    """Write every new key and value to the cache, behind the keys that are there."""
    assert operands.k is not None
    shard = problem.mask.shard
    starts, cache, rotary = operands.lengths.cu_seqlens_k_new, operands.cache, operands.rotary
    for b in range(problem.batch_size):
        new = slice(int(starts[b]), int(starts[b + 1])) if starts is not None else b
        k, v = operands.k[new], None if operands.v is None else operands.v[new]
        if rotary is not None:
            k = rotate(rotary, to_float32(k), rotary_base(rotary, operands.lengths, b) + np.arange(len(k)))
        positions = int(operands.lengths.cache_seqlens[b]) + np.arange(len(k))
        mine = shard.holds(positions)
        pages, slots = cache.place(b, shard.held(positions[mine]))
        there = pages >= 0
        place = pages[there], slots[there]
        _write(problem, cache.k, cache.k_scales, b, place, k[mine][there])
        if v is not None:
            _write(problem, cache.v, cache.v_scales, b, place, v[mine][there])


def _write(problem: Problem, cache: Array, scales: Scales, b: int, place: tuple[Array, Array], rows: Array) -> None:
    """Write new rows (n, heads, d) of a sequence to their places; quantised, if the cache is."""
    if not problem.is_quantised:
        cache[place] = rows
        return
    x, largest = to_float32(rows), _LARGEST_CODE[problem.kv_dtype]
    if scales.array is not None and scales.per_key:
        most = np.abs(x).max(-1)
        scale = np.where(most == 0, np.float32(1), np.maximum(most / largest, _TINY))
        scales.array[place] = scale
    else:
        scale = scales.of_heads(b, slice(None))
    x = np.clip(x / scale[..., None], -largest, largest)
    cache[place] = (np.rint(x) if problem.kv_dtype == "int8" else x).astype(cache.dtype)


def rotary_base(rotary: Rotary, lengths: Lengths, b: int) -> int:
    """Return the position of a sequence's first query and first new key."""
    return int((lengths.cache_seqlens if rotary.seqlens is None else rotary.seqlens)[b])


def rotate(rotary: Rotary, x: Floats, positions: NDArray[np.int64]) -> Floats:
    """Return x (n, heads, d), its row r rotated for ``positions[r]``, computed in float32."""
    cos = to_float32(rotary.cos[positions])[:, None]  # (n, 1, rotary_dim / 2)
    sin = to_float32(rotary.sin[positions])[:, None]
    half, begin = cos.shape[-1], rotary.first
    if rotary.interleaved:
        first, second = slice(begin, begin + 2 * half, 2), slice(begin + 1, begin + 2 * half, 2)
    else:
        first, second = slice(begin, begin + half), slice(begin + half, begin + 2 * half)
    a, b = x[..., first], x[..., second]
    rotated = x.copy()
    rotated[..., first] = a * cos - b * sin
    rotated[..., second] = a * sin + b * cos
    return rotated


def to_float32(x: Array, buffer: Floats | None = None) -> Floats:
    """Return x in float32: itself, or converted into ``buffer``."""
    if x.dtype == np.float32:
        return x
    if x.dtype.itemsize == 1:  # a table is faster than converting one by one
        return np.take(_numbers(x.dtype.name), x.view(np.uint8), out=buffer, mode="clip")
    if buffer is None:
        return x.astype(np.float32)
    buffer[...] = x
    return buffer


@lru_cache(maxsize=None)
def _numbers(dtype: str) -> Floats:
    """Return what each code of 8 bits stands for, (256,)."""
    return np.arange(256, dtype=np.uint8).view(numpy_dtype(dtype)).astype(np.float32)
