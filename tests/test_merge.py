"""merge_attn_states: parts over disjoint keys give the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import DTYPES, UNIT_ROUNDOFF, Backend

import cuflash

# The backend is the same for all examples of a test.
SETTINGS = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _merge(backend: Backend, outs: Any, lses: Any) -> tuple[np.ndarray, np.ndarray]:
    native = [[backend.to_native(part) for part in parts] for parts in (outs, lses)]
    out, lse = cuflash.merge_attn_states(*native)
    return backend.to_numpy(out), backend.to_numpy(lse)


def _parts(n: int, shape: tuple[int, ...], dtype: str, seed: int, empty: float = 0.0) -> tuple[Any, Any]:
    """Return n random outs of a shape and their lses, a share of the rows without keys."""
    rng = np.random.default_rng(seed)
    outs = [rng.standard_normal(shape, np.float32).astype(DTYPES[dtype]) for _ in range(n)]
    lse_shape = (*shape[:-3], shape[-2], shape[-3])
    lses = [(3 * rng.standard_normal(lse_shape)).astype(np.float32) for _ in range(n)]
    for out, lse in zip(outs, lses, strict=True):
        none = rng.random(lse_shape) < empty
        lse[none] = -np.inf
        out[np.swapaxes(none, -1, -2)] = 0
    return outs, lses


def _expected(outs: Any, lses: Any) -> tuple[np.ndarray, np.ndarray]:
    """Merge in float64."""
    with np.errstate(divide="ignore", invalid="ignore"):
        stacked = np.stack([np.asarray(lse, np.float64) for lse in lses])
        top = np.max(stacked, axis=0)
        weights = np.exp(stacked - top)
        lse = np.where(np.isneginf(top), -np.inf, top + np.log(weights.sum(0)))
        weights = np.nan_to_num(weights / weights.sum(0))  # not by the LSE, where a large one loses its sum
    weights = np.swapaxes(weights, -1, -2)[..., None]
    return sum(w * np.asarray(out, np.float64) for w, out in zip(weights, outs, strict=True)), lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 4, 64), (5, 4, 40), (1, 1, 1, 256), (7, 6, 72)], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 17])
def test_against_float64(dtype: str, shape: tuple[int, ...], n: int, backend: Backend) -> None:
    outs, lses = _parts(n, shape, dtype, seed=n, empty=0.2)
    out, lse = _merge(backend, outs, lses)
    expected, expected_lse = _expected(outs, lses)
    assert out.dtype == DTYPES[dtype]
    assert lse.dtype == np.float32
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=1e-6)
    # Rounded once; a part may be as large as 5.
    np.testing.assert_allclose(out.astype(np.float64), expected, rtol=UNIT_ROUNDOFF[dtype] + 1e-6, atol=5e-6)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_a_cache_give_the_whole(dtype: str, ragged: bool, backend: Backend) -> None:
    """Attention over the halves of a cache, merged, is attention over all of it."""
    rng = np.random.default_rng(0)
    batch, heads, total = 3, 4, 150
    q = rng.standard_normal((batch, 2, heads, 64), np.float32).astype(DTYPES[dtype])
    k, v = rng.standard_normal((2, batch, total, 2, 64), np.float32).astype(DTYPES[dtype])
    options: dict[str, Any] = {"return_softmax_lse": True}
    if ragged:
        q = q.reshape(-1, heads, 64)
        options |= {"cu_seqlens_q": backend.to_native(np.array([0, 1, 4, 6], np.int32)), "max_seqlen_q": 3}

    def attend(begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        caches = [backend.to_native(np.ascontiguousarray(cache[:, begin:end])) for cache in (k, v)]
        out, lse = cuflash.flash_attn_with_kvcache(backend.to_native(q), *caches, **options)
        return backend.to_numpy(out), backend.to_numpy(lse)

    whole, whole_lse = attend(0, total)
    outs, lses = zip(*(attend(begin, end) for begin, end in [(0, 7), (7, 90), (90, 90), (90, 150)]), strict=True)
    out, lse = _merge(backend, outs, lses)
    np.testing.assert_allclose(lse, whole_lse, atol=1e-5)
    tolerance = 4 * UNIT_ROUNDOFF[dtype] + 1e-6
    np.testing.assert_allclose(out.astype(np.float64), whole.astype(np.float64), rtol=tolerance, atol=tolerance)


@SETTINGS
@given(
    n=st.integers(0, 4),
    at=st.integers(0, 4),
    seed=st.integers(0, 2**32 - 1),
    garbage=st.sampled_from([0, np.nan, np.inf]),
)
def test_empty_parts_are_identities(n: int, at: int, seed: int, garbage: float, backend: Backend) -> None:
    """A part with LSE -inf changes no bit, nor does it warn, not even if its output was never written."""
    outs, lses = _parts(1, (2, 3, 2, 64), "float32", seed)
    position = min(at, n)
    parts = [np.full_like(outs[0], garbage)] * n
    empties = [np.full_like(lses[0], -np.inf)] * n
    out, lse = _merge(
        backend,
        parts[:position] + outs + parts[position:],
        empties[:position] + lses + empties[position:],
    )
    assert out.tobytes() == outs[0].tobytes()
    assert lse.tobytes() == lses[0].tobytes()


@SETTINGS
@given(n=st.integers(2, 6), seed=st.integers(0, 2**32 - 1), empty=st.sampled_from([0.0, 0.5, 1.0]))
def test_order_and_nesting_do_not_matter(n: int, seed: int, empty: float, backend: Backend) -> None:
    outs, lses = _parts(n, (3, 2, 64), "float32", seed, empty)
    out, lse = _merge(backend, outs, lses)
    order = np.random.default_rng(seed).permutation(n)
    shuffled, shuffled_lse = _merge(backend, [outs[i] for i in order], [lses[i] for i in order])
    first = _merge(backend, outs[:-1], lses[:-1])
    nested, nested_lse = _merge(backend, [first[0], outs[-1]], [first[1], lses[-1]])
    for other, other_lse in ((shuffled, shuffled_lse), (nested, nested_lse)):
        np.testing.assert_allclose(other, out, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(other_lse, lse, rtol=1e-5, atol=1e-5)


def test_all_empty(backend: Backend) -> None:
    outs, lses = _parts(3, (2, 1, 4, 64), "bfloat16", 0, empty=1.0)
    out, lse = _merge(backend, outs, lses)
    assert not out.astype(np.float32).any()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize(
    "parts", [(np.nan,), (np.nan, np.nan), (-np.inf, np.nan), (np.nan, 0.5), (np.inf, np.nan)], ids=str
)
def test_nan_does_not_vanish(parts: tuple[float, ...], backend: Backend) -> None:
    """A row with a NaN LSE stays NaN, alone and beside others; its neighbour does not become it."""
    outs = [np.full((1, 2, 1, 40), 3, np.float32) for _ in parts]
    lses = [np.array([[[part, 0.5]]], np.float32) for part in parts]
    out, lse = _merge(backend, outs, lses)
    assert np.isnan(lse[..., 0]).all() and np.isnan(out[:, 0]).all()
    np.testing.assert_allclose(out[:, 1], 3, rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 4, 0), (5, 4, 0)], ids=str)
def test_outputs_without_columns(shape: tuple[int, ...], backend: Backend) -> None:
    """There still are LSEs."""
    outs, lses = _parts(3, shape, "float32", 0, empty=0.3)
    lse = backend.to_native(np.full_like(lses[0], np.nan))
    out, _ = cuflash.merge_attn_states(*(backend.to_native(np.stack(x)) for x in (outs, lses)), lse=lse)
    assert out.shape == shape
    np.testing.assert_allclose(backend.to_numpy(lse), _expected(outs, lses)[1], rtol=1e-6, atol=1e-6)


def test_stacked_is_the_same_as_a_list(backend: Backend) -> None:
    outs, lses = _parts(3, (2, 1, 4, 64), "float16", 0, empty=0.3)
    listed = _merge(backend, outs, lses)
    out, lse = cuflash.merge_attn_states(backend.to_native(np.stack(outs)), backend.to_native(np.stack(lses)))
    assert backend.to_numpy(out).tobytes() == listed[0].tobytes()
    assert backend.to_numpy(lse).tobytes() == listed[1].tobytes()


def test_far_apart(backend: Backend) -> None:
    """Exponents that float32 cannot hold."""
    out = np.ones((1, 1, 1, 64), np.float32)
    for difference in (50.0, 1000.0, 3e38):
        lses = [np.full((1, 1, 1), x, np.float32) for x in (difference, -difference)]
        merged, lse = _merge(backend, [out, 5 * out], lses)
        np.testing.assert_allclose(merged, 1)
        np.testing.assert_allclose(lse, difference)


@pytest.mark.parametrize("far", [np.inf, np.nan])
def test_a_weight_of_zero_counts_for_nothing(far: float, backend: Backend) -> None:
    """Whatever the output of a part is whose weight is too small for float32."""
    outs = [np.full((1, 1, 1, 64), x, np.float32) for x in (1, far)]
    merged, lse = _merge(backend, outs, [np.full((1, 1, 1), x, np.float32) for x in (0, -200)])
    np.testing.assert_array_equal(merged, 1)
    np.testing.assert_array_equal(lse, 0)


@pytest.mark.parametrize("size", [1e3, 1e5, 1e7, 1e20, 3e38])
@pytest.mark.parametrize("sign", [1, -1])
def test_large(size: float, sign: int, backend: Backend) -> None:
    """The logarithm of the parts' sum is lost in an LSE of float32, not in the weights."""
    outs = [np.full((1, 3, 2, 64), i, np.float32) for i in range(3)]
    lses = [np.full((1, 2, 3), sign * size, np.float32) for _ in range(3)]
    lses[2][0, 0] = np.nextafter(np.float32(sign * size), np.float32(-np.inf))
    (merged, lse), (expected, expected_lse) = _merge(backend, outs, lses), _expected(outs, lses)
    np.testing.assert_allclose(merged, expected, 1e-6)
    np.testing.assert_allclose(lse, expected_lse, 2.0**-22, 1e-3)


