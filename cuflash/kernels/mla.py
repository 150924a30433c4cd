"""The family of latent attention, ``mla.cu``: the values are scored as well, and every row of the cache is read once.

It takes keys that are longer than those of the other kernels, whose values are their first columns (the joint form),
and keys of up to 64 elements beside values of at least 256: calls of such a plan may bring ``qv``, or may not.

A tile is 16, 32 or 64 keys, which all warps of a block read together. They divide the rows of a row block and the value
columns; warps that share their rows divide the keys of a tile, and share the weights.
"""

from __future__ import annotations

from functools import lru_cache

from ..device import Device
from ..dtypes import numpy_dtype
from ..metadata import SchedulerMetadata
from ..operands import Operands
from ..partition import Partition
from ..problem import MAX_HEADDIM, Problem
from .attention import PLAIN, Defines, Form, attention_defines, attention_launch, resident_partition
from .extend import Tiles
from .launch import Launch, Scratch
from .source import Variant
from .tiles import shared_room

NAME = "mla"
_MOST_STAGES = 6
_SHARE_BYTES = 160  # struct BlockState in mla.cu

# float32, and caches of 8 bits beside queries of float32, which become float32 in shared memory.
_FLOAT32_SHAPES = ((16, 1, 2, 16, 1, 1),)
# (rows, warps that divide them, warps that divide the columns, keys of a tile, blocks per multiprocessor, fewest
# stages). Of those for as many rows the first that fits is taken. Warps of 32 rows have 128 columns of the output each,
# warps of 16 rows 128 or 256: 128 registers of a lane at most. All of a row block's queries are read from shared memory
# once per tile and warp that scores, so many rows want long tiles.
_SHAPES = (
    (16, 1, 4, 32, 2, 2),
    (16, 1, 4, 32, 1, 2),
    (16, 1, 2, 16, 1, 2),
    (32, 2, 4, 64, 1, 2),
    (32, 2, 4, 32, 1, 2),
    (32, 2, 2, 16, 1, 2),
    (64, 2, 4, 64, 1, 2),
    (64, 2, 4, 32, 1, 2),
)
# Of codes, which become float16 on their way to an MMA: a tile is half as large, so that two of 64 keys have room.
_CODE_SHAPES = ((16, 1, 4, 64, 2, 2), *_SHAPES)


def partition(problem: Problem, device: Device, max_seqlen_k: int | None) -> Partition | None:
    """Return how the family cuts a problem for a device; None if it cannot."""
    tiles = tiling(problem, device)
    return None if tiles is None else resident_partition(NAME, tiles, problem, device)


