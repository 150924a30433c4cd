"""Tensor maps as the simulator has them: what a driver encodes in a CUtensorMap, in a layout of our own."""

from __future__ import annotations

import struct
from collections.abc import Sequence

MAP_BYTES = 128
_MAGIC = 0x7365786F6273696D  # struct TensorMap of boxes.cpp begins with it
_LAYOUT = "<QQ4Q3Q4II"


def tensor_map(itemsize: int, address: int, shape: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> bytes:
    """Return the map of a tensor of four axes, the contiguous one first, whose boxes lie in the 128-byte swizzle.

    Args:
        itemsize: Bytes of an element.
        address: Where the tensor begins.
        shape: Elements along each axis.
        strides: Bytes from one element to the next, along all axes but the first.
        box: Elements of a box along each axis.

    Raises:
        ValueError: If a driver would refuse it.
    """
    if len(shape) != 4 or len(strides) != 3 or len(box) != 4:
        raise ValueError(f"a tensor map has four axes here; got {len(shape)}, {len(strides) + 1} and {len(box)}")
    if address % 16 or any(stride % 16 or not 0 < stride < 2**40 for stride in strides):
        raise ValueError(f"a tensor's address and strides must be multiples of 16; got {address}, {tuple(strides)}")
    if not all(1 <= size <= 2**32 for size in shape) or not all(1 <= size <= 256 for size in box):
        raise ValueError(f"axes have 1 to 2**32 elements, those of boxes up to 256; got {tuple(shape)}, {tuple(box)}")
    if box[0] * itemsize != 128:
        raise ValueError(f"rows of a box must have the 128 bytes that are swizzled; got {box[0] * itemsize}")
    return struct.pack(_LAYOUT, _MAGIC, address, *shape, *strides, *box, itemsize).ljust(MAP_BYTES, b"\0")