# ------------------------------------------------------------------------------------------------ other forms of input
@pytest.mark.parametrize("ragged", [False, True])
def test_any_strides(ragged: bool, backend: Backend) -> None:
    """Parts along another axis, and parts that lie packed with their LSEs in one buffer."""
    shape = (5, 4, 40) if ragged else (2, 3, 4, 40)
    outs, lses = _parts(3, shape, "float32", 0, empty=0.3)
    wanted = _merge(backend, outs, lses)
    buffer = np.full((*shape[:-1], 3, 41), np.nan, np.float32)  # (.., heads, parts, out and LSE)
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        buffer[..., i, :40], buffer[..., i, 40] = out, lse.swapaxes(-1, -2)
    native = backend.to_native(buffer)
    axes = (2, 0, 1, 3) if ragged else (3, 0, 1, 2, 4)
    packed_outs = native[..., :40].transpose(axes)
    packed_lses = native[..., 40].transpose((2, 1, 0) if ragged else (3, 0, 2, 1))
    found = cuflash.merge_attn_states(packed_outs, packed_lses)
    every_other = np.repeat(np.stack(outs), 2, axis=-1)
    spread = cuflash.merge_attn_states(backend.to_native(every_other)[..., ::2], backend.to_native(np.stack(lses)))
    for x, y, z in zip(found, spread, wanted, strict=True):
        assert backend.to_numpy(x).tobytes() == backend.to_numpy(y).tobytes() == z.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_base_2(dtype: str, backend: Backend) -> None:
    outs, lses = _parts(4, (2, 3, 4, 40), dtype, 1, empty=0.3)
    expected, expected_lse = _expected(outs, lses)
    stacked = np.stack(lses) / np.float32(np.log(2))
    out, lse = cuflash.merge_attn_states(
        backend.to_native(np.stack(outs)), backend.to_native(stacked.astype(np.float32)), base2=True
    )
    np.testing.assert_allclose(backend.to_numpy(lse), expected_lse / np.log(2), rtol=1e-6, atol=1e-6)
    tolerance = UNIT_ROUNDOFF[dtype] + 2e-6
    np.testing.assert_allclose(backend.to_numpy(out).astype(np.float64), expected, rtol=tolerance, atol=5e-6)


