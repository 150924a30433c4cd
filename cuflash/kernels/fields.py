"""The values of what parameter structs have in common: lengths, masks, caches, divisors."""

from __future__ import annotations

from ..kv_cache import KVCache, Scales
from ..mask import Shard
from ..memory import strides_of
from ..operands import Lengths, Operands
from ..problem import Problem
from .launch import element_strides

_UNIT = 16  # bytes, in which strides of caches are counted: 32 bits reach 64 GiB


def length_fields(problem: Problem, lengths: Lengths) -> dict[str, int]:
    """Return the values of a field ``lengths``, a Lengths of lengths.cuh, without its arrays."""
    return {"lengths.max_seqlen_q": problem.max_seqlen_q, "lengths.seqlen_k_new": lengths.seqlen_k_new}


def mask_fields(problem: Problem) -> dict[str, int]:
    """Return the values of a field ``mask``, a Mask of mask.cuh."""
    mask = problem.mask
    return {
        "mask.window_left": mask.left,
        "mask.window_right": mask.right,
        "mask.attention_chunk": mask.chunk,
        **shard_fields("mask.shard", mask.shard),
    }


def shard_fields(path: str, shard: Shard) -> dict[str, int]:
    """Return the values of a Shard of mask.cuh."""
    return {f"{path}.world_size": shard.world_size, f"{path}.rank": shard.rank, f"{path}.interleave": shard.interleave}


def mask_defines(problem: Problem, has_tree: bool) -> tuple[tuple[str, int], ...]:
    """Return the macros of the masks that an attention kernel knows."""
    return (
        ("HAS_CHUNK", int(problem.attention_chunk > 0)),
        ("HAS_SHARD", int(problem.cp_world_size > 1)),
        ("HAS_TREE", int(has_tree)),
    )


def tree_fields(operands: Operands) -> dict[str, int]:
    """Return the values of a field ``tree``, a Tree of mask.cuh, without its array."""
    tree = operands.tree_mask
    if tree is None:
        return dict.fromkeys(("tree.batch_stride", "tree.row_stride", "tree.is_packed"), 0)
    *batch, row, _ = strides_of(tree)
    return {
        "tree.batch_stride": sum(batch),  # of one, if queries are not ragged
        "tree.row_stride": row,
        "tree.is_packed": int(tree.itemsize > 1),
    }


def merge_fields(operands: Operands) -> dict[str, int]:
    """Return the values of a field ``merge``, a MergeWith of params.cuh, without its arrays."""
    names = ("batch", "row", "head", "column", "lse_batch", "lse_head", "lse_row")
    strides = [0] * len(names)
    out, lse = operands.merge_out, operands.merge_lse
    if out is not None and lse is not None:
        ragged = (0,) * (4 - out.ndim)
        strides = [*ragged, *element_strides(out), *ragged, *element_strides(lse)]
    return {f"merge.{name}_stride": stride for name, stride in zip(names, strides, strict=True)}


def cache_fields(cache: KVCache) -> dict[str, int]:
    """Return the values of a field ``cache``, a KVCache of paging.cuh, without its arrays; see cache_arrays."""
    values = {
        "cache.page_table_stride": 0 if cache.page_table is None else element_strides(cache.page_table)[0],
        "cache.page_size": cache.page_size,
        "cache.capacity": min(cache.capacity, 2**31 - 1),
        **divisor_fields("cache.by_page_size", cache.page_size),
    }
    for name, array in (("k", cache.k), ("v", cache.v)):
        for axis, stride in zip(("page", "row", "head"), strides_of(array)):
            values[f"cache.{name}.{axis}"] = stride // _UNIT
        if cache.is_packed:  # a sequence begins at a key, as at a page
            values[f"cache.{name}.page"] = values[f"cache.{name}.row"]
    return values


def cache_arrays(cache: KVCache) -> dict[str, str]:
    """Return the arrays of a KVCache of paging.cuh that are not called as its pointers."""
    return {} if cache.page_indices is None else {"page_table": "page_indices"}


def scale_fields(name: str, scales: Scales, is_packed: bool = False) -> dict[str, int]:
    """Return the values of a field that is a DescaleStrides of descale.cuh, by the name of the argument."""
    strides = [0, 0, 0]
    if scales.array is not None:
        steps = [0 if size == 1 else stride for size, stride in zip(scales.array.shape, element_strides(scales.array))]
        strides = steps if scales.per_key else [steps[0], 0, steps[1]]
        if scales.per_key and is_packed:  # as in cache_fields
            strides[0] = strides[1]
    return dict(zip((f"{name}_strides.outer", f"{name}_strides.row", f"{name}_strides.head"), strides))


def divisor_fields(path: str, divisor: int) -> dict[str, int]:
    """Return the values of a FastDivisor: n // divisor == n * magic >> (31 + shift) for 0 <= n < 2**31.

    The magic has 32 bits (Granlund and Montgomery, "Division by invariant integers using multiplication" (1994),
    theorem 4.2).
    """
    shift = (max(divisor, 1) - 1).bit_length()
    return {f"{path}.magic": -(-(1 << (31 + shift)) // max(divisor, 1)), f"{path}.shift": shift}
