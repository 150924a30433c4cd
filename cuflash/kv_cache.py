"""Where the keys of a sequence lie, what their elements are and how they are scaled.

The CUDA twin is ``kernels_cu/include/paging.cuh``. Whatever else a cache may look like is added in these two files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import NativeArray


@dataclass(frozen=True)
class KVCache:
    """Keys and values of all sequences: key j of a sequence lies in slot ``j % page_size`` of its page j // page_size.

    A contiguous cache is one page a sequence, as long as its row.

    Attributes:
        k: (pages, page_size, heads_kv, headdim), or (rows, capacity, heads_kv, headdim) without a page table.
        v: The same with headdim_v.
        page_table: (rows, pages per sequence) or None.
        batch_idx: (batch,) row of the cache or of the page table, or None: a sequence's own number.
    """

    k: NativeArray
    v: NativeArray
    page_table: NativeArray | None = None
    batch_idx: NativeArray | None = None

    @property
    def page_size(self) -> int:
        """Keys of a page; of a whole row without a page table."""
        return int(self.k.shape[1])

    @property
    def num_rows(self) -> int:
        """Rows that sequences may have: of the page table, or of the cache without one."""
        return int((self.k if self.page_table is None else self.page_table).shape[0])

    @property
    def capacity(self) -> int:
        """Keys that a sequence has room for."""
        return self.page_size * (1 if self.page_table is None else int(self.page_table.shape[1]))

    @property
    def arrays(self) -> dict[str, NativeArray | None]:
        """The arrays by the names of the arguments that they came in by."""
        return {"k_cache": self.k, "v_cache": self.v, "page_table": self.page_table, "cache_batch_idx": self.batch_idx}

    def row(self, b: int) -> int:
        """Return the row of sequence ``b``; for host arrays."""
        return b if self.batch_idx is None else int(self.batch_idx[b])

    def place(self, b: int, keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the pages and the slots in them of some keys of sequence ``b``; for host arrays."""
        row = self.row(b)
        if self.page_table is None:
            return np.full_like(keys, row), keys
        return self.page_table[row, keys // self.page_size].astype(np.int64), keys % self.page_size

    def read(self, array: NDArray[Any], b: int, begin: int, end: int) -> NDArray[Any]:
        """Return the keys [begin, end) of sequence ``b``, (n, heads, dim); a view where they lie in one page.

        Args:
            array: ``k``, ``v`` or some heads of one of them; for host arrays.
            b: The sequence.
            begin: First key; no page-table entry beyond the last key is looked at.
            end: End of the keys.
        """
        row = self.row(b)
        if self.page_table is None:
            return array[row, begin:end]
        first = begin // self.page_size
        pages = array[self.page_table[row, first : -(-end // self.page_size)]]
        pages = pages.reshape(-1, *pages.shape[2:])
        return pages[begin - first * self.page_size : end - first * self.page_size]
