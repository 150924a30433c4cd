"""The schedules of other libraries, as loads: keys that each of their thread blocks reads.

Both are read from their sources: FlashAttention-3 (``hopper/flash_prepare_scheduler.cu``, ``hopper/heuristics.h`` and
``hopper/tile_scheduler.hpp``) and FlashInfer (``include/flashinfer/attention/scheduler.cuh``).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Loads = NDArray[np.int64]

_TILE_KEYS = 128  # keys of a tile of FlashAttention-3 at head dim 128 on pages
_MIN_PART = 128  # FlashInfer's shortest part
_FLASHINFER_BLOCKS = 2  # its blocks on a multiprocessor


def flash_attention_3(lengths: NDArray[np.int64], num_heads_kv: int, num_sm: int, headdim: int = 128) -> Loads:
    """Return the keys that each block of FlashAttention-3 reads: one persistent block per multiprocessor.

    A sequence is cut into ``ceil(tiles / tiles per multiprocessor)`` splits, 10 % slack included, the longest splits
    come first, and each block takes the next one when it is done with its last.
    """
    tiles = -(-lengths // _TILE_KEYS)
    most = _most_splits(num_heads_kv, num_sm, int(tiles.max()), int(lengths.max()) * 2 * headdim * 2)
    per_sm = max(1, math.ceil(np.float32(int(tiles.sum()) * np.float32(1.1) * num_heads_kv / num_sm)))
    splits = np.ones_like(tiles) if most == 1 or len(lengths) > 992 else np.clip(-(-tiles // per_sm), 1, most)
    split_tiles = -(-tiles // splits)
    work = []
    for sequence in np.argsort(-split_tiles, kind="stable"):
        split_keys = int(split_tiles[sequence]) * _TILE_KEYS
        parts = [
            max(0, min(split_keys, int(lengths[sequence]) - split * split_keys)) for split in range(splits[sequence])
        ]
        work += parts * num_heads_kv
    return _greedy(work, num_sm)


def _most_splits(num_heads_kv: int, num_sm: int, tiles: int, kv_bytes: int) -> int:
    """The upper bound of splits: the fewest that fill 85 % of what the best number does, one sequence alone."""
    if num_heads_kv >= 0.8 * num_sm:
        return 1
    if tiles <= 4:
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
