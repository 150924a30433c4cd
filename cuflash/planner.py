"""The planner in NumPy: lengths -> the int32 array of a plan. The bitwise twin of ``kernels_cu/plan.cu``.

The keys of all items form one line, which is cut into shares of equal cost. An item is (sequence, KV head, row block);
its cost is the keys that it sees plus a fixed overhead, or next to nothing if its sequence has no such rows. Every cut
follows from its own number alone, so a GPU makes them all at once: the two versions share their formulas, which use
integers only.

What a plan's words are stands in ``kernels_cu/include/schedule.cuh``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .device import Device
from .operands import Lengths
from .partition import MAX_BLOCKS_PER_SM, Partition
from .problem import Problem

PLAN_CUTS = 8  # the word at which the cuts begin
CUT = np.dtype([("item", "<i4"), ("key", "<i4"), ("first_block", "<i4"), ("last_block", "<i4")])
_INT32_MAX = 2**31 - 1
_EMPTY = 1  # what a row block costs that a sequence does not have, in keys
_BLOCKS_OF_FEW = 16  # items are few if few_blocks are so many for each

Ints = NDArray[np.int64]


def plan_words(batch_size: int, device: Device) -> int:
    """Return the size of a plan in int32 words: it depends on the batch size and the device alone."""
    return PLAN_CUTS + 4 * (device.num_sm * MAX_BLOCKS_PER_SM + 1) + 3 * batch_size


def plan_cuts(array: NDArray[np.int32], batch_size: int) -> NDArray[Any]:
    """Return the cuts of a plan as a structured view (blocks of the device + 1,) with the fields of ``CUT``."""
    return array[PLAN_CUTS : array.size - 3 * batch_size].view(CUT)


def plan_sequences(array: NDArray[np.int32], batch_size: int) -> NDArray[np.int32]:
    """Return the rows leftpad, seqlen_k and seqlen_q of a plan as a view (3, batch_size)."""
    return array[array.size - 3 * batch_size :].reshape(3, batch_size)


def sequence_lengths(problem: Problem, lengths: Lengths) -> tuple[Ints, Ints, Ints]:
    """Return leftpad, seqlen_k (new keys included) and seqlen_q of every sequence, each (batch,) and at least 0."""
    shape = (problem.batch_size,)
    seqlen_k = lengths.cache_seqlens.astype(np.int64)
    leftpad = np.zeros(shape, np.int64)
    if lengths.cache_leftpad is not None:
        leftpad = np.maximum(lengths.cache_leftpad, leftpad)
    seqlen_k = np.maximum(seqlen_k - leftpad, 0)
    if lengths.cu_seqlens_k_new is not None:
        seqlen_k += np.maximum(np.diff(lengths.cu_seqlens_k_new.astype(np.int64)), 0)
    else:
        seqlen_k += lengths.seqlen_k_new
    if lengths.cu_seqlens_q is not None:
        seqlen_q = np.diff(lengths.cu_seqlens_q.astype(np.int64)).clip(0, problem.max_seqlen_q)
    else:
        seqlen_q = np.full(shape, problem.max_seqlen_q, np.int64)
    return leftpad, np.minimum(seqlen_k, _INT32_MAX), seqlen_q


def row_blocks_at(problem: Problem, partition: Partition, seqlen_q: Ints) -> Ints:
    """Return the number of the row block at every place of each sequence, (batch, row_blocks).

    They come in the order first, last, second, last but one, ..: with a causal mask each sees more keys than the one
    before it, but two places side by side see as many as the next two. Empty row blocks come behind those that a
    sequence has.
    """
    place = np.arange(partition.row_blocks, dtype=np.int64)
    row_blocks = (-(-seqlen_q * problem.group // partition.rows))[:, None]
    return np.where(place >= row_blocks, place, np.where(place % 2, row_blocks - 1 - place // 2, place // 2))


def visible_keys(problem: Problem, partition: Partition, seqlen_k: Ints, seqlen_q: Ints) -> tuple[Ints, Ints]:
    """Return the keys [begin, end) that a row block sees, counted from the leftpad; 0, 0 where it sees none.

    Query position i of a sequence stands at p = i + seqlen_k - seqlen_q. What a row sees begins and ends no earlier
    than what the row before it sees, so a row block's first and last position decide.

    Args:
        problem: The problem: its masks and its group size.
        partition: The rows and the number of the row blocks.
        seqlen_k: (batch,) valid keys.
        seqlen_q: (batch,) query positions.

    Returns:
        begin and end, (batch * row_blocks,) each, the place fastest; see :func:`row_blocks_at`.
    """
    first_row = row_blocks_at(problem, partition, seqlen_q) * partition.rows
    if partition.row_blocks > 1:
        seqlen_k, seqlen_q = seqlen_k[:, None], seqlen_q[:, None]
    else:
        first_row = first_row[:, 0]
    num_rows = seqlen_q * problem.group
    mask = problem.mask
    end = np.where(first_row < num_rows, mask.shard.held(seqlen_k), 0)
    begin = np.zeros_like(end)
    if mask.hides:
        first = first_row // problem.group + (seqlen_k - seqlen_q)
        last = (np.minimum(first_row + partition.rows, num_rows) - 1) // problem.group + (seqlen_k - seqlen_q)
        begin, end = mask.first(first), np.minimum(end, mask.end(last, seqlen_k))
        none = begin >= end
        begin[none] = end[none] = 0
    return begin.ravel(), end.ravel()


def plan(problem: Problem, partition: Partition, lengths: Lengths, array: NDArray[np.int32]) -> None:
    """Plan a decode step: fill ``array``.

    Args:
        problem: The problem.
        partition: How its kernel family cuts it.
        lengths: Host arrays.
        array: (plan_words(batch_size, device),) int32, every word of it is written.
    """
    sequences = plan_sequences(array, problem.batch_size)
    leftpad, seqlen_k, seqlen_q = sequence_lengths(problem, lengths)
    sequences[0], sequences[1], sequences[2] = leftpad, seqlen_k, seqlen_q
    begin, end = visible_keys(problem, partition, seqlen_k, seqlen_q)
    items = len(begin) * problem.num_heads_kv
    cuts = array[PLAN_CUTS : array.size - 3 * problem.batch_size].reshape(-1, 4)
    array[1:PLAN_CUTS] = 0
    if partition.cluster > 1:
        item, key = _cut_for_clusters(problem, partition, begin, end)
        array[0] = used = len(item)
        cuts[:used, 0], cuts[:used, 1], cuts[:used, 2], cuts[:used, 3] = item, key, np.arange(used), np.arange(used)
        cuts[used:] = (items, 0, used, used)
        return

    rows = (seqlen_q * problem.group)[:, None]  # of the sequence
    rows = np.where(np.arange(partition.row_blocks) * partition.rows < rows, rows, 0).ravel()
    item, key = _cut(problem, partition, begin, end, rows)
    used = len(item)
    blocks = np.arange(used)
    # Blocks that hold a part of the item of a cut: from the one that holds its beginning to the one that holds its end.
    inside = key > 0
    first = np.searchsorted(item, item)
    first = np.where(inside, first - inside[first], blocks)
    last = np.where(inside, np.searchsorted(item, item, side="right") - 1, blocks)
    array[0] = used
    cuts[:used, 0], cuts[:used, 1], cuts[:used, 2], cuts[:used, 3] = item, key, first, last
    cuts[used:] = (items, 0, used, used)


def _cut(problem: Problem, partition: Partition, begin: Ints, end: Ints, rows: Ints) -> tuple[Ints, Ints]:
    """Return (item, key) where the share of every used block begins.

    Args:
        problem: The problem.
        partition: How its kernel family cuts it.
        begin: (units,) first key that a unit, (sequence, row block), sees.
        end: (units,) behind its last one.
        rows: (units,) rows of its sequence; 0 for a row block that the sequence does not have.
    """
    heads, row_blocks, num_blocks = problem.num_heads_kv, partition.row_blocks, partition.num_blocks
    units = len(begin)  # (sequence, row block): what the KV heads have in common
    items = units * heads
    if items == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    keys = end - begin
    all_keys = int(keys.sum()) * heads
    shortest, longest = int(keys.min()), int(keys.max())
    few, min_share = partition.few_blocks, partition.min_share
    if all_keys < partition.parted_share * (few or num_blocks):
        min_share = max(min_share, min(longest // partition.most_parts, partition.parted_share))
        if items * _BLOCKS_OF_FEW <= few:
            num_blocks = min(few, num_blocks)
    blocks = min(max(items, -(-all_keys // min_share)), num_blocks)
    # Equal items: whole ones per block, or whole blocks per item, if the GPU stays nearly full. So are others cut that
    # are about as long as one another: they then count as equal.
    even = shortest == longest
    aligned = blocks // items * items if items <= blocks else largest_divisor(items, num_blocks)
    pairs = keys[::2] + keys[1::2] if row_blocks % 2 == 0 else None
    longest_share = _longest_whole_share(items, aligned, longest, None if pairs is None else int(pairs.max()))
    if aligned <= blocks and aligned * 8 >= blocks * 7:
        if even or longest_share <= _most_keys(partition, all_keys, blocks):
            even, blocks = True, aligned
    overheads = np.zeros(units, np.int64)
    if not even:  # row blocks that a sequence does not have are walked past
        is_short = all_keys < partition.short_share * blocks
        has_rows = rows > 0
        item_cost = item_overhead(int(has_rows.sum()) * heads, all_keys)
        if is_short:
            item_cost *= partition.overhead_short
        elif not (has_rows & (rows < partition.overhead_rows)).any():
            item_cost *= partition.overhead
        overheads = np.where(has_rows, item_cost, _EMPTY)
    costs = np.full(units, max(longest, 1)) if even else keys + overheads
    total = int(costs.sum()) * heads
    slack = 0
    if problem.split_size is None:  # by what the longest share may exceed the mean, both of its ends together
        slack = max(0, (_most_keys(partition, all_keys, blocks) - -(-total // blocks)) // 2)

    share, rest = divmod(total, blocks)
    block = np.arange(blocks, dtype=np.int64)
    target = block * share + block * rest // blocks
    before = np.zeros(units + 1, np.int64)  # cost of the units before this one, for one KV head
    np.cumsum(costs, out=before[1:])
    unit = np.searchsorted(before, target // heads, side="right") - 1
    sequence = unit // row_blocks
    start = before[sequence * row_blocks]
    head, within = np.divmod(target - heads * start, before[sequence * row_blocks + row_blocks] - start)
    if row_blocks > 1:
        unit = np.searchsorted(before, start + within, side="right") - 1
    x = start + within - before[unit]  # offset in the cost of the item
    cost = before[unit + 1] - before[unit]
    item = (sequence * (heads - 1) + head) * row_blocks + unit
    begin, end, overhead = begin[unit], end[unit], overheads[unit]

    # The overhead stands at the beginning of an item.
    grain = problem.split_size or partition.grain
    into = (end - begin) * x // cost if even else np.maximum(x - overhead, 0)
    key = (begin + into + grain // 2) // grain * grain
    key = np.where(x <= slack, begin, np.where(cost - x <= slack, end, key))
    if 0 < problem.num_splits < blocks:
        parts = problem.num_splits
        # Items that equal shares would cut into more parts: equal parts instead.
        many = (cost - 1) * blocks > (parts - 1) * total
        part = (2 * parts * x + cost) // (2 * cost)
        equal = (begin + (end - begin) * part // parts + partition.grain // 2) // partition.grain * partition.grain
        equal = np.where(part == 0, begin, np.where(part == parts, end, equal))
        key = np.where(many, equal, key)
    after = key >= end
    item += after & (x > 0)
    key[after | (key <= begin)] = 0

    kept = item < items
    kept[1:] &= (item[1:] != item[:-1]) | (key[1:] != key[:-1])
    return item[kept], key[kept]


def _longest_whole_share(items: int, blocks: int, longest: int, longest_pair: int | None) -> int:
    """Return the keys of the longest of ``blocks`` shares of whole items, or whole shares of items, at most."""
    if items <= blocks or blocks == 0:
        return -(-items * longest // max(blocks, 1))
    count = items // blocks  # of a share
    return count * longest if longest_pair is None else count // 2 * longest_pair + count % 2 * longest


def _most_keys(partition: Partition, all_keys: int, blocks: int) -> int:
    """Return how many keys the longest of ``blocks`` shares may have."""
    mean = -(-all_keys // blocks)
    return min(partition.longest_share * mean // 100, mean + partition.longest_excess)


def _cut_for_clusters(problem: Problem, partition: Partition, begin: Ints, end: Ints) -> tuple[Ints, Ints]:
    """Return (item, key) where the share of every block begins: a cluster cuts its item into equal parts."""
    rows = (len(begin) // partition.row_blocks, 1, partition.row_blocks, 1)  # sequence, KV head, row block, part
    begin, end = begin.reshape(rows), end.reshape(rows)
    part = np.arange(partition.cluster)
    key = (
        (begin + (end - begin) * part // partition.cluster + partition.grain // 2) // partition.grain * partition.grain
    )
    after = (key >= end) & (part > 0)
    key = np.where(after | (key <= begin) | (part == 0), 0, key)
    shape = (rows[0], problem.num_heads_kv, partition.row_blocks, partition.cluster)
    items = np.arange(math.prod(shape[:3])).reshape(*shape[:3], 1)
    item = items + np.broadcast_to(after, shape)
    return item.ravel(), np.broadcast_to(key, shape).ravel()


def item_overhead(items: int, all_keys: int) -> int:
    """Return what an item costs beyond its keys, in keys: about 1/32 of the mean item, in [1, 128].

    Short items weigh up to 1/16 of the mean, so that the keys of the longest share stay within 8 % of the mean share,
    where this counts once. Where shares are short it counts for more: see :class:`cuflash.partition.Partition`.
    """
    return max(1, min(128, max(all_keys // (32 * items), min(16, all_keys // (16 * items)))))


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of ``number`` that is at most ``limit`` and at least 7/8 of it, else 0."""
    return next((d for d in range(min(limit, number), (limit * 7 + 7) // 8 - 1, -1) if d > 0 and number % d == 0), 0)
