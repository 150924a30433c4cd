"""The family of latent attention on sm_90a, ``mla_wgmma.cu``: two warpgroups that multiply, and one that copies.

It has row blocks of 64, which both warpgroups share; each has half of the value columns. Beside them a multiprocessor
has room for two tiles of 64 keys.
"""

from __future__ import annotations

from functools import lru_cache

from ..device import Device
from ..metadata import SchedulerMetadata
from ..operands import Operands
from ..partition import Partition
from ..problem import Problem
from . import mla
from .attention import PLAIN, Form
from .boxes import LEAST_ROWS
from .extend import Tiles, has_16_bits, scale_bytes
from .launch import Launch, Scratch
from .source import Variant
from .tiles import resident_blocks

NAME = "mla_wgmma"
_ROWS = _TILE_KEYS = 64
_WIDTHS = 64, 512  # padded: of what of a key is no value, and of values
_ROW_WARPS, _COLUMN_WARPS, _LOADER_WARPS, _STAGES = 4, 2, 4, 2
_STATE_BYTES = 1024  # struct BlockState in mla_wgmma.cu
_REGISTERS = (("LOADER_REGISTERS", 72), ("MATH_REGISTERS", 216))
_REGISTERS_OF_CODES = (("LOADER_REGISTERS", 88), ("MATH_REGISTERS", 208))  # codes land in those of who copies


