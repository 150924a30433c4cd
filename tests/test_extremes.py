"""Scores, scales and caps of any size that float32 holds: the right LSE, and the right weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from problems import DTYPES, TINY, UNIT_ROUNDOFF, Backend
from reference import attention

import cuflash

HEADDIM = 64


def _problem(dtype: str, scores: Any, heads: int = 2) -> dict[str, Any]:
    """Return one sequence whose products of query and key are exactly ``scores``, as far as the elements hold them.

    Only one column of the queries and keys is not zero. A query's share is a power of two.
    """
    rng = np.random.default_rng(0)
    scores = np.asarray(scores, np.float64)
    share = 2.0 ** min(15, max(0, np.ceil(np.log2(max(1.0, np.abs(scores).max()))) // 2))
    q = np.zeros((1, 1, heads, HEADDIM), DTYPES[dtype])
    q[..., 3] = share
    k = np.zeros((1, len(scores), 1, HEADDIM), DTYPES[dtype])
    k[..., 3] = (scores / share).reshape(1, -1, 1)
    v = rng.standard_normal((1, len(scores), 1, HEADDIM)).astype(DTYPES[dtype])
    return {"q": q, "k_cache": k, "v_cache": v, "cache_seqlens": np.array([len(scores)], np.int32)}


def _check(problem: dict[str, Any], backend: Backend, dtype: str, **options: Any) -> None:
    native = {name: backend.to_native(array) for name, array in problem.items()}
    out, lse = cuflash.flash_attn_with_kvcache(**native, **options, return_softmax_lse=True)
    answer = attention(**problem, **options)
    found, wanted = backend.to_numpy(lse), answer.lse
    with np.errstate(over="ignore"):
        infinite = np.isinf(wanted.astype(np.float32))
    np.testing.assert_array_equal(found[infinite], wanted.astype(np.float32)[infinite])
    off = np.abs(found - wanted)[~infinite] - 2.0**-22 * np.abs(wanted)[~infinite]
    assert (off <= 1e-3).all(), f"LSE {found.ravel()} instead of {wanted.ravel()}"
    error = np.abs(backend.to_numpy(out).astype(np.float64) - answer.out)
    bound = (2 * UNIT_ROUNDOFF[dtype] + 1e-5) * answer.magnitude + TINY[dtype]
    assert (error <= bound).all(), f"out is off by {np.nanmax(error)} where {bound.max()} is allowed"


# Sizes of scores by dtype: what two elements of it can make, and float32 can hold.
SIZES = {
    "float16": (1.0, 3e5, 8e6, 4e7, 4e8, 2e9),
    "bfloat16": (1.0, 3e5, 4e7, 1.5e9, 1e13, 1e25, 2e38),
    "float32": (1.0, 3e5, 4e7, 1.5e9, 1e13, 1e25, 3e38),
}
KEYS = 300


def _patterns(size: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    ramp = np.linspace(-1, 1, KEYS)
    close = np.where(rng.random(KEYS) < 0.5, 1.0, 1.0 - 2.0**-7)
    mixed = rng.choice([-1.0, -0.5, 0.0, 1e-3, 0.25], KEYS)
    late = np.full(KEYS, -1.0)
    late[130:] = 1e-7 * rng.random(KEYS - 130)
    late[290] = 1.0
    return {
        "equal": size * np.ones(KEYS),
        "negative": -size * np.ones(KEYS),
        "rising": size * ramp,
        "falling": -size * ramp,
        "close": size * close,
        "mixed": size * mixed,
        "late": size * late,
    }


@pytest.mark.parametrize("pattern", ["equal", "negative", "rising", "falling", "close", "mixed", "late"])
@pytest.mark.parametrize(("dtype", "size"), [(dtype, size) for dtype, sizes in SIZES.items() for size in sizes])
def test_scores_of_any_size(dtype: str, size: float, pattern: str, backend: Backend) -> None:
    _check(_problem(dtype, _patterns(size)[pattern]), backend, dtype, softmax_scale=0.5)


@pytest.mark.parametrize("size", [4e8, 1e20])
@pytest.mark.parametrize("options", [{"num_splits": 5}, {"split_size": 64}, {"window_size": (100, 0)}], ids=str)
def test_huge_scores_of_several_blocks(size: float, options: dict[str, Any], backend: Backend) -> None:
    """Parts are merged by their maxima as they came from the products."""
    problem = _problem("bfloat16", _patterns(size)["close"], heads=16)
    window = {name: value for name, value in options.items() if name == "window_size"}
    native = {name: backend.to_native(array) for name, array in problem.items()}
    out, lse = cuflash.flash_attn_with_kvcache(**native, **options, softmax_scale=0.5, return_softmax_lse=True)
    answer = attention(**problem, **window, softmax_scale=0.5)
    np.testing.assert_allclose(backend.to_numpy(lse), answer.lse, rtol=2.0**-22, atol=1e-3)
    np.testing.assert_allclose(backend.to_numpy(out).astype(np.float64), answer.out, atol=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_full_rows_of_the_largest_elements(dtype: str, backend: Backend) -> None:
    """All elements of all rows are the largest that keep the score finite."""
    largest = {"float16": 65504.0, "bfloat16": 2.0**60, "float32": 2.0**60}[dtype]
    problem = _problem(dtype, np.zeros(77))
    for name in ("q", "k_cache"):
        problem[name][...] = largest
    _check(problem, backend, dtype)
    _check(problem, backend, dtype, softmax_scale=-0.25)


@pytest.mark.parametrize("scale", [0.0, 2e-38, -1e-36, 1e-31, 1e-20, 1e6, -1e10, 1.5e38])
@pytest.mark.parametrize("size", [1.0, 1e5, 1e30, 3e38])
def test_scales_of_any_size(scale: float, size: float, backend: Backend) -> None:
    """A scale of zero makes all keys equal, whatever their scores."""
    if abs(scale) * size > 3e38:
        pytest.skip("scores are infinite")
    _check(_problem("float32", _patterns(size)["mixed"]), backend, "float32", softmax_scale=scale)


def test_sinks_beside_huge_scores(backend: Backend) -> None:
    for size in (-1e20, 0.0, 1e20):
        for sink in (-1e19, -3.0, 0.0, 5.0, 1e21, -np.inf):
            problem = _problem("float32", size + np.zeros(40))
            problem["sinks"] = np.array([sink, 1.0], np.float32)
            _check(problem, backend, "float32")


# ------------------------------------------------------------------------------------------------ softcap
CAPS = (1e-60, 1e-44, 1e-30, 1e-3, 30.0, 1000.0, 1024.0, 5e4, 1e6, 1e9, 1e20, 3e38)


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("scale", [0.125, -0.125])
def test_caps_of_any_size(cap: float, scale: float, backend: Backend) -> None:
    """Scores far below, near and far above the cap, one at a time: the LSE of one key is its score."""
    rng = np.random.default_rng(2)
    near = cap * 8 * np.exp(rng.uniform(-4, 3, 40)) * rng.choice([-1, 1], 40)
    scores = [*near, 0.0, 1.0, -20.0, 1e5, 1e30, -3e38]
    for score in np.clip(scores, -3e38, 3e38):
        problem = _problem("float32", [score], heads=1)
        _check(problem, backend, "float32", softmax_scale=scale, softcap=cap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [1e-30, 5.0, 5e4, 1e9])
def test_weights_below_a_cap(dtype: str, cap: float, backend: Backend) -> None:
    rng = np.random.default_rng(3)
    scores = 8 * min(cap, 3e4) * rng.standard_normal(200)
    _check(_problem(dtype, scores), backend, dtype, softcap=cap)
    _check(_problem(dtype, scores), backend, dtype, softcap=cap, softmax_scale=0.0)
