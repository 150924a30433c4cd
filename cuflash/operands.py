"""The data of a call as native arrays that a backend can use; what they must be is checked in ``arguments``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .kv_cache import KVCache, Scales
from .memory import NativeArray

# Arguments that may be pairs of arrays, and what the two are called here.
PAIRS = {"page_table": ("page_indptr", "page_indices"), "merge_with": ("merge_out", "merge_lse")}


@dataclass(frozen=True)
class Lengths:
    """The lengths of a step, as native int32 arrays in one memory. A plan's are advisory, a call's are what counts.

    Attributes:
        cache_seqlens: (batch,) keys in the cache before the append, leftpad included.
        cu_seqlens_q: (batch + 1,) first query of each sequence, or None: ``max_seqlen_q`` each.
        cu_seqlens_k_new: (batch + 1,) first new key of each sequence, or None: ``seqlen_k_new`` each.
        cache_leftpad: (batch,) first valid key, or None: 0.
        seqlen_k_new: New keys of every sequence; 0 with ``cu_seqlens_k_new``.
    """

    cache_seqlens: NativeArray
    cu_seqlens_q: NativeArray | None = None
    cu_seqlens_k_new: NativeArray | None = None
    cache_leftpad: NativeArray | None = None
    seqlen_k_new: int = 0

    @property
    def arrays(self) -> dict[str, NativeArray | None]:
        """The arrays by the names of the arguments."""
        return {
            "cache_seqlens": self.cache_seqlens,
            "cu_seqlens_q": self.cu_seqlens_q,
            "cu_seqlens_k_new": self.cu_seqlens_k_new,
            "cache_leftpad": self.cache_leftpad,
        }


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding of the queries and the new keys.

    Attributes:
        cos: (positions, rotary_dim / 2).
        sin: The same.
        seqlens: (batch,) position of the first query and the first new key, or None: ``cache_seqlens``.
        interleaved: Pairs (0, 1), (2, 3) .. instead of (0, rotary_dim / 2), (1, rotary_dim / 2 + 1) ..
        moves: Query i stands at base + i, else all queries at base.
        first: The first column that is rotated.
    """

    cos: NativeArray
    sin: NativeArray
    seqlens: NativeArray | None
    interleaved: bool
    moves: bool
    first: int = 0

    @property
    def dim(self) -> int:
        """Columns that are rotated."""
        return 2 * int(self.cos.shape[1])


@dataclass(frozen=True)
class Operands:
    """The data of one call.

    Attributes:
        q: (batch, seqlen_q, heads_q, headdim), or (total_q, heads_q, headdim) with ``cu_seqlens_q``.
        cache: Where keys and values lie.
        out: As q with headdim_v; written.
        softmax_lse: (batch, heads_q, seqlen_q) or (heads_q, total_q) float32; written. None on a GPU if nobody asks.
        lengths: Lengths of the sequences.
        softmax_scale: Factor of the scores.
        softcap: Cap of the scores, 0 for none.
        k: New keys (batch, seqlen_new, heads_kv, headdim) or (total_new, heads_kv, headdim), or None.
        v: New values, likewise.
        rotary: What rotates q and k, or None.
        sinks: (heads_q,) float32 or None.
        qv: As q with headdim_v: what of a query meets the values, or None.
        tree_mask: bool (batch, sq, sq) or (total_q, max_seqlen_q), or the same packed as uint32 words along the last
            axis, or None: which of the last sq keys of its sequence a query sees.
        merge_out: As out: results of the same queries over other keys, to be merged, or None.
        merge_lse: As softmax_lse.
        q_scales: What quantised queries are multiplied by.
    """

    q: NativeArray
    cache: KVCache
    out: NativeArray
    softmax_lse: NativeArray | None
    lengths: Lengths
    softmax_scale: float
    softcap: float
    k: NativeArray | None = None
    v: NativeArray | None = None
    rotary: Rotary | None = None
    sinks: NativeArray | None = None
    qv: NativeArray | None = None
    tree_mask: NativeArray | None = None
    merge_out: NativeArray | None = None
    merge_lse: NativeArray | None = None
    q_scales: Scales = Scales()

    @property
    def arrays(self) -> dict[str, NativeArray | None]:
        """All arrays by the names that arguments and kernels have for them."""
        rotary = self.rotary
        return {
            "q": self.q,
            "q_descale": self.q_scales.array,
            "qv": self.qv,
            "tree_mask": self.tree_mask,
            "merge_out": self.merge_out,
            "merge_lse": self.merge_lse,
            "out": self.out,
            "softmax_lse": self.softmax_lse,
            "k": self.k,
            "v": self.v,
            "sinks": self.sinks,
            "rotary_cos": None if rotary is None else rotary.cos,
            "rotary_sin": None if rotary is None else rotary.sin,
            "rotary_seqlens": None if rotary is None else rotary.seqlens,
            **self.cache.arrays,
            **self.lengths.arrays,
        }

    @property
    def appended(self) -> list[str]:
        """The names of the arrays that an append writes; joint values are a part of the keys."""
        if self.k is None:
            return []
        pairs = ("k_cache", "k_descale", self.cache.k_scales), ("v_cache", "v_descale", self.cache.v_scales)
        names = [(cache, *([descale] if scales.per_key else [])) for cache, descale, scales in pairs]
        return [name for pair in names[: 2 - self.cache.joint] for name in pair]

    def kept_apart(self) -> Iterator[tuple[str, str]]:
        """Yield what is written and each other array that it must share no memory with, but be the same at most."""
        part = "v_cache" if self.cache.joint else None  # of k_cache
        names = [name for name, array in self.arrays.items() if array is not None and name != part]
        for written in ("out", "softmax_lse", *self.appended):
            if written in names:
                yield from ((written, name) for name in names if name != written)
