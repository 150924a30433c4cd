"""Tile sizes of ``decode.cu``, and what every family asks of a device; the others have a ``tiling`` of their own.

A tile is 16, 32 or 64 keys of one warp; a block of ``warps`` warps reads ``warps`` tiles at a time. Each warp keeps a
ring of ``stages`` half-stages in shared memory, K and V of its tiles in turn, so ``stages`` is odd and ``stages - 1``
of them are in flight. Why these numbers are good is counted by ``python -m tests.bench resources``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..device import Device
from ..dtypes import numpy_dtype
from ..problem import Problem

PADDED_HEADDIMS = (64, 96, 128, 192, 256)
ONE_ROW_BLOCK = 16  # so many packed query rows are never cut
_RESERVED_SHARED = 1024  # the system's share of every resident block
MOST_BLOCKS = 2**12 - 1  # those that merge an item are counted in 12 bits (rows_combine.cuh); no GPU holds as many


@dataclass(frozen=True)
class Tiling:
    """Tile sizes of a problem on a device.

    Attributes:
        headdim: Padded head dim of queries and keys.
        headdim_v: Padded head dim of values.
        rows: Packed query rows of a row block: 8, 16 or 32.
        tile_keys: Keys of a warp's tile: 16, 32 or 64.
        row_blocks: Row blocks of one (sequence, KV head).
        warps: Warps of a block.
        stages: Half-stages of a warp's ring, odd.
        blocks_per_sm: Blocks meant to be resident on one multiprocessor.
        shared_bytes: Dynamic shared memory of a block.
        query_buffers: 2 if the queries of the next item come while the keys of an item are read, else 1.
        block_state_bytes: Shared memory for what a block's threads have in common, struct BlockState in decode.cu.
        cluster: Blocks of a thread-block cluster, which share one item and merge it through their shared memory; 1: no
            clusters, blocks share all keys and merge through global memory.
        row_parts: 1: a block has all rows of the row blocks that it reads.
    """

    headdim: int
    headdim_v: int
    rows: int
    tile_keys: int
    row_blocks: int
    warps: int
    stages: int
    blocks_per_sm: int
    shared_bytes: int
    query_buffers: int
    block_state_bytes: int
    cluster: int = 1
    row_parts: int = 1

    def max_blocks(self, problem: Problem, device: Device) -> int:
        """Blocks of the largest grid of a plan: those that the device holds at once."""
        if self.cluster > 1:
            return problem.batch_size * problem.num_heads_kv * self.row_blocks * self.cluster
        return resident_blocks(problem, device, self.blocks_per_sm)


def resident_blocks(problem: Problem, device: Device, blocks_per_sm: int) -> int:
    """Return the blocks that a device holds at once, of the multiprocessors that a problem leaves to attention."""
    return min(MOST_BLOCKS, max(1, device.num_sm - problem.sm_margin) * blocks_per_sm)


def shared_room(device: Device, blocks_per_sm: int) -> int:
    """Return the shared memory that a block may have where so many share a multiprocessor."""
    return min(device.shared_per_sm // blocks_per_sm - _RESERVED_SHARED, device.shared_per_block)


def padded_headdim(headdim: int, itemsize: int = 2) -> int:
    """Round a head dim up to one whose rows in shared memory are whole half-lines of 64 bytes."""
    return next(size for size in PADDED_HEADDIMS if size >= headdim and size * itemsize % 64 == 0)


@lru_cache(maxsize=1024)
def tiling(problem: Problem, device: Device, max_seqlen_k: int | None = None) -> Tiling:
    """Choose the tile sizes of a problem on a device; depends on shapes alone.

    Args:
        problem: The problem.
        device: The device.
        max_seqlen_k: Upper bound of the key lengths, if one is known: small problems get clusters.

    Raises:
        ValueError: If the head dim does not fit the device.
    """
    itemsize = numpy_dtype(problem.kv_dtype).itemsize
    d, dv = padded_headdim(problem.headdim, itemsize), padded_headdim(problem.headdim_v, itemsize)
    # More than 16 rows at head dim 256 do not fit the registers: two row blocks read the keys twice instead.
    most_rows = 32 if max(d, dv) <= 192 else 16
    is_float32 = problem.qkv_dtype == "float32"
    if is_float32:
        most_rows = min(most_rows, 16)
    # With split_size a sequence's bits may not depend on the longest query of its batch: rows for one query position,
    # but no fewer than are one row block in every plan.
    wanted = problem.rows if problem.split_size is None else max(problem.group, ONE_ROW_BLOCK)
    rows = next(size for size in (8, 16, 32) if size >= min(wanted, most_rows))
    row_blocks = max(1, -(-problem.rows // rows))
    row_bytes = max(d, dv) * itemsize
    query = rows * d * max(2, numpy_dtype(problem.qkv_dtype).itemsize)  # those of 8 bits become float16

    # (keys of a tile, warps, blocks per multiprocessor), the best first: what a tile costs beside its keys is halved by
    # tiles of 32 keys, where registers allow; of two blocks per multiprocessor one computes while the other waits.
    shapes = [(16, 4, 2), (16, 2, 2), (16, 4, 1), (16, 2, 1), (16, 1, 1)]
    is_long = not is_float32 and (row_bytes <= 128 or (row_bytes <= 256 and rows == 8))
    if is_long:
        shapes = [(32, 4, 2), (32, 2, 2), *shapes]
    items = problem.batch_size * problem.num_heads_kv * row_blocks
    has_few_items = _has_few_items(problem, device, items)
    if has_few_items:
        # A block that has the multiprocessor alone has the registers for more rows.
        is_long |= not is_float32 and row_bytes <= 256 and rows == 16
        shapes = [(32, 8, 1)] * is_long + [(16, 8, 1)] + shapes
    if problem.is_quantised:
        shapes = _quantised_shapes(problem, max(d, dv), rows, has_few_items)
    choices = [*_cluster_shapes(problem, device, items, max_seqlen_k), *((shape, 1) for shape in shapes)]
    for (tile_keys, warps, blocks_per_sm), cluster in choices:
        room = shared_room(device, blocks_per_sm)
        slot = tile_keys * row_bytes
        state = _block_state_bytes(warps, rows)
        if problem.is_quantised:  # scales of a tile's keys and values, factors of the rows
            slot += 8 * tile_keys
            state += 4 * rows
        fixed = state
        if cluster > 1:  # the partial results of all blocks of a cluster: outputs, maxima and sums; a barrier
            fixed += cluster * rows * (4 * dv + 8) + 8
        stages, with_second = (_stages((room - fixed - n * query) // (warps * slot)) for n in (1, 2))
        # A second buffer where it costs no half-stage. A cluster reads one item; 32 rows, or 16 of float32, leave no
        # registers for it.
        has_registers = rows <= 16 and not is_float32
        buffers = 2 if cluster == 1 and has_registers and with_second == stages else 1
        if stages >= 3:
            shared = warps * stages * slot + fixed + buffers * query
            sizes = d, dv, rows, tile_keys, row_blocks, warps, stages, blocks_per_sm, shared, buffers
            return Tiling(*sizes, state, cluster)
    raise ValueError(f"headdim {problem.headdim} does not fit the shared memory of sm_{device.arch}")


def _has_few_items(problem: Problem, device: Device, items: int) -> bool:
    """Whether a multiprocessor gets one block of 8 warps, so that an item has fewer parts to merge.

    With split_size the warps of a block must not depend on the batch: they divide the keys of a split among them. And
    where lengths differ and blocks read parts of two items or three, two smaller blocks hide what one waits for while
    an item ends. Lengths are not known here: from a quarter of the multiprocessors to nearly all, it saves 3 to 13 % of
    random ones, and costs at most 2 % of equal ones (H200; 8 sequences of up to 8192 keys, 32/8 heads 34.9 -> 33.1 us,
    of codes 23.6 -> 21.2); with 16 bits and one KV head it saves nothing.
    """
    if items > device.num_sm or problem.split_size is not None:
        return False
    is_between = device.num_sm < 4 * items and 8 * items <= 7 * device.num_sm
    return not is_between or problem.qkv_dtype == "float32" or not (problem.is_quantised or problem.num_heads_kv > 1)


def _quantised_shapes(problem: Problem, headdim: int, rows: int, has_few_items: bool) -> list[tuple[int, int, int]]:
    """Return (keys of a tile, warps, blocks per multiprocessor) for a cache of 8 bits, the best first.

    The output of 8 rows passes through a slot of the ring, which holds it from 32 keys on. Tiles of 64 keys halve once
    more what a tile costs beside its keys, where registers and shared memory allow.
    """
    shapes = [(32, 4, 2), (32, 2, 2), (32, 4, 1), (32, 2, 1), (32, 1, 1)]
    if problem.qkv_dtype == "float32":
        return shapes
    is_long = headdim <= 128 and rows == 8
    if is_long:
        shapes = [(64, 4, 2), *shapes]
    if has_few_items:
        is_long |= headdim <= 128 and rows == 16
        shapes = [(64, 8, 1)] * is_long + [(32, 8, 1)] + shapes
    return shapes


def _cluster_shapes(
    problem: Problem, device: Device, items: int, max_seqlen_k: int | None
) -> list[tuple[tuple[int, int, int], int]]:
    """Return shapes, as above, and clusters for a problem that is small enough to gain from them, the best first.

    A cluster cuts its item into equal parts, whatever the other items are: one sequence is in balance, several seldom.
    On an H100 clusters won by 4 to 20 % with 128 to 512 keys a block and equal lengths; several sequences get them for
    fewer keys, of which what a launch costs beside reading outweighs balance. All must run at once: a cluster lies in
    one part (GPC) of the GPU, whose multiprocessors are no multiple of 8 or 4. Of 132, an H100 ran 128 blocks at once
    in clusters of 2, but not in clusters of 4; blocks of which two fit one multiprocessor do (H200: 4 sequences of 1024
    keys 8.6 -> 7.6 us).
    """
    free = problem.num_splits == 0 and problem.split_size is None and problem.sm_margin == 0
    if device.arch < 90 or not free or not max_seqlen_k or not items:
        return []
    tile_keys = 32 if problem.is_quantised else 16
    most_keys = 512 if problem.batch_size == 1 else 256
    choices = []
    for cluster in (8, 4, 2):  # 16 is not portable
        keys = max_seqlen_k / cluster
        if items * cluster > device.num_sm or not 64 <= keys <= most_keys:
            continue
        if cluster == 2 or items * cluster <= device.num_sm * 7 // 8:
            choices += [((tile_keys, 8, 1), cluster)] * (keys >= 8 * tile_keys)
            choices += [((tile_keys, 4, 1), cluster)] * (keys < 256)
        elif keys > 128:  # with fewer a smaller cluster is as good
            choices.append(((tile_keys, 4, 2), cluster))
    return choices


def _stages(slots: int) -> int:
    """Return the half-stages of a ring that has room for so many slots: odd, and at most 7."""
    return min(7, slots - 1 + slots % 2)


def _block_state_bytes(warps: int, rows: int) -> int:
    """Return room for a share, two segments, two mbarriers, and the maximum, sum and ring slot of each warp."""
    return 192 + warps * (8 * rows + 4)
