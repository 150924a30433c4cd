"""Where a native array lies: in which memory, at which addresses, and what it shares with others."""

from __future__ import annotations

from typing import Any

import numpy as np

NativeArray = Any  # numpy.ndarray | cupy.ndarray


def is_on_device(native: NativeArray) -> bool:
    """Whether a native array lives in GPU memory."""
    return not isinstance(native, np.ndarray)


def gpu_of(native: NativeArray) -> int | None:
    """Return the number of the GPU on which a native array lives, None for host memory."""
    return native.data.device_id if is_on_device(native) else None


def memory_of(native: NativeArray) -> str:
    """Name the memory in which a native array lives."""
    return f"the memory of GPU {native.data.device_id}" if is_on_device(native) else "host memory"


def address_of(array: NativeArray) -> int:
    """Return the address of the first element."""
    return array.data.ptr if is_on_device(array) else array.ctypes.data


def strides_of(array: NativeArray) -> tuple[int, ...]:
    """Return strides in bytes, 0 for axes along which there is nothing to step: theirs may be any number."""
    return tuple([stride if size > 1 else 0 for size, stride in zip(array.shape, array.strides)])


def span_of(array: NativeArray) -> tuple[int, int]:
    """Return the addresses [begin, end) between which all elements lie."""
    begin = end = address_of(array)
    if not array.size:
        return begin, begin
    for size, stride in zip(array.shape, array.strides):
        if stride > 0:
            end += (size - 1) * stride
        else:
            begin += (size - 1) * stride
    return begin, end + array.itemsize


def has_whole_rows(array: NativeArray) -> bool:
    """Whether the elements of the last axis lie side by side; not so if they are all one, as a broadcast makes them."""
    return not array.size or array.shape[-1] == 1 or array.strides[-1] == array.itemsize


def has_each_once(array: NativeArray) -> bool:
    """Whether no two elements of an array share memory."""
    if not array.size:
        return True
    end = array.itemsize
    for stride, size in reversed(_steps(array)):
        if stride < end:
            return False
        end += (size - 1) * stride
    return True


def is_aligned(array: NativeArray) -> bool:
    """Whether every element begins at a multiple of its own size."""
    size = array.itemsize
    return not array.size or not (address_of(array) % size or any(stride % size for stride in strides_of(array)))


def is_same(first: NativeArray, second: NativeArray) -> bool:
    """Whether two arrays are one, or two objects for the same elements in the same memory."""
    return first is second or (
        (first.shape, first.strides, first.dtype) == (second.shape, second.strides, second.dtype)
        and address_of(first) == address_of(second)
    )


def lie_alike(first: NativeArray, second: NativeArray) -> bool:
    """Whether two arrays of one element size have the same elements in the same memory."""
    return (address_of(first), first.shape, strides_of(first)) == (address_of(second), second.shape, strides_of(second))


def overlaps(first: NativeArray, second: NativeArray) -> bool:
    """Whether two arrays may share memory: whether their spans meet, and they do not take turns."""
    if not first.size or not second.size:
        return False
    (begin, end), (other_begin, other_end) = span_of(first), span_of(second)
    if end <= other_begin or other_end <= begin:  # nearly always, and soon found out
        return False
    return _meet(_steps(first), _steps(second), other_begin - begin, first.itemsize, second.itemsize)


def _steps(array: NativeArray) -> list[tuple[int, int]]:
    """Return (stride, size) of the axes along which an array steps, counted upwards from its first byte."""
    steps = ((abs(stride), size) for stride, size in zip(array.strides, array.shape) if size > 1)
    return sorted(steps, reverse=True)


def _meet(one: list[tuple[int, int]], other: list[tuple[int, int]], distance: int, size: int, other_size: int) -> bool:
    """Whether steps from 0 and steps from ``distance`` on may come to the same byte.

    Each two of the largest steps that are near enough to each other are looked at by what lies in them: so caches in
    one buffer are apart whether they take turns by page, token, head or row.
    """
    extent = size + sum((count - 1) * stride for stride, count in one)
    other_extent = other_size + sum((count - 1) * stride for stride, count in other)
    if not -other_extent < distance < extent:
        return False
    if not one and not other:
        return True
    step = max(one[:1] + other[:1])[0]
    # Who has no steps of this size stands in one of them.
    (_, count), *rest = one if one[:1] and one[0][0] == step else [(step, 1), *one]
    (_, other_count), *other_rest = other if other[:1] and other[0][0] == step else [(step, 1), *other]
    extent, other_extent = extent - (count - 1) * step, other_extent - (other_count - 1) * step
    if max(extent, other_extent) > step:
        return True
    # By how many steps the other one may be ahead for what is in its step to reach what is in the one's.
    first = max(1 - count, (-other_extent - distance) // step)
    last = min(other_count - 1, (extent - distance) // step)
    nearest = range(distance + first * step, distance + last * step + 1, step)
    return any(_meet(rest, other_rest, within, size, other_size) for within in nearest)
