"""Merging partial results over disjoint keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import backends
from .arguments.common import expect_shape, lse_shape, output
from .array_types import Array, ArrayT
from .arrays import aligned, check_way_back, copy_into, empty, exporter, import_array, refuse_in_capture
from .dtypes import FLOAT_DTYPES, dtype_name
from .memory import NativeArray, is_on_device, lie_alike, memory_of, overlaps
from .problem import boolean


def merge_attn_states(
    outs: ArrayT | Sequence[ArrayT],
    lses: Array | Sequence[Array],
    *,
    mask: Array | None = None,
    base2: bool = False,
    out: Array | None = None,
    lse: Array | None = None,
) -> tuple[ArrayT, ArrayT]:
    """Merge partial results over disjoint keys into the result over all of them.

    ``lse = log(sum_i exp(lse_i))`` and ``out = sum_i exp(lse_i - lse) out_i`` (FlashInfer, "cascade inference"). A part
    that saw no key changes nothing and is not read: its LSE is -inf, or +inf as FlashAttention-2 writes it.

    Args:
        outs: Sequence or stacked array of n outputs, each (batch, seqlen_q, heads, headdim) or (total_q, heads,
            headdim). A stacked array may have any strides and is not copied: parts along another axis are
            ``numpy.moveaxis`` away, and parts packed with their LSEs in one buffer are views of it.
        lses: Sequence or stacked array of n LSEs, each (batch, heads, seqlen_q) or (heads, total_q), float32; any
            strides.
        mask: bool, which parts count: (n,), or (n, batch, seqlen_q) or (n, total_q) for each query by itself. Default:
            all.
        base2: Whether LSEs, given and returned, are logarithms to base 2 (FlashInfer's) instead of natural ones.
        out: Where to write the output; may be one of the parts of a stacked array.
        lse: Where to write the LSE; likewise.

    Returns:
        (out, lse) of the shapes, kind and dtype of one part.

    Raises:
        TypeError: If an argument is not an array or a sequence of arrays, ``lses`` are not float32, or ``mask`` is not
            bool.
        ValueError: For a wrong value: shapes or dtypes that do not fit together, or memory that may not be written.

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
    expected = (shape[0], *lse_shape(shape[1:]))
    if stacked_lses.shape != expected:
        raise ValueError(f"lses must have shape {expected} for outs of shape {shape}, got {stacked_lses.shape}")
    if not shape[0]:
        raise ValueError("outs must hold at least one part, got 0")
    boolean("base2", base2)
    parts = _mask(mask, shape[: 2 if ragged else 3])
    for name, array in (("lses", stacked_lses), ("mask", parts)):
        if array is not None and memory_of(array) != memory_of(stacked):
            raise ValueError(f"{name} must be in {memory_of(stacked)} like outs, got one in {memory_of(array)}")
    merged = _target("out", out, stacked, stacked, shape[1:], (stacked_lses, parts))
    merged_lse = _target("lse", lse, stacked_lses, stacked, expected[1:], (stacked, parts, merged))
    for name, given, native in (("out", out, merged), ("lse", lse, merged_lse)):
        check_way_back("outs" if given is None else name, like if given is None else given, native)
    arrays = [stacked, stacked_lses, parts, merged, merged_lse]
    if ragged:
        arrays = [array if array is None else array[:, None] for array in arrays[:3]] + [merged[None], merged_lse[None]]
    backends.select(stacked).merge(*arrays, bool(base2))
    results: list[Any] = []
    for given, native in ((out, merged), (lse, merged_lse)):
        exported = exporter(like if given is None else given)(native)
        results.append(exported if given is None else given)
    return results[0], results[1]


def _mask(mask: Any, shape: tuple[int, ...]) -> NativeArray | None:
    """Import the mask of parts as a view of ``shape``, a number for each part and query."""
    if mask is None:
        return None
    array = import_array("mask", mask)
    if array.dtype != np.bool_:
        raise TypeError(f"mask must be bool, got {array.dtype}")
    if array.ndim > 1:
        expect_shape("mask", array, shape)
        return array
    expect_shape("mask", array, shape[:1])
    strides = (*array.strides, *(0,) * (len(shape) - 1))
    if is_on_device(array):
        return type(array)(shape, array.dtype, array.data, strides)
    return np.lib.stride_tricks.as_strided(array, shape, strides, writeable=False)


def _target(
    name: str, given: Any, parts: NativeArray, like: NativeArray, shape: tuple[int, ...], others: tuple[Any, ...]
) -> NativeArray:
    """Return where a result goes: a new array, or the caller's, which shares no memory with what is read but a part."""
    array = output(name, given, like, shape, parts.dtype)
    if given is None:
        return array
    if memory_of(array) != memory_of(like):
        raise ValueError(f"{name} must be in {memory_of(like)} like outs, got one in {memory_of(array)}")
    shared = any(other is not None and overlaps(array, other) for other in others)
    if shared or (overlaps(array, parts) and any(_is_in_the_way(part, array) for part in parts)):
        raise ValueError(f"{name} must be one of the parts or share no memory with any array, got overlapping arrays")
    return array


def _is_in_the_way(part: NativeArray, array: NativeArray) -> bool:
    """Whether a part would be written over before it has been read: it overlaps an array, and is not that itself."""
    return not lie_alike(array, part) and overlaps(array, part)


def _stack(name: str, arrays: Any) -> tuple[NativeArray, Any]:
    """Return n arrays as one native array (n, ...), and one of the caller's arrays."""
    if not isinstance(arrays, (list, tuple)):
        array = import_array(name, arrays)
        return aligned(name, array), arrays
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
