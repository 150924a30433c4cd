"""The schedules of other libraries: what each of their thread blocks reads, as work or as loads (keys per block).

Both are read from their sources: FlashAttention-3 (``hopper/flash_prepare_scheduler.cu``, ``hopper/heuristics.h`` and
``hopper/tile_scheduler.hpp``) and FlashInfer (``include/flashinfer/attention/scheduler.cuh``).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuflash.metadata import WORK

Loads = NDArray[np.int64]
Part = tuple[int, int, int, int]  # sequence, KV head, first key, end

_TILE_KEYS = 128  # keys of a tile of FlashAttention-3 at head dim 128 on pages
_MIN_PART = 128  # FlashInfer's shortest part
_FLASHINFER_BLOCKS = 2  # its blocks on a multiprocessor


def flash_attention_3(lengths: NDArray[np.int64], num_heads_kv: int, num_sm: int, headdim: int = 128) -> Loads:
    """Return the keys that each block of FlashAttention-3 reads; see :func:`flash_attention_3_work`."""
    work = flash_attention_3_work(lengths, num_heads_kv, num_sm, headdim)
    loads = np.zeros(num_sm, np.int64)
    np.add.at(loads, work["block"], work["key_end"] - work["key_begin"])
    return loads[loads > 0]


def flash_attention_3_work(
    lengths: NDArray[np.int64], num_heads_kv: int, num_sm: int, headdim: int = 128
) -> NDArray[Any]:
    """Return what the blocks of FlashAttention-3 read: one persistent block per multiprocessor.

    A sequence is cut into ``ceil(tiles / tiles per multiprocessor)`` splits, 10 % slack included, the longest splits
    come first, and each block takes the next one when it is done with its last.

    Args:
        lengths: (batch,) keys of each sequence.
        num_heads_kv: KV heads.
        num_sm: Multiprocessors.
        headdim: Elements of a key.

    Returns:
        Lines as those of :meth:`cuflash.SchedulerMetadata.work`.
    """
    tiles = -(-lengths // _TILE_KEYS)
    most = _most_splits(num_heads_kv, num_sm, int(tiles.max()))
    per_sm = max(1, math.ceil(np.float32(int(tiles.sum()) * np.float32(1.1) * num_heads_kv / num_sm)))
    splits = np.ones_like(tiles) if most == 1 or len(lengths) > 992 else np.clip(-(-tiles // per_sm), 1, most)
    return _split_work(lengths, -(-tiles // splits), num_heads_kv, num_sm)


def fixed_splits_work(lengths: NDArray[np.int64], num_heads_kv: int, num_sm: int, num_splits: int) -> NDArray[Any]:
    """Return what blocks read if every sequence is cut into as many parts: the policy before schedulers.

    The arguments and the result are those of :func:`flash_attention_3_work`, and so is who takes which part.
    """
    tiles = -(-lengths // _TILE_KEYS)
    return _split_work(lengths, -(-tiles // num_splits), num_heads_kv, num_sm)


def _split_work(
    lengths: NDArray[np.int64], split_tiles: NDArray[np.int64], num_heads_kv: int, num_sm: int
) -> NDArray[Any]:
    """Cut every sequence into parts of so many tiles, and let persistent blocks take them, the longest first."""
    parts: list[Part] = []
    for sequence in np.argsort(-split_tiles, kind="stable").tolist():
        size, length = int(split_tiles[sequence]) * _TILE_KEYS, int(lengths[sequence])
        cuts = range(0, length, max(size, 1))
        parts += [(sequence, head, begin, min(begin + size, length)) for head in range(num_heads_kv) for begin in cuts]
    free = [(0, block) for block in range(num_sm)]  # when each block is free
    taken = []
    for part in parts:
        load, block = free[0]
        heapq.heapreplace(free, (load + part[3] - part[2], block))
        taken.append(block)
    work = np.zeros(len(parts), WORK)
    work["block"] = taken
    for field, values in zip(("sequence", "kv_head", "key_begin", "key_end"), zip(*parts)):
        work[field] = values
    return work[np.argsort(work["block"], kind="stable")]


def _most_splits(num_heads_kv: int, num_sm: int, tiles: int) -> int:
    """The upper bound of splits: the fewest that fill 85 % of what the best number does, one sequence alone."""
    if num_heads_kv >= 0.8 * num_sm or tiles <= 4:
        return 1
    counts = np.arange(1, min(128, num_sm, tiles) + 1)
    waves = num_heads_kv * counts / num_sm
    efficiency = waves / np.ceil(waves)
    return int(counts[np.argmax(efficiency >= 0.85 * efficiency.max())])


def flashinfer(lengths: NDArray[np.int64], num_heads_kv: int, num_sm: int, page_size: int = 16) -> Loads:
    """Return the keys that each block of FlashInfer's decode reads.

    The length of a part is the shortest with which all parts fit the GPU at once, found by binary search in whole
    pages; where the sequences alone fill it they are not cut, and wait for one another.
    """
    slots = _FLASHINFER_BLOCKS * num_sm
    pages = np.maximum(-(-lengths // page_size), 1)
    low, high = max(1, _MIN_PART // page_size), int(pages.max())
    if len(lengths) * num_heads_kv >= slots:
        low = high
    while low < high:
        middle = (low + high) // 2
        if int((-(-pages // middle)).sum()) * num_heads_kv > slots:
            low = middle + 1
        else:
            high = middle
    part = low * page_size
    work: list[int] = []
    for length in lengths:
        keys = [min(part, int(length) - begin) for begin in range(0, int(length), part)]
        work += keys * num_heads_kv
    return _greedy(work, slots)


def _greedy(work: Iterable[int], workers: int) -> Loads:
    """Return the loads of workers who each take the next piece of work when they are free."""
    loads = [0] * workers
    for piece in work:
        heapq.heapreplace(loads, loads[0] + piece)
    return np.array([load for load in loads if load], np.int64)
