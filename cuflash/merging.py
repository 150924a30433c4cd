"""Merge results of attention over disjoint keys: a shared prompt, keys on two GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import backends
from .array_types import Array, ArrayT
from .arrays import (
    NativeArray,
    aligned,
    copy_into,
    empty,
    exporter,
    import_array,
    is_on_device,
    refuse_in_capture,
)
from .dtypes import FLOAT_DTYPES, dtype_name

_UNIT = 16  # bytes that the merge reads at once


def merge_attn_states(outs: ArrayT | Sequence[ArrayT], lses: Array | Sequence[Array]) -> tuple[ArrayT, ArrayT]:
    """Merge partial results over disjoint keys into the result over all of them.

    ``lse = log(sum_i exp(lse_i))`` and ``out = sum_i exp(lse_i - lse) out_i`` (FlashInfer, "cascade inference"). A part
    that saw no key (LSE -inf) changes nothing.

    Args:
        outs: Sequence or stacked array of n outputs, each (batch, seqlen_q, heads, headdim) or (total_q, heads,
            headdim).
        lses: Sequence or stacked array of n LSEs, each (batch, heads, seqlen_q) or (heads, total_q), float32, natural
            log.

    Returns:
        (out, lse) of the shapes, kind and dtype of one part.

    Raises:
        TypeError: If an argument is not an array or a sequence of arrays.
        ValueError: If shapes or dtypes do not fit together.

    Example:
        >>> import cuflash, numpy as np
        >>> out, lse = np.ones((1, 1, 2, 64), np.float32), np.zeros((1, 2, 1), np.float32)
        >>> merged, total = cuflash.merge_attn_states([out, 3 * out], [lse, lse])
        >>> float(merged[0, 0, 0, 0]), round(float(total[0, 0, 0]), 4)
        (2.0, 0.6931)
    """
    stacked, like = _stack("outs", outs)
    stacked_lses, _ = _stack("lses", lses)
    dtype_name("outs", stacked.dtype, FLOAT_DTYPES)
    if stacked_lses.dtype != np.float32:
        raise TypeError(f"lses must be float32, got {stacked_lses.dtype}")
    if stacked.ndim not in (4, 5):
        raise ValueError(f"outs must be n arrays with 3 or 4 dimensions each, got shape {stacked.shape}")
    ragged = stacked.ndim == 4
    shape = stacked.shape
    expected = (shape[0], shape[2], shape[1]) if ragged else (shape[0], shape[1], shape[3], shape[2])
    if stacked_lses.shape != expected:
        raise ValueError(f"lses must have shape {expected} for outs of shape {shape}, got {stacked_lses.shape}")
    if not shape[0]:
        raise ValueError("outs must hold at least one part, got 0")
    if ragged:
        stacked, stacked_lses = stacked[:, None], stacked_lses[:, None]
    out, lse = empty(stacked.shape[1:], stacked.dtype, stacked), empty(stacked_lses.shape[1:], np.float32, stacked)
    backends.select(stacked).merge(stacked, stacked_lses, out, lse)
    if ragged:
        out, lse = out[0], lse[0]
    export = exporter(like)
    return export(out), export(lse)


def _stack(name: str, arrays: Any) -> tuple[NativeArray, Any]:
    """Return n arrays as one contiguous native array (n, ...), and one of the caller's arrays."""
    if not isinstance(arrays, (list, tuple)):
        array = import_array(name, arrays)
        if is_on_device(array) and not array.flags.c_contiguous:
            refuse_in_capture(name, "be contiguous")
        return aligned(name, array if array.flags.c_contiguous else array.copy(), _UNIT), arrays
    if not arrays:
        raise ValueError(f"{name} must hold at least one part, got 0")
    parts = [import_array(f"{name}[{i}]", array) for i, array in enumerate(arrays)]
    for i, part in enumerate(parts):
        if part.dtype != parts[0].dtype or is_on_device(part) != is_on_device(parts[0]):
            raise ValueError(
                f"{name}[{i}] must have the dtype and memory of {name}[0] ({parts[0].dtype}), got {part.dtype}"
            )
        if part.shape != parts[0].shape:
            raise ValueError(f"{name}[{i}] must have shape {parts[0].shape}, got {part.shape}")
    if is_on_device(parts[0]):
        refuse_in_capture(name, "be one array")
    stacked = empty((len(parts), *parts[0].shape), parts[0].dtype, parts[0])
    for i, part in enumerate(parts):
        copy_into(f"{name}[{i}]", stacked[i], part)
    return stacked, arrays[0]
