"""Lengths of no dimension, room for 2^31 keys, and infinite numbers in new keys."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from problems import DTYPES, Backend, expected
from small import BATCH, DIM, appending, call, contiguous, native, paged

import cuflash


@pytest.mark.parametrize("value", [7, 40])
def test_lengths_of_no_dimension(value: int, backend: Backend) -> None:
    """An array of no dimension is one int, or is refused as what it is."""
    arguments = contiguous()
    wanted = call(native(arguments | {"cache_seqlens": value}, backend), backend)
    given = native(arguments, backend) | {"cache_seqlens": backend.to_native(np.array(value, np.int32))}
    try:
        found = call(given, backend)
    except (TypeError, ValueError) as error:
        assert "cache_seqlens" in str(error)
        assert "(1,)" not in str(error)
        assert "()" in str(error)
    else:
        for x, y in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(x, y)


def test_planned_lengths_of_no_dimension(backend: Backend) -> None:
    lengths = backend.to_native(np.array(9, np.int32))
    try:
        plan = cuflash.get_scheduler_metadata(BATCH, 1, 64, 4, 2, DIM, lengths)
    except (TypeError, ValueError) as error:
        assert "cache_seqlens" in str(error)
        assert "(1,)" not in str(error)
    else:
        assert set(plan.work()["sequence"]) == set(range(BATCH))


@pytest.mark.parametrize("pages, page_size", [(2**21, 1024), (2**21 + 1, 1024), (2**15, 2**16), (2**23, 2**10)])
@pytest.mark.parametrize("planned", [False, True], ids=["", "planned"])
def test_room_for_too_many_keys(pages: int, page_size: int, planned: bool, backend: Backend) -> None:
    """Without lengths the whole table counts, and that is more than an int32 holds."""
    q = backend.to_native(np.zeros((1, 1, 1, 8), np.float32))
    cache = backend.to_native(np.zeros((1, page_size, 1, 8), np.float32))
    table = backend.to_native(np.zeros((1, pages), np.int32))
    options: dict[str, Any] = {"page_table": table, "window_size": (10, 0)}
    if planned:
        lengths = backend.to_native(np.array([2000], np.int32))
        options["scheduler_metadata"] = cuflash.get_scheduler_metadata(
            1, 1, 2000, 1, 1, 8, lengths, "float32", page_size=page_size, window_size=(10, 0)
        )
    with pytest.raises(ValueError, match="cache_seqlens"):
        cuflash.flash_attn_with_kvcache(q, cache, cache, **options)
    out = cuflash.flash_attn_with_kvcache(q, cache, cache, **options, cache_seqlens=2000)
    assert not backend.to_numpy(out).any()


@pytest.mark.parametrize("ragged", [False, True], ids=["", "ragged"])
def test_new_keys_behind_the_last_that_can_be_counted(
    ragged: bool, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for them, but an int32 cannot say where they end."""
    monkeypatch.setenv("CUFLASH_VALIDATE", "1")
    page_size, most = 2**16, 2**31 - 1
    q = np.ones((1, 1, 1, 8), np.float32)
    k_cache, v_cache = np.zeros((2, 1, page_size, 1, 8), np.float32)
    table = np.zeros((1, 2**15), np.int32)
    new: dict[str, Any] = {"k": q, "v": q}
    if ragged:
        new = {"k": q[0], "v": q[0], "cu_seqlens_k_new": np.array([0, 1], np.int32)}
    given = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "page_table": table, "window_size": (0, 0), **new}
    for length in (most - 1, most):
        arguments = native(given | {"cache_seqlens": np.array([length], np.int32)}, backend)
        if length < most:
            np.testing.assert_array_equal(call(arguments, backend)[0], 1)
            continue
        with pytest.raises(ValueError, match="^cache_seqlens must be less than"):
            call(arguments, backend)
        assert not backend.to_numpy(arguments["k_cache"]).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3e38, 65504.0])
@pytest.mark.parametrize("rotary", [False, True], ids=["", "rotary"])
def test_new_keys_of_any_size(rotary: bool, value: float, dtype: str, backend: Backend) -> None:
    """Warnings are errors here: all new keys are written, and what other sequences give is right."""
    base = appending(paged)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = {
            name: x.astype(DTYPES[dtype]) if isinstance(x, np.ndarray) and x.dtype == np.float32 else x
            for name, x in base.items()
        }
        for name in "kv":
            arguments[name][1, 0] = np.float32(value)
        if not rotary:
            del arguments["rotary_cos"], arguments["rotary_sin"]
        answer = expected(arguments)
    given = native(arguments, backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, lse = call(given, backend)
    assert np.isfinite(out[[0, 2]].astype(np.float32)).all()
    for name in ("k_cache", "v_cache"):
        found = backend.to_numpy(given[name]).astype(np.float32)
        # NaN and Inf are the same thing here: a rotation may make one of the other.
        wanted = getattr(answer, name).astype(np.float32)
        np.testing.assert_array_equal(np.isfinite(found), np.isfinite(wanted))
        np.testing.assert_array_equal(found[np.isfinite(found)], wanted[np.isfinite(wanted)])
    np.testing.assert_allclose(lse[[0, 2]], answer.lse[[0, 2]], atol=2e-2 if rotary else 1e-4)
    np.testing.assert_allclose(out[[0, 2]].astype(float), answer.out[[0, 2]], atol=0.03)


@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "int8"])
@pytest.mark.parametrize("form", ["number", "array"])
def test_new_keys_by_a_scale_of_zero(form: str, kv_dtype: str, backend: Backend) -> None:
    """They are as large as codes can be, and no warning, an error here, ends the append half way."""
    rng = np.random.default_rng(0)
    new = rng.standard_normal((1, 2, 1, 64), np.float32)
    codes = np.zeros((1, 16, 1, 64), np.int8 if kv_dtype == "int8" else np.uint8)
    given = native({"q": new[:, :1], "k_cache": codes, "v_cache": codes, "k": new, "v": new}, backend)
    scale = backend.to_native(np.zeros((1, 1), np.float32)) if form == "array" else 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cuflash.flash_attn_with_kvcache(**given, cache_seqlens=3, kv_dtype=kv_dtype, k_descale=scale, v_descale=scale)
    largest = {"int8": (127, -127), "float8_e4m3fn": (0x7E, 0xFE)}[kv_dtype]
    for name in ("k_cache", "v_cache"):
        np.testing.assert_array_equal(backend.to_numpy(given[name])[0, 3:5], np.where(new[0] > 0, *largest))
