"""What attention kernels have in common, whatever their family: blocks, macros, parameters, scratch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..device import Device
from ..metadata import SchedulerMetadata
from ..operands import Operands
from ..partition import MAX_BLOCKS_PER_SM, Partition
from ..problem import Problem
from .boxes import boxed_cache
from .fields import (
    cache_arrays,
    cache_fields,
    divisor_fields,
    length_fields,
    mask_defines,
    mask_fields,
    merge_fields,
    scale_fields,
    tree_fields,
)
from .launch import ABSENT, Launch, Scratch, contiguous_strides, element_strides, make_launch, row_strides
from .source import Variant, element_defines
from .tiles import resident_blocks

# A part of 64 rows of 128 values is 33 KB, written and read again: a cut costs what some 256 keys do. Per cent of the
# mean share and keys beyond it; a share has two ends. With more rows only the first counts: blocks that begin items
# together find in the L2 cache what others have read, 512 queries on 32,768 keys take 450 us, with cuts 552 (H200).
_LONGEST_SHARE, _LONGEST_EXCESS, _FEW_ROWS = 112, 512, 64
_ITEM_COUNTERS = 3  # of an item that lies in several blocks: enum ItemWord in rows_combine.cuh
SPLIT_BYTES = 2**30  # for what split_size keeps of items that are cut
_LOG2E = math.log2(math.e)
_LARGEST, _SMALLEST = float(np.finfo(np.float32).max), 2.0**-126  # of the float32 numbers that no kernel flushes
# Multiples of it by logarithms to base 2 stay finite, and beside scores of any size.
_MOST_SLACK = 2.0**120
_COARSE_CAP = 1024  # from here on, a cap's relative error of 2^-22 is too much

Defines = tuple[tuple[str, str | int], ...]


def resident_partition(family: str, tiles: Any, problem: Problem, device: Device) -> Partition:
    """Return the partition of a family whose blocks are those that the device holds at once."""
    num_blocks = resident_blocks(problem, device, tiles.blocks_per_sm)
    return Partition(
        family,
        tiles.rows,
        tiles.row_blocks,
        num_blocks,
        tiles.cluster,
        tiles,
        longest_share=_LONGEST_SHARE,
        longest_excess=_LONGEST_EXCESS if tiles.rows <= _FEW_ROWS else Partition.longest_excess,
    )


@dataclass(frozen=True)
class Form:
    """What a call says of its kernel that its problem does not know.

    Attributes:
        has_tree: Whether there is a tree mask.
        key_scales: 1 if every key and head has a scale of its own, 2 if every value, 3 for both.
        rotates: Whether the queries come from the append, which makes bfloat16 of those of 8 bits.
        merges: Whether results over other keys come in. A test for them in all kernels cost 0.1 to 1 us a launch, at
            the end of shares, where nothing hides it (H200).
    """

    has_tree: bool = False
    key_scales: int = 0
    rotates: bool = False
    merges: bool = False

    @classmethod
    def of(cls, operands: Operands) -> Form:
        """Return the form of a call."""
        key_scales = operands.cache.k_scales.per_key + 2 * operands.cache.v_scales.per_key
        rotates, merges = operands.rotary is not None, operands.merge_lse is not None
        return cls(operands.tree_mask is not None, key_scales, rotates, merges)


PLAIN = Form()


def attention_defines(problem: Problem, tiles: Any, own: Defines, form: Form) -> Defines:
    """Return the macros of an attention kernel: everything not named here is a run-time value.

    Args:
        problem: The problem.
        tiles: Its tile sizes.
        own: What the family says itself: head dims of the keys, warps.
        form: What the call says.
    """
    return (
        *element_defines(problem.out_dtype if form.rotates else problem.qkv_dtype, problem.kv_dtype, problem.out_dtype),
        ("KEY_SCALES", form.key_scales),
        ("HEAD_DIM_V", problem.headdim_v),
        ("PADDED_HEAD_DIM_V", tiles.headdim_v),
        ("ROWS", tiles.rows),
        ("TILE_KEYS", tiles.tile_keys),
        ("STAGES", tiles.stages),
        ("BLOCKS_PER_SM", tiles.blocks_per_sm),
        ("BLOCK_STATE_BYTES", tiles.block_state_bytes),
        ("CLUSTER", tiles.cluster),
        *own,
        ("HAS_SOFTCAP", int(problem.has_softcap)),
        *mask_defines(problem, form.has_tree),
        ("HAS_SPLIT_SIZE", int(problem.split_size is not None)),
        ("MERGES", int(form.merges)),
    )


def usual_forms(problem: Problem, appends: bool) -> list[Form]:
    """Return what calls of a plan say that have neither a tree mask nor results over other keys."""
    if not problem.is_quantised:
        return [PLAIN]
    rotated = (False, True) if appends and problem.out_dtype != problem.qkv_dtype else (False,)
    return [Form(key_scales=key_scales, rotates=rotates) for key_scales in (0, 3) for rotates in rotated]


def attention_launch(
    kernel: Variant,
    problem: Problem,
    operands: Operands,
    metadata: SchedulerMetadata,
    arrays: dict[str, str],
    joint: bool = False,
    scales_tiles: bool = False,
    has_boxes: bool = False,
) -> tuple[Launch, dict[str, Scratch]]:
    """Return the launch of a kernel that takes ``DecodeParams``, and the scratch that it needs.

    Args:
        kernel: The kernel.
        problem: The problem.
        operands: Their shapes, strides and numbers count, not their addresses.
        metadata: The plan. Its partition's tiles say rows, row blocks, cluster, warps and shared memory of a block.
        arrays: The arrays of pointers that are not called as their arrays.
        joint: Whether the first columns of q and k_cache are what meets the values, and the values, for the kernel.
        scales_tiles: Whether the kernel multiplies keys by their scales, not scores.
        has_boxes: Whether the kernel takes ``TiledParams``.
    """
    tiles = metadata.partition.tiles
    slots, max_splits = 2 * metadata.num_blocks, 0
    items = problem.batch_size * problem.num_heads_kv * tiles.row_blocks
    if problem.split_size:
        cut_items = min(items, metadata.num_blocks)  # at most
        slot_bytes = 4 * tiles.rows * (problem.headdim_v + 2)
        longest = max(1, min(metadata.max_seqlen_k, operands.cache.capacity))
        max_splits = _max_splits(longest, problem.split_size, slot_bytes * max(1, cut_items))
        slots += cut_items * max_splits
    scratch = {
        "partials": Scratch((slots * tiles.row_parts * tiles.rows * (problem.headdim_v + 2),), np.dtype(np.float32)),
        "counters": Scratch(
            (_ITEM_COUNTERS * metadata.device.num_sm * MAX_BLOCKS_PER_SM,), np.dtype(np.int32), zeroed=True
        ),
    }
    if tiles.cluster > 1:  # merges in its shared memory
        scratch = {}
    lse, ragged = operands.softmax_lse, problem.cu_seqlens_q
    lse_strides = (0, 0, 0) if lse is None else element_strides(lse)
    # Rotated queries are new memory.
    q_strides = element_strides(operands.q) if operands.rotary is None else contiguous_strides(operands.q.shape)
    qv_strides = q_strides if joint else (0, 0, 0, 0) if operands.qv is None else element_strides(operands.qv)
    cache = operands.cache
    softmax_scale = operands.softmax_scale * operands.q_scales.number * (1 if scales_tiles else cache.k_scales.number)
    values: dict[str, Any] = {
        **row_strides("q", q_strides, ragged),
        **row_strides("qv", qv_strides, ragged),
        **row_strides("out", element_strides(operands.out), ragged),
        "lse_head_stride": lse_strides[-2],
        "lse_batch_stride": 0 if ragged else lse_strides[0],
        **length_fields(problem, operands.lengths),
        **cache_fields(cache),
        **scale_fields("q_descale", operands.q_scales),
        **scale_fields("k_descale", cache.k_scales, cache.is_packed),
        **scale_fields("v_descale", cache.v_scales, cache.is_packed),
        "key_scale": cache.k_scales.number,
        "value_scale": cache.v_scales.number,
        **mask_fields(problem),
        **tree_fields(operands),
        **merge_fields(operands),
        "batch_size": problem.batch_size,
        "total_q": operands.out.shape[0] if ragged else 0,
        "num_heads_kv": problem.num_heads_kv,
        "group": problem.group,
        "row_blocks": tiles.row_blocks,
        "key_column": problem.headdim_v if joint else 0,
        **divisor_fields("by_num_heads_kv", problem.num_heads_kv),
        **divisor_fields("by_group", problem.group),
        **divisor_fields("by_row_blocks", tiles.row_blocks),
        "split_size": problem.split_size or 0,
        "max_splits": max_splits,
        "slots_by_item": items <= metadata.num_blocks,
        "num_slots": slots,
        **_score_values(softmax_scale, operands.softcap),
        # Signs are turned in the queries, so that the scale is positive.
        "query_flip": 0,
        "query_keep": 0xFFFFFFFF,
    }
    if softmax_scale <= 0 and not problem.has_softcap:
        values["query_flip"] = 0x80000000 if operands.q.itemsize == 4 else 0x80008000
        values["query_keep"] = 0xFFFFFFFF if softmax_scale else 0
    pointers = arrays | cache_arrays(cache)
    if joint:
        pointers["qv"] = arrays.get("q", "q")
    if cache.shares_scales:
        pointers["v_descale"] = "k_descale"
    if not scratch:
        pointers |= {"partials": ABSENT, "counters": ABSENT}
    grid, threads = metadata.num_blocks * tiles.row_parts, 32 * tiles.warps
    sizes = grid, threads, tiles.shared_bytes
    if not has_boxes:
        return make_launch(kernel, "DecodeParams", *sizes, values, pointers), scratch
    numbers, boxed = boxed_cache(cache, tiles.tile_keys // tiles.loader_warps)
    values = numbers | {f"attention.{path}": value for path, value in values.items()}
    return make_launch(kernel, "TiledParams", *sizes, values, pointers, boxed), scratch


def _max_splits(longest: int, split_size: int, bytes_of_a_split: int) -> int:
    """Return the splits that an item may have if it is cut, with ``split_size``: items with more stay whole."""
    return min(-(-longest // split_size), max(1, SPLIT_BYTES // bytes_of_a_split))


def _score_values(softmax_scale: float, softcap: float) -> dict[str, float]:
    """Return what the kernel does to the products of queries and keys; every number is one that float32 holds."""
    values = dict.fromkeys(("score_cap", "cap_scale", "cap_inverse", "tanh_scale", "cap_exactly"), 0.0)
    # All scores are 0 with a scale of 0, since its queries are: with any other scale they are the same.
    lse_scale = abs(softmax_scale) or 1.0
    if softcap:
        lse_scale = 1.0
        values["score_cap"] = min(softcap, _LARGEST)
        values["cap_scale"] = softmax_scale
        values["cap_inverse"] = min(2.0**64 / softcap, _LARGEST)
        tanh_scale = 2 * _LOG2E * softmax_scale / softcap
        values["tanh_scale"] = max(-_LARGEST, min(tanh_scale, _LARGEST))
        values["cap_exactly"] = softcap >= _COARSE_CAP or abs(tanh_scale) < _SMALLEST
    # However small the scale is, keep it positive, so that a masked score, -inf, stays one.
    score_scale = min(max(lse_scale * _LOG2E, _SMALLEST), _LARGEST)
    values["score_scale"], values["score_slack"] = score_scale, min(8 / score_scale, _MOST_SLACK)
    values["lse_scale"] = lse_scale
    return values
