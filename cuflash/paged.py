"""A paged KV cache of all layers, for sequences that come and go.

Every layer has pages of its own, but they go together: page 7 of a sequence is page 7 in all of them, so that one page
table and one plan serve a whole step of the model (:class:`~cuflash.DecodeStep`). The README has a server's loop.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .dtypes import FLOAT_DTYPES, QUANTISED_DTYPES, dtype_name, numpy_dtype
from .pages import Pages, PageTable
from .problem import MAX_HEADS, boolean, integer, make_problem


def _array_module(xp: Any) -> Any:
    """Return what makes arrays as a cache needs them, of NumPy's dtypes and written in place, or raise TypeError."""
    try:
        xp.zeros(1, np.int32)[:] = xp.ones(1, np.int32)
    except (AttributeError, TypeError):  # not those of a GPU that fails
        got = xp.__name__ if isinstance(xp, ModuleType) else repr(xp)
        raise TypeError(f"xp must be the module numpy or cupy, got {got}") from None
    return xp


class PagedKVCache:
    """Keys and values of many layers in pages, and which sequence has which pages.

    Sequences are named by handles, integers that are never given twice. Their bookkeeping is on the host and never
    waits for a GPU; copies and uploads go to the current stream, behind the steps before. Methods that take
    ``sequences`` take one handle or several, and change all or nothing. All arrays are the same for the life of the
    cache, on which steps and CUDA graphs rely.

    Args:
        num_layers: Layers.
        num_pages: Pages of each layer.
        page_size: Tokens of a page.
        num_heads_kv: KV heads.
        headdim: Elements of a key row; of the joint row if ``latent``.
        dtype: Element type of queries and new keys, and of the cache unless it is quantised.
        headdim_v: Elements of a value row; default ``headdim``.
        latent: Values are the first ``headdim_v`` columns of the keys' own rows (MLA: headdim 576, headdim_v 512).
        kv_dtype: Element type of a quantised cache: "float8_e4m3fn", "float8_e5m2" or "int8".
        max_sequences: Most sequences at a time.
        max_seqlen: Most tokens of a sequence, for which steps are planned too; default: all pages there are.
        xp: Where the arrays live: the module ``numpy`` or ``cupy``.
        seed: Hands pages out in a random order: to see that nothing depends on it.

    Attributes:
        k: (layers, pages, page_size, heads_kv, headdim) keys; float8 as uint8.
        v: The same with headdim_v; a view of ``k`` if ``latent``.
        k_scale: (layers, pages, page_size, heads_kv) float32 scales of a quantised cache, else None.
        v_scale: The same; None if ``latent``: a joint row has one scale.
        page_table: (max_sequences, pages per sequence) int32 of all sequences, as kernels read it; changes reach it
            with the next step.
        dtype: Name of the element type of queries.
        kv_dtype: Name of the element type of the cache.
        max_sequences: Rows of the page table.
        max_seqlen: Most tokens of a sequence.

    Example:
        >>> import cuflash
        >>> cache = cuflash.PagedKVCache(2, 8, 16, 1, 64, "float32")
        >>> a = cache.add(40)  # three pages for a prompt of 40 tokens
        >>> step = cuflash.DecodeStep(cache, 4).begin(a, 40)
        >>> step.commit()  # and between the two, step(layer, q, k, v) for each layer
        >>> b = cache.fork(a)  # an answer of its own, on the same pages
        >>> cache.num_free_pages
        5
        >>> cache.extend(b, 1)  # copies the page that both would write to
        >>> cache.pages(a).tolist(), cache.pages(b).tolist()
        ([0, 1, 2], [0, 1, 3])
        >>> cache.free([a, b])
        >>> cache.num_free_pages
        8
        >>> cache.add(1000)
        Traceback (most recent call last):
        ...
        ValueError: a sequence must have at most max_seqlen=128 tokens, got 1000
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_heads_kv: int,
        headdim: int,
        dtype: Any = "bfloat16",
        *,
        headdim_v: int | None = None,
        latent: bool = False,
        kv_dtype: Any = None,
        max_sequences: int = 256,
        max_seqlen: int | None = None,
        xp: Any = np,
        seed: int | None = None,
    ) -> None:
        self.num_layers, self.num_pages = integer("num_layers", num_layers, 1), integer("num_pages", num_pages, 1)
        self.page_size = integer("page_size", page_size, 1)
        self.num_heads_kv = integer("num_heads_kv", num_heads_kv, 1, MAX_HEADS)
        self.headdim = integer("headdim", headdim, 1)
        self.headdim_v = self.headdim if headdim_v is None else integer("headdim_v", headdim_v, 1)
        self.latent = boolean("latent", latent)
        if self.latent and self.headdim_v >= self.headdim:
            raise ValueError(f"headdim_v must be less than headdim={headdim} if latent, got {self.headdim_v}")
        self.dtype = dtype_name("dtype", dtype)
        if self.dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}, that of queries, got {self.dtype}")
        self.kv_dtype = self.dtype if kv_dtype is None else dtype_name("kv_dtype", kv_dtype)
        if self.kv_dtype not in (self.dtype, *QUANTISED_DTYPES):
            raise ValueError(f"kv_dtype must be {self.dtype} like dtype or a quantised one, got {self.kv_dtype}")
        problem = make_problem(
            1, 1, self.num_heads_kv, self.num_heads_kv, self.headdim, qkv_dtype=self.dtype, kv_dtype=self.kv_dtype,
            headdim_v=self.headdim_v,
        )  # fmt: skip
        if problem.is_joint and not self.latent:
            raise ValueError(f"latent must be True for headdim={self.headdim}, got False")
        self.max_sequences = integer("max_sequences", max_sequences, 1)
        capacity = self.num_pages * self.page_size
        self.max_seqlen = capacity if max_seqlen is None else integer("max_seqlen", max_seqlen, 1)

        self.xp = _array_module(xp)
        rows = (self.num_layers, self.num_pages, self.page_size, self.num_heads_kv)
        # Float8 as bytes: not every array module knows its name.
        storage = np.dtype(np.uint8) if self.kv_dtype.startswith("float8") else numpy_dtype(self.kv_dtype)
        self.k = xp.zeros((*rows, self.headdim), storage)
        self.v = self.k[..., : self.headdim_v] if self.latent else xp.zeros((*rows, self.headdim_v), storage)
        self.k_scale = xp.ones(rows, np.float32) if self.is_quantised else None
        self.v_scale = xp.ones(rows, np.float32) if self.is_quantised and not self.latent else None
        self._pages = PageTable(self.num_pages, self.page_size, self.max_sequences, self.max_seqlen, seed)
        self.page_table = xp.asarray(self._pages.table)  # on the host the very same array

    @property
    def is_quantised(self) -> bool:
        """Whether elements are codes with scales."""
        return self.kv_dtype in QUANTISED_DTYPES

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence has."""
        return self._pages.num_free

    @property
    def sequences(self) -> list[int]:
        """Handles of all sequences in the cache."""
        return self._pages.handles()

    def seqlens(self, sequences: ArrayLike) -> NDArray[np.int32]:
        """Return the tokens in the cache of sequences; of one handle a NumPy integer."""
        return self._pages.lengths[self._pages.rows(sequences)]

    def pages(self, sequence: int) -> Pages:
        """Return the page numbers of a sequence in order, those for tokens to come too."""
        row = self._pages.row(sequence)
        return self._pages.table[row, : self._pages.counts[row]].copy()

    def rows(self, sequences: ArrayLike) -> NDArray[np.int64]:
        """Return the rows of ``page_table`` that sequences have: their ``cache_batch_idx``."""
        return self._pages.rows(sequences)

    def add(self, num_tokens: int = 0) -> int:
        """Add an empty sequence.

        Args:
            num_tokens: Tokens to come that it gets pages for at once: those of its prompt, say.

        Returns:
            Its handle.

        Raises:
            OutOfPages: If there are too few free pages; nothing has changed.
            ValueError: If there are ``max_sequences`` already, or for more tokens than ``max_seqlen``.
        """
        return self._pages.add(integer("num_tokens", num_tokens, 0))

    def extend(self, sequences: ArrayLike, num_tokens: ArrayLike) -> None:
        """Make sure that sequences have pages of their own for tokens to come. Steps do it for their own tokens.

        A page that a sequence is about to write to and shares is copied.

        Args:
            sequences: Handles.
            num_tokens: Tokens behind the present length, one number or one per sequence.

        Raises:
            OutOfPages: If there are too few free pages; nothing has changed.
            ValueError: For an unknown sequence, or more tokens than ``max_seqlen``.
        """
        source, target = self._pages.extend(sequences, num_tokens)
        if not len(source):
            return
        source, target = self.xp.asarray(source), self.xp.asarray(target)
        for array in (self.k, None if self.latent else self.v, self.k_scale, self.v_scale):
            if array is not None:
                bits = array.view(f"u{array.dtype.itemsize}")  # of a type that every array module can copy
                bits[:, target] = bits[:, source]

    def fork(self, sequence: int) -> int:
        """Add a sequence with the tokens of another.

        Both share the pages with tokens in them, until one writes to the last, partial one: it then gets a copy. So
        this needs no page, and the next step of the two needs one.

        Args:
            sequence: The other's handle.

        Returns:
            The new one's handle.

        Raises:
            ValueError: For an unknown sequence, or if there are ``max_sequences`` already.
        """
        return self._pages.fork(sequence)

    def truncate(self, sequences: ArrayLike, seqlens: ArrayLike) -> None:
        """Cut sequences off: rejected drafts. Pages behind the new length are given back, those for tokens to come too.

        Args:
            sequences: Handles.
            seqlens: New lengths, one number or one per sequence, at most the present ones.

        Raises:
            ValueError: For an unknown sequence, or a length that is not in the cache; nothing has changed.
        """
        self._pages.truncate(sequences, seqlens)

    def free(self, sequences: ArrayLike) -> None:
        """End sequences: their handles are void, and pages that no other sequence shares are free.

        Args:
            sequences: Handles.

        Raises:
            ValueError: For an unknown sequence; nothing has changed.
        """
        self._pages.free(sequences)

    def advance(self, sequences: ArrayLike, seqlens: NDArray[Any], num_tokens: NDArray[Any]) -> None:
        """Add tokens to sequences, whose keys and values a step has written. ``DecodeStep.commit`` calls this."""
        self._pages.advance(sequences, seqlens, num_tokens)

    def upload(self) -> None:
        """Bring ``page_table`` up to date with the bookkeeping. ``DecodeStep.begin`` calls this."""
        pages = self._pages
        rows = np.flatnonzero(pages.changed)
        if len(rows) and self.page_table is not pages.table:
            used = int(pages.counts[rows].max())  # what stands behind is never read
            self.page_table[self.xp.asarray(rows), :used] = self.xp.asarray(pages.table[rows, :used])
        pages.changed[:] = False

    def __repr__(self) -> str:
        values = f", headdim_v={self.headdim_v}" if self.headdim_v != self.headdim else ""
        return (
            f"PagedKVCache({self.num_layers} layers, {self.num_pages} pages of {self.page_size} ({self.num_free_pages} "
            f"free), {self.num_heads_kv} KV heads, headdim={self.headdim}{values}, {self.kv_dtype}, "
            f"{len(self.sequences)} sequences)"
        )
