"""The family of many rows on sm_90a, ``extend_wgmma.cu``: warpgroups that multiply, and one that copies.

Every warpgroup that multiplies has 64 rows of a row block. Beyond 64 rows there are two of them, which share the tiles.
Up to 64 rows there is one, and two blocks share a multiprocessor where head dims allow; of few items there are two with
the same rows, which take turns at the tiles, so that an item has half as many parts.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from ..device import Device
from ..metadata import SchedulerMetadata
from ..operands import Operands
from ..partition import Partition
from ..problem import Problem
from . import extend
from .attention import PLAIN, Form, attention_launch
from .extend import MOST_STAGES, Tiles, code_slot_bytes, defines, scale_bytes, state_bytes
from .launch import Launch, Scratch
from .source import Variant
from .tiles import shared_room

NAME = "extend_wgmma"
_MOST_HEADDIM = 256
_LOADER_WARPS = 4
_LEAST_STAGES = 4  # the keys of a tile are waited for while the values of two tiles before it are there
_BARRIERS_BYTES = 16  # of a half-stage: one for those that fill it, one for those that read it
_SHORT_SHARE_IN_TURNS = 1536  # of a block that has its multiprocessor alone
_MOST_STAGES_IN_TURNS = 12
_STAGES_OF_TURNS = 4  # a tile of each warpgroup: a slot is always the same one's
# Registers of the threads that load and of those that multiply, by warpgroups that multiply and blocks of a
# multiprocessor: 65,536 in all. One warpgroup alone needs no more than it is launched with.
_REGISTERS = {(1, 2): (56, 200), (2, 1): (56, 224), (1, 1): (0, 0)}


def partition(problem: Problem, device: Device, max_seqlen_k: int | None) -> Partition | None:
    """Return how the family cuts a problem for a device; None if it cannot."""
    tiles = tiling(problem, device)
    if tiles is None:
        return None
    partition = extend.partition_of(NAME, tiles, problem, device)
    return replace(partition, short_share=_SHORT_SHARE_IN_TURNS) if tiles.key_groups > 1 else partition


@lru_cache(maxsize=1024)
def tiling(problem: Problem, device: Device) -> Tiles | None:
    """Choose the tile sizes of a problem on a device; None if the family does not fit it."""
    widest = max(problem.headdim, problem.headdim_v)
    if device.arch != 90 or widest > _MOST_HEADDIM or extend.tiling(problem, device) is None:
        return None
    d, dv = (-(-n // 64) * 64 for n in (problem.headdim, problem.headdim_v))
    # Two rings do not fit beside 128 queries of 256 elements. With split_size, rows may not follow the longest query.
    has_room = not problem.is_quantised or widest <= 192
    rows = 128 if problem.rows > 64 and problem.split_size is None and has_room else 64
    is_wide = max(d, dv) > 128
    key_groups = 2 if _takes_turns(problem, device, rows, is_wide) else 1
    tile_keys, row_warps = 64 if is_wide else rows, rows // 16
    blocks_per_sm = 2 if rows == 64 and not is_wide and key_groups == 1 else 1
    state = state_bytes(rows, row_warps, 1, tile_keys)
    most_stages = MOST_STAGES if key_groups == 1 else _MOST_STAGES_IN_TURNS
    queries = rows * d * 2
    if key_groups > 1:  # results are given where queries have been: see Gift in extend_wgmma.cu
        queries = max(queries, rows * dv * 4 + 16 * 128)
    fixed, slot = queries + state + _BARRIERS_BYTES * most_stages, tile_keys * max(d, dv) * 2
    room = shared_room(device, blocks_per_sm)
    row_blocks, code_stages = max(1, -(-problem.rows // rows)), 0
    if problem.is_quantised:
        stages = _LEAST_STAGES
        fixed += 4 * rows + stages * (slot + scale_bytes(tile_keys))
        code_slot = code_slot_bytes(problem, tile_keys, _LOADER_WARPS)
        code_stages = min(MOST_STAGES, (room - fixed) // code_slot)
        shared = fixed + code_stages * code_slot
        state += 4 * rows
    else:
        stages = min(most_stages, (room - fixed) // slot)
        if key_groups > 1:
            stages -= stages % _STAGES_OF_TURNS
        shared = fixed + stages * slot
    if stages < _LEAST_STAGES or (problem.is_quantised and code_stages < 2):
        return None
    state += _BARRIERS_BYTES * stages
    sizes = d, dv, rows, row_blocks, row_warps, 1, tile_keys, stages, blocks_per_sm, shared, state
    return Tiles(*sizes, loader_warps=_LOADER_WARPS, code_stages=code_stages, key_groups=key_groups)


def _takes_turns(problem: Problem, device: Device, rows: int, is_wide: bool) -> bool:
    """Whether one block of two warpgroups with the same rows has a multiprocessor, instead of two blocks of one each.

    So if items are whole or cut in two at most; and if they are cut in more, into whole blocks, where a part has many
    rows. Not with head dim 64, where a tile of 64 keys is half as many bytes and one warpgroup copies for two: b8 L4096
    with 16 queries 24.5 -> 26.6 us (H200).
    """
    is_narrow = max(problem.headdim, problem.headdim_v) <= 64
    if rows > 64 or is_wide or is_narrow or problem.is_quantised or problem.split_size is not None:
        return False
    items = problem.batch_size * problem.num_heads_kv
    blocks = device.num_sm // max(items, 1) * items
    return blocks > 0 and (2 * items > device.num_sm or (problem.rows > 32 and 8 * blocks >= 7 * device.num_sm))


@lru_cache(maxsize=1024)
def _variant(problem: Problem, tiles: Tiles, form: Form) -> Variant:
    of_loader, of_math = _REGISTERS[tiles.math_warps // 4, tiles.blocks_per_sm]
    own = ("KEY_GROUPS", tiles.key_groups), ("LOADER_REGISTERS", of_loader), ("MATH_REGISTERS", of_math)
    return Variant(NAME, (*defines(problem, tiles, form), *own), arch_suffix="a")


def variant(problem: Problem, partition: Partition, form: Form = PLAIN) -> Variant:
    """Return the kernel of a partition."""
    return _variant(problem, partition.tiles, form)


def launch(
    problem: Problem, operands: Operands, metadata: SchedulerMetadata, arrays: dict[str, str]
) -> tuple[Launch, dict[str, Scratch]]:
    """Return the launch and the scratch that it needs; see :func:`cuflash.kernels.attention.attention_launch`."""
    kernel = variant(problem, metadata.partition, Form.of(operands))
    return attention_launch(kernel, problem, operands, metadata, arrays, has_boxes=True)
