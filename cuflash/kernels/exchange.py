"""The launch that merges what several GPUs have found, each through the memory of the others."""

from __future__ import annotations

import math
from functools import lru_cache

from ..packing import Packing
from .launch import Launch, make_launch
from .source import Variant, element_defines

MOST_RANKS = 32  # a lane of a warp has the LSE of each
_BLOCKS, _WARPS = 128, 8  # all of them resident on any GPU
_TURNS_BYTES = 4 * _BLOCKS


def exchange_variant(dtype: str) -> Variant:
    """Return the kernel."""
    return Variant("exchange", (*element_defines(dtype), ("WARPS", _WARPS), ("BLOCKS", _BLOCKS)))


def half_bytes(packing: Packing, ranks: int) -> int:
    """Return what half of an inbox must hold: of each rank and row its outputs and LSE, with the number of the call."""
    row_bytes = 2 * packing.headdim_v * packing.dtype.itemsize + 16
    return ranks * packing.heads * math.prod(packing.rows) * row_bytes


def inbox_bytes(half: int) -> int:
    """Return the size of an inbox of two halves; see exchange.cu."""
    return _TURNS_BYTES + 2 * half


@lru_cache(maxsize=256)
def exchange_launch(packing: Packing, rank: int, ranks: int, shares: bool, half: int) -> Launch:
    """Return the launch.

    Args:
        packing: How results of a share of the heads lie.
        rank: This rank.
        ranks: Ranks.
        shares: Whether each rank gets its share of the heads; else all get the same.
        half: Bytes of half of an inbox, at least ``half_bytes``.
    """
    *batch, queries = packing.rows
    values = {
        "half_bytes": half,
        "partial_stride": packing.nbytes if shares else 0,
        "head_bytes": packing.head_bytes,
        "ranks": ranks,
        "rank": rank,
        "batch_size": math.prod(batch),
        "queries": queries,
        "heads": packing.heads,
        "headdim": packing.headdim_v,
    }
    variant = exchange_variant(packing.dtype.name)
    return make_launch(variant, "ExchangeParams", _BLOCKS, 32 * _WARPS, 0, values)
