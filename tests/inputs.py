"""The arrays of a random problem, full of traps.

Every slot of the caches that no row sees holds NaN or Inf, in codes and in scales (past the lengths, before the
leftpad, outside the windows, unselected rows, unused pages), and so do the gaps of strided arrays and queries that
belong to no sequence. Unused page-table entries hold huge and negative numbers; pages lie in random order; pages and
cache rows are shared between sequences where nothing is appended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import reference
from cases import DTYPES, KV_DTYPES, Case

FLOAT8 = (KV_DTYPES["float8_e4m3fn"], KV_DTYPES["float8_e5m2"])
GARBAGE = (2**31 - 1, -(2**31), -1, 10**9)
UNIT = {"float8_e4m3fn": 1.0, "float8_e5m2": 1.0, "int8": 1 / 40}  # a scale that makes values of size 1 of codes


def make_inputs(case: Case) -> dict[str, Any]:
    """Return the arguments of ``flash_attn_with_kvcache`` (NumPy arrays) for a random problem."""
    return _Maker(case).make()


class _Maker:
    """One problem in the making.

    Attributes:
        inputs: What is made yet.
        leftpad, seqlens, new, used: Per sequence: first valid key, keys before the call, new ones, keys after it.
        local: Keys after the call in this rank's cache.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.rng = np.random.default_rng(case.seed)
        self.batch = len(case.seqlens)
        zeros = np.zeros(self.batch, np.int64)
        self.leftpad = self.rng.integers(0, 20, self.batch) if case.leftpad else zeros
        self.seqlens = self.leftpad + np.array(case.seqlens, np.int64)
        self.new = np.array(case.appended, np.int64)
        self.used = self.seqlens + self.new
        world, rank, interleave = case.cp
        self.local = np.array([np.count_nonzero(np.arange(n) // interleave % world == rank) for n in self.used], int)
        self.inputs: dict[str, Any] = {}

    def make(self) -> dict[str, Any]:
        case = self.case
        self.inputs = {
            "cache_seqlens": self.spread(self.seqlens.astype(np.int32)),
            "causal": case.causal,
            "window_size": case.window,
            "attention_chunk": case.chunk,
            "softcap": case.softcap,
            "softmax_scale": case.scale,
            "layout": case.layout,
        }
        self.queries()
        self.new_keys()
        rows = self.rows()
        shape = self.contiguous(rows) if case.page_size is None else self.pages(rows)
        self.caches(shape)
        self.rotary()
        if case.tree:
            self.tree()
        if case.merge:
            self.merge_with()
        if case.cp != (1, 0, 1):
            self.inputs |= zip(("cp_world_size", "cp_rank", "cp_interleave"), case.cp)
        if case.poison:
            self.poison()
        if case.as_uint8:
            self.inputs = as_uint8(self.inputs, str(case.kv_dtype))
        return self.inputs

    # -------------------------------------------------------------------------------------------- numbers
    def normal(self, *shape: int, dtype: str = "", form: str = "") -> np.ndarray:
        """Return numbers of size 1, or codes that scales of a form turn into such."""
        name = dtype or self.case.dtype
        x = self.rng.standard_normal(shape, np.float32)
        if name == "int8":  # the smallest code, which an append never writes, is as good as any
            if form == "none":
                return np.rint(x).astype(np.int8)
            codes = np.clip(np.rint(x / UNIT[name]), -127, 127)
            return np.where(self.rng.random(shape) < 0.01, -128, codes).astype(np.int8)
        return x.astype(KV_DTYPES.get(name) or DTYPES[name])

    def spread(self, x: np.ndarray) -> np.ndarray:
        """Return x as a view of memory with gaps that hold garbage, if the case wants that."""
        if not self.case.strided or not x.size:
            return x
        if x.ndim == 1:
            memory = np.full(2 * len(x), -(10**6), x.dtype)
            view = memory[::2]
        elif x.ndim == 2:
            memory = np.full((x.shape[0] + 1, x.shape[1] + 3), np.nan if x.dtype.kind == "f" else -7, x.dtype)
            view = memory[: x.shape[0], : x.shape[1]]
        else:  # rows stay whole units of 16 bytes; axes in another order
            shape = (x.shape[1] + 1, x.shape[0], *x.shape[2:-1], x.shape[-1] + 16)
            memory = np.full(shape, 99 if x.dtype == np.int8 else np.nan, x.dtype)
            view = memory[: x.shape[1]].swapaxes(0, 1)[..., : x.shape[-1]]
        view[...] = x
        return view

    def scale(self, form: str, unit: float, cache: tuple[int, ...] | None = None) -> Any:
        """Return scales of a form around a unit; cache is the shape of a cache."""

        def uniform(*shape: int) -> np.ndarray:
            return (unit * self.rng.uniform(0.5, 1.5, shape)).astype(np.float32)

        if form == "none":
            return None
        if form == "float":
            return float(uniform(1)[0])
        if form == "one":
            return uniform(1)
        if form == "heads":
            return self.spread(uniform(self.batch, self.case.heads[1]))
        assert cache is not None
        scales = uniform(*cache[:-1])
        if self.case.strided:
            memory = np.full((*scales.shape, 2), np.nan, np.float32)
            memory[..., 1] = scales
            return memory[..., 1]
        return scales

    # -------------------------------------------------------------------------------------------- arguments
    def queries(self) -> None:
        case = self.case
        (num_heads, _), (d, dv) = case.heads, case.headdim
        shape: tuple[int, ...] = (self.batch, case.queries[0] if case.queries else 1)
        if isinstance(case.seqlens_q, tuple):
            before, behind = case.unowned
            starts = before + np.cumsum((0, *case.seqlens_q)).astype(np.int32)
            shape = (int(starts[-1]) + behind,)
            self.inputs |= {"cu_seqlens_q": starts, "max_seqlen_q": max(case.seqlens_q)}
        names = {"q": d} | ({"qv": dv} if case.mla in ("qv", "qv row") else {})
        for name, columns in names.items():
            q = self.normal(*shape, num_heads, columns)
            if isinstance(case.seqlens_q, tuple):
                q[: starts[0]], q[starts[-1] :] = np.nan, np.nan
            self.inputs[name] = self.spread(q)
        if case.scales[0] != "none":
            self.inputs["q_descale"] = self.scale(case.scales[0], 1.0)
        if case.sinks:
            self.inputs["sinks"] = self.spread((2 * self.rng.standard_normal(num_heads)).astype(np.float32))
        if case.leftpad:
            self.inputs["cache_leftpad"] = self.leftpad.astype(np.int32)

    def new_keys(self) -> None:
        case = self.case
        if case.new is None:
            return
        shape: tuple[int, ...] = (self.batch, int(self.new[0]) if self.batch else 0)
        if isinstance(case.new, tuple):
            starts = np.cumsum((0, *case.new)).astype(np.int32)
            shape = (int(starts[-1]),)
            self.inputs["cu_seqlens_k_new"] = starts
        for name, columns in zip("kv", case.headdim):
            if name == "k" or case.mla != "joint":
                x = self.normal(*shape, case.heads[1], columns, dtype=case.out_dtype)
                self.inputs[name] = self.spread(x)

    def rows(self) -> int:
        """Choose rows of the cache, or of the page table; some are read twice if nothing is written."""
        if not self.case.batch_idx:
            return self.batch
        rows = 2 * self.batch + 1
        index = self.rng.permutation(rows)[: self.batch]
        if self.case.new is None and self.batch > 1:
            index[-1] = index[0]
        self.inputs["cache_batch_idx"] = index.astype(np.int32)
        return rows

    def contiguous(self, rows: int) -> tuple[int, ...]:
        return rows, max(1, int(self.local.max(initial=0))) + int(self.rng.integers(0, 40))

    def pages(self, rows: int) -> tuple[int, ...]:
        """Make a page table; return (pages, page size)."""
        case, rng, page_size = self.case, self.rng, self.case.page_size
        assert page_size is not None
        needed = -(-max(1, int(self.local.max(initial=0))) // page_size)
        table = rng.choice(GARBAGE, (rows, needed + int(rng.integers(0, 4)))).astype(np.int32)
        pages = rng.permutation(rows * needed + 3)[: rows * needed].reshape(rows, needed)
        counts = np.zeros(rows, int)
        for b in range(self.batch):
            row = self.inputs["cache_batch_idx"][b] if case.batch_idx else b
            count = -(-int(self.local[b]) // page_size)
            table[row, :count] = pages[row, :count]
            if case.new is None and count:  # a shared prefix
                table[row, 0] = pages[0, 0]
            if case.negative_pages and count and b % 2 == 0:
                table[row, rng.integers(count)] = rng.choice((-1, -2, -(2**31)))
            counts[row] = max(counts[row], count)
        self.inputs["page_table"] = self.csr(table, counts) if case.csr else self.spread(table)
        return rows * needed + 3, page_size

    def csr(self, table: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the same table as (indptr, indices): some rows hold more pages than needed, none begins at 0."""
        parts = [table[row, : min(count + int(self.rng.integers(0, 3)), table.shape[1])]
                 for row, count in enumerate(counts)]  # fmt: skip
        garbage = self.rng.choice(GARBAGE, 3).astype(np.int32)
        indptr = 3 + np.cumsum([0, *map(len, parts)])
        return indptr.astype(np.int32), np.concatenate([garbage, *parts, garbage])

    def caches(self, shape: tuple[int, ...]) -> None:
        case = self.case
        (_, kv_heads), (d, dv) = case.heads, case.headdim
        shape = (*shape, kv_heads) if case.layout == "NHD" else (shape[0], kv_heads, shape[1])
        element = case.kv_dtype or case.dtype
        if case.mla == "joint":
            k_cache = self.spread(self.normal(*shape, d, dtype=element, form=case.scales[1]))
            v_cache = k_cache[..., :dv]
        elif case.mla == "qv row":
            form = "none" if "none" in case.scales[1:] else ""
            row = self.spread(self.normal(*shape, d + dv, dtype=element, form=form))
            k_cache, v_cache = row[..., dv:], row[..., :dv]
        else:
            k_cache, v_cache = (
                self.spread(self.normal(*shape, n, dtype=element, form=form))
                for n, form in zip((d, dv), case.scales[1:])
            )
        self.inputs |= {"k_cache": k_cache, "v_cache": v_cache}
        for name, form in zip(("k_descale", "v_descale"), case.scales[1:]):
            if form != "none":
                self.inputs[name] = self.scale(form, UNIT[element], k_cache.shape)

    def rotary(self) -> None:
        case = self.case
        if case.rotary is None:
            return
        half = (case.rotary_dim or case.headdim[0] // 16 * 16) // 2
        longest = max(1, int(self.used.max(initial=0)))
        most = max(max(case.queries, default=0), int(self.new.max(initial=0)))
        capacity = self.inputs["k_cache"].shape[1 if case.layout == "NHD" else 2]
        if case.page_size is not None:
            table = self.inputs["page_table"]
            capacity *= max(np.diff(table[0]).max(), 1) if case.csr else table.shape[1]
        angles = self.rng.uniform(0, 2 * np.pi, (max(int(capacity), longest) + most, half))
        dtype = DTYPES[case.out_dtype]
        self.inputs |= {
            "rotary_cos": np.cos(angles).astype(dtype),
            "rotary_sin": np.sin(angles).astype(dtype),
            "rotary_interleaved": case.rotary == "interleaved",
        }
        if case.rotary_seqlens:
            self.inputs["rotary_seqlens"] = self.rng.integers(0, longest, self.batch).astype(np.int32)

    def tree(self) -> None:
        """Make a mask of any entries; columns behind a sequence's own queries are garbage."""
        case = self.case
        ragged = isinstance(case.seqlens_q, tuple)
        columns = self.inputs["max_seqlen_q"] if ragged else self.inputs["q"].shape[1]
        mask = self.rng.random((*self.inputs["q"].shape[:-2], columns)) < 0.5
        if case.tree == "words":
            words = -(-columns // 32)
            bits = self.rng.random((*mask.shape[:-1], 32 * words)) < 0.5
            bits[..., :columns] = mask
            weights = np.uint32(1) << np.arange(32, dtype=np.uint32)
            mask = (bits.reshape(*mask.shape[:-1], words, 32) * weights).sum(-1, dtype=np.uint32)
        self.inputs["tree_mask"] = mask

    def merge_with(self) -> None:
        """Make results over other keys, some over none."""
        case, q = self.case, self.inputs["q"]
        out = self.normal(*q.shape[:-1], case.headdim[1], dtype=case.out_dtype)
        heads = q.shape[-2]
        lse = 3 + self.rng.standard_normal((heads, len(q)) if q.ndim == 3 else (len(q), heads, q.shape[1]), np.float32)
        empty = self.rng.random(lse.shape) < 0.2
        lse[empty], out[empty.swapaxes(-1, -2)] = -np.inf, np.nan
        self.inputs["merge_with"] = (out if case.merge == "in place" else self.spread(out), lse)

    # -------------------------------------------------------------------------------------------- traps
    def poison(self) -> None:
        """Overwrite every slot of the caches, and its scales, that no row sees."""
        unseen = ~reference.seen_slots(**self.inputs)
        every_other = unseen & (np.arange(unseen.size).reshape(unseen.shape) % 2 == 0)
        for name, other in (("v_cache", np.inf), ("k_cache", np.nan)):  # Inf turns to NaN in other places
            cache = self.inputs[name]
            if cache.dtype == np.int8:
                cache[unseen] = self.rng.integers(-128, 128, (np.count_nonzero(unseen), cache.shape[-1]))
            elif name == "k_cache" or self.case.mla != "joint":
                cache[unseen], cache[every_other] = np.nan, other
        for name in ("k_descale", "v_descale"):
            if np.ndim(self.inputs.get(name)) == 3:
                self.inputs[name][unseen] = np.nan


def packed_inputs(
    queries: Sequence[int], keys: Sequence[int], dtype: Any, headdim: int = 64, seed: int = 0
) -> dict[str, Any]:
    """Packed queries and keys, as ``flash_attn_varlen_func`` takes them; keys that belong to no sequence are NaN."""
    rng = np.random.default_rng(seed)
    starts_q, starts_k = (np.concatenate([[0], np.cumsum(counts)]).astype(np.int32) for counts in (queries, keys))
    q = rng.standard_normal((starts_q[-1], 8, headdim), np.float32).astype(dtype)
    k, v = (rng.standard_normal((starts_k[-1] + 7, 2, headdim), np.float32).astype(dtype) for _ in range(2))
    k[starts_k[-1] :] = v[starts_k[-1] :] = np.nan
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k,
            "max_seqlen_q": max(queries), "max_seqlen_k": max(keys)}  # fmt: skip


def as_uint8(inputs: dict[str, Any], kv_dtype: str) -> dict[str, Any]:
    """Give float8 arrays as uint8, with the name of the caches' type."""
    stored = dict(inputs)
    for name in ("q", "k_cache", "v_cache"):
        if inputs[name].dtype in FLOAT8:
            stored[name] = inputs[name].view(np.uint8)
    return stored | ({"kv_dtype": kv_dtype} if stored["k_cache"].dtype == np.uint8 else {})
