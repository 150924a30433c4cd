"""Small problems and calls for tests of single rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from problems import Backend, expected

import cuflash

Arguments = dict[str, Any]
BATCH, HEADS, KV_HEADS, DIM, CAPACITY, PAGE = 3, 4, 2, 32, 48, 16
LENGTHS = (40, 7, 23)


def contiguous(seqlen_q: int = 2) -> Arguments:
    """Return arguments of a call on a contiguous cache."""
    rng = np.random.default_rng(0)
    return {
        "q": rng.standard_normal((BATCH, seqlen_q, HEADS, DIM), np.float32),
        "k_cache": rng.standard_normal((BATCH, CAPACITY, KV_HEADS, DIM), np.float32),
        "v_cache": rng.standard_normal((BATCH, CAPACITY, KV_HEADS, DIM), np.float32),
        "cache_seqlens": np.array(LENGTHS, np.int32),
    }


def paged() -> Arguments:
    """Return the same with pages."""
    arguments = contiguous()
    for name in ("k_cache", "v_cache"):
        arguments[name] = arguments[name].reshape(-1, PAGE, KV_HEADS, DIM)
    pages = np.random.default_rng(1).permutation(BATCH * CAPACITY // PAGE)
    return arguments | {"page_table": pages.astype(np.int32).reshape(BATCH, -1)}


def appending(base: Callable[[], Arguments] = contiguous, new: int = 2) -> Arguments:
    """Return the same with new keys and rotary embedding."""
    rng = np.random.default_rng(2)
    angles = rng.uniform(0, 6, (CAPACITY, 16))
    return base() | {
        "k": rng.standard_normal((BATCH, new, KV_HEADS, DIM), np.float32),
        "v": rng.standard_normal((BATCH, new, KV_HEADS, DIM), np.float32),
        "rotary_cos": np.cos(angles).astype(np.float32),
        "rotary_sin": np.sin(angles).astype(np.float32),
    }


def ragged(base: Callable[[], Arguments] = contiguous) -> Arguments:
    """Return the same with ragged queries, and new keys if there are any."""
    arguments = base()
    arguments["q"] = arguments["q"].reshape(-1, HEADS, DIM)
    arguments |= {"cu_seqlens_q": np.array([0, 1, 1, 6], np.int32), "max_seqlen_q": 5}
    if "k" in arguments:
        for name in "kv":
            arguments[name] = arguments[name].reshape(-1, KV_HEADS, DIM)
        arguments["cu_seqlens_k_new"] = np.array([0, 3, 3, 6], np.int32)
    return arguments


def everything() -> Arguments:
    """Return a call with every index array: ragged, paged, appending, with rows, leftpad, positions and sinks."""
    arguments = ragged(lambda: appending(paged))
    return arguments | {
        "cache_batch_idx": np.array([2, 0, 1], np.int32),
        "cache_leftpad": np.array([3, 0, 5], np.int32),
        "rotary_seqlens": np.array([8, 1, 30], np.int32),
        "sinks": np.array([0.5, -1, 2, 0], np.float32),
        "causal": True,
    }


def native(arguments: Arguments, backend: Backend) -> Arguments:
    """Copy all arrays to a backend."""
    return {name: backend.to_native(x.copy()) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}


def plan(arguments: Arguments, backend: Backend, **options: Any) -> cuflash.SchedulerMetadata:
    """Plan a problem of this module."""
    a, q = arguments, arguments["q"]
    names = ("cu_seqlens_q", "cu_seqlens_k_new", "cache_leftpad")
    arrays = native({name: a[name] for name in (*names, "cache_seqlens") if name in a}, backend)
    settings = {
        "qkv_dtype": q.dtype,
        "page_size": PAGE if "page_table" in a else None,
        "max_seqlen_k_new": 0 if "k" not in a else a["k"].shape[1] if a["k"].ndim == 4 else 3,
        "causal": a.get("causal", False),
    }
    return cuflash.get_scheduler_metadata(
        BATCH, a.get("max_seqlen_q", q.shape[1]), CAPACITY, HEADS, KV_HEADS, DIM, **arrays, **settings | options
    )


def call(arguments: Arguments, backend: Backend, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Call cuflash with arguments that are on the backend; return out and lse as NumPy arrays."""
    out, lse = cuflash.flash_attn_with_kvcache(**arguments, **options, return_softmax_lse=True)
    return backend.to_numpy(out), backend.to_numpy(lse)


def check(arguments: Arguments, backend: Backend, out: np.ndarray, lse: np.ndarray) -> None:
    """Compare float32 results with the reference of arguments as they were before the call."""
    answer = expected({name: x for name, x in arguments.items() if name not in ("out", "softmax_lse")})
    np.testing.assert_allclose(out, answer.out, atol=2e-5)
    np.testing.assert_allclose(lse, answer.lse, atol=2e-5)


def check_caches(arguments: Arguments, backend: Backend, after: Arguments) -> None:
    """Compare the caches after a call with the reference of the arguments before it."""
    answer = expected({name: x for name, x in arguments.items() if name not in ("out", "softmax_lse")})
    for name in ("k_cache", "v_cache"):
        np.testing.assert_array_equal(backend.to_numpy(after[name]), getattr(answer, name), err_msg=name)
