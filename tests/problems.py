"""Random attention problems, full of traps, and the check of their answers.

A :class:`Case` says what a problem is like; :func:`make_inputs` makes the arrays of one; :func:`run` calls cuflash on a
backend and :func:`check` holds the result against the reference.

The traps: every slot of the caches that no row sees holds NaN or Inf (past the lengths, before the leftpad, outside the
windows, unselected rows, unused pages); unused page-table entries hold huge and negative numbers; pages lie in random
order; pages and cache rows are shared between sequences where nothing is appended.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import ml_dtypes
import numpy as np
import reference

import cuflash

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
# Below these, numbers have fewer bits (GPUs may also flush float32 ones to zero).
TINY = {"float16": 2.0**-24, "bfloat16": 2.0**-125, "float32": 2.0**-125}


@dataclass(frozen=True)
class Backend:
    """Where a problem runs.

    Attributes:
        name: The value of CUFLASH_BACKEND.
        to_native: Takes a NumPy array there.
        to_numpy: Brings one back.
    """

    name: str
    to_native: Callable[[np.ndarray], Any]
    to_numpy: Callable[[Any], np.ndarray]


@dataclass(frozen=True)
class Case:
    """What a problem is like.

    Attributes:
        dtype: Element type.
        heads: (query heads, KV heads).
        headdim: (of queries and keys, of values).
        seqlens: Keys of each sequence that are in the cache before the call, without leftpad.
        seqlens_q: Query length, or one per sequence (ragged).
        page_size: Keys per page, None for a contiguous cache.
        layout: "NHD" or "HND".
        batch_idx: Whether sequences lie in other rows of the cache (or page table) than their own.
        leftpad: Whether sequences begin later than at 0.
        causal: Causal mask.
        window: Window (left, right).
        chunk: Attention chunk.
        softcap: Cap of the scores.
        sinks: Whether there are sinks.
        scale: softmax_scale.
        new: New keys of every sequence, or one number per sequence (ragged), None without append.
        rotary: None, "interleaved" or "half".
        rotary_dim: Rotated elements; 0 for all.
        rotary_seqlens: Whether positions differ from the lengths.
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
    page_size: int | None = None
    layout: str = "NHD"
    batch_idx: bool = False
    leftpad: bool = False
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    chunk: int = 0
    softcap: float = 0.0
    sinks: bool = False
    scale: float | None = None
    new: int | tuple[int, ...] | None = None
    rotary: str | None = None
    rotary_dim: int = 0
    rotary_seqlens: bool = False
    plan: str = "none"
    num_splits: int = 0
    split_size: int | None = None
    poison: bool = True
    seed: int = 0

    def __str__(self) -> str:
        """What differs from the defaults, as the name of a test."""
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(f"{f.name}={getattr(self, f.name)}".replace(" ", "") for f in changed) or "default"


