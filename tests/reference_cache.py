"""Where the reference keeps keys and values: slots of a cache, codes and their scales, and how new keys are written."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}
"""The largest code of each quantised type: larger quotients are saturated to it."""


class Slots:
    """Where the n-th key of a sequence lies.

    Args:
        cache: A cache, for its page size.
        layout: "NHD" or "HND".
        cache_batch_idx: Row of the cache or of the page table for every sequence, or None.
        page_table: Rows of page numbers, (indptr, indices), or None for a contiguous cache.
    """

    def __init__(self, cache: np.ndarray, layout: str, cache_batch_idx: Any, page_table: Any) -> None:
        self.hnd = layout == "HND"
        self.page_size = cache.shape[2] if self.hnd else cache.shape[1]
        self.rows = cache_batch_idx
        self.table = page_table

    def pages(self, b: int) -> np.ndarray:
        """Return the page numbers of sequence b."""
        row = self.row(b)
        if isinstance(self.table, tuple):
            indptr, indices = self.table
            return indices[int(indptr[row]) : int(indptr[row + 1])]
        return self.table[row]

    def row(self, b: int) -> int:
        """Return the row of the cache or of the page table."""
        return b if self.rows is None else int(self.rows[b])

    def find(self, b: int, n: int) -> tuple | None:
        """Return the index that selects (KV heads, ...) of a key, None where a negative page says that nothing is."""
        if self.table is None:
            page, n = self.row(b), int(n)
        else:
            page, n = int(self.pages(b)[n // self.page_size]), int(n % self.page_size)
        if page < 0:
            return None
        return (page, slice(None), n) if self.hnd else (page, n)

    def capacity(self, b: int) -> int:
        """Return how many keys a sequence has room for."""
        return self.page_size if self.table is None else len(self.pages(b)) * self.page_size


class Cache:
    """Keys or values: codes, and what they are multiplied by.

    Args:
        array: (rows, S, KV heads, d) or with heads before S; changed by :meth:`write`.
        descale: None, a float, an array of one, (batch, KV heads), or one per key and head; the last is changed, too.
        kv_dtype: Element type of uint8 arrays.
        layout: "NHD" or "HND".
    """

    def __init__(self, array: np.ndarray, descale: Any, kv_dtype: Any, layout: str) -> None:
        self.array = array
        self.num_heads = array.shape[1 if layout == "HND" else 2]
        self.descale = descale
        self.codes = array.view(dtype_of(kv_dtype)) if array.dtype == np.uint8 else array
        self.per_key = np.ndim(descale) == 3

    def scale(self, b: int, slot: tuple) -> np.ndarray:
        """Return the float32 scale of every KV head of a key of sequence b."""
        if self.descale is None:
            return np.float32(1)
        if self.per_key:
            return self.descale[slot]
        if np.size(self.descale) > 1:
            return self.descale[b]
        return np.asarray(self.descale, np.float32).reshape(())

    def read(self, b: int, slot: tuple | None) -> np.ndarray:
        """Return (KV heads, d) of a key in float64, zeros where there is none."""
        if slot is None:
            return np.zeros((self.num_heads, self.codes.shape[-1]))
        return self.codes[slot].astype(np.float64) * np.asarray(self.scale(b, slot), np.float64)[..., None]

    def write(self, b: int, slot: tuple | None, x: np.ndarray) -> None:
        """Write a new key x, (KV heads, d): quantised if the cache is, by scales that it finds if they are per key."""
        if slot is None:
            return
        if self.codes.dtype.name in LARGEST:
            if self.per_key:
                self.descale[slot] = find_scale(x, self.codes.dtype)
            x = quantise(x, self.scale(b, slot), self.codes.dtype)
        self.codes[slot] = x


def dtype_of(name: Any) -> np.dtype:
    """Return the dtype of a name such as "float8_e4m3fn", or of what NumPy knows as one."""
    return np.dtype(getattr(ml_dtypes, name)) if isinstance(name, str) and hasattr(ml_dtypes, name) else np.dtype(name)


def find_scale(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the float32 scale of every head of a new key x, (KV heads, d)."""
    amax = np.abs(x.astype(np.float32)).max(axis=-1)
    scale = np.maximum(amax / np.float32(LARGEST[dtype.name]), np.float32(2.0**-126))
    return np.where(amax == 0, np.float32(1), scale)


def quantise(x: np.ndarray, scale: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the codes of x: the float32 quotients, saturated, and rounded to nearest even."""
    quotient = x.astype(np.float32) / np.asarray(scale, np.float32)[..., None]
    quotient = np.clip(quotient, -LARGEST[dtype.name], LARGEST[dtype.name])
    return (np.rint(quotient) if dtype == np.int8 else quotient).astype(dtype)


def are_leading_columns(values: np.ndarray, keys: np.ndarray) -> bool:
    """Whether values are the first columns of the keys' own rows: the joint form of MLA."""
    if values.dtype != keys.dtype or values.shape[:-1] != keys.shape[:-1] or values.shape[-1] > keys.shape[-1]:
        return False
    a, b = keys.__array_interface__, values.__array_interface__
    steps = [pair for n, *pair in zip(keys.shape, keys.strides, values.strides, strict=True) if n > 1]
    return keys.size > 0 and a["data"][0] == b["data"][0] and all(x == y for x, y in steps)
