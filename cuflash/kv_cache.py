"""Where the keys of a sequence lie, what their elements are and how they are scaled.

The CUDA twin is ``kernels_cu/include/paging.cuh``. Whatever else a cache may look like is added in these two files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .memory import NativeArray, address_of, strides_of


@dataclass(frozen=True)
class Scales:
    """What quantised elements are multiplied by: a number, times an array if there is one.

    Attributes:
        number: The number.
        array: float32 (batch, heads_kv), or (1, 1) for all, or (pages, page_size, heads_kv): one per key and head.
    """

    number: float = 1.0
    array: NativeArray | None = None

    @property
    def per_key(self) -> bool:
        """Whether every key and head has a scale of its own."""
        return self.array is not None and self.array.ndim == 3

    def of_heads(self, b: int, heads: slice) -> NDArray[np.float32]:
        """Return the scales of some KV heads of sequence ``b``, (heads,) or (1,); 1 where keys have their own."""
        if self.array is None or self.per_key:
            return np.full(1, self.number, np.float32)
        row = self.array[b if len(self.array) > 1 else 0]
        return np.float32(self.number) * (row[heads] if len(row) > 1 else row)


@dataclass(frozen=True)
class KVCache:
    """Keys and values of all sequences: key j of a sequence lies in slot j % page_size of its page j // page_size.

    A contiguous cache is one page a sequence, as long as its row. A negative page number means that nothing is there:
    zeros stand in place of its keys, and what is appended to it is lost.

    Attributes:
        k: (pages, page_size, heads_kv, headdim), or (rows, capacity, heads_kv, headdim) without a page table.
        v: The same with headdim_v.
        page_table: (rows, pages per sequence), or None.
        page_indptr: (rows + 1,) where the pages of a row begin in the next array, or, without that, where its keys
            begin in the only page; or None.
        page_indices: (n,) page numbers, or None.
        batch_idx: (batch,) row of the cache or of the page table, or None: a sequence's own number.
        dtype: Element type if it is a quantised one, else None; on a GPU the arrays may say uint8.
        k_scales: What quantised keys are multiplied by.
        v_scales: What quantised values are multiplied by.
    """

    k: NativeArray
    v: NativeArray
    page_table: NativeArray | None = None
    page_indptr: NativeArray | None = None
    page_indices: NativeArray | None = None
    batch_idx: NativeArray | None = None
    dtype: str | None = None
    k_scales: Scales = Scales()
    v_scales: Scales = Scales()

    @property
    def is_paged(self) -> bool:
        """Whether a page table says where keys lie."""
        return self.page_table is not None or self.page_indices is not None

    @property
    def is_packed(self) -> bool:
        """Whether keys lie one sequence after another: those of row i begin at ``page_indptr[i]`` of the only page."""
        return self.page_indptr is not None and self.page_indices is None

    @property
    def joint(self) -> bool:
        """Whether values are the first columns of the keys' own rows, by address and strides."""
        k, v = self.k, self.v
        same = k.dtype == v.dtype and strides_of(k)[:3] == strides_of(v)[:3] and v.shape[3] <= k.shape[3]
        return bool(k.size and same and address_of(k) == address_of(v))

    @property
    def may_be_joint(self) -> bool:
        """Whether values are the first columns of the keys' own rows, or have no elements that would say otherwise."""
        return self.joint or (not self.k.size and self.v.shape[3] <= self.k.shape[3])

    @property
    def shares_scales(self) -> bool:
        """Whether the values' scales are the keys' array."""
        return self.k_scales.array is not None and self.k_scales is self.v_scales

    @property
    def page_size(self) -> int:
        """Keys of a page; of a whole row without a page table."""
        return int(self.k.shape[1])

    @property
    def num_rows(self) -> int:
        """Rows that sequences may have: of the page table, or of the cache without one."""
        if self.page_indptr is not None:
            return int(self.page_indptr.shape[0]) - 1
        return int((self.k if self.page_table is None else self.page_table).shape[0])

    @property
    def capacity(self) -> int:
        """Keys that a sequence has room for, as far as shapes tell."""
        if self.page_indices is not None:
            return self.page_size * int(self.page_indices.shape[0])
        return self.page_size * (1 if self.page_table is None else int(self.page_table.shape[1]))

    @property
    def arrays(self) -> dict[str, NativeArray | None]:
        """The arrays by the names that arguments and kernels have for them."""
        return {
            "k_cache": self.k,
            "v_cache": self.v,
            "page_table": self.page_table,
            "page_indptr": self.page_indptr,
            "page_indices": self.page_indices,
            "cache_batch_idx": self.batch_idx,
            "k_descale": self.k_scales.array,
            "v_descale": None if self.shares_scales else self.v_scales.array,
        }

    # ---------------------------------------------------------------------------------------- for host arrays
    def row(self, b: int) -> int:
        """Return the row of sequence ``b``."""
        return b if self.batch_idx is None else int(self.batch_idx[b])

    def pages(self, b: int) -> NDArray[np.int32]:
        """Return the page numbers of sequence ``b``."""
        row = self.row(b)
        if self.page_indptr is not None and self.page_indices is not None:
            return self.page_indices[int(self.page_indptr[row]) : int(self.page_indptr[row + 1])]
        return self.page_table[row] if self.page_table is not None else np.array([row], np.int32)

    def place(self, b: int, keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the pages and the slots in them of some keys of sequence ``b``."""
        return self.pages(b)[keys // self.page_size].astype(np.int64), keys % self.page_size

    def read(self, array: NDArray[Any], b: int, begin: int, end: int) -> NDArray[Any]:
        """Return the keys [begin, end) of sequence ``b``, (n, heads, dim); a view where they lie in one page.

        Args:
            array: ``k``, ``v`` or some heads of one of them; or their scales, if every key has some.
            b: The sequence.
            begin: First key; no page-table entry beyond the last key is looked at.
            end: End of the keys.
        """
        if self.is_packed:
            start = int(self.page_indptr[self.row(b)])  # type: ignore[index]
            return array[0, start + begin : start + end]
        if not self.is_paged:
            return array[self.row(b), begin:end]
        first = begin // self.page_size
        numbers = self.pages(b)[first : -(-end // self.page_size)]
        if (numbers < 0).all():
            return np.zeros((end - begin, *array.shape[2:]), array.dtype)
        pages = array[np.maximum(numbers, 0)]
        pages[numbers < 0] = 0
        pages = pages.reshape(-1, *pages.shape[2:])
        return pages[begin - first * self.page_size : end - first * self.page_size]
