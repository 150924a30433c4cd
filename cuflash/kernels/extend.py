"""The family of many rows, ``extend.cu``: packed query rows are the rows of the matrix product, keys its columns.

A tile is 32 or 64 keys, which all warps of a block read together; they divide the rows of a row block, and the value
columns where registers do not hold all of them. A ring of ``stages`` half-stages, K and V of the tiles in turn, lies in
shared memory. Of a quantised cache it is a ring of numbers; codes come to another one, of ``code_stages`` half-stages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from ..device import Device
from ..dtypes import numpy_dtype
from ..metadata import SchedulerMetadata
from ..operands import Operands
from ..partition import Partition
from ..problem import Problem
from .attention import (
    PLAIN,
    Defines,
    Form,
    attention_defines,
    attention_launch,
    resident_partition,
)
from .launch import Launch, Scratch
from .source import Variant
from .tiles import shared_room

NAME = "extend"
PADDED_HEADDIMS = (64, 96, 128, 192, 256, 384, 512)
MOST_STAGES = 8
# An item of 64 rows costs as much as hundreds of keys, one of 128 rows twice as much: 6 sequences of up to 8192 keys
# with 64 queries took 85.9 us, 60.9 and 56.7 where it counts 4 and 8 times (H200).
_OVERHEAD_OF_64_ROWS = 4
_PARTED_SHARE = 256
_SHARE_BYTES = 128  # struct BlockState in extend.cu


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of a problem on a device.

    Attributes:
        headdim: Padded head dim of queries and keys; with ``mla.cu`` of what of a key is no value.
        headdim_v: Padded head dim of values.
        rows: Packed query rows of a row block.
        row_blocks: Row blocks of one (sequence, KV head).
        row_warps: Warps that divide the rows.
        column_warps: Warps that share their rows and divide the value columns.
        tile_keys: Keys of a tile.
        stages: Half-stages of the ring, at least 2; with ``mla.cu`` tiles of it.
        blocks_per_sm: Blocks meant to be resident on one multiprocessor.
        shared_bytes: Dynamic shared memory of a block.
        block_state_bytes: Of that, for what a block's threads have in common beside tiles and queries.
        loader_warps: Warps beside those that multiply, which load: a warpgroup with ``extend_wgmma.cu``, else none.
        code_stages: Half-stages of the ring of codes; 0 without one.
        key_groups: Warpgroups that have the same rows and take turns at the tiles.
        row_parts: Blocks that read the same share of the plan, each with so many of its rows.
        shares_tiles: Whether these are a cluster, and a tile is copied once for all of them.
        scattered_parts: Most parts of an item that its blocks merge piece by piece, 0 for none.
        evicts_first: Whether rows of the cache that were read leave the L2 cache before all others.
        merge_loads: Loads that a lane has under way where many blocks merge an item.
        merge_vectors: Lanes that load one part there, four columns each.
        cluster: 1: blocks merge through global memory.
    """

    headdim: int
    headdim_v: int
    rows: int
    row_blocks: int
    row_warps: int
    column_warps: int
    tile_keys: int
    stages: int
    blocks_per_sm: int
    shared_bytes: int
    block_state_bytes: int
    loader_warps: int = 0
    code_stages: int = 0
    key_groups: int = 1
    row_parts: int = 1
    shares_tiles: bool = False
    scattered_parts: int = 0
    evicts_first: bool = True
    merge_loads: int = 0
    merge_vectors: int = 0
    cluster: int = 1

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.math_warps + self.loader_warps

    @property
    def math_warps(self) -> int:
        """Warps of a block that multiply."""
        return self.row_warps * self.column_warps * self.key_groups


def partition(problem: Problem, device: Device, max_seqlen_k: int | None) -> Partition | None:
    """Return how the family cuts a problem for a device; None if it cannot."""
    tiles = tiling(problem, device)
    return None if tiles is None else partition_of(NAME, tiles, problem, device)


def partition_of(family: str, tiles: Tiles, problem: Problem, device: Device) -> Partition:
    """Return the partition of a family of many rows."""
    return replace(
        resident_partition(family, tiles, problem, device),
        overhead=_OVERHEAD_OF_64_ROWS * tiles.rows // 64,
        overhead_rows=tiles.rows // 4,
        parted_share=_PARTED_SHARE,
    )


