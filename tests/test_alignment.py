"""Arrays at any address: they are copied, or refused by name; never do they end in a fault of the device."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from problems import Backend
from small import (
    BATCH,
    CAPACITY,
    KV_HEADS,
    Arguments,
    call,
    check,
    check_caches,
    contiguous,
    everything,
    native,
    plan,
)

import cuflash

INPUTS = ["q", "k", "v", "rotary_cos", "rotary_sin", "sinks", "cache_seqlens", "page_table", "cache_batch_idx",
          "cache_leftpad", "cu_seqlens_q", "cu_seqlens_k_new", "rotary_seqlens", "k_cache", "v_cache"]  # fmt: skip
OUTPUTS = ["out", "softmax_lse"]


def shifted(array: np.ndarray, num_bytes: int) -> np.ndarray:
    """The same values at an address that many bytes behind a multiple of 256."""
    memory = np.zeros(array.nbytes + 512, np.uint8)
    start = -memory.ctypes.data % 256 + num_bytes
    view = np.ndarray(array.shape, array.dtype, memory, start)
    view[...] = array
    return view


def problem() -> Arguments:
    arguments = everything()
    q = arguments["q"]
    nan = np.full(q.shape, np.nan, np.float32)
    return arguments | {"out": nan, "softmax_lse": nan[..., 0].T.copy()}


def place(arguments: Arguments, name: str, num_bytes: int, backend: Backend) -> Arguments:
    """Copy all arrays to a backend, one of them to an odd address."""
    placed = native(arguments, backend)
    if backend.name == "cuda":
        import cupy

        array = arguments[name]
        memory = cupy.zeros(array.nbytes + 512, np.uint8)
        memory[num_bytes : num_bytes + array.nbytes] = cupy.asarray(array.reshape(-1).view(np.uint8))
        placed[name] = cupy.ndarray(array.shape, array.dtype, memory.data + num_bytes)
    else:
        placed[name] = shifted(arguments[name], num_bytes)
    return placed


def try_call(arguments: Arguments, placed: Arguments, name: str, backend: Backend, **options: Any) -> None:
    """The result is right, in the outputs that were given; or a ValueError names the array and nothing is changed."""
    try:
        out, lse = call(placed, backend, **options)
    except ValueError as error:
        assert re.search(rf"\b{name}\b", str(error))
        for cache in ("k_cache", "v_cache"):
            np.testing.assert_array_equal(backend.to_numpy(placed[cache]), arguments[cache])
        return
    check(arguments, backend, out, lse)
    check(arguments, backend, backend.to_numpy(placed["out"]), backend.to_numpy(placed["softmax_lse"]))
    check_caches(arguments, backend, placed)


@pytest.mark.parametrize(
    "name, num_bytes",
    [(name, n) for name in INPUTS for n in (1, 4)] + [(name, n) for name in OUTPUTS for n in (1, 2, 4, 8, 20)],
)
def test_any_address(name: str, num_bytes: int, backend: Backend) -> None:
    """Without a plan, at the first call with one, and after calls that are remembered."""
    if backend.name == "cuda":
        pytest.skip("a fault would end this process: test_gpu_alignment.py")
    every_call(name, num_bytes, backend)


def every_call(name: str, num_bytes: int, backend: Backend) -> None:
    arguments = problem()
    try_call(arguments, place(arguments, name, num_bytes, backend), name, backend)
    made = plan(arguments, backend)
    try_call(arguments, place(arguments, name, num_bytes, backend), name, backend, scheduler_metadata=made)
    for _ in range(2):
        try_call(arguments, native(arguments, backend), name, backend, scheduler_metadata=made)
    for _ in range(2):
        try_call(arguments, place(arguments, name, num_bytes, backend), name, backend, scheduler_metadata=made)
    try_call(arguments, native(arguments, backend), name, backend, scheduler_metadata=made)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("num_bytes", [1, 2, 4, 8])
def test_merging_at_any_address(num_bytes: int, dtype: Any, backend: Backend) -> None:
    if backend.name == "cuda":
        pytest.skip("a fault would end this process")
    rng = np.random.default_rng(0)
    outs = [rng.standard_normal((2, 3, 4, 24), np.float32).astype(dtype) for _ in range(2)]
    lses = [rng.standard_normal((2, 4, 3), np.float32) for _ in range(2)]
    wanted = cuflash.merge_attn_states(outs, lses)
    for changed in ({"outs": [outs[0], shifted(outs[1], num_bytes)]}, {"lses": [lses[0], shifted(lses[1], num_bytes)]}):
        try:
            found = cuflash.merge_attn_states(**{"outs": outs, "lses": lses} | changed)
        except ValueError as error:
            assert next(iter(changed)) in str(error)
        else:
            for x, y in zip(found, wanted, strict=True):
                np.testing.assert_array_equal(x, y)


def off_by(array: np.ndarray, num_bytes: int) -> np.ndarray:
    """The same values in rows that many bytes further apart than they are long."""
    memory = np.zeros((*array.shape[:-1], array.shape[-1] * array.itemsize + num_bytes), np.uint8)
    view = np.ndarray(array.shape, array.dtype, memory, 0, (*memory.strides[:-1], array.itemsize))
    view[...] = array
    return view


@pytest.mark.parametrize("place", [shifted, off_by])
@pytest.mark.parametrize("num_bytes", [1, 2, 4])
def test_results_to_merge_with_at_any_address(num_bytes: int, place: Any, backend: Backend) -> None:
    if backend.name == "cuda":
        pytest.skip("a fault would end this process")
    arguments = contiguous()
    rng = np.random.default_rng(0)
    q = arguments["q"]
    pair = rng.standard_normal(q.shape, np.float32), rng.standard_normal((len(q), q.shape[2], q.shape[1]), np.float32)
    for part in range(2):
        given = [place(x, num_bytes) if i == part else x for i, x in enumerate(pair)]
        check(arguments | {"merge_with": pair}, backend, *call(arguments | {"merge_with": tuple(given)}, backend))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (BATCH, KV_HEADS), (BATCH, CAPACITY, KV_HEADS)], ids=str)
@pytest.mark.parametrize("name", ["q_descale", "k_descale", "v_descale"])
def test_scales_at_odd_addresses_are_refused(name: str, shape: tuple[int, ...], backend: Backend) -> None:
    if backend.name == "cuda" or (name == "q_descale" and len(shape) == 3):
        pytest.skip("a fault would end this process, or queries have no such scales")
    arguments = contiguous()
    for array in ("q", "k_cache", "v_cache"):
        arguments[array] = arguments[array].astype(ml_dtypes.float8_e4m3fn)
    for num_bytes in (1, 2):
        with pytest.raises(ValueError, match=f"{name} must be aligned to its elements"):
            call(arguments | {name: shifted(np.ones(shape, np.float32), num_bytes)}, backend)
