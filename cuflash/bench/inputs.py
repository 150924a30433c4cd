"""A decode step to time: its shape, and copies of its arrays that together are larger than the L2 cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import SchedulerMetadata, flash_attn_with_kvcache, get_scheduler_metadata
from ..dtypes import numpy_dtype
from .timing import number_of_calls, number_of_copies

# How elements of quantised caches are stored, and the scale with which random ones are numbers about 1.
QUANTISED = {"float8_e4m3fn": (np.uint8, 1.0), "float8_e5m2": (np.uint8, 1.0), "int8": (np.int8, 1 / 64)}


@dataclass(frozen=True, eq=False)
class Shape:
    """A decode step.

    Attributes:
        name: Its name.
        lengths: (batch,) keys of each sequence, at least as many as queries.
        heads_q: Query heads.
        heads_kv: KV heads.
        headdim: Elements of a key.
        page_size: Keys per page; None for a contiguous cache.
        headdim_v: Elements of a value; None: those of a key.
        dtype: Element type of the queries.
        kv_dtype: Element type of a quantised cache, of ``QUANTISED``; None: the cache's is that of the queries.
        queries: Queries of each sequence.
        causal: Whether a query sees only the keys up to its own; the last one sees all.
        latent: Whether values are the first elements of the keys' own rows, as MLA's are.
        key_scales: Whether a quantised cache has a scale per key and head.
    """

    name: str
    lengths: NDArray[np.int64]
    heads_q: int
    heads_kv: int
    headdim: int = 128
    page_size: int | None = 16
    headdim_v: int | None = None
    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    queries: int = 1
    causal: bool = True
    latent: bool = False
    key_scales: bool = False

    @property
    def dim_v(self) -> int:
        """Elements of a value."""
        return self.headdim_v or self.headdim

    @property
    def kv_bytes(self) -> int:
        """Bytes of the visible keys and values and of their scales, each counted once."""
        itemsize = 1 if self.kv_dtype in QUANTISED else numpy_dtype(self.dtype).itemsize
        row = self.headdim + (0 if self.latent else self.dim_v)
        scales = 4 * (2 - self.latent) * self.key_scales
        return int(self.lengths.sum()) * self.heads_kv * (row * itemsize + scales)

    @property
    def operations(self) -> int:
        """Multiplications and additions of the two matrix products, for what the queries see."""
        unseen = self.queries * (self.queries - 1) // 2 if self.causal else 0  # of each sequence: a triangle
        seen = int(self.lengths.sum()) * self.queries - len(self.lengths) * unseen
        return 2 * seen * self.heads_q * (self.headdim + self.dim_v)

    @property
    def uniform(self) -> bool:
        """Whether all sequences are equally long."""
        return len(np.unique(self.lengths)) == 1

    def plan(self, cache_seqlens: Any, out: SchedulerMetadata | None = None) -> SchedulerMetadata:
        """Plan the step for lengths that lie on the host or on a GPU."""
        return get_scheduler_metadata(
            len(self.lengths), self.queries, int(self.lengths.max()), self.heads_q, self.heads_kv, self.headdim,
            cache_seqlens, qkv_dtype=self.dtype, headdim_v=self.headdim_v, page_size=self.page_size, causal=self.causal,
            kv_dtype=self.kv_dtype, out=out,
        )  # fmt: skip

    @property
    def options(self) -> dict[str, Any]:
        """What a call is told beside its arrays."""
        options: dict[str, Any] = {"causal": self.causal}
        if self.kv_dtype in QUANTISED:
            options["kv_dtype"] = self.kv_dtype
            scale = QUANTISED[self.kv_dtype][1]
            if scale != 1.0 and not self.key_scales:
                options |= {"k_descale": scale, "v_descale": scale}
        return options


@dataclass
class Inputs:
    """Copies of a shape's arrays in the memory of a machine.

    Attributes:
        shape: The shape.
        copies: The arrays of each copy, by the names of the arguments; lengths and page numbers are the same in all.
        calls: Calls that are timed together.
    """

    shape: Shape
    copies: list[dict[str, Any]]
    calls: int
    _contiguous: dict[int, tuple[Any, Any, Any]] = field(default_factory=dict)

    @classmethod
    def make(cls, shape: Shape, xp: Any, fill: Callable[[Any, int], None], l2_bytes: int) -> Inputs:
        """Make the arrays.

        Args:
            shape: The shape.
            xp: CuPy, or NumPy where a test stands in for a GPU.
            fill: Fills an array with random numbers from a seed.
            l2_bytes: Size of the L2 cache.
        """
        batch, longest = len(shape.lengths), int(shape.lengths.max())
        count = number_of_copies(shape.kv_bytes, l2_bytes)
        dtype = numpy_dtype(shape.dtype)
        stored = QUANTISED[shape.kv_dtype][0] if shape.kv_dtype in QUANTISED else dtype
        rows: tuple[int, ...] = (batch, longest)
        if shape.page_size is not None:
            rows = (int((-(-shape.lengths // shape.page_size)).sum()), shape.page_size)
        inputs = cls(shape, [], number_of_calls(3 + shape.kv_bytes / 4e6, count))
        for i in range(count):
            arrays = {
                "q": xp.empty((batch, shape.queries, shape.heads_q, shape.headdim), dtype),
                "k_cache": xp.empty((*rows, shape.heads_kv, shape.headdim), stored),
            }
            if not shape.latent:
                arrays["v_cache"] = xp.empty((*rows, shape.heads_kv, shape.dim_v), stored)
            for j, array in enumerate(arrays.values()):
                fill(array, 3 * i + j + 1)
            if shape.key_scales and shape.kv_dtype in QUANTISED:
                for name in ("k_descale", "v_descale")[: 2 - shape.latent]:
                    arrays[name] = xp.empty((*rows, shape.heads_kv), np.float32)
                    fill(arrays[name], 3 * i + len(arrays))
                    arrays[name][...] = abs(arrays[name]) * QUANTISED[shape.kv_dtype][1]
            arrays.setdefault("v_cache", arrays["k_cache"][..., : shape.dim_v])
            arrays["out"] = xp.empty((batch, shape.queries, shape.heads_q, shape.dim_v), dtype)
            arrays["cache_seqlens"] = xp.asarray(shape.lengths.astype(np.int32))
            if shape.page_size is not None:
                arrays["page_table"] = xp.asarray(inputs.host_table)
            inputs.copies.append(arrays)
        return inputs

    @cached_property
    def host_table(self) -> NDArray[np.int32]:
        """The page table, (batch, most pages): pages in random order."""
        pages = -(-self.shape.lengths // (self.shape.page_size or 1))
        table = np.zeros((len(pages), int(pages.max())), np.int32)
        table[np.arange(table.shape[1]) < pages[:, None]] = np.random.default_rng(1).permutation(int(pages.sum()))
        return table

    def contiguous(self, i: int) -> tuple[Any, Any, Any]:
        """Return copy ``i`` as q, k and v (batch, longest, heads, headdim)."""
        copy = self.copies[i]
        if self.shape.page_size is None:
            return copy["q"], copy["k_cache"], copy["v_cache"]
        if i not in self._contiguous:
            k = self._gathered(copy["k_cache"], copy["page_table"])
            v = k[..., : self.shape.dim_v] if self.shape.latent else self._gathered(copy["v_cache"], copy["page_table"])
            self._contiguous[i] = copy["q"], k, v
        return self._contiguous[i]

    def _gathered(self, cache: Any, table: Any) -> Any:
        """Return the pages of all sequences one after another; what lies behind a length is of no meaning."""
        rows = cache.view(bits(cache.dtype))[table]  # (batch, pages, page_size, heads, headdim)
        batch, pages, page_size, *rest = rows.shape
        return rows.reshape(batch, pages * page_size, *rest)[:, : int(self.shape.lengths.max())].view(cache.dtype)

    def sequence(self, name: str, s: int) -> NDArray[Any]:
        """Return the rows of sequence ``s`` in a cache of the first copy, on the host: (1, length, heads, elements)."""
        cache, length = self.copies[0][name], int(self.shape.lengths[s])
        if self.shape.page_size is None:
            return to_host(cache[s : s + 1, :length])
        pages = self.copies[0]["page_table"][s, : -(-length // self.shape.page_size)]
        rows = to_host(cache.view(bits(cache.dtype))[pages]).view(cache.dtype)
        return rows.reshape(1, -1, *rows.shape[2:])[:, :length]

    def plan(self, out: SchedulerMetadata | None = None) -> SchedulerMetadata:
        """Plan the step."""
        return self.shape.plan(self.copies[0]["cache_seqlens"], out)

    def attend(self, i: int, metadata: SchedulerMetadata | None) -> Any:
        """Attend on copy ``i`` modulo their number."""
        copy = self.copies[i % len(self.copies)]
        return flash_attn_with_kvcache(**copy, **self.shape.options, scheduler_metadata=metadata)


def to_host(array: Any) -> NDArray[Any]:
    """Return an array of CuPy's, or NumPy's, on the host; CuPy copies types that it does not know as bits."""
    if isinstance(array, np.ndarray):
        return array
    host: NDArray[Any] = array.view(bits(array.dtype)).get().view(array.dtype)
    return host


def bits(dtype: Any) -> Any:
    """Return the unsigned integer type of a type's size."""
    return np.dtype(f"u{np.dtype(dtype).itemsize}")


def read_trace(path: str) -> NDArray[np.int64]:
    """Read lengths from a text file: the last word of each line where it is a number; commas part words too.

    Raises:
        ValueError: If the file cannot be read, has no length or one that is too large.
    """
    try:
        lines = [line.replace(",", " ").split() for line in Path(path).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--trace must name a text file: {error}") from None
    lengths = [words[-1] for words in lines if words and words[-1].isdecimal()]
    if not lengths:
        raise ValueError(f"--trace must name a file whose lines end in a length, got {path}")
    longest = max(lengths, key=float)  # int refuses thousands of digits
    if float(longest) >= 2**31:
        raise ValueError(f"--trace must name a file of lengths below 2**31, got {longest}")
    return np.maximum(np.array(lengths, np.int64), 1)
