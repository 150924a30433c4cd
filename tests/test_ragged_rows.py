"""Ragged queries: rows that belong to no sequence, and the positions that rows are rotated to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from problems import DTYPES, Backend, Case, check, check_lse, check_out, expected, make_inputs

import cuflash


def _call(inputs: dict[str, Any], backend: Backend, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Call with ``out`` and ``softmax_lse`` full of old numbers."""
    q, v_cache = inputs["q"], inputs["v_cache"]
    out = np.full((*q.shape[:-1], v_cache.shape[-1]), 7, q.dtype)
    lse = np.full((q.shape[1], q.shape[0]), 7, np.float32)
    arrays = {**inputs, "out": out, "softmax_lse": lse}
    native = {k: backend.to_native(v) if isinstance(v, np.ndarray) else v for k, v in arrays.items()}
    cuflash.flash_attn_with_kvcache(**native, **options)
    return backend.to_numpy(native["out"]), backend.to_numpy(native["softmax_lse"])


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("behind", [0, 1, 61])
@pytest.mark.parametrize("options", [{}, {"sinks": True}, {"dtype": "bfloat16", "heads": (16, 2)}], ids=str)
@pytest.mark.parametrize("keys", [{}, {"split_size": 64}, {"seqlens": (0, 0, 0)}], ids=str)
def test_rows_of_no_sequence(
    before: int, behind: int, options: dict[str, Any], keys: dict[str, Any], backend: Backend
) -> None:
    """Rows before the first sequence and behind the last give 0 and LSE -inf; the others are as without them."""
    case = Case(**{"seqlens": (700, 0, 33), "seqlens_q": (1, 2, 5), "page_size": 16, **options, **keys})
    inputs = make_inputs(case)
    answer = expected(inputs)
    queries = inputs["q"]
    nan = np.full_like(queries[:1], np.nan)
    inputs["q"] = np.concatenate([nan.repeat(before, 0), queries, nan.repeat(behind, 0)])
    inputs["cu_seqlens_q"] = inputs["cu_seqlens_q"] + np.int32(before)
    out, lse = _call(inputs, backend, split_size=case.split_size)
    own = slice(before, before + len(queries))
    check_out(case, out[own], answer)
    check_lse(case, lse[:, own], answer)
    for rows in (slice(0, before), slice(before + len(queries), None)):
        np.testing.assert_array_equal(out[rows].astype(np.float32), 0)
        np.testing.assert_array_equal(lse[:, rows], -np.inf)


@pytest.mark.parametrize("starts", [[0], [4], [0, 0], [3, 3, 3], [9, 9]], ids=str)
@pytest.mark.parametrize("max_seqlen_q", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_row_belongs_to_a_sequence(starts: list[int], max_seqlen_q: int, dtype: str, backend: Backend) -> None:
    """A batch without sequences, or sequences without queries."""
    batch = len(starts) - 1
    case = Case(dtype=dtype, seqlens=(50,) * max(1, batch), poison=False)
    inputs = make_inputs(case)
    for name in ("k_cache", "v_cache", "cache_seqlens"):
        inputs[name] = inputs[name][:batch]
    inputs |= {
        "q": np.full((9, *inputs["q"].shape[2:]), np.nan, inputs["q"].dtype),
        "cu_seqlens_q": np.array(starts, np.int32),
        "max_seqlen_q": max_seqlen_q,
        "sinks": np.ones(inputs["q"].shape[2], np.float32),
    }
    out, lse = _call(inputs, backend)
    np.testing.assert_array_equal(out.astype(np.float32), 0)
    np.testing.assert_array_equal(lse, -np.inf)


def test_rows_of_no_sequence_with_clusters(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_NUM_SM", "132")
    case = Case(dtype="bfloat16", seqlens=(600,), seqlens_q=(2,), heads=(8, 2))
    inputs = make_inputs(case)
    answer = expected(inputs)
    inputs["q"] = np.concatenate([inputs["q"], np.full((300, 8, 64), np.nan, inputs["q"].dtype)])
    out, lse = _call(inputs, backend)
    check_out(case, out[:2], answer)
    np.testing.assert_array_equal(out[2:].astype(np.float32), 0)
    np.testing.assert_array_equal(lse[:, 2:], -np.inf)


# ------------------------------------------------------------------------------------------------ rotary positions
@pytest.mark.parametrize("rotary", ["interleaved", "half"])
@pytest.mark.parametrize("queries", [3, (1, 4, 2)], ids=str)
def test_chunks_alone_rotate_queries_to_their_positions(rotary: str, queries: Any, backend: Backend) -> None:
    check(case := Case(seqlens_q=queries, chunk=32, new=4, rotary=rotary), make_inputs(case), backend)


@pytest.mark.parametrize("causal", [True, False])
def test_rotary_tables_that_are_just_long_enough(causal: bool, backend: Backend) -> None:
    """A sequence needs the positions of its own queries and new keys, one without either needs none."""
    case = Case(seqlens=(0, 99, 300, 40), seqlens_q=(8, 1, 0, 2), new=(8, 1, 0, 60), rotary="half", causal=causal)
    inputs = make_inputs(case)
    inputs["rotary_cos"], inputs["rotary_sin"] = inputs["rotary_cos"][:100], inputs["rotary_sin"][:100]
    check(case, inputs, backend)
    inputs["rotary_cos"], inputs["rotary_sin"] = inputs["rotary_cos"][:99], inputs["rotary_sin"][:99]
    if backend.name != "cuda":
        with pytest.raises(ValueError, match="rotary_cos"):
            check(case, inputs, backend)


def test_rows_of_no_sequence_beside_an_append(backend: Backend) -> None:
    """Queries and new keys are found though rows stand before those of the first sequence."""
    case = Case(seqlens=(70, 9), seqlens_q=(2, 3), new=(3, 2), rotary="half", causal=True)
    inputs = make_inputs(case)
    answer = expected(inputs)
    nan = np.full_like(inputs["q"][:1], np.nan)
    inputs["q"] = np.concatenate([nan, nan, inputs["q"], nan])
    inputs["cu_seqlens_q"] = inputs["cu_seqlens_q"] + np.int32(2)
    out, lse = _call(inputs, backend)
    check_out(case, out[2:7], answer)
    check_lse(case, lse[:, 2:7], answer)
    np.testing.assert_array_equal(out[[0, 1, 7]], 0)