def partition(problem: Problem, device: Device, max_seqlen_k: int | None) -> Partition | None:
    """Return how the family cuts a problem for a device; None if it cannot."""
    tiles = tiling(problem, device)
    if tiles is None:
        return None
    num_blocks = max(1, resident_blocks(problem, device, 1) // tiles.row_parts)
    return Partition(NAME, tiles.row_parts * _ROWS, tiles.row_blocks, num_blocks, tiles=tiles, grain=_TILE_KEYS)


@lru_cache(maxsize=1024)
def tiling(problem: Problem, device: Device) -> Tiles | None:
    """Choose the tile sizes of a problem on a device; None if the family does not fit it."""
    d, dv = mla.headdim_beside(problem), problem.headdim_v
    fits = mla.is_latent(problem) and d <= _WIDTHS[0] and _WIDTHS[1] - 128 < dv <= _WIDTHS[1]
    if device.arch != 90 or not fits or not has_16_bits(problem):
        return None
    # Scores of values and of the rest of a key are added up at once: there is one scale for both.
    if problem.is_quantised and not mla.is_joint(problem):
        return None
    row_blocks, resident = max(1, -(-problem.rows // _ROWS)), resident_blocks(problem, device, 1)
    if problem.is_quantised and not _outdoes_few_rows(problem, resident):
        return None
    # Where blocks read several items each, two side by side read those of the same sequence: what one has read from
    # memory the other one finds in the L2 cache. With split_size the batch may not matter.
    items = problem.batch_size * problem.num_heads_kv * row_blocks
    is_long = items > resident
    # Where both have heads of one query, they read the same tiles, and one can copy for the other. That pays unless
    # items lie in many blocks: b16 L1024 with 128 heads 26.8 us without, 27.1 with (H200).
    # Nor where tiles come row by row: 2048 chosen keys, pages of one, 52.0 and 43.0 us with what follows. Of codes,
    # which come in no other way, each makes numbers of half, for both: b128 L4096 313 and 260 us, b1 L32768 36.1, 34.5.
    has_boxes = problem.page_size is None or problem.page_size % LEAST_ROWS == 0
    is_common = problem.group % (2 * _ROWS) == 0 and problem.split_size is None
    is_shared = is_common and (problem.is_quantised or (has_boxes and 3 * items >= resident))
    row_parts = 2 if (is_long or is_shared) and row_blocks % 2 == 0 and problem.split_size is None else 1
    row_blocks //= row_parts
    # Where the blocks divide into so many an item, each merges a piece of what it has: b32 L4096 with 128 heads 75.5 us
    # without, 67.5 with, 64 heads 54.8 and 49.2, b16 L1024 with 128 heads 26.8 and 20.6. To 16 rows two warps do it:
    # b16 L1024 13.4 and 14.3, in 8 parts. Elsewhere the code would only lie in the way: b1 L32768 32.0 and 33.1.
    most_parts = 8 if problem.rows > 16 else 4
    is_scattered = 8 * most_parts * items >= 7 * resident
    # Where many blocks merge an item, 32 lanes load 128 columns of a part, or 64 of two parts, if there is something to
    # do for more blocks then: b1 L32768 with 16 heads, which are 64 pieces of 128 columns for 132 blocks, 17.85 and
    # 17.3 us. With 8 heads pieces of 32 columns were no faster, 16.4 and 16.5 (H200).
    blocks = resident // max(items, 1)
    merge_vectors = 16 if problem.rows > 8 and problem.rows * (dv // 4) <= blocks * 16 else 32
    # Loads that a lane has under way there. That is executed once, and each instruction counts: b16 L1024 with 16 heads
    # takes 13.3 us with 32 loads, of which 8 are wanted, and 12.7 with 8. Of parts in 66 or 132 blocks a warp has 17.
    merge_loads = 8 if blocks <= 8 else {32: 20, 16: 12}[merge_vectors]
    # Rows that were read leave the L2 cache first. That is faster, in most kernels by an eighth, but with more than 32
    # rows where blocks have sequences of their own: b128 L4096 with 64 heads 154 us so, 150 to 154 without, 128 heads
    # 254 and 244; yet 16 heads 145 and 156, and b32 L4096 with 64 heads, whose blocks share items, 49.7 and 51.8.
    evicts_first = problem.rows <= 32 or 8 * problem.batch_size < 7 * resident
    weights = _ROWS * _TILE_KEYS * 2
    state = _STATE_BYTES
    if problem.is_quantised:  # scales of a tile's keys and values, factors of the rows
        state += _STAGES * scale_bytes(_TILE_KEYS) + 4 * _ROWS
    shared = (_ROWS + _STAGES * _TILE_KEYS) * sum(_WIDTHS) * 2 + weights + state
    sizes = *_WIDTHS, _ROWS, row_blocks, _ROW_WARPS, _COLUMN_WARPS, _TILE_KEYS, _STAGES, 1, shared, state
    return Tiles(
        *sizes,
        loader_warps=_LOADER_WARPS,
        row_parts=row_parts,
        shares_tiles=is_shared,
        scattered_parts=most_parts if is_scattered else 0,
        evicts_first=evicts_first,
        merge_loads=merge_loads,
        merge_vectors=merge_vectors,
    )


def _outdoes_few_rows(problem: Problem, resident: int) -> bool:
    """Whether a quantised cache is read faster than by ``mla.cu``, which converts as it multiplies, all rows at once.

    Here a tile is converted once for 64 rows, and few rows wait for that: b128 L4096 with 16 heads takes 156 us, there
    101, with 32 heads 157 and 171. Yet many blocks that merge an item do it sooner here: b1 L32768 with 16 heads 20.6
    and 52.4 us, b16 L1024 15.5 and 18.4, b32 L4096 48.8 and 36.3 (H200). With split_size the batch may not matter.
    """
    if problem.split_size is not None:
        return True
    return problem.rows > 16 or 6 * problem.batch_size * problem.num_heads_kv < resident


def variant(problem: Problem, partition: Partition, form: Form = PLAIN) -> Variant:
    """Return the kernel of a partition: of both spellings, with and without ``qv``."""
    return _variant(problem, partition.tiles, form)


@lru_cache(maxsize=1024)
def _variant(problem: Problem, tiles: Tiles, form: Form) -> Variant:
    own = (
        ("ROW_PARTS", tiles.row_parts),
        ("SHARES_TILES", int(tiles.shares_tiles)),
        ("SCATTERED_PARTS", tiles.scattered_parts),
        ("EVICTS_FIRST", int(tiles.evicts_first)),
        ("MERGE_LOADS", tiles.merge_loads),
        ("MERGE_VECTORS", tiles.merge_vectors),
        *(_REGISTERS_OF_CODES if problem.is_quantised and not tiles.shares_tiles else _REGISTERS),
    )
    return Variant(NAME, (*mla.defines(problem, tiles, form), *own), arch_suffix="a")


def launch(
    problem: Problem, operands: Operands, metadata: SchedulerMetadata, arrays: dict[str, str]
) -> tuple[Launch, dict[str, Scratch]]:
    """Return the launch and the scratch that it needs; see :func:`cuflash.kernels.attention.attention_launch`."""
    kernel = variant(problem, metadata.partition, Form.of(operands))
    return mla.latent_launch(kernel, problem, operands, metadata, arrays, has_boxes=True)
