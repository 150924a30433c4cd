"""The launch of ``merge_attn_states``."""

from __future__ import annotations

import math

from ..arrays import NativeArray
from .launch import ROW_WARPS, Launch, element_strides, make_launch
from .source import Variant, element_defines


def merge_variant(dtype: str) -> Variant:
    """Return the kernel."""
    return Variant("merge", (*element_defines(dtype), ("WARPS", ROW_WARPS)))


def merge_launch(outs: NativeArray, lses: NativeArray) -> Launch:
    """Return the launch for partial results.

    Args:
        outs: (states, batch, queries, heads, headdim), each state contiguous.
        lses: (states, batch, heads, queries), likewise.
    """
    values = dict(zip(("states", "batch_size", "queries", "heads", "headdim"), outs.shape, strict=True))
    values |= {"outs_stride": element_strides(outs)[0], "lses_stride": element_strides(lses)[0]}
    grid = -(-math.prod(outs.shape[1:-1]) // ROW_WARPS)
    return make_launch(merge_variant(outs.dtype.name), "MergeParams", grid, 32 * ROW_WARPS, 0, values)
