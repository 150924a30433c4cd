"""sglang's kernel package as far as its FlashAttention backend needs it.

https://github.com/sgl-project/sglang, ``sgl-kernel/python/sgl_kernel``.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ... import merging
from ...arguments.common import expect_apart, renamed
from ...arrays import empty, import_array, is_writeable
from ...layouts import new_tensor
from ...memory import NativeArray, has_each_once, memory_of
from .. import torch_tensors

__all__ = ["merge_state", "merge_state_v2"]


def merge_state_v2(
    v_a: Any, s_a: Any, v_b: Any, s_b: Any, v_merged: Any = None, s_merged: Any = None
) -> tuple[Any, Any]:
    """Merge the results of the same queries over disjoint keys.

    Args:
        v_a: (tokens, heads, headdim) outputs over some keys.
        s_a: (tokens, heads) float32 their LSE, natural log.
        v_b: Outputs over other keys.
        s_b: Their LSE.
        v_merged: Where to write the outputs.
        s_merged: Where to write the LSE.

    Returns:
        The outputs and the LSE over all keys.
    """
    _check(v_a, s_a=s_a, v_b=v_b, s_b=s_b, v_merged=v_merged, s_merged=s_merged)
    with torch_tensors.stream_of(v_a), renamed({"out": "v_merged", "outs": "v_a and v_b", "lses": "s_a and s_b"}):
        outs: Any = [v_a, v_b]
        lses: Any = [s_a.T, s_b.T]
        out, lse = v_merged, None
        target: Any = None if s_merged is None else _target(s_merged, v_a, v_merged)
        if torch_tensors.is_tensor(v_a):  # in torch's memory, so that a graph can be captured
            torch = sys.modules["torch"]
            outs, lses = torch.stack(outs), torch.stack(lses).float()
            lse = new_tensor(tuple(lses.shape[1:]), "float32", v_a)
            if out is None:
                out = torch.empty_like(v_a, memory_format=torch.contiguous_format)
            target = s_merged
        elif target is not None:
            lse = empty(target.T.shape, np.float32, target)
        merged, total = merging.merge_attn_states(outs, lses, out=out, lse=lse)
        if target is None:
            return merged, total.T
        target[...] = total.T
        return merged, s_merged


def _check(v_a: Any, **others: Any) -> None:
    """Check kinds and shapes before anything is written."""
    if len(_shape(v_a) or ()) != 3:
        raise TypeError(f"v_a must be an array (tokens, heads, headdim), got {type(v_a).__name__}")
    for name, x in others.items():
        if x is None and name.endswith("merged"):
            continue
        if _shape(x) is None or torch_tensors.is_tensor(x) != torch_tensors.is_tensor(v_a):
            raise TypeError(f"{name} must be an array of the kind of v_a, got {type(x).__name__}")
        shape = tuple(v_a.shape) if name.startswith("v") else tuple(v_a.shape[:2])
        if _shape(x) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {_shape(x)}")


def _shape(x: Any) -> tuple[int, ...] | None:
    """Return an array's shape, None of what is no array: NumPy's classes have a ``shape``, too, which is no tuple."""
    shape = getattr(x, "shape", None)
    return tuple(shape) if isinstance(shape, tuple) else None


def _target(s_merged: Any, v_a: Any, v_merged: Any) -> NativeArray:
    """Return where the LSE is copied to, which may have any strides, checked before anything is written."""
    target, memory = import_array("s_merged", s_merged), memory_of(import_array("v_a", v_a))
    if target.dtype != np.float32:
        raise TypeError(f"s_merged must be float32, got {target.dtype}")
    if not is_writeable(target, s_merged):
        raise ValueError("s_merged must be writeable, got a read-only array")
    if not has_each_once(target):
        raise ValueError(f"s_merged must have no elements that overlap, got strides {target.strides} bytes")
    if memory_of(target) != memory:
        raise ValueError(f"s_merged must be in {memory} like v_a, got one in {memory_of(target)}")
    expect_apart("s_merged", target, {"v_merged": v_merged})
    return target


merge_state = merge_state_v2
