"""Packed keys and values: flash_attn_varlen_func gives what the same keys in a cache give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from inputs import packed_inputs
from problems import Backend

import cuflash

LENGTHS = {"many": ((3, 0, 70, 1, 33), (40, 5, 100, 0, 1)), "one": ((9,), (9,)), "few rows": ((1, 1, 2), (300, 17, 1))}
MASKS: dict[str, dict[str, Any]] = {
    "plain": {}, "causal": {"causal": True}, "window": {"window_size": (20, 3)}, "chunks": {"attention_chunk": 16},
    "softcap": {"softcap": 5.0}, "splits": {"split_size": 64, "causal": True},
}  # fmt: skip


def inputs(lengths: str, dtype: Any, headdim: int = 64, seed: int = 0) -> dict[str, Any]:
    return packed_inputs(*LENGTHS[lengths], dtype, headdim, seed)


def expected(given: dict[str, Any], used: Any = None, **options: Any) -> reference.Answer:
    """By the definition, every sequence with a row of a cache."""
    starts = given["cu_seqlens_k"]
    lengths = np.diff(starts) if used is None else used
    caches = np.full((2, len(lengths), max(1, lengths.max()), *given["k"].shape[1:]), np.nan, np.float32)
    for cache, x in zip(caches, (given["k"], given["v"]), strict=True):
        for b, length in enumerate(lengths):
            cache[b, :length] = x[starts[b] : starts[b] + length]
    dtype = given["q"].dtype
    return reference.attention(
        given["q"], caches[0].astype(dtype), caches[1].astype(dtype), cache_seqlens=lengths.astype(np.int32),
        cu_seqlens_q=given["cu_seqlens_q"], max_seqlen_q=given["max_seqlen_q"], **options,
    )  # fmt: skip


def check(given: dict[str, Any], answer: reference.Answer, backend: Backend, **options: Any) -> None:
    native = {name: backend.to_native(x) if isinstance(x, np.ndarray) else x for name, x in given.items()}
    out, lse = cuflash.flash_attn_varlen_func(**native, **options, return_softmax_lse=True)
    unit = 2.0**-10 if given["q"].dtype == np.float16 else 1e-5
    error = np.abs(backend.to_numpy(out).astype(np.float64) - answer.out)
    assert (error <= 2 * unit * answer.magnitude + 1e-6).all()
    np.testing.assert_allclose(backend.to_numpy(lse), answer.lse, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_masks(mask: str, lengths: str, backend: Backend) -> None:
    given = inputs(lengths, np.float16)
    options = {name: value for name, value in MASKS[mask].items() if name != "split_size"}
    check(given, expected(given, **options), backend, **MASKS[mask])


@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_scale_for_every_key(lengths: str, backend: Backend) -> None:
    """Scales are packed as the keys are."""
    given, rng = inputs(lengths, np.float16), np.random.default_rng(3)
    numbers = dict(given)
    for name in ("k", "v"):
        codes = rng.integers(-127, 128, given[name].shape).astype(np.int8)
        scales = np.exp2(rng.integers(-9, -5, codes.shape[:2])).astype(np.float32)
        given |= {name: codes, f"{name}_descale": scales[None]}
        numbers[name] = (codes * scales[..., None]).astype(np.float16)
    check(given, expected(numbers), backend)


@pytest.mark.parametrize("headdim", [64, 128, 256])
def test_float32_and_head_dims(headdim: int, backend: Backend) -> None:
    given = inputs("few rows", np.float32, headdim)
    check(given, expected(given, causal=True), backend, causal=True)


def test_used_keys(backend: Backend) -> None:
    """Keys beyond those that are used may hold anything."""
    given = inputs("many", np.float16)
    used = np.array([17, 0, 99, 0, 1], np.int32)
    answer = expected(given, used)
    for name in ("k", "v"):
        for b, begin in enumerate(given["cu_seqlens_k"][:-1]):
            given[name][begin + used[b] : given["cu_seqlens_k"][b + 1]] = np.nan
    check({**given, "seqused_k": used}, answer, backend)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("cu_seqlens_k", np.array([0, 40, 30, 145, 145, 146], np.int32), "cu_seqlens_k must never decrease"),
        ("cu_seqlens_k", np.array([0, 40, 45, 145, 145, 500], np.int32), "cu_seqlens_k must end by k's 153 rows"),
        ("cu_seqlens_k", np.array([0, 40, 45], np.int32), r"^cu_seqlens_k must have shape \(6,\), got \(3,\)$"),
        ("k", np.zeros((1, 153, 2, 64), np.float16), "k must have shape"),
        ("seqused_q", np.array([1], np.int32), "seqused_q must be None"),
        ("seqused_k", np.array([41, 0, 0, 0, 0], np.int32), "^seqused_k must fit the capacity 40, got 41 at .0.$"),
        ("seqused_k", np.array([-1, 0, 0, 0, 0], np.int32), "^seqused_k must be at least 0"),
        ("k", np.zeros((153, 2, 64), np.float32), "^k must have the dtype of q"),
        ("v", np.zeros((153, 1, 64), np.float16), "^v must have the shape of k but"),
        ("q", np.zeros((1, 7, 64), np.float16), "num_heads_q must be a multiple of k's num_heads_kv=2, got 7"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values_are_named(name: str, change: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cuflash.flash_attn_varlen_func(**{**inputs("many", np.float16), name: change})


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_beginnings_must_be_given(name: str) -> None:
    """Also of one sequence, whose they could be only."""
    rows = np.zeros((3, 1, 64), np.float32)
    given = {"cu_seqlens_q": np.array([0, 3]), "cu_seqlens_k": np.array([0, 3]), name: None}
    with pytest.raises(TypeError, match=f"^{name} must be an array, got None$"):
        cuflash.flash_attn_varlen_func(rows, rows, rows, **given, max_seqlen_q=3, max_seqlen_k=3)