def test_infinity_is_empty(backend: Backend) -> None:
    """As FlashAttention-2 says it; also where all parts are."""
    outs, lses = _parts(3, (2, 3, 4, 40), "float16", 2, empty=0.5)
    wanted = _merge(backend, outs, lses)
    for out, lse in zip(outs, lses, strict=True):
        out[np.isneginf(lse).swapaxes(-1, -2)] = np.nan
        lse[np.isneginf(lse)] = np.inf
    for x, y in zip(_merge(backend, outs, lses), wanted, strict=True):
        assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("rows", [False, True], ids=["parts", "rows"])
def test_mask_of_parts(rows: bool, ragged: bool, backend: Backend) -> None:
    shape = (5, 4, 40) if ragged else (2, 3, 4, 40)
    outs, lses = _parts(4, shape, "float32", 3)
    mask = np.random.default_rng(3).random((4, *shape[:-2]) if rows else (4,)) < 0.5
    of_rows = [np.broadcast_to(part, shape[:-2]) for part in mask]  # (batch, sq) or (total,)
    kept = [np.where(part[..., None, :], lse, np.float32(-np.inf)) for part, lse in zip(of_rows, lses, strict=True)]
    wanted = _merge(backend, outs, kept)
    for out, part in zip(outs, of_rows, strict=True):
        out[~part] = np.nan
    found = cuflash.merge_attn_states(
        *(backend.to_native(np.stack(x)) for x in (outs, lses)), mask=backend.to_native(mask)
    )
    for x, y in zip(found, wanted, strict=True):
        assert backend.to_numpy(x).tobytes() == y.tobytes()


