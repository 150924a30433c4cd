"""Attention on every backend against the float64 reference: every feature, and every two together.

``pytest -k "numpy and not pairs"`` and the like select parts of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from typing import Any

import numpy as np
import pytest
from cases import kernel_of
from problems import (
    DTYPES,
    Backend,
    Case,
    all_pairs,
    check,
    check_lse,
    check_out,
    expected,
    first_pairs,
    make_inputs,
    run,
)
from reference import averages

import cuflash
from cuflash.backends import numpy as numpy_backend

HEADDIMS = [(64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (40, 40), (72, 72), (200, 200)]
TWO_HEADDIMS = [(64, 128), (192, 128), (128, 72), (8, 256), (256, 8)]
HEADS = [(2, 2), (4, 2), (4, 1), (12, 2), (7, 1), (8, 1), (16, 1), (32, 1), (6, 6)]
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"causal": True},
    "left": {"window": (19, -1)},
    "right": {"window": (-1, 1)},
    "both": {"window": (33, 2)},
    "causal+left": {"causal": True, "window": (16, 0)},
    "chunk": {"chunk": 32},
    "causal+chunk": {"causal": True, "chunk": 17},
    "window+chunk": {"window": (9, 1), "chunk": 23},
}
QUERIES: dict[str, dict[str, Any]] = {
    "one": {"seqlens_q": 1},
    "few": {"seqlens_q": 3},
    "ragged": {"seqlens_q": (0, 1, 6)},
    "ragged, none": {"seqlens_q": (2, 0, 0)},
    "long": {"seqlens_q": 37},
}
CACHES: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "rows": {"batch_idx": True},
    "pages of 1": {"page_size": 1},
    "pages of 3": {"page_size": 3},
    "pages of 16": {"page_size": 16},
    "pages of 64": {"page_size": 64, "batch_idx": True},
    "pages of 100": {"page_size": 100},
}
APPENDS: dict[str, dict[str, Any]] = {
    "none": {},
    "one": {"new": 1},
    "many": {"new": 21},
    "ragged": {"new": (3, 0, 5)},
}
ROTARY: dict[str, dict[str, Any]] = {
    "none": {},
    "interleaved": {"rotary": "interleaved"},
    "half": {"rotary": "half"},
    "partial": {"rotary": "interleaved", "rotary_dim": 16},
    "partial half, other positions": {"rotary": "half", "rotary_dim": 32, "rotary_seqlens": True},
}
SPLITS: dict[str, dict[str, Any]] = {
    "free": {},
    "1": {"num_splits": 1},
    "3": {"num_splits": 3},
    "split_size": {"split_size": 64},
}

FEATURES: dict[str, list[Any]] = {
    "dtype": list(DTYPES),
    "headdim": HEADDIMS + TWO_HEADDIMS,
    "heads": HEADS,
    "seqlens": [(77, 1, 130), (0, 64, 15), (16, 199, 63)],
    "mask": list(MASKS),
    "queries": list(QUERIES),
    "cache": list(CACHES),
    "append": list(APPENDS),
    "rotary": list(ROTARY),
    "splits": list(SPLITS),
    "plan": ["none", "given", "stale", "reused"],
    "layout": ["NHD", "HND"],
    "leftpad": [False, True],
    "softcap": [0.0, 3.0],
    "sinks": [False, True],
    "scale": [None, -0.2, 0.0],
}


def _is_valid(choice: dict[str, Any]) -> bool:
    rotary = ROTARY[choice["rotary"]]
    return not rotary or (
        choice["append"] != "none" and rotary.get("rotary_dim", 16) <= choice["headdim"][0] // 16 * 16
    )


def _case(choice: dict[str, Any], seed: int) -> Case:
    named = {"mask": MASKS, "queries": QUERIES, "cache": CACHES, "append": APPENDS, "rotary": ROTARY, "splits": SPLITS}
    options: dict[str, Any] = {"seed": seed}
    for name, value in choice.items():
        options |= named[name][value] if name in named else {name: value}
    return Case(**options)


CHOICES = list(all_pairs(FEATURES, _is_valid, lambda choice: kernel_of(_case(choice, 0))))
PAIRS = [_case(choice, seed) for seed, choice in enumerate(CHOICES)]


@pytest.mark.parametrize("case", first_pairs(PAIRS, 0))
def test_pairs(case: Case, backend: Backend) -> None:
    """Every two features together at least once; on the simulator see test_library_kernels.py."""
    check(case, make_inputs(case), backend)


def test_pairs_are_all_there() -> None:
    """What test_pairs leaves out cannot be: rotary embedding without new keys, or of more elements than there are."""
    for (a, xs), (b, ys) in itertools.combinations(FEATURES.items(), 2):
        for x, y in itertools.product(xs, ys):
            if not any(choice[a] == x and choice[b] == y for choice in CHOICES):
                assert (a, b) in {("append", "rotary"), ("headdim", "rotary")}
                rest = {"append": "one", "headdim": (64, 64)}
                assert not _is_valid(rest | {a: x, b: y}), f"{a}={x} never meets {b}={y}"


def _grid() -> dict[str, list[Case]]:
    """The full product of the axes that select or shape kernels, by (dtype, head dim)."""
    cases: dict[str, list[Case]] = {}
    for seed, (dtype, headdim, heads, cache, mask, queries) in enumerate(
        itertools.product(
            DTYPES,
            [(64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (40, 72)],
            [(2, 2), (4, 2), (4, 1), (6, 1), (7, 1), (8, 1), (16, 1), (32, 1)],
            ["contiguous", "pages of 16"],
            ["none", "causal", "both", "chunk"],
            ["one", "few", "ragged", "long"],
        )
    ):
        choice = {"dtype": dtype, "headdim": headdim, "heads": heads, "cache": cache, "mask": mask, "queries": queries}
        lengths = (70, 5, 33) if queries == "ragged" else (70,)
        cases.setdefault(f"{dtype}-{headdim[0]}-{headdim[1]}", []).append(_case(choice | {"seqlens": lengths}, seed))
    return cases


GRID = _grid()


@pytest.mark.slow
@pytest.mark.parametrize("name", GRID)
def test_grid(name: str, backend: Backend) -> None:
    """Every dtype x head dim x group size x cache x mask x query length."""
    for case in GRID[name]:
        try:
            check(case, make_inputs(case), backend)
        except AssertionError as error:
            raise AssertionError(str(case)) from error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache", ["contiguous", "pages of 16", "pages of 1"])
@pytest.mark.parametrize("options", [{}, {"leftpad": True, "causal": True, "seqlens_q": 2}], ids=["plain", "leftpad"])
def test_every_length(dtype: str, cache: str, options: dict[str, Any], backend: Backend) -> None:
    """Lengths 0 to 129: every residue modulo 16 and 64, together in one batch."""
    case = Case(dtype=dtype, heads=(2, 1), seqlens=tuple(range(130)), **CACHES[cache], **options)
    check(case, make_inputs(case), backend)


@pytest.mark.parametrize("chunk", [0, 16, 50])
@pytest.mark.parametrize("window", [(-1, -1), (0, 0), (15, 0), (64, 64), (200, -1), (-1, 3)])
def test_windows_on_ragged_lengths(window: tuple[int, int], chunk: int, backend: Backend) -> None:
    """Window edges against tile edges; more queries than keys."""
    seqlens = (0, 1, 3, 15, 16, 17, 63, 64, 65, 140)
    case = Case(heads=(2, 2), seqlens=seqlens, seqlens_q=5, window=window, chunk=chunk, page_size=16)
    check(case, make_inputs(case), backend)


@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (28, 4), (48, 8), (64, 1), (71, 1), (128, 2)])
def test_many_heads(heads: tuple[int, int], backend: Backend) -> None:
    case = Case(dtype="bfloat16", heads=heads, seqlens=(65, 3), sinks=True, seqlens_q=2, causal=True)
    check(case, make_inputs(case), backend)


@pytest.mark.parametrize(
    "headdim", [pytest.param(n, marks=() if n % 32 == 8 else pytest.mark.slow_on_sim) for n in range(8, 257, 8)]
)
def test_every_headdim(headdim: int, backend: Backend) -> None:
    dtype = list(DTYPES)[headdim // 8 % 3]
    case = Case(dtype=dtype, heads=(2, 1), headdim=(headdim, 264 - headdim), seqlens=(70, 9), new=1)
    check(case, make_inputs(case), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_splits", [0, 1, 2, 5, 64])
def test_splits(dtype: str, num_splits: int, backend: Backend) -> None:
    """Long enough to be split in several parts, with sinks, which count once."""
    case = Case(dtype=dtype, seqlens=(700, 3, 0, 450), sinks=True, plan="given", num_splits=num_splits, page_size=16)
    check(case, make_inputs(case), backend)


@pytest.mark.parametrize("mask", MASKS)
def test_masks_on_long_keys(mask: str, backend: Backend) -> None:
    case = Case(dtype="bfloat16", seqlens=(513, 700), seqlens_q=(9, 2), sinks=True, plan="reused", **MASKS[mask])
    check(case, make_inputs(case), backend)


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_queries(dtype: str, mask: str, backend: Backend) -> None:
    case = Case(dtype=dtype, heads=(4, 1), seqlens=(300, 77), seqlens_q=150, page_size=48, **MASKS[mask])
    check(case, make_inputs(case), backend)


@pytest.mark.parametrize("plan", ["none", "given", "stale", "reused"])
@pytest.mark.parametrize("queries", ["one", "ragged"])
def test_plans(plan: str, queries: str, backend: Backend) -> None:
    case = Case(seqlens=(600, 0, 333), plan=plan, new=2, **QUERIES[queries])
    check(case, make_inputs(case), backend)


# ------------------------------------------------------------------------------------------------ batch invariance
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"page_size": 16}, {"seqlens_q": 3, "causal": True}, {"heads": (4, 4)}], ids=str
)
def test_split_size_is_batch_invariant(dtype: str, options: dict[str, Any], backend: Backend) -> None:
    """With split_size a sequence gives the same bits alone, in a batch, and in any order."""
    seqlens = (500, 64, 1, 300, 129, 0, 1000)
    case = Case(dtype=dtype, seqlens=seqlens, split_size=128, plan="given", poison=False, **options)
    inputs = make_inputs(case)
    out, lse, _, _ = run(case, inputs, backend)
    check_out(case, out, expected(inputs))
    rng = np.random.default_rng(0)
    selections = [[b] for b in range(len(seqlens))] + [rng.permutation(len(seqlens))[:n].tolist() for n in (7, 5, 2)]
    for chosen in selections:
        few = dict(inputs)
        for name in ("q", "cache_seqlens", "page_table" if case.page_size else "k_cache"):
            few[name] = np.ascontiguousarray(inputs[name][chosen])
        if not case.page_size:
            few["v_cache"] = np.ascontiguousarray(inputs["v_cache"][chosen])
        few_case = dataclasses.replace(case, seqlens=tuple(seqlens[b] for b in chosen))
        few_out, few_lse, _, _ = run(few_case, few, backend)
        assert few_out.tobytes() == out[chosen].tobytes(), f"out depends on the batch {chosen}"
        assert few_lse.tobytes() == lse[chosen].tobytes(), f"lse depends on the batch {chosen}"


def test_numpy_is_thread_invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    """The NumPy backend gives the same bits on any number of threads."""
    monkeypatch.setenv("CUFLASH_BACKEND", "numpy")
    monkeypatch.setattr("cuflash.backends.numpy._THREAD_ELEMENTS", 0)
    numpy_backend = Backend("numpy", lambda array: array, np.asarray)
    case = Case(heads=(12, 6), seqlens=(3000, 1700, 5), seqlens_q=2, poison=False)
    inputs = make_inputs(case)
    results = []
    for threads in (1, 2, 3, 5):
        monkeypatch.setattr("cuflash.backends.numpy._num_threads", lambda threads=threads: threads)
        results.append(run(case, inputs, numpy_backend))
    for out, lse, _, _ in results[1:]:
        assert out.tobytes() == results[0][0].tobytes()
        assert lse.tobytes() == results[0][1].tobytes()


# ------------------------------------------------------------------------------------------------ single rules
def _call(inputs: dict[str, Any], backend: Backend, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    native = {k: backend.to_native(v) if isinstance(v, np.ndarray) else v for k, v in inputs.items()}
    native |= {k: backend.to_native(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    out, lse = cuflash.flash_attn_with_kvcache(**native, return_softmax_lse=True)
    return backend.to_numpy(out), backend.to_numpy(lse)


def test_lengths_as_one_int(backend: Backend) -> None:
    case = Case(seqlens=(50, 50), poison=False)
    inputs = make_inputs(case)
    out, lse = _call(inputs, backend)
    for lengths in (50, np.int64(50)):
        again, lse_again = _call(inputs, backend, cache_seqlens=lengths)
        assert again.tobytes() == out.tobytes()
        assert lse_again.tobytes() == lse.tobytes()
    # Without lengths the whole cache counts.
    capacity = inputs["k_cache"].shape[1]
    inputs["cache_seqlens"] = np.full(2, capacity, np.int32)
    assert _call(inputs, backend)[0].tobytes() == _call(inputs, backend, cache_seqlens=None)[0].tobytes()


def test_rows_without_keys(backend: Backend) -> None:
    """Out 0 and LSE -inf, whatever the outputs held; with a sink LSE = sink."""
    case = Case(seqlens=(0, 0, 2), seqlens_q=4, causal=True)
    inputs = make_inputs(case)
    out = backend.to_native(np.full((3, 4, 4, 64), np.nan, np.float32))
    lse = backend.to_native(np.full((3, 4, 4), np.nan, np.float32))
    returned = cuflash.flash_attn_with_kvcache(
        **{k: backend.to_native(v) if isinstance(v, np.ndarray) else v for k, v in inputs.items()},
        return_softmax_lse=True, out=out, softmax_lse=lse,
    )  # fmt: skip
    assert returned[0] is out
    assert returned[1] is lse
    answer = expected(inputs)
    check_out(case, backend.to_numpy(out), answer)
    check_lse(case, backend.to_numpy(lse), answer)
    assert not backend.to_numpy(out)[:2].any()
    assert np.isneginf(backend.to_numpy(lse)[:2]).all()

    sinks = np.array([0.5, -3, 20, -np.inf], np.float32)
    out, lse = _call(inputs, backend, sinks=sinks)
    assert not out[:2].any()
    np.testing.assert_allclose(lse[:2], np.broadcast_to(sinks[:, None], (2, 4, 4)), rtol=1e-6)


@pytest.mark.parametrize("sink", [-1e30, -100.0, 0.0, 100.0, 1e30])
def test_extreme_sinks(sink: float, backend: Backend) -> None:
    case = Case(seqlens=(300, 2), sinks=True, plan="given")
    inputs = make_inputs(case)
    inputs["sinks"][::2] = sink
    check(case, inputs, backend)


@pytest.mark.parametrize("sink", [np.inf, np.nan])
@pytest.mark.parametrize("lengths", [(9, 3), (2, 0)], ids=str)
def test_a_sink_that_is_no_number_leaves_nothing_of_the_keys(sink: float, lengths: Any, backend: Backend) -> None:
    """Or, where a row sees keys, nothing but NaN of one that is NaN; the other sink is as it was."""
    q, kv = np.ones((2, 3, 4, 64), np.float32), np.ones((2, 9, 2, 64), np.float32)
    given = {"q": q, "k_cache": kv, "v_cache": kv, "sinks": np.array([sink, 1, sink, 1], np.float32)}
    given["cache_seqlens"] = np.array(lengths, np.int32)
    out, lse = map(backend.to_numpy, cuflash.flash_attn_with_kvcache(
        **{name: backend.to_native(x) for name, x in given.items()}, causal=True, return_softmax_lse=True
    ))  # fmt: skip
    seen = np.array(lengths)[:, None] - 3 + np.arange(3) >= 0
    assert not out[~seen].any() and (out[seen][:, 1::2] > 0).all()
    np.testing.assert_allclose(lse[:, 1::2].swapaxes(1, 2)[~seen], 1)
    wanted = 0 if sink == np.inf else np.nan
    np.testing.assert_array_equal(out[seen][:, ::2], np.full_like(out[seen][:, ::2], wanted))
    if sink == np.inf or backend.name == "numpy":  # kernels say -inf of NaN without keys
        np.testing.assert_array_equal(lse[:, ::2], np.full_like(lse[:, ::2], sink))


@pytest.mark.parametrize("size", [1e-20, 30.0])
@pytest.mark.parametrize("sign", [-1, 0, 1])
def test_size_of_the_scores(size: float, sign: int, backend: Backend) -> None:
    """Scores in the thousands, all positive, all negative or mixed, neither overflow nor turn to NaN or to nothing."""
    case = Case(seqlens=(200, 65))
    inputs = make_inputs(case)
    inputs["q"] *= np.float32(size)
    inputs["k_cache"] *= np.float32(size)
    if sign:
        inputs["q"], inputs["k_cache"] = sign * np.abs(inputs["q"]), np.abs(inputs["k_cache"])
    out, lse = _call(inputs, backend)
    answer = expected(inputs)
    np.testing.assert_allclose(lse, answer.lse, rtol=1e-6, atol=1e-5)
    assert (np.abs(out - answer.out) <= 5e-3 * answer.magnitude).all()


@pytest.mark.parametrize("page_size", [None, 16])
def test_append_without_queries(page_size: int | None, backend: Backend) -> None:
    """Every new key is written: of sequences without queries, and where no row sees it."""
    case = Case(seqlens=(40, 0, 100), seqlens_q=(0, 2, 0), new=(7, 30, 70), window=(3, 0), causal=True,
                page_size=page_size, rotary="half")  # fmt: skip
    check(case, make_inputs(case), backend)


def test_strided_arrays(backend: Backend) -> None:
    """Views are taken as they are: q from a fused projection, a cache with K and V interleaved."""
    case = Case(heads=(4, 2), headdim=(64, 64), seqlens=(60, 33))
    inputs = make_inputs(case)
    fused = np.concatenate([inputs["q"], np.full((2, 1, 4, 64), np.nan, np.float32)], axis=2)
    both = np.stack([inputs["k_cache"], inputs["v_cache"]], axis=2)  # (batch, capacity, 2, heads, d)
    fused, both = backend.to_native(fused), backend.to_native(both)
    out, lse = cuflash.flash_attn_with_kvcache(
        fused[:, :, :4], both[:, :, 0], both[:, :, 1], return_softmax_lse=True,
        cache_seqlens=backend.to_native(inputs["cache_seqlens"]),
    )  # fmt: skip
    answer = expected(inputs)
    check_out(case, backend.to_numpy(out), answer)
    check_lse(case, backend.to_numpy(lse), answer)


def test_loose_max_seqlen_k(backend: Backend) -> None:
    """max_seqlen_k is an upper bound: it may choose another kernel, for small problems, and every result is right."""
    case = Case(seqlens=(500, 20), heads=(4, 1))
    inputs = make_inputs(case)
    answer = expected(inputs)
    for max_seqlen_k in (500, 501, 4096, 2**30):
        meta = cuflash.get_scheduler_metadata(
            2, 1, max_seqlen_k, 4, 1, 64, backend.to_native(inputs["cache_seqlens"]), qkv_dtype="float32"
        )
        out, lse = _call(inputs, backend, scheduler_metadata=meta)[:2]
        check_out(case, out, answer)
        check_lse(case, lse, answer)


@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_to_do(batch: int, backend: Backend) -> None:
    """No sequences; sequences without queries."""
    q = backend.to_native(np.zeros((batch, 0 if batch else 1, 4, 64), np.float32))
    cache = backend.to_native(np.zeros((batch, 32, 2, 64), np.float32))
    lengths = backend.to_native(np.full(batch, 5, np.int32))
    out, lse = cuflash.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=lengths, return_softmax_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (batch, 4, q.shape[1])


@pytest.mark.parametrize("spelling", ["apart", "joint"])
@pytest.mark.parametrize("rows", [(0, 16), (2, 0), "no pages"])
@pytest.mark.parametrize("dims", [(64, 64), (192, 128), (576, 512)])
def test_caches_without_elements(
    dims: tuple[int, int], rows: tuple[int, int] | str, spelling: str, backend: Backend
) -> None:
    """Nothing is all that an append can write there; no address says whether values are the keys' own columns."""
    (dim, dim_v), batch, native = dims, 0 if rows == (0, 16) else 2, backend.to_native
    k_cache = native(np.zeros((*((0, 16) if rows == "no pages" else rows), 1, dim), np.float32))
    v_cache = k_cache[..., :dim_v] if spelling == "joint" else native(np.zeros((*k_cache.shape[:3], dim_v), np.float32))
    q = native(np.ones((batch, 1, 4, dim), np.float32))
    given = {"cache_seqlens": native(np.zeros(batch, np.int32))}
    if rows == "no pages":
        given["page_table"] = native(np.zeros((batch, 0), np.int32))
    new = {"k": native(np.zeros((batch, 0 if batch else 3, 1, dim), np.float32))}
    if spelling == "apart":
        new["v"] = native(np.zeros((*new["k"].shape[:3], dim_v), np.float32))
    for appended in ({}, new) if spelling == "joint" or dim < 576 else ({},):
        out, lse = cuflash.flash_attn_with_kvcache(q, k_cache, v_cache, **appended, **given, return_softmax_lse=True)
        assert out.shape == (batch, 1, 4, dim_v) and not backend.to_numpy(out).any()
        assert np.isneginf(backend.to_numpy(lse)).all()


