"""What a random problem is like: :class:`Case`, and cases with any features together."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, fields
from typing import Any

import ml_dtypes
import numpy as np

FEATURES: frozenset[str] = frozenset({
    "rotary chunk", "unowned rows", "kv_dtype", "fp8 queries", "qv", "joint", "tree_mask", "csr", "negative pages",
    "merge_with", "cp",
})  # fmt: skip
"""Which of the newer features the library has: random cases use no others. All are in ALL_FEATURES."""

ALL_FEATURES = frozenset({
    "rotary chunk",  # rotary embedding with attention_chunk alone turns query i by base + i
    "unowned rows",  # rows of ragged queries that belong to no sequence
    "kv_dtype",  # quantised caches
    "fp8 queries",  # needs kv_dtype
    "qv",  # MLA in FlashAttention-3's spelling
    "joint",  # MLA whose values are the first columns of the keys
    "headdim 512",  # head dims from 264 on
    "tree_mask",
    "csr",  # page_table=(indptr, indices)
    "negative pages",
    "merge_with",
    "cp",  # context parallelism
})  # fmt: skip

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
KV_DTYPES = {
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int8": np.dtype(np.int8),
}


@dataclass(frozen=True)
class Case:
    """What a problem is like.

    Attributes:
        dtype: Element type of queries; of the caches, too, without kv_dtype. May be "float8_e4m3fn" with one.
        heads: (query heads, KV heads).
        headdim: (of queries and keys, of values).
        seqlens: Keys of each sequence that are in the cache before the call, without leftpad.
        seqlens_q: Query length, or one per sequence (ragged).
        unowned: Rows of ragged queries (before, behind) those that belong to a sequence.
        page_size: Keys per page, None for a contiguous cache.
        csr: Whether the page table is (indptr, indices).
        negative_pages: Whether some sequences have pages of negative numbers.
        layout: "NHD" or "HND".
        batch_idx: Whether sequences lie in other rows of the cache (or page table) than their own.
        leftpad: Whether sequences begin later than at 0.
        strided: Whether arrays are views with gaps, that hold NaN.
        causal: Causal mask.
        window: Window (left, right).
        chunk: Attention chunk.
        tree: None, "bool" or "words".
        softcap: Cap of the scores.
        sinks: Whether there are sinks.
        scale: softmax_scale.
        new: New keys of every sequence, or one number per sequence (ragged), None without append.
        rotary: None, "interleaved" or "half".
        rotary_dim: Rotated elements; 0 for all.
        rotary_seqlens: Whether positions differ from the lengths.
        kv_dtype: Element type of a quantised cache.
        as_uint8: Whether float8 arrays are given as uint8.
        scales: Form of (q_descale, k_descale, v_descale): "none", "float", "one", "heads", and "keys" but for q.
        mla: None, "qv", "qv row" (both caches views of one row) or "joint".
        merge: Whether results over other keys are merged in; "in place" if they are also out and softmax_lse.
        cp: (world size, rank, interleave).
        plan: "none", "given", "stale" (made for other lengths), "long" (made for 1000 keys each) or "reused" (used by
            two calls).
        num_splits: As in the call.
        split_size: As in the call.
        poison: Whether unseen slots hold NaN and Inf.
        seed: Of the random numbers.
    """

    dtype: str = "float32"
    heads: tuple[int, int] = (4, 2)
    headdim: tuple[int, int] = (64, 64)
    seqlens: tuple[int, ...] = (77, 1, 130)
    seqlens_q: int | tuple[int, ...] = 1
    unowned: tuple[int, int] = (0, 0)
    page_size: int | None = None
    csr: bool = False
    negative_pages: bool = False
    layout: str = "NHD"
    batch_idx: bool = False
    leftpad: bool = False
    strided: bool = False
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    chunk: int = 0
    tree: str | None = None
    softcap: float = 0.0
    sinks: bool = False
    scale: float | None = None
    new: int | tuple[int, ...] | None = None
    rotary: str | None = None
    rotary_dim: int = 0
    rotary_seqlens: bool = False
    kv_dtype: str | None = None
    as_uint8: bool = False
    scales: tuple[str, str, str] = ("none", "none", "none")
    mla: str | None = None
    merge: bool | str = False
    cp: tuple[int, int, int] = (1, 0, 1)
    plan: str = "none"
    num_splits: int = 0
    split_size: int | None = None
    poison: bool = True
    seed: int = 0

    def __str__(self) -> str:
        """What differs from the defaults, as the name of a test."""
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(f"{f.name}={getattr(self, f.name)}".replace(" ", "") for f in changed) or "default"

    @property
    def queries(self) -> tuple[int, ...]:
        """The number of queries of each sequence."""
        return self.seqlens_q if isinstance(self.seqlens_q, tuple) else (self.seqlens_q,) * len(self.seqlens)

    @property
    def appended(self) -> tuple[int, ...]:
        """The number of new keys of each sequence."""
        return self.new if isinstance(self.new, tuple) else (self.new or 0,) * len(self.seqlens)

    @property
    def out_dtype(self) -> str:
        """The element type of the output; of new keys, too."""
        return "bfloat16" if self.dtype == "float8_e4m3fn" else self.dtype


def features_of(c: Case) -> set[str]:
    """Return which of the newer features a case uses."""
    uses = {
        "rotary chunk": c.rotary and c.chunk and not c.causal and c.window == (-1, -1),
        "unowned rows": c.unowned != (0, 0),
        "kv_dtype": c.kv_dtype,
        "fp8 queries": c.dtype == "float8_e4m3fn",
        "qv": c.mla in ("qv", "qv row"),
        "joint": c.mla == "joint",
        "headdim 512": max(c.headdim) > 256 and not c.mla,
        "tree_mask": c.tree,
        "csr": c.csr,
        "negative pages": c.negative_pages,
        "merge_with": c.merge,
        "cp": c.cp != (1, 0, 1),
    }
    return {name for name, used in uses.items() if used}


def kernel_of(c: Case) -> Hashable:
    """Return what the attention kernel of a case is compiled for: cases of which it is the same mostly share one."""
    rows = c.heads[0] // c.heads[1] * (1 if c.split_size else max(c.queries))
    sizes = c.mla is not None, c.headdim, sum(rows > most for most in (8, 16, 32, 64))
    masks = c.chunk > 0, c.tree is not None, c.cp[0] > 1
    scales = [form == "keys" for form in c.scales]
    rotates = c.dtype == "float8_e4m3fn" and c.rotary is not None
    return c.dtype, c.kv_dtype, *sizes, *masks, *scales, rotates, c.softcap > 0, c.split_size is None, bool(c.merge)


# ------------------------------------------------------------------------------------------------ random cases
def random_case(seed: int, longest: int = 300, features: frozenset[str] | None = None) -> Case:
    """Return a case in which every feature is switched on or off by itself, as far as the contract lets them meet.

    Args:
        seed: Of the random numbers.
        longest: Bound of the sequences' lengths.
        features: What may be switched on of ALL_FEATURES; what the library has if None.
    """
    rng = np.random.default_rng(seed)
    have = FEATURES if features is None else features

    def flip(chance: float, feature: str | None = None) -> bool:
        return bool(rng.random() < chance) and (feature is None or feature in have)

    def one_of(*choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    batch = int(one_of(1, 2, 3, 5))
    page_size = one_of(None, None, 1, 3, 16, 64)
    options: dict[str, Any] = {
        "seed": seed,
        "dtype": one_of(*DTYPES),
        "seqlens": tuple(_length(rng, longest, page_size or 16) for _ in range(batch)),
        "page_size": page_size,
        "layout": one_of("NHD", "HND"),
        "batch_idx": flip(0.3),
        "strided": flip(0.3),
        "sinks": flip(0.3),
        "softcap": 3.0 if flip(0.2) else 0.0,
        "scale": one_of(-0.2, 0.0, 0.3) if flip(0.2) else None,
        "plan": one_of("none", "given", "stale", "reused"),
        "heads": one_of((1, 1), (4, 2), (4, 1), (7, 1), (8, 1), (3, 3), (12, 2), (16, 1), (40, 1)),
    }
    options |= one_of({}, {}, {"num_splits": 1}, {"num_splits": 3}, {"split_size": 64}, {"split_size": 192})
    ragged = flip(0.4)
    few = [0, 1, 1, 2, 5] if flip(0.8) else [0, 1, 33, 70]
    options["seqlens_q"] = tuple(one_of(*few) for _ in range(batch)) if ragged else one_of(*few[1:])
    if ragged and flip(0.5, "unowned rows"):
        options["unowned"] = (one_of(0, 1, 3), one_of(0, 2, 9))
    if page_size is not None:
        options |= {"csr": flip(0.3, "csr"), "negative_pages": flip(0.2, "negative pages")}
    options |= _elements(flip, one_of)
    quantised, mla = "kv_dtype" in options, options.get("mla")
    options["headdim"] = _headdim(one_of, quantised, mla, "headdim 512" in have)

    if flip(0.2, "tree_mask"):
        options["tree"] = one_of("bool", "words")
    else:
        options |= one_of({}, {"causal": True}, {"window": (19, -1)}, {"window": (-1, 1)}, {"window": (33, 2)},
                          {"causal": True, "window": (16, 0)}, {"chunk": 32}, {"causal": True, "chunk": 17},
                          {"window": (9, 1), "chunk": 23})  # fmt: skip
    if flip(0.2, "cp"):
        world = int(rng.integers(1, 9))
        options["cp"] = (world, int(rng.integers(world)), one_of(1, 2, 16, 64))
    else:
        options["leftpad"] = flip(0.2)
    if flip(0.2, "merge_with"):
        options["merge"] = one_of(True, "in place")
    if flip(0.4):
        options["new"] = tuple(one_of(0, 1, 2, 7) for _ in range(batch)) if flip(0.4) else one_of(1, 1, 3, 21)
        chunk_alone = "chunk" in options and not options.get("causal") and "window" not in options
        room = options["headdim"][0] - (options["headdim"][1] if mla == "joint" else 0)
        if room >= 16 and not options.get("tree") and not (chunk_alone and "rotary chunk" not in have) and flip(0.6):
            options["rotary"] = one_of("interleaved", "half")
            options["rotary_dim"] = one_of(16, room // 16 * 16)
            options["rotary_seqlens"] = flip(0.3)
    return Case(**options)


def _length(rng: np.random.Generator, longest: int, around: int) -> int:
    """Return a length: none, one, beside a multiple of the page size, or any."""
    kind = rng.integers(6)
    if kind < 2:
        return int(kind)
    if kind == 2:
        return max(0, around * int(rng.integers(1, 2 + longest // around)) + int(rng.integers(-1, 2)))
    return int(rng.integers(1 + longest))


def _elements(flip: Any, one_of: Any) -> dict[str, Any]:
    """Choose how caches are stored."""
    options: dict[str, Any] = {}
    if flip(0.5, "kv_dtype"):
        forms = ("none", "float", "one", "heads", "keys")
        scales = [one_of("none", "float", "one", "heads"), one_of(*forms), one_of(*forms)]
        options |= {"kv_dtype": one_of(*KV_DTYPES), "as_uint8": flip(0.5)}
        if flip(0.3, "fp8 queries"):
            options["dtype"] = "float8_e4m3fn"
        else:
            scales[0] = "none"
        if options["kv_dtype"] == "int8" and scales[1] == "none":
            scales[1] = "float"  # scores of tens of thousands: float32 is less exact there than checks expect
        options["scales"] = tuple(scales)
    kind = one_of("qv", "qv row", "joint", "joint")
    if flip(0.25, kind.split()[0]) and not (kind != "joint" and options.get("dtype") == "float8_e4m3fn"):
        options["mla"] = kind
        if kind == "joint" and "scales" in options:
            options["scales"] = (*options["scales"][:2], "none")
    return options


def _headdim(one_of: Any, quantised: bool, mla: str | None, large: bool) -> tuple[int, int]:
    """Choose head dims that the contract knows."""
    if mla == "joint":
        return one_of((576, 512), (320, 256), (96, 64), (80, 64), (128, 128), (160, 144))
    if mla is not None:
        return one_of((64, 512), (64, 256), (32, 256), (64, 512))
    if large and one_of(*range(8)) == 0:
        return one_of((512, 512), (320, 320), (512, 64), (384, 512))
    sizes = [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (16, 16), (80, 48), (64, 256)]
    return one_of(*sizes) if quantised else one_of(*sizes, (40, 40), (72, 200), (8, 8), (200, 56))
