"""What all arguments have in common."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..arrays import empty, import_array, import_index, is_writeable, refuse_in_capture
from ..dlpack import float8_name
from ..dtypes import QUANTISED_DTYPES, numpy_dtype
from ..memory import NativeArray, address_of, has_each_once, has_whole_rows, is_on_device, overlaps, strides_of
from ..metadata import SchedulerMetadata

UNIT = 16  # bytes that kernels read and write at once

Given = dict[str, Any]


def index(name: str, x: Any, ndim: int, wraps: bool = False) -> NativeArray | None:
    """Import an optional index array with a contiguous last dimension."""
    if x is None:
        return None
    array = import_index(name, x, wraps)
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension{'s' * (ndim > 1)}, got shape {array.shape}")
    if not has_whole_rows(array):
        if ndim > 1:  # on a GPU, and too large to copy on every call
            raise ValueError(f"{name} must have a contiguous last dimension, got strides {array.strides} bytes")
        refuse_in_capture(name, "be contiguous")
        array = array.copy()
    return array


def import_codes(name: str, x: Any, dtype: str | None) -> tuple[NativeArray, str | None]:
    """Import an array that may be quantised.

    Args:
        name: The argument's name.
        x: The array.
        dtype: What uint8 stands for; None if nobody says so.

    Returns:
        The array, and the name of its element type if that is a quantised one. In host memory the elements have that
        type too; on a GPU they may be uint8, since CuPy knows no float8.
    """
    array = import_array(name, x)
    if array.dtype.name in QUANTISED_DTYPES:
        return array, array.dtype.name
    if array.dtype != np.uint8:
        return array, None
    dtype = float8_name(x) or dtype  # a framework's float8 that came as bytes
    if dtype is None:
        raise ValueError(f"{name} must come with kv_dtype, which says what uint8 stands for, got None")
    if dtype not in QUANTISED_DTYPES:
        return array, None
    return array if is_on_device(array) else array.view(numpy_dtype(dtype)), dtype


@contextmanager
def renamed(names: dict[str, str]) -> Iterator[None]:
    """Let errors about a call name what its caller's caller gave.

    Args:
        names: Of ``flash_attn_with_kvcache``, and what the arguments are called outside.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        text = re.sub(rf"\b({'|'.join(names)})\b", lambda name: names[name[0]], str(error))
        raise (TypeError if isinstance(error, TypeError) else ValueError)(text) from error


def expect_shape(name: str, array: NativeArray | None, shape: tuple[int, ...]) -> None:
    """Raise if an array is given and of another shape."""
    if array is not None and array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")


def expect_apart(name: str, array: NativeArray, given: Given) -> None:
    """Raise if an array that is written shares memory with one of these arguments, pairs and plans included."""
    for other, value in given.items():
        pair = value if isinstance(value, tuple) else (value,)
        for place, part in enumerate(pair):
            label = other if pair is not value else f"{other}[{place}]"
            if isinstance(part, SchedulerMetadata):
                part = part.array
            if hasattr(part, "__dlpack__") and overlaps(array, import_array(label, part)):
                raise ValueError(f"{name} must share no memory with {label}, got overlapping arrays")


def lse_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the LSE of queries or outputs of a shape: (batch, heads, seqlen_q) or (heads, total_q)."""
    *batch, positions, heads, _ = shape
    return (*batch, heads, positions)


def output(
    name: str, given: Any, like: NativeArray, shape: tuple[int, ...], dtype: Any, strided: bool = False
) -> NativeArray:
    """Return the caller's output array, checked, or a new one where ``like`` lives.

    Args:
        name: The argument's name.
        given: The caller's array, or None.
        like: An array of the memory in which a new one is made.
        shape: What it must have.
        dtype: Likewise.
        strided: Whether only its last axis must be contiguous.
    """
    if given is None:
        return empty(shape, dtype, like)
    array = import_array(name, given)
    expect_shape(name, array, shape)
    if array.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {array.dtype}")
    if not is_writeable(array, given):
        raise ValueError(f"{name} must be writeable, got a read-only array")
    # A row of the output is stored by vectors, an LSE is one number.
    boundary = UNIT if name == "out" else array.itemsize
    if array.size and not array.flags.c_contiguous:
        if not strided:
            raise ValueError(f"{name} must be contiguous, got strides {array.strides} bytes")
        steps_up = all(step >= 0 and step % boundary == 0 for step in strides_of(array)[:-1])
        if not has_whole_rows(array) or not steps_up or not has_each_once(array):
            raise ValueError(
                f"{name} must have a contiguous last dimension and strides of multiples of {boundary} bytes "
                f"without an overlap, got {array.strides}"
            )
    if array.size and address_of(array) % boundary:
        raise ValueError(f"{name} must begin at a multiple of {boundary} bytes, got address {address_of(array):#x}")
    return array
