"""Pages: which page holds which tokens of which sequence. Bookkeeping on the host, without the keys and values.

Pages are counted by reference, because forked sequences share them. What is kept, and what every method keeps:

- A sequence has pages for at least its length; entries of its row behind them are -1.
- A page has as many references as rows hold it, and is on the free list if that is none.
- Only pages with tokens in them are shared. So only the page in which a sequence ends can be both shared and about to
  be written: it is copied on write.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .problem import integer

Rows = NDArray[np.int64]
Pages = NDArray[np.int32]


class OutOfPages(MemoryError):
    """A paged cache has fewer free pages than asked for; nothing has changed.

    Attributes:
        needed: Pages that were asked for.
        free: Pages that are free.
    """

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"the cache has {free} free pages, {needed} are needed: free sequences or wait")
        self.needed, self.free = needed, free

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.needed, self.free), vars(self)


class PageTable:
    """Page table, lengths and free pages of sequences that come and go.

    Methods take handles as :meth:`add` gives them, one or several (an ArrayLike of integers), and do all or nothing.

    Args:
        num_pages: Pages there are.
        page_size: Tokens of a page.
        max_sequences: Most sequences at a time: rows of the table.
        max_seqlen: Most tokens of a sequence; the table has columns for so many.
        seed: Hands pages out in a random order; without it in the order of their numbers.

    Attributes:
        table: (max_sequences, pages per sequence) int32, -1 where a sequence has no page.
        lengths: (max_sequences,) int32 tokens in the cache.
        counts: (max_sequences,) int64 pages that a sequence has, also for tokens to come.
        references: (num_pages,) int32 rows that hold a page.
        changed: (max_sequences,) rows of the table that have changed since somebody cleared this.
        num_free: Pages that are free.
    """

    def __init__(
        self, num_pages: int, page_size: int, max_sequences: int, max_seqlen: int, seed: int | None = None
    ) -> None:
        self.page_size, self.max_seqlen = page_size, max_seqlen
        self.table = np.full((max_sequences, -(-max_seqlen // page_size)), -1, np.int32)
        self.lengths = np.zeros(max_sequences, np.int32)
        self.counts = np.zeros(max_sequences, np.int64)
        self.references = np.zeros(num_pages, np.int32)
        self.changed = np.ones(max_sequences, bool)
        order = np.arange(num_pages)
        if seed is not None:
            order = np.random.default_rng(integer("seed", seed, 0, 2**64 - 1)).permutation(num_pages)
        self._free = order[::-1].astype(np.int32)  # a stack: the first num_free entries are free pages
        self.num_free = num_pages
        # A handle is its row plus a multiple of max_sequences that grows whenever the row is given away.
        self._handles = np.full(max_sequences, -1, np.int64)
        self._next = np.arange(max_sequences, dtype=np.int64)
        self._free_rows = list(range(max_sequences))[::-1]

    def rows(self, sequences: ArrayLike) -> Rows:
        """Return the rows of sequences; of one handle a NumPy integer.

        Raises:
            TypeError: If a handle is not an integer.
            ValueError: If there is no such sequence (any more).
        """
        handles = integers("sequences", sequences)
        rows = handles % len(self._handles)
        unknown = self._handles[rows] != handles
        if unknown.any():
            raise ValueError(f"sequences must be in the cache, got {np.atleast_1d(handles[unknown])[0]}, which is not")
        return rows

    def row(self, sequence: ArrayLike) -> int:
        """Return the row of one sequence.

        Raises:
            TypeError: If it is not one handle.
            ValueError: If there is no such sequence (any more).
        """
        handle = integers("sequence", sequence)
        if handle.ndim:
            raise TypeError(f"sequence must be one handle, got {handle.tolist()}")
        return int(self.rows(handle))

    def handles(self) -> list[int]:
        """Return all sequences, in the order of their rows."""
        return self._handles[self._handles >= 0].tolist()

    def add(self, num_tokens: int) -> int:
        """Add an empty sequence, with pages for ``num_tokens`` to come; return its handle."""
        if not self._free_rows:
            raise ValueError(f"max_sequences={len(self._handles)} sequences are in the cache: free one first")
        row = self._free_rows[-1]
        self._extend(np.array([row]), np.array([num_tokens]))
        self._free_rows.pop()
        self._handles[row] = self._next[row]
        self._next[row] += len(self._handles)
        return int(self._handles[row])

    def extend(self, sequences: ArrayLike, num_tokens: ArrayLike) -> tuple[Pages, Pages]:
        """Give sequences pages of their own for ``num_tokens`` behind their lengths.

        Returns:
            (from, to): pages whose contents somebody has to copy before the tokens are written.
        """
        rows = self._distinct(sequences)
        return self._extend(rows, _for_each("num_tokens", num_tokens, rows))

    def fork(self, sequence: ArrayLike) -> int:
        """Add a sequence with the tokens of another, on the same pages; return its handle."""
        row = self.row(sequence)
        fork = self.add(0)
        new, used = fork % len(self._handles), -(-int(self.lengths[row]) // self.page_size)
        self.table[new, :used] = self.table[row, :used]
        self.references[self.table[new, :used]] += 1
        self.lengths[new], self.counts[new], self.changed[new] = self.lengths[row], used, True
        return fork

    def truncate(self, sequences: ArrayLike, seqlens: ArrayLike) -> None:
        """Cut sequences off at ``seqlens``; pages behind are no longer theirs."""
        rows = self._distinct(sequences)
        cut = _for_each("seqlens", seqlens, rows)
        if (cut > self.lengths[rows]).any():
            i = int((cut > self.lengths[rows]).argmax())
            raise ValueError(
                f"seqlens must be at most those of the sequences, got {cut[i]} for {self.lengths[rows[i]]}"
            )
        self._drop(rows, -(-cut // self.page_size))
        self.lengths[rows] = cut

    def free(self, sequences: ArrayLike) -> None:
        """End sequences."""
        rows = self._distinct(sequences)
        self._drop(rows, np.zeros(len(rows), np.int64))
        self.lengths[rows] = 0
        self._handles[rows] = -1
        self._free_rows.extend(rows[::-1].tolist())

    def advance(self, sequences: ArrayLike, lengths: NDArray[Any], num_tokens: NDArray[Any]) -> None:
        """Add tokens that have been written to sequences that still have ``lengths``."""
        rows = self._distinct(sequences)
        if (self.lengths[rows] != lengths).any() or (lengths + num_tokens > self.counts[rows] * self.page_size).any():
            raise ValueError("sequences must not change between begin() and commit()")
        self.lengths[rows] += num_tokens.astype(np.int32)

    # ------------------------------------------------------------------------------------------------------- helpers
    def _distinct(self, sequences: ArrayLike) -> Rows:
        rows = np.atleast_1d(self.rows(sequences))
        if rows.ndim != 1 or len(np.unique(rows)) < len(rows):
            raise ValueError(f"sequences must be different ones in one dimension, got {np.asarray(sequences).tolist()}")
        return rows

    def _extend(self, rows: Rows, num_tokens: NDArray[np.int64]) -> tuple[Pages, Pages]:
        lengths = self.lengths[rows].astype(np.int64)
        ends = lengths + num_tokens
        if (ends > self.max_seqlen).any():
            raise ValueError(f"a sequence must have at most max_seqlen={self.max_seqlen} tokens, got {ends.max()}")
        more = np.maximum(-(-ends // self.page_size) - self.counts[rows], 0)

        # Of n rows that write to a page that is shared, n need a copy; or n - 1, if no other row holds it.
        writers = np.flatnonzero((num_tokens > 0) & (lengths % self.page_size > 0))
        writers = writers[self.references[self.table[rows[writers], lengths[writers] // self.page_size]] > 1]
        last = self.table[rows[writers], lengths[writers] // self.page_size]
        shared, first, writing = np.unique(last, return_index=True, return_counts=True)
        copied = np.delete(np.arange(len(last)), first[writing == self.references[shared]])
        source, writers = last[copied], writers[copied]

        needed = len(source) + int(more.sum())
        if needed > self.num_free:
            raise OutOfPages(needed, self.num_free)
        if not needed:  # as in most steps
            return source, source
        self.num_free -= needed
        taken = self._free[self.num_free : self.num_free + needed][::-1].copy()
        self.references[taken] = 1
        target, fresh = taken[: len(source)], taken[len(source) :]
        np.subtract.at(self.references, source, 1)
        self.table[rows[writers], lengths[writers] // self.page_size] = target
        self.table[_runs(rows, self.counts[rows], more)] = fresh
        self.counts[rows] += more
        self.changed[rows[writers]] = self.changed[rows[more > 0]] = True
        return source, target

    def _drop(self, rows: Rows, keep: NDArray[np.int64]) -> None:
        less = np.maximum(self.counts[rows] - keep, 0)
        where = _runs(rows, keep, less)
        dropped = self.table[where]
        self.table[where] = -1
        self.counts[rows] -= less
        self.changed[rows[less > 0]] = True
        np.subtract.at(self.references, dropped, 1)
        freed = np.unique(dropped[self.references[dropped] == 0])[::-1]  # the lowest is the next to be given away
        self._free[self.num_free : self.num_free + len(freed)] = freed
        self.num_free += len(freed)


def _runs(rows: Rows, begin: NDArray[np.int64], count: NDArray[np.int64]) -> tuple[Rows, NDArray[np.int64]]:
    """Index ``count[i]`` entries of row ``rows[i]`` from column ``begin[i]`` on."""
    first = np.cumsum(count) - count
    return np.repeat(rows, count), np.arange(int(count.sum())) - np.repeat(first - begin, count)


def _for_each(name: str, values: ArrayLike, rows: NDArray[Any]) -> NDArray[np.int64]:
    """Return integers, one for each of the rows, or raise naming the argument."""
    array = integers(name, values)
    if array.shape not in ((), rows.shape):
        raise ValueError(f"{name} must be one number or one per sequence ({len(rows)}), got {array.shape}")
    return np.broadcast_to(array, rows.shape)


def integers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    """Return integers of at least 0 and below 2**62, so that sums of them fit, or raise naming the argument."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:  # lists of different lengths, or what is on a GPU
        raise TypeError(f"{name} must be integers on the host, got {type(values).__name__}: {error}") from error
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {array.dtype}")
    if (array < 0).any():
        raise ValueError(f"{name} must be at least 0, got {array.min()}")
    if (array >= 2**62).any():
        raise ValueError(f"{name} must be below 2**62, got {array.max()}")
    return array.astype(np.int64)
