"""The launch of ``merge_attn_states``."""

from __future__ import annotations

import math

from ..memory import NativeArray
from .launch import ROW_WARPS, Launch, element_strides, make_launch
from .source import Variant, element_defines


def merge_variant(dtype: str) -> Variant:
    """Return the kernel."""
    return Variant("merge", (*element_defines(dtype), ("WARPS", ROW_WARPS)))


def merge_launch(outs: NativeArray, lses: NativeArray, mask: NativeArray | None, base2: bool) -> Launch:
    """Return the launch.

    Args:
        outs: (states, batch, queries, heads, headdim) with any strides.
        lses: (states, batch, heads, queries), likewise.
        mask: (states, batch, queries), likewise, or None.
        base2: Whether LSEs are to base 2.
    """
    values = dict(zip(("states", "batch_size", "queries", "heads", "headdim"), outs.shape, strict=True))
    *outs_strides, column = element_strides(outs)
    state, batch, head, query = element_strides(lses)
    steps = {
        "outs": outs_strides,
        "lses": (state, batch, query, head),
        "mask": (0, 0, 0, 0) if mask is None else (*element_strides(mask), 0),
    }
    for name, strides in steps.items():
        axes = ("state", "batch", "query", "head")
        values |= {f"{name}_strides.{axis}": stride for axis, stride in zip(axes, strides, strict=True)}
    numbers = values | {"column_stride": column, "unit": math.log(2) if base2 else 1.0}
    grid = -(-math.prod(outs.shape[1:-1]) // ROW_WARPS)
    return make_launch(merge_variant(outs.dtype.name), "MergeParams", grid, 32 * ROW_WARPS, 0, numbers)
