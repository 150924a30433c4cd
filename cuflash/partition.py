"""Partition: all that a planner knows of a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GRAIN = 16  # keys: cuts lie at multiples of it
MAX_BLOCKS_PER_SM = 2  # blocks that a plan has room for, whatever the family


@dataclass(frozen=True)
class Partition:
    """How a kernel family cuts a problem into work for thread blocks.

    Attributes:
        family: Name of the kernel family.
        rows: Packed query rows of a row block.
        row_blocks: Row blocks of one (sequence, KV head).
        num_blocks: The most thread blocks that a plan may use: those that the device holds at once.
        cluster: Blocks that share one item, or 1: blocks share all keys.
        tiles: What the family alone knows of its tiles.
        grain: Keys: cuts lie at multiples of it.
        min_share: Keys of a block below which cutting items further does not pay.
        most_parts: It does not pay either if an item has more parts than these ..
        parted_share: .. and a block fewer keys than these, since all parts are merged, by one block or a few, ..
        few_blocks: .. nor do more blocks than these for few items, if these have fewer keys each; 0: they do.
        overhead: What an item costs beyond its keys, as a multiple of what planner.item_overhead says. Beginning,
            ending and merging an item takes microseconds, in which a block could read hundreds of keys; but long
            shares of few rows are to have about as many keys as one another.
        overhead_short: The same where shares have fewer keys than ``short_share``.
        short_share: See there.
        overhead_rows: Rows of a sequence from which on ``overhead`` counts: if all that have rows have so many. Beside
            a long chunk of queries, the items of sequences that decode are to cost no more than their keys.
        longest_share: Per cent of the mean share that keeping items whole may give the longest one ..
        longest_excess: .. and at most so many keys more than the mean.
    """

    family: str
    rows: int
    row_blocks: int
    num_blocks: int
    cluster: int = 1
    tiles: Any = None
    grain: int = GRAIN
    min_share: int = 64
    most_parts: int = 32
    parted_share: int = 64
    few_blocks: int = 0
    overhead: int = 1
    overhead_short: int = 8
    short_share: int = 1024
    overhead_rows: int = 1
    longest_share: int = 106
    longest_excess: int = 2**31 - 1