def test_many_sequences(backend: Backend) -> None:
    """More sequences than blocks; more than the 992 where FlashAttention-3 stops to split."""
    rng = np.random.default_rng(0)
    case = Case(heads=(2, 1), seqlens=tuple(rng.integers(0, 9, 1100).tolist()), page_size=4, plan="given")
    check(case, make_inputs(case), backend)


@pytest.mark.parametrize("num_sm", ["3", "8", "20"])
@pytest.mark.parametrize("heads, seqlens", [((20, 1), (1300,)), ((34, 2), (300, 2600))])
@pytest.mark.parametrize("plan", ["given", "reused"])
def test_splits_beyond_max_seqlen_k(
    plan: str, heads: tuple[int, int], seqlens: tuple[int, ...], num_sm: str, backend: Backend, monkeypatch: Any
) -> None:
    """Keys beyond the bound that a plan was made with have no slots of their own: one split takes them all."""
    monkeypatch.setenv("CUFLASH_NUM_SM", num_sm)
    case = Case(dtype="bfloat16", heads=heads, seqlens=seqlens, sinks=True, plan=plan, split_size=128, seed=2)
    check(case, make_inputs(case), backend)


@pytest.mark.parametrize("short", [1, 16, 70])
def test_lengths_up_to_2_31(short: int, backend: Backend) -> None:
    """A sequence as long as an int32 says, in a table that names one page again and again: no key number overflows."""
    rng = np.random.default_rng(short)
    length, window, page_size = 2**31 - short, 20, 1024
    q = rng.standard_normal((1, 1, 8, 64), np.float32)
    k, v = rng.standard_normal((2, 1, page_size, 1, 64), np.float32)
    out = cuflash.flash_attn_with_kvcache(
        backend.to_native(q), backend.to_native(k), backend.to_native(v),
        cache_seqlens=backend.to_native(np.array([length], np.int32)),
        page_table=backend.to_native(np.zeros((1, 2**31 // page_size), np.int32)), window_size=(window, 0),
    )  # fmt: skip
    seen = np.arange(length - window - 1, length) % page_size
    scores = q[0, 0].astype(np.float64) @ k[0, seen, 0].T / 8
    wanted = averages(scores, v[0, seen, 0])
    np.testing.assert_allclose(backend.to_numpy(out)[0, 0], wanted, atol=1e-5)


def test_an_interrupted_call_ends_on_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches the calling thread alone; the others stop at their next block of rows, not at the end."""
    monkeypatch.setenv("CUFLASH_BACKEND", "numpy")
    monkeypatch.setattr(numpy_backend, "_THREAD_ELEMENTS", 0)
    monkeypatch.setattr(numpy_backend, "_num_threads", lambda: 3)
    monkeypatch.setattr(numpy_backend, "_pool", None)
    attended, caller, others_run = [], threading.get_ident(), threading.Event()
    attend_rows = numpy_backend._attend_rows

    def interrupted(*arguments: Any) -> Any:
        if threading.get_ident() == caller:
            others_run.wait(10)
            raise KeyboardInterrupt
        attended.append(threading.get_ident())
        others_run.set()
        time.sleep(0.05)
        return attend_rows(*arguments)

    monkeypatch.setattr(numpy_backend, "_attend_rows", interrupted)
    q, cache = np.ones((4, 32 * 40, 1, 8), np.float32), np.ones((4, 50, 1, 8), np.float32)
    with pytest.raises(KeyboardInterrupt):
        cuflash.flash_attn_with_kvcache(q, cache, cache)
    seen = len(attended)
    assert 0 < seen < 20  # of 160
    time.sleep(0.2)
    assert len(attended) == seen
