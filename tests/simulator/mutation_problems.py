"""Problems for mutation tests of the library's kernels.

    PYTHONPATH=tests python -m cuflash.simulator.mutate tests/simulator/mutation_problems.py --kernel decode

A problem is small, and a simulated GPU has few multiprocessors, so that a mutant takes some milliseconds. Together the
problems reach what a variant of each kernel does: every mask, kind of cache, query length and split, lengths on and
beside the boundaries of tiles, stale plans.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from problems import Backend, Case, check, make_inputs

import cuflash

SIM = Backend("sim", lambda array: array, np.asarray)


def _attention(case: Case, num_sm: int) -> Callable[[], None]:
    inputs = make_inputs(case)

    def problem() -> None:
        os.environ.update(CUFLASH_BACKEND="sim", CUFLASH_NUM_SM=str(num_sm))
        check(case, {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in inputs.items()}, SIM)

    return problem


def _cases() -> Iterator[tuple[Case, int]]:
    """Cases and numbers of multiprocessors; one variant for few items, one for many."""
    few: dict[str, Any] = {"dtype": "bfloat16", "headdim": (64, 64)}
    one, two, group = {"heads": (8, 1)}, {"heads": (4, 1), "seqlens_q": 2}, {"heads": (6, 2)}
    for n in (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 511, 513):
        yield Case(**few, **one, seqlens=(n,), seed=n), 1 + n % 3
    for k, (seqlens, num_sm) in enumerate(
        (((2600,), 40), ((3000, 5), 36), ((1500, 1100), 33), ((5000,), 66), ((640,), 10))
    ):
        yield Case(**few, **one, seqlens=seqlens, scale=3.0 - k, page_size=16, seed=k), num_sm
        yield Case(**few, **two, seqlens=seqlens, causal=True, plan="stale", sinks=True, seed=k), num_sm
        yield Case(**few, **group, seqlens=seqlens, split_size=64 << k % 3, layout="HND", seed=k), num_sm // 4
        yield Case(**few, **one, seqlens=seqlens, window=(700, 3), leftpad=True, seed=k), num_sm
    many = (0, 64, 15, 16, 17, 40, 33, 0, 128, 5)
    for seqlens, num_sm in (((700, 300), 6), ((1000,), 9), (many, 2), (tuple(range(0, 140, 7)), 3)):
        for k, options in enumerate(
            (
                {**one, "page_size": 1, "plan": "stale"},
                {**one, "page_size": 16, "layout": "HND", "leftpad": True},
                {**one, "page_size": 3, "sinks": True, "batch_idx": True},
                {**two, "causal": True, "plan": "given"},
                {**two, "window": (19, 3), "leftpad": True},
                {**two, "chunk": 32, "causal": True, "num_splits": 3},
                {**group, "split_size": 64, "scale": -0.2},
                {**group, "window": (100, 0), "plan": "reused", "page_size": 64},
                {**one, "num_splits": 1, "scale": 0.0},
            )
        ):
            yield Case(**few, **options, seqlens=seqlens, seed=k), num_sm
    yield Case(**few, **two, seqlens=(130, 70, 33), new=2, rotary="half", page_size=16, causal=True), 2
    yield Case(**few, **one, seqlens=(100, 30), new=(3, 5), rotary="interleaved", rotary_dim=16, leftpad=True), 2
    yield Case(**few, **group, seqlens=(100, 30), new=1, rotary="half", rotary_seqlens=True, page_size=3), 2
    yield Case(**few, **one, seqlens=(10, 0, 3), new=20, batch_idx=True), 2
    yield Case(**few, **{**two, "seqlens_q": (2, 0, 1)}, seqlens=(100, 30, 60), causal=True), 4


def _plan(seed: int) -> Callable[[], None]:
    """The planner's kernel is held to the planner in NumPy, bitwise."""
    rng = np.random.default_rng(seed)
    batch = int(rng.choice([1, 7, 33, 70]))
    arguments: dict[str, Any] = {
        "batch_size": batch,
        "max_seqlen_q": int(rng.choice([1, 1, 40])),
        "max_seqlen_k": 4096,
        "num_heads_q": 8,
        "num_heads_kv": 2,
        "headdim": 64,
        "cache_seqlens": rng.integers(0, int(rng.choice([40, 4000])), batch) if seed % 3 else np.full(batch, 640),
        "causal": bool(seed & 1),
        "window_size": (300, 0) if seed % 5 == 4 else (-1, -1),
        "num_splits": int(rng.choice([0, 0, 1, 3])),
    }
    if seed % 7 == 3:
        arguments |= {"split_size": 128, "num_splits": 0}

    def problem() -> None:
        os.environ.update(CUFLASH_NUM_SM=str(3 + 11 * (seed % 6)))
        arrays = []
        for backend in ("numpy", "sim"):
            os.environ["CUFLASH_BACKEND"] = backend
            arrays.append(cuflash.get_scheduler_metadata(**arguments).array)
        np.testing.assert_array_equal(*arrays)

    return problem


def _merge(n: int, dim: int) -> Callable[[], None]:
    rng = np.random.default_rng(n)
    outs = [rng.standard_normal((3, 2, 4, dim)).astype(np.float16) for _ in range(n)]
    lses = [(3 * rng.standard_normal((3, 4, 2))).astype(np.float32) for _ in range(n)]
    lses[0][0] = -np.inf
    if n > 1:
        lses[1][0, 0] = -np.inf

    def problem() -> None:
        results = []
        for backend in ("numpy", "sim"):
            os.environ["CUFLASH_BACKEND"] = backend
            results.append(cuflash.merge_attn_states(outs, lses))
        (a, lse_a), (b, lse_b) = results
        np.testing.assert_allclose(np.asarray(lse_b), np.asarray(lse_a), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(np.asarray(b, np.float32), np.asarray(a, np.float32), rtol=2e-3, atol=2e-4)

    return problem


def problems() -> list[tuple[str, Callable[[], None]]]:
    """All problems by name."""
    out = [(f"attention {case}", _attention(case, num_sm)) for case, num_sm in _cases()]
    out += [(f"plan {seed}", _plan(seed)) for seed in range(24)]
    out += [(f"merge {n} of {dim}", _merge(n, dim)) for n, dim in ((1, 64), (2, 72), (5, 128), (17, 256))]
    return out