@lru_cache(maxsize=1024)
def tiling(problem: Problem, device: Device) -> Tiles | None:
    """Choose the tile sizes of a problem on a device; None if the family does not fit it."""
    if not is_latent(problem):
        return None
    code_bytes = numpy_dtype(problem.kv_dtype).itemsize
    is_float32 = problem.qkv_dtype == "float32"
    itemsize = 4 if is_float32 else 2  # of queries and weights as they are multiplied
    scales_tiles, reads_codes = problem.is_quantised and is_float32, problem.is_quantised and not is_float32
    shapes = _FLOAT32_SHAPES if is_float32 else _CODE_SHAPES if reads_codes else _SHAPES
    # With split_size a sequence's bits may not depend on the longest query of its batch: rows for one query position.
    wanted = problem.rows if problem.split_size is None else problem.group
    best = None
    for rows, row_warps, column_warps, tile_keys, blocks_per_sm, least in shapes:
        if best is not None and (best.rows >= wanted or best.rows == rows):
            continue
        line = 128 // code_bytes  # elements
        columns = _round_up(problem.headdim_v, 64 * column_warps) // column_warps  # of a warp
        if reads_codes and columns > 64:
            columns = _round_up(columns, line)
        dv = columns * column_warps
        d = _round_up(headdim_beside(problem), line)
        row_bytes = (d + dv) * itemsize
        if scales_tiles:  # numbers are padded less than codes
            row_bytes = itemsize * _round_up(
                _round_up(problem.headdim_v, 16 * column_warps) + headdim_beside(problem), 32
            )
        warps = row_warps * column_warps
        state = (
            _SHARE_BYTES
            + 8 * tile_keys * scales_tiles
            + 8 * rows * reads_codes
            + itemsize * rows * tile_keys
            + 8 * rows * column_warps
            + 4 * warps
            + 16
        )
        fixed = (rows + tile_keys * scales_tiles) * row_bytes + state
        slot = tile_keys * ((d + dv) * code_bytes + 8 * reads_codes)
        room = shared_room(device, blocks_per_sm)
        stages = min(_MOST_STAGES, (room - fixed) // slot)
        if stages >= least:
            row_blocks = max(1, -(-problem.rows // rows))
            shared = fixed + stages * slot
            best = Tiles(
                d, dv, rows, row_blocks, row_warps, column_warps, tile_keys, stages, blocks_per_sm, shared, state
            )
    return best


def is_latent(problem: Problem) -> bool:
    """Whether the values are scored as well, or may be."""
    return problem.takes_qv or is_joint(problem)


def is_joint(problem: Problem) -> bool:
    """Whether the kernel takes values for the first columns of keys: of keys that no other kernel has."""
    has_other = problem.headdim <= 256 or (
        problem.headdim <= MAX_HEADDIM and numpy_dtype(problem.kv_dtype).itemsize == 2
    )
    return problem.headdim > problem.headdim_v and not has_other


def headdim_beside(problem: Problem) -> int:
    """Return the elements of a key that are no value's."""
    return problem.headdim - problem.headdim_v if is_joint(problem) else problem.headdim


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def variant(problem: Problem, partition: Partition, form: Form = PLAIN) -> Variant:
    """Return the kernel of a partition: of both spellings, with and without ``qv``."""
    return _variant(problem, partition.tiles, form)


@lru_cache(maxsize=1024)
def _variant(problem: Problem, tiles: Tiles, form: Form) -> Variant:
    return Variant(NAME, defines(problem, tiles, form))


def defines(problem: Problem, tiles: Tiles, form: Form) -> Defines:
    """Return the macros of a kernel of latent attention; see :func:`cuflash.kernels.attention.attention_defines`."""
    own = (
        ("HEAD_DIM", headdim_beside(problem)),
        ("PADDED_HEAD_DIM", tiles.headdim + tiles.headdim_v),
        ("WARPS", tiles.math_warps),
        ("COLUMN_WARPS", tiles.column_warps),
    )
    return attention_defines(problem, tiles, own, form)


def launch(
    problem: Problem, operands: Operands, metadata: SchedulerMetadata, arrays: dict[str, str]
) -> tuple[Launch, dict[str, Scratch]]:
    """Return the launch and the scratch that it needs; see :func:`cuflash.kernels.attention.attention_launch`."""
    kernel = variant(problem, metadata.partition, Form.of(operands))
    return latent_launch(kernel, problem, operands, metadata, arrays)


def latent_launch(
    kernel: Variant,
    problem: Problem,
    operands: Operands,
    metadata: SchedulerMetadata,
    arrays: dict[str, str],
    has_boxes: bool = False,
) -> tuple[Launch, dict[str, Scratch]]:
    """Return the launch of a kernel of latent attention, and the scratch that it needs.

    Raises:
        ValueError: For values of their own beside keys that only joint rows may be as long as.
    """
    joint = is_joint(problem)
    if joint and not operands.cache.may_be_joint:
        dims, kinds = (problem.headdim, problem.headdim_v), (problem.qkv_dtype, problem.kv_dtype)
        raise ValueError(
            f"v_cache must be the first columns of k_cache's rows for headdim and headdim_v of {dims} with queries of "
            f"{kinds[0]} and a cache of {kinds[1]}, got values of their own: the NumPy backend alone serves them"
        )
    return attention_launch(kernel, problem, operands, metadata, arrays, joint, scales_tiles=True, has_boxes=has_boxes)
