"""Inactive rows of a fixed batch, as CUDA graphs have them: negative page numbers, ragged appends of nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from padded_batch import INACTIVE, PaddedBatch
from problems import Backend, expected
from reference import averages

import cuflash

BATCH, PAGE, HEADS, KV_HEADS, DIM, TABLE = 4, 4, 4, 2, 32, 6


@pytest.mark.parametrize("dtype", ["float16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("inactive", INACTIVE)
def test_a_padded_batch_leaves_pages_of_others_alone(inactive: str, dtype: str, backend: Backend) -> None:
    """Sequences come and go for 50 steps of one batch size; every step appends, in inactive rows to nowhere."""
    batch = PaddedBatch(backend, inactive, dtype)
    batch.run(batch.step, 50)


@pytest.mark.parametrize("queries", [1, 3])
def test_nothing_is_read_of_a_sequence_without_pages(queries: int, backend: Backend) -> None:
    """Every page is poison, page 0 too: rows that see keys of it have no meaning, all others stay right."""
    rng = np.random.default_rng(1)
    shape = (5, PAGE, KV_HEADS, DIM)
    k_cache, v_cache = rng.standard_normal((2, *shape), np.float32)
    k_cache[0], v_cache[0] = np.nan, np.nan
    table = np.array([[1, 2, -1], [-1, -7, -(2**31)], [3, 4, -1]], np.int32)
    inputs = {
        "q": rng.standard_normal((3, queries, HEADS, DIM), np.float32),
        "k_cache": k_cache,
        "v_cache": v_cache,
        # The last query of the first sequence sees a key that is nowhere, those before it do not.
        "cache_seqlens": np.array([2 * PAGE + (queries > 1), 3 * PAGE, 2 * PAGE], np.int32),
        "page_table": table,
        "causal": True,
    }
    native = {name: backend.to_native(x) if isinstance(x, np.ndarray) else x for name, x in inputs.items()}
    out, lse = cuflash.flash_attn_with_kvcache(**native, return_softmax_lse=True)
    answer = expected(inputs)
    assert not answer.defined[1].all()
    assert answer.defined[[0, 2]].sum() == HEADS * (2 * queries - (queries > 1))
    out, lse = backend.to_numpy(out), backend.to_numpy(lse)
    defined = answer.defined.swapaxes(-1, -2)
    np.testing.assert_allclose(out[defined], answer.out[defined], atol=2e-5)
    np.testing.assert_allclose(lse[answer.defined], answer.lse[answer.defined], atol=2e-5)


def test_the_page_of_a_last_key_before_2_31_that_is_not_there(backend: Backend) -> None:
    """The last tile reaches beyond 2^31, and only the second query sees its one key, in whose place page 0 is read."""
    rng = np.random.default_rng(3)
    page_size, length = 42966, 2**31 - 1  # the last page has one key
    q = rng.standard_normal((1, 2, 4, 64), np.float32).astype(np.float16)
    k, v = rng.standard_normal((2, 2, page_size, 1, 64), np.float32).astype(np.float16)
    k[0], v[0] = np.nan, np.nan
    table = np.ones((1, (length - 1) // page_size + 1), np.int32)
    table[0, -1] = -1
    given = [backend.to_native(x) for x in (q, k, v)]
    out = cuflash.flash_attn_with_kvcache(
        *given, cache_seqlens=backend.to_native(np.array([length], np.int32)), page_table=backend.to_native(table),
        window_size=(5, 0), causal=True,
    )  # fmt: skip
    seen = np.arange(length - 7, length - 1) % page_size
    scores = q[0, 0].astype(np.float64) @ k[1, seen, 0].astype(np.float64).T / 8
    wanted = averages(scores, v[1, seen, 0].astype(np.float64))
    np.testing.assert_allclose(backend.to_numpy(out)[0, 0].astype(np.float64), wanted, atol=4e-3)


def test_a_plan_for_a_full_batch_serves_fewer_sequences(backend: Backend) -> None:
    """Refilled with lengths of 0 for rows that nobody has: those give 0 and -inf, the others are as ever."""
    rng = np.random.default_rng(2)
    lengths = np.array([17, 0, 24, 0], np.int32)
    q = rng.standard_normal((BATCH, 1, HEADS, DIM), np.float32)
    k_cache, v_cache = rng.standard_normal((2, BATCH, TABLE * PAGE, KV_HEADS, DIM), np.float32)
    arguments = (BATCH, 1, TABLE * PAGE, HEADS, KV_HEADS, DIM)
    full = backend.to_native(np.full(BATCH, TABLE * PAGE, np.int32))
    meta = cuflash.get_scheduler_metadata(*arguments, full, qkv_dtype="float32")
    native = backend.to_native(lengths)
    meta = cuflash.get_scheduler_metadata(*arguments, native, qkv_dtype="float32", out=meta)
    out, lse = cuflash.flash_attn_with_kvcache(
        *map(backend.to_native, (q, k_cache, v_cache)), cache_seqlens=native, scheduler_metadata=meta,
        return_softmax_lse=True,
    )  # fmt: skip
    answer = expected({"q": q, "k_cache": k_cache, "v_cache": v_cache, "cache_seqlens": lengths})
    np.testing.assert_allclose(backend.to_numpy(out), answer.out, atol=2e-5)
    assert np.isneginf(backend.to_numpy(lse)[[1, 3]]).all()


@pytest.mark.parametrize(
    ("queries", "heads_kv", "dims", "dtype", "given"),
    [
        (1, 2, (64, 64), "float16", ()),
        (40, 2, (64, 64), "float16", ()),
        (1, 2, (64, 64), "float16", ("k", "csr")),
        (1, 2, (64, 32), "float8_e4m3fn", ("k_descale",)),
        (20, 1, (64, 64), "int8", ("k", "k_descale", "HND")),
        (1, 1, (576, 512), "float16", ("k",)),
        (1, 1, (576, 512), "int8", ("k_descale",)),
        (5, 1, (576, 512), "int8", ("k_descale",)),
        (5, 1, (480, 448), "int8", ("v_descale",)),
        (1, 1, (64, 512), "bfloat16", ("qv",)),
    ],
)
def test_a_cache_without_pages(
    queries: int, heads_kv: int, dims: tuple[int, int], dtype: str, given: tuple[str, ...], backend: Backend
) -> None:
    """Every page of every sequence is nowhere: zeros stand in place of all keys, and nothing is written."""
    (dim, dim_v), batch, native = dims, 2, backend.to_native
    kind = "float16" if dtype in ("float8_e4m3fn", "int8") else dtype
    q = native(np.ones((batch, queries, 4, dim), kind))
    codes = "uint8" if dtype == "float8_e4m3fn" else dtype
    k_cache = native(np.zeros((0, heads_kv, PAGE, dim) if "HND" in given else (0, PAGE, heads_kv, dim), codes))
    v_cache = native(np.zeros((*k_cache.shape[:-1], dim_v), codes))
    arguments = {"layout": "HND"} if "HND" in given else {}
    if dim > 256:
        v_cache = k_cache[..., :dim_v]
    if dtype == "float8_e4m3fn":
        arguments["kv_dtype"] = dtype
    if "k" in given:
        arguments["k"] = native(np.ones((batch, 1, heads_kv, dim), kind))
        arguments["v"] = None if dim > dim_v else native(np.ones((batch, 1, heads_kv, dim_v), kind))
    for name in {"k_descale", "v_descale"} & set(given):
        arguments[name] = native(np.zeros(k_cache.shape[:-1], np.float32))
    if "qv" in given:
        arguments["qv"] = native(np.ones((batch, queries, 4, dim_v), kind))
    table: Any = native(np.full((batch, 3), -1, np.int32))
    if "csr" in given:
        table = native(np.array([0, 3, 6], np.int32)), native(np.full(6, -5, np.int32))
    lengths = np.array([2 * PAGE + 1, 0], np.int32)
    for _ in range(2):  # the second call must not be the first one again, on memory that the first one had
        out, lse = cuflash.flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=native(lengths), page_table=table, return_softmax_lse=True, **arguments
        )
        assert not backend.to_numpy(out).any()
        with np.errstate(divide="ignore"):
            answer = np.log(lengths + ("k" in given))
        np.testing.assert_allclose(backend.to_numpy(lse), np.broadcast_to(answer[:, None, None], lse.shape), rtol=1e-6)