# ------------------------------------------------------------------------------------------------ making problems
def make_inputs(case: Case) -> dict[str, Any]:
    """Return the arguments of ``flash_attn_with_kvcache`` (NumPy arrays) for a random problem."""
    rng = np.random.default_rng(case.seed)
    dtype = DTYPES[case.dtype]
    batch = len(case.seqlens)
    (num_heads, kv_heads), (d, dv) = case.heads, case.headdim

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(dtype)

    leftpad = rng.integers(0, 20, batch) if case.leftpad else np.zeros(batch, np.int64)
    seqlens = leftpad + case.seqlens
    new = case.new if isinstance(case.new, tuple) else (case.new or 0,) * batch
    used = seqlens + new
    inputs: dict[str, Any] = {
        "cache_seqlens": seqlens.astype(np.int32),
        "causal": case.causal,
        "window_size": case.window,
        "attention_chunk": case.chunk,
        "softcap": case.softcap,
        "softmax_scale": case.scale,
        "layout": case.layout,
    }
    if isinstance(case.seqlens_q, tuple):
        starts = np.cumsum((0, *case.seqlens_q)).astype(np.int32)
        inputs |= {
            "q": normal(starts[-1], num_heads, d),
            "cu_seqlens_q": starts,
            "max_seqlen_q": max(case.seqlens_q),
        }
    else:
        inputs["q"] = normal(batch, case.seqlens_q, num_heads, d)
    if case.new is not None:
        if isinstance(case.new, tuple):
            starts = np.cumsum((0, *case.new)).astype(np.int32)
            inputs |= {
                "k": normal(starts[-1], kv_heads, d),
                "v": normal(starts[-1], kv_heads, dv),
                "cu_seqlens_k_new": starts,
            }
        else:
            inputs |= {"k": normal(batch, case.new, kv_heads, d), "v": normal(batch, case.new, kv_heads, dv)}
    if case.leftpad:
        inputs["cache_leftpad"] = leftpad.astype(np.int32)
    if case.sinks:
        inputs["sinks"] = (2 * rng.standard_normal(num_heads)).astype(np.float32)

    # Rows of the cache, or of the page table: more than sequences, some read twice where nothing is written.
    rows = batch
    if case.batch_idx:
        rows = 2 * batch + 1
        index = rng.permutation(rows)[:batch]
        if case.new is None and batch > 1:
            index[-1] = index[0]
        inputs["cache_batch_idx"] = index.astype(np.int32)
    longest = max(1, int(used.max(initial=0)))
    if case.page_size is None:
        shape: tuple[int, ...] = (rows, longest + int(rng.integers(0, 40)))
        capacity = shape[1]
    else:
        needed = -(-longest // case.page_size)
        columns = needed + int(rng.integers(0, 4))
        capacity = columns * case.page_size
        shape = (rows * needed + 3, case.page_size)
        table = rng.choice([2**31 - 1, -(2**31), -1, 10**9], (rows, columns)).astype(np.int32)
        pages = rng.permutation(shape[0])[: rows * needed].reshape(rows, needed)
        for b in range(batch):
            row = inputs["cache_batch_idx"][b] if case.batch_idx else b
            count = -(-int(used[b]) // case.page_size)
            table[row, :count] = pages[row, :count]
            if case.new is None and count:  # a shared prefix
                table[row, 0] = pages[0, 0]
        inputs["page_table"] = table
    inputs["k_cache"], inputs["v_cache"] = normal(*shape, kv_heads, d), normal(*shape, kv_heads, dv)
    if case.layout == "HND":
        for name in ("k_cache", "v_cache"):
            inputs[name] = np.ascontiguousarray(inputs[name].swapaxes(1, 2))
    if case.rotary is not None:
        half = (case.rotary_dim or d // 16 * 16) // 2
        queries = max(case.seqlens_q) if isinstance(case.seqlens_q, tuple) else case.seqlens_q
        angles = rng.uniform(0, 2 * np.pi, (capacity + queries, half))
        inputs |= {
            "rotary_cos": np.cos(angles).astype(dtype),
            "rotary_sin": np.sin(angles).astype(dtype),
            "rotary_interleaved": case.rotary == "interleaved",
        }
        if case.rotary_seqlens:
            inputs["rotary_seqlens"] = rng.integers(0, longest, batch).astype(np.int32)
            inputs["rotary_seqlens"] = np.minimum(inputs["rotary_seqlens"], capacity - np.array(new)).astype(np.int32)
    if case.poison:
        _poison(case, inputs, used, leftpad, new)
    return inputs


def _poison(case: Case, inputs: dict[str, Any], used: np.ndarray, leftpad: np.ndarray, new: Sequence[int]) -> None:
    """Overwrite every slot of the caches that no row sees with NaN or Inf."""
    seen = reference.seen_slots(**inputs)
    for name, value in (("k_cache", np.nan), ("v_cache", np.inf)):
        inputs[name][~seen] = np.nan
        # Every other one Inf, which turns to NaN in other places.
        inputs[name].reshape(-1, inputs[name].shape[-1])[::2][~seen.reshape(-1)[::2]] = value


# ------------------------------------------------------------------------------------------------ running problems
def run(case: Case, inputs: dict[str, Any], backend: Backend) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Call cuflash; return out, lse and the caches after the call as NumPy arrays. The inputs stay as they are."""
    calls = 2 if case.plan == "reused" else 1
    arguments = {
        name: backend.to_native(value.copy()) if isinstance(value, np.ndarray) else value
        for name, value in inputs.items()
    }
    options: dict[str, Any] = {"num_splits": case.num_splits, "split_size": case.split_size}
    if case.plan != "none":
        options = {"scheduler_metadata": make_plan(case, inputs, backend)}
    for _ in range(calls):
        out, lse = cuflash.flash_attn_with_kvcache(**arguments, **options, return_softmax_lse=True)
    arrays = (out, lse, arguments["k_cache"], arguments["v_cache"])
    return tuple(backend.to_numpy(array) for array in arrays)  # type: ignore[return-value]


def make_plan(case: Case, inputs: dict[str, Any], backend: Backend) -> cuflash.SchedulerMetadata:
    """Plan a problem, with other lengths than its own if the case wants a stale plan."""
    seqlens = inputs["cache_seqlens"]
    if case.plan == "stale":
        # 61 is prime: as good as random, and some sequences grow while others shrink.
        seqlens = (inputs.get("cache_leftpad", 0) + (7 + 61 * np.arange(len(seqlens))) % 190).astype(np.int32)
    if case.plan == "long":
        seqlens = np.full(len(seqlens), 1000, np.int32)
    lengths = {
        name: backend.to_native(inputs[name])
        for name in ("cu_seqlens_q", "cu_seqlens_k_new", "cache_leftpad")
        if name in inputs
    }
    max_seqlen_q = inputs.get("max_seqlen_q", inputs["q"].shape[1])
    return cuflash.get_scheduler_metadata(
        len(seqlens),
        max_seqlen_q,
        1000,
        *case.heads,
        case.headdim[0],
        backend.to_native(seqlens),
        qkv_dtype=case.dtype,
        headdim_v=case.headdim[1],
        page_size=case.page_size,
        max_seqlen_k_new=0 if case.new is None else max(case.new) if isinstance(case.new, tuple) else case.new,
        causal=case.causal,
        window_size=case.window,
        attention_chunk=case.chunk,
        has_softcap=case.softcap > 0,
        num_splits=case.num_splits,
        split_size=case.split_size,
        **lengths,
    )


def expected(inputs: dict[str, Any]) -> reference.Answer:
    """Return what the call must give."""
    return reference.attention(**inputs)


def check(case: Case, inputs: dict[str, Any], backend: Backend) -> None:
    """Run a problem and compare out, lse and caches with the reference."""
    out, lse, k_cache, v_cache = run(case, inputs, backend)
    answer = expected(inputs)
    check_out(case, out, answer)
    check_lse(case, lse, answer)
    check_cache("v_cache", v_cache, answer.v_cache)
    check_cache("k_cache", k_cache, answer.k_cache)


def check_out(case: Case, out: np.ndarray, answer: reference.Answer) -> None:
    """Compare an output with the reference.

    An output element is sum(p * v). For 16-bit types each p may be rounded, which moves the sum by at most
    u * sum(p * |v|) for the unit roundoff u, and then the sum itself, by at most u * |sum|: together 2 u * magnitude.
    Scores and sums are float32 throughout, worth 1e-5 for scores of this size. On average roundings cancel. Next to a
    large sink, outputs may be subnormal. The bound of a row without keys is 0: it must be exactly 0.
    """
    assert out.shape == answer.out.shape
    assert out.dtype == DTYPES[case.dtype]
    u = UNIT_ROUNDOFF[case.dtype]
    error = np.abs(out.astype(np.float64) - answer.out)
    assert np.isfinite(error).all(), f"{np.count_nonzero(~np.isfinite(error))} of {error.size} elements are not finite"
    bound = (2 * u + 1e-5) * answer.magnitude
    bound[answer.magnitude > 0] += TINY[case.dtype]
    worst = np.unravel_index((error - bound).argmax(), error.shape) if error.size else ()
    assert (error <= bound).all(), f"out{list(map(int, worst))}: {out[worst]} instead of {answer.out[worst]}"
    assert error.sum() <= (0.6 * u + 2e-6) * bound.sum() / (2 * u + 1e-5), "out is less accurate than rounding explains"


def check_lse(case: Case, lse: np.ndarray, answer: reference.Answer) -> None:
    """Compare an LSE with the reference: float32 sums, but tanh and rotated 16-bit queries may be less accurate."""
    assert lse.shape == answer.lse.shape
    assert lse.dtype == np.float32
    empty = np.isneginf(answer.lse)
    np.testing.assert_array_equal(lse[empty], -np.inf)
    bound = 1e-3 if case.softcap or (case.rotary and case.dtype != "float32") else 2e-5
    np.testing.assert_allclose(lse[~empty], answer.lse[~empty], rtol=1e-6, atol=bound)


def check_cache(name: str, cache: np.ndarray, expected: np.ndarray) -> None:
    """Compare a cache bit by bit (NaN included) with what a separate write would have made."""
    bits = f"u{cache.dtype.itemsize}"
    different = (cache.view(bits) != expected.view(bits)).any(-1)
    assert not different.any(), (
        f"{name} differs in {np.count_nonzero(different)} rows, first {np.argwhere(different)[0]}"
    )


# ------------------------------------------------------------------------------------------------ all pairs
def all_pairs(
    features: dict[str, Sequence[Any]], is_valid: Callable[[dict[str, Any]], bool], seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Yield combinations in which every two values of different features meet at least once, where any valid one can.

    Greedy: of some random combinations around a pair that is missing yet, take the one with the most missing pairs.
    """
    rng = np.random.default_rng(seed)
    names = list(features)

    def pairs_of(choice: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        return {(a, choice[a], b, choice[b]) for a, b in itertools.combinations(range(len(names)), 2)}

    missing = {
        (a, x, b, y)
        for a, b in itertools.combinations(range(len(names)), 2)
        for x in range(len(features[names[a]]))
        for y in range(len(features[names[b]]))
    }
    while missing:
        a, x, b, y = target = min(missing)
        best: tuple[int, ...] | None = None
        best_pairs: set[tuple[int, int, int, int]] = set()
        for _ in range(200):
            choice = [int(rng.integers(len(features[name]))) for name in names]
            choice[a], choice[b] = x, y
            if is_valid({name: features[name][i] for name, i in zip(names, choice, strict=True)}):
                pairs = pairs_of(tuple(choice)) & missing
                if len(pairs) > len(best_pairs):
                    best, best_pairs = tuple(choice), pairs
        missing -= best_pairs | {target}  # a pair that no valid combination has is given up
        if best is not None:
            yield {name: features[name][i] for name, i in zip(names, best, strict=True)}