@pytest.mark.parametrize("shape", [(5, 4, 40), (2, 3, 4, 200)], ids=str)
def test_in_place(shape: tuple[int, ...], backend: Backend) -> None:
    """Into one of the parts, of which no bit may be read after it has been written."""
    outs, lses = _parts(3, shape, "bfloat16", 4, empty=0.2)
    wanted = _merge(backend, outs, lses)
    for i in range(3):
        native = [backend.to_native(np.stack(x)) for x in (outs, lses)]
        out, lse = native[0][i], native[1][i]
        found = cuflash.merge_attn_states(*native, out=out, lse=lse)
        assert found[0] is out
        assert found[1] is lse
        for x, y in zip(found, wanted, strict=True):
            assert backend.to_numpy(x).tobytes() == y.tobytes()


def test_what_may_not_be_written(backend: Backend) -> None:
    outs, lses = (backend.to_native(np.stack(x)) for x in _parts(3, (4, 3, 2, 64), "float32", 5))
    flat, size = outs.reshape(-1), outs[0].size
    with pytest.raises(ValueError, match="out must be one of the parts"):
        cuflash.merge_attn_states(outs, lses, out=flat[64 : 64 + size].reshape(outs.shape[1:]))
    with pytest.raises(ValueError, match="lse must be one of the parts"):
        cuflash.merge_attn_states(outs, lses, lse=flat[: lses[0].size].reshape(lses.shape[1:]))


@pytest.mark.parametrize("name", ["out", "lse"])
def test_parts_that_slide_over_each_other_may_not_be_written(name: str, backend: Backend) -> None:
    """A part that is written over another one would be read by rows that come later."""
    heads = 32
    outs, lses = _parts(2, (1, heads, 8), "float32", 6)
    given = {"outs": backend.to_native(np.stack(outs)), "lses": backend.to_native(np.stack(lses))}
    # Part 1 begins one head behind part 0.
    shape, strides = {"out": ((1, heads + 1, 8), (32, 0, 32, 4)), "lse": ((heads + 1, 1), (4, 4, 0))}[name]
    memory = backend.to_native(np.zeros(shape, np.float32))
    strided = (np if isinstance(memory, np.ndarray) else pytest.importorskip("cupy")).lib.stride_tricks.as_strided
    sliding = given[f"{name}s"] = strided(memory, given[f"{name}s"].shape, strides)
    cuflash.merge_attn_states(**given)
    with pytest.raises(ValueError, match=f"{name} must be one of the parts or share no memory"):
        cuflash.merge_attn_states(**given, **{name: sliding[1]})


def test_elements_of_another_kind(backend: Backend) -> None:
    outs, lses = (backend.to_native(np.stack(x)) for x in _parts(2, (1, 2, 8), "float32", 7))
    with pytest.raises(TypeError, match="lses must be float32, got float64"):
        cuflash.merge_attn_states(outs, lses.astype(np.float64))
    with pytest.raises(TypeError, match="mask must be bool, got int32"):
        cuflash.merge_attn_states(outs, lses, mask=backend.to_native(np.ones(2, np.int32)))
