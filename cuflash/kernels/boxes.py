"""Boxes: what the tensor memory accelerator copies by one instruction, and of which tensors (``rows_boxes.cuh``)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..kv_cache import KVCache
from ..memory import NativeArray, strides_of

LINE_BYTES = 128  # of a row of a box, which the 128-byte swizzle permutes
MAP_BYTES = 128  # of a CUtensorMap
LEAST_ROWS = 8  # of a box, after which the pattern of the swizzle begins anew
_MOST_STRIDE = 2**40


@dataclass(frozen=True)
class Boxed:
    """A tensor that is copied in boxes, without its address; the contiguous axis comes first.

    Attributes:
        itemsize: Bytes of an element.
        shape: Elements along each axis.
        strides: Bytes from one element to the next, along all axes but the first.
        box: Elements of a box along each axis.
    """

    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


def boxed_cache(cache: KVCache, part_keys: int) -> tuple[dict[str, int], list[tuple[str, Boxed]]]:
    """Return the numbers of TiledParams, and what its maps are: none where rows are copied one by one.

    Args:
        cache: The cache.
        part_keys: Keys of a tile that a warp copies, a power of two.
    """
    boxes = cache.page_size & -cache.page_size if cache.is_paged else part_keys  # the largest power of two in it
    rows = min(boxes, part_keys)
    tensors = [(name, _boxed(array, rows)) for name, array in (("k_cache", cache.k), ("v_cache", cache.v))]
    boxed = [(name, tensor) for name, tensor in tensors if tensor is not None]
    fits = rows >= LEAST_ROWS and cache.dtype is None and len(boxed) == len(tensors)
    numbers = {
        "box_rows": rows if fits else 0,
        "box_step": rows if cache.is_paged else 1,
        "is_packed": int(cache.is_packed),
    }
    return numbers, boxed if fits else []


def _boxed(array: NativeArray, rows: int) -> Boxed | None:
    """Return a cache as (dim, slots of a page, heads, pages); None if no tensor map is like that."""
    pages, slots, heads, dim = (int(size) for size in array.shape)
    page, slot, head, _ = strides_of(array)
    shape = dim, slots, heads, pages
    # What the stride of an axis of one element is does not matter, but it has to be one.
    strides = tuple(
        stride if size > 1 else LINE_BYTES for size, stride in zip(shape[1:], (slot, head, page), strict=True)
    )
    if not math.prod(shape) or not all(0 < stride < _MOST_STRIDE for stride in strides):
        return None
    return Boxed(array.itemsize, shape, strides, (LINE_BYTES // array.itemsize, rows, 1, 1))
