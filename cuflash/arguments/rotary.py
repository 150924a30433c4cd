"""Rotary embedding: tables, positions, and what of a row is rotated."""

from __future__ import annotations

from ..arrays import import_array
from ..dtypes import numpy_dtype
from ..memory import NativeArray, address_of
from ..operands import Rotary
from ..problem import Problem, boolean, window_bounds
from .common import Given, expect_shape, index


def rotary(problem: Problem, k: NativeArray | None, joint: bool, given: Given) -> Rotary | None:
    """Import what rotates queries and new keys.

    Args:
        problem: The problem.
        k: The new keys.
        joint: Whether values are the first columns of the keys: those behind them are rotated.
        given: All arguments.
    """
    cos, sin = given["rotary_cos"], given["rotary_sin"]
    interleaved = boolean("rotary_interleaved", given["rotary_interleaved"])
    seqlens = index("rotary_seqlens", given["rotary_seqlens"], 1)
    if (cos is None) != (sin is None):
        raise ValueError(f"rotary_{'sin' if sin is None else 'cos'} must be given too, got None")
    if cos is None:
        return None  # without tables, rotary_seqlens says nothing: callers of FlashAttention-3 always pass it
    if k is None:
        raise ValueError("rotary_cos needs k and v: it rotates the queries and the new keys, got None")
    cos, sin = import_array("rotary_cos", cos), import_array("rotary_sin", sin)
    if cos.ndim != 2:
        raise ValueError(f"rotary_cos must have shape (positions, rotary_dim / 2), got {cos.shape}")
    expect_shape("rotary_sin", sin, cos.shape)
    rotary_dim = 2 * cos.shape[1]
    first = problem.headdim_v if joint else 0
    if rotary_dim > problem.headdim - first or rotary_dim % 16:
        raise ValueError(
            f"rotary_cos must have rotary_dim / 2 columns, rotary_dim a multiple of 16 up to "
            f"headdim={problem.headdim - first}{' behind the values' * joint}, got {cos.shape[1]} columns"
        )
    for name, array in (("rotary_cos", cos), ("rotary_sin", sin)):
        if array.dtype != numpy_dtype(problem.out_dtype):
            raise ValueError(f"{name} must have the dtype of q ({problem.out_dtype}), got {array.dtype}")
        if not array.flags.c_contiguous or address_of(array) % array.itemsize:
            raise ValueError(f"{name} must be contiguous and aligned, got strides {array.strides}")
    expect_shape("rotary_seqlens", seqlens, (problem.batch_size,))
    # The mask as the caller gave it decides, not the normalised one.
    moves = bool(given["causal"]) or window_bounds(given["window_size"]) != (-1, -1) or problem.attention_chunk > 0
    return Rotary(cos, sin, seqlens, interleaved, moves, first)