@lru_cache(maxsize=1024)
def tiling(problem: Problem, device: Device) -> Tiles | None:
    """Choose the tile sizes of a problem on a device; None if the family does not fit it."""
    if not has_16_bits(problem) or max(problem.headdim, problem.headdim_v) > PADDED_HEADDIMS[-1]:
        return None
    # Numbers that are made of codes lie in whole lines of 128 bytes.
    sizes = [size for size in PADDED_HEADDIMS if not problem.is_quantised or size % 64 == 0]
    d, dv = (next(size for size in sizes if size >= n) for n in (problem.headdim, problem.headdim_v))
    # A warp's outputs are 16 rows x 256 columns at most, or 32 x 128: 128 registers of a lane.
    column_warps = 1 if dv <= 256 else 2
    # (rows, row warps, keys of a tile, blocks per multiprocessor), the best first. Warps of 32 rows read a tile from
    # shared memory once for twice the products; of two blocks one multiplies while the other waits.
    shapes = [(64, 4, 64, 2), (64, 4, 32, 2), (64, 4, 64, 1), (64, 4, 32, 1), (32, 2, 32, 1), (32, 2, 16, 1)]
    if problem.rows > 64 and problem.split_size is None:  # with split_size, rows may not depend on the longest query
        shapes = [(128, 4, 32, 2), (128, 8, 64, 1), (128, 8, 32, 1), *shapes]
    for rows, row_warps, tile_keys, blocks_per_sm in shapes:
        if rows // row_warps > 16 and (dv > 128 or d > 192):
            continue
        warps = row_warps * column_warps
        slot = tile_keys * max(d, dv) * 2
        if tile_keys // warps < (4 if max(d, dv) % 64 == 0 and min(d, dv) % 64 == 0 else 8):
            continue  # a warp copies whole passes of rows
        state = state_bytes(rows, warps, column_warps, tile_keys)
        fixed = rows * d * 2
        least = 3 if blocks_per_sm > 1 or rows > 64 else 2
        code_slot = 0
        if problem.is_quantised:  # keys and values have a slot each, codes are on their way to another ring
            state += 4 * rows
            fixed += 2 * (slot + scale_bytes(tile_keys))
            code_slot = code_slot_bytes(problem, tile_keys, warps)
        room = shared_room(device, blocks_per_sm)
        stages = min(MOST_STAGES, (room - fixed - state) // (code_slot or slot))
        if stages >= least:
            row_blocks = max(1, -(-problem.rows // rows))
            shared = fixed + state + stages * (code_slot or slot)
            stages, code_stages = (2, stages) if problem.is_quantised else (stages, 0)
            own = tile_keys, stages, blocks_per_sm, shared, state
            return Tiles(d, dv, rows, row_blocks, row_warps, column_warps, *own, code_stages=code_stages)
    return None


def has_16_bits(problem: Problem) -> bool:
    """Whether what is multiplied has 16 bits: queries and keys of as many, or codes of 8 that become so."""
    if problem.is_quantised:
        return problem.qkv_dtype != "float32"
    return numpy_dtype(problem.qkv_dtype).itemsize == 2


def code_slot_bytes(problem: Problem, tile_keys: int, loader_warps: int) -> int:
    """Return the bytes of a half-stage of codes and its scales, rows_codes.cuh: 8 or 4 lanes copy a row together."""
    row_bytes = 0
    for headdim in (problem.headdim, problem.headdim_v):
        lanes = 8 if headdim > 64 or tile_keys // loader_warps < 8 else 4
        row_bytes = max(row_bytes, -(-headdim // (16 * lanes)) * 16 * lanes)
    return tile_keys * (row_bytes + 8)


def scale_bytes(tile_keys: int) -> int:
    """Return the bytes of struct ScaleTile of rows_codes.cuh: what belongs to a slot."""
    return 12 * tile_keys


def state_bytes(rows: int, warps: int, column_warps: int, tile_keys: int) -> int:
    """Return room for what the threads of a block have in common, and for a struct Meeting of rows_partners.cuh."""
    if column_warps == 1:
        return _SHARE_BYTES
    return _SHARE_BYTES + 2 * rows * (tile_keys + 4 * column_warps) + 4 * warps + 16


def defines(problem: Problem, tiles: Tiles, form: Form) -> Defines:
    """Return the macros of a kernel of this family; see :func:`cuflash.kernels.attention.attention_defines`."""
    own = (
        ("HEAD_DIM", problem.headdim),
        ("PADDED_HEAD_DIM", tiles.headdim),
        ("WARPS", tiles.math_warps),
        ("COLUMN_WARPS", tiles.column_warps),
        ("CODE_STAGES", tiles.code_stages),
    )
    return attention_defines(problem, tiles, own, form)


@lru_cache(maxsize=1024)
def _variant(problem: Problem, tiles: Tiles, form: Form) -> Variant:
    return Variant(NAME, defines(problem, tiles, form))


def variant(problem: Problem, partition: Partition, form: Form = PLAIN) -> Variant:
    """Return the kernel of a partition."""
    return _variant(problem, partition.tiles, form)


def launch(
    problem: Problem, operands: Operands, metadata: SchedulerMetadata, arrays: dict[str, str]
) -> tuple[Launch, dict[str, Scratch]]:
    """Return the launch and the scratch that it needs; see :func:`cuflash.kernels.attention.attention_launch`."""
    kernel = variant(problem, metadata.partition, Form.of(operands))
    return attention_launch(kernel, problem, operands, metadata, arrays)
