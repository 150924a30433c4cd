"""The family of few rows, ``decode.cu``: keys are the rows of the matrix product, packed query rows its columns."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from ..device import Device
from ..metadata import SchedulerMetadata
from ..operands import Operands
from ..partition import MAX_BLOCKS_PER_SM, Partition
from ..problem import Problem
from .fields import cache_fields, divisor_fields, length_fields, mask_fields
from .launch import ABSENT, Launch, Scratch, contiguous_strides, element_strides, make_launch, row_strides
from .source import Variant, element_defines
from .tiles import Tiling, tiling

NAME = "decode"
_LOG2E = math.log2(math.e)


def partition(problem: Problem, device: Device, max_seqlen_k: int | None) -> Partition:
    """Return how the family cuts a problem for a device."""
    tiles = tiling(problem, device, max_seqlen_k)
    return Partition(NAME, tiles.rows, tiles.row_blocks, tiles.max_blocks(problem, device), tiles.cluster, tiles)


@lru_cache(maxsize=1024)
def decode_variant(problem: Problem, tiles: Tiling) -> Variant:
    """Return the attention kernel for a problem: everything not named here is a run-time value."""
    return Variant(
        "decode",
        (
            *element_defines(problem.qkv_dtype, problem.kv_dtype),
            ("HEAD_DIM", problem.headdim),
            ("HEAD_DIM_V", problem.headdim_v),
            ("PADDED_HEAD_DIM", tiles.headdim),
            ("PADDED_HEAD_DIM_V", tiles.headdim_v),
            ("ROWS", tiles.rows),
            ("TILE_KEYS", tiles.tile_keys),
            ("WARPS", tiles.warps),
            ("QUERY_BUFFERS", tiles.query_buffers),
            ("STAGES", tiles.stages),
            ("BLOCKS_PER_SM", tiles.blocks_per_sm),
            ("BLOCK_STATE_BYTES", tiles.block_state_bytes),
            ("CLUSTER", tiles.cluster),
            ("HAS_SOFTCAP", int(problem.has_softcap)),
            ("HAS_CHUNK", int(problem.attention_chunk > 0)),
            ("HAS_SPLIT_SIZE", int(problem.split_size is not None)),
        ),
    )


def variant(problem: Problem, partition: Partition) -> Variant:
    """Return the kernel of a partition."""
    return decode_variant(problem, partition.tiles)


def launch(
    problem: Problem, operands: Operands, metadata: SchedulerMetadata, arrays: dict[str, str]
) -> tuple[Launch, dict[str, Scratch]]:
    """Return the launch and the scratch that it needs.

    Args:
        problem: The problem.
        operands: Their shapes, strides and numbers count, not their addresses.
        metadata: The plan.
        arrays: The arrays of pointers that are not called as their arrays.
    """
    tiles: Tiling = metadata.partition.tiles
    slots, max_splits = 2 * metadata.num_blocks, 0
    if problem.split_size:
        max_splits = -(-max(metadata.max_seqlen_k, 1) // problem.split_size)
        slots = problem.batch_size * problem.num_heads_kv * tiles.row_blocks * max_splits
    scratch = {
        "partials": Scratch((slots * tiles.rows * (problem.headdim_v + 2),), np.dtype(np.float32)),
        "counters": Scratch((metadata.device.num_sm * MAX_BLOCKS_PER_SM,), np.dtype(np.int32), zeroed=True),
    }
    if tiles.cluster > 1:  # merges in its shared memory
        scratch = {}
    lse, ragged = operands.softmax_lse, problem.cu_seqlens_q
    lse_strides = (0, 0, 0) if lse is None else element_strides(lse)
    # Rotated queries are new memory.
    q_strides = element_strides(operands.q) if operands.rotary is None else contiguous_strides(operands.q.shape)
    scale = operands.softmax_scale * _LOG2E
    values: dict[str, Any] = {
        **row_strides("q", q_strides, ragged),
        **row_strides("out", element_strides(operands.out), ragged),
        "lse_head_stride": lse_strides[-2],
        "lse_batch_stride": 0 if ragged else lse_strides[0],
        **length_fields(problem, operands.lengths),
        **cache_fields(operands.cache),
        **mask_fields(problem),
        "num_heads_kv": problem.num_heads_kv,
        "group": problem.group,
        "row_blocks": tiles.row_blocks,
        **divisor_fields("by_num_heads_kv", problem.num_heads_kv),
        **divisor_fields("by_group", problem.group),
        **divisor_fields("by_row_blocks", tiles.row_blocks),
        "split_size": problem.split_size or 0,
        "max_splits": max_splits,
        "num_slots": slots,
        # Signs are turned in the queries, so that the scale is positive.
        "query_flip": 0,
        "tanh_scale": 0.0,
        "score_cap": 0.0,
    }
    if problem.has_softcap:
        values["tanh_scale"] = 2 * scale / operands.softcap
        values["score_cap"] = operands.softcap * _LOG2E
        scale = 1.0
    elif scale < 0:
        values["query_flip"] = 0x80008000 if operands.q.itemsize == 2 else 0x80000000
    # A scale of zero hides no key: keep it positive, so that a masked score, -inf, stays one.
    values["score_scale"] = max(abs(scale), 1e-30)
    values["score_slack"] = 8 / max(abs(scale), 1e-30)
    kernel, threads = decode_variant(problem, tiles), 32 * tiles.warps
    pointers = arrays if scratch else {**arrays, "partials": ABSENT, "counters": ABSENT}
    return make_launch(
        kernel, "DecodeParams", metadata.num_blocks, threads, tiles.shared_bytes, values, pointers
    ), scratch
