"""The planner kernel on the simulator: bitwise what the planner in NumPy makes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import schedules

import cuflash
from cuflash import planner
from cuflash.backends import sim
from cuflash.kernels.source import source
from cuflash.operands import Lengths
from cuflash.simulator import compile_ptx


def check_twins(num_sm: int, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan with both and compare every word."""
    monkeypatch.setenv("CUFLASH_NUM_SM", str(num_sm))
    monkeypatch.setenv("CUFLASH_BACKEND", "numpy")
    twin = cuflash.get_scheduler_metadata(**arguments)
    monkeypatch.setenv("CUFLASH_BACKEND", "sim")
    meta = cuflash.get_scheduler_metadata(**arguments)
    np.testing.assert_array_equal(meta.array, twin.array, err_msg=f"{num_sm} {arguments}")


def plain(seqlens: np.ndarray, heads: int = 8, **options: Any) -> dict[str, Any]:
    """Return the arguments of a decode step with a group size of 4."""
    return {
        "batch_size": len(seqlens),
        "max_seqlen_q": 1,
        "max_seqlen_k": 8192,
        "num_heads_q": 4 * heads,
        "num_heads_kv": heads,
        "headdim": 128,
        "cache_seqlens": seqlens,
        **options,
    }


@pytest.mark.parametrize("seed", range(10))
def test_random_steps(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(10):
        step = schedules.random_step(rng, max_batch=40, max_keys=int(rng.choice([50, 600, 20000])))
        check_twins(step.num_sm, step.arguments, monkeypatch)


@pytest.mark.parametrize("batch", [0, 1, 31, 32, 33, 264, 265, 992, 993, 1024, 1025, 5000])
def test_batch_sizes(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(batch)
    check_twins(132, plain(rng.integers(0, 8192, batch)), monkeypatch)
    check_twins(13, plain(np.full(batch, 1000), 3, num_splits=2), monkeypatch)


def test_equal_items_on_seven_eighths_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for batch in (76, 77, 88, 231, 463):
        check_twins(132, plain(np.full(batch, 1000), 3), monkeypatch)


@pytest.mark.parametrize("missing", [0, 1])
def test_shares_about_to_be_short(missing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks on each of 4 multiprocessors, with 1024 keys each, or not quite."""
    check_twins(4, plain(np.array([600, 100, 324 - missing] + [0] * 5)), monkeypatch)
    check_twins(4, plain(np.array([600, 100, 324 - missing] * 4), 2, kv_dtype="int8"), monkeypatch)


@pytest.mark.parametrize("options", [{}, {"kv_dtype": "int8"}, {"max_seqlen_q": 16}, {"num_splits": 20}])
@pytest.mark.parametrize("heads", [1, 2, 4, 5])
def test_few_items(heads: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One item in few parts, on half of the multiprocessors or on all of them: at the borders of all this."""
    for keys in (63, 960, 2047, 2048, 4095, 63_359, 63_360, 33_791, 33_792, 270_000):
        check_twins(132, plain(np.array([keys // heads]), heads, max_seqlen_k=300_000, **options), monkeypatch)
    check_twins(7, plain(np.array([5000, 1, 0]), heads, max_seqlen_k=300_000, **options), monkeypatch)


@pytest.mark.parametrize("fewest", [15, 16, 17])
def test_sequences_of_about_as_many_rows_as_weigh_more(fewest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row blocks of 64: from 16 rows of each sequence on that has some, long items cost more."""
    queries = np.array([64, 0, fewest, 33])
    starts = np.append(0, np.cumsum(queries))
    options = {"num_heads_q": 2, "max_seqlen_q": 64, "cu_seqlens_q": starts}
    check_twins(4, plain(np.array([9000, 500, 3000, 7000]), 2, **options), monkeypatch)


@pytest.mark.slow
def test_a_hundred_thousand_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    check_twins(132, plain(np.random.default_rng(0).integers(0, 8192, 100_000)), monkeypatch)


@pytest.mark.parametrize(("batch", "max_seqlen_q"), [(1, 3000), (5, 700), (200, 33), (1100, 24), (1, 9000)])
def test_row_blocks(batch: int, max_seqlen_q: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices are parts of sequences, whole ones and several ones."""
    rng = np.random.default_rng(batch)
    seqlens = rng.integers(0, 4000, batch)
    starts = np.concatenate([[0], rng.integers(0, max_seqlen_q + 1, batch).cumsum()])
    for options in ({}, {"causal": True}, {"causal": True, "window_size": (300, 0), "cu_seqlens_q": starts}):
        check_twins(132, plain(seqlens, 2, max_seqlen_q=max_seqlen_q, **options), monkeypatch)


@pytest.mark.parametrize("num_splits", [1, 2, 7, 100, 263, 264, 10**6])
def test_num_splits(num_splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seqlens = np.array([100_000, 5, 0, 3000, 40_000])
    check_twins(132, plain(seqlens, num_splits=num_splits), monkeypatch)


def test_huge_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 2**31 - 1
    seqlens = np.array([most, 0, most - 5, 7, most])
    wide = {"window_size": (most, -1), "max_seqlen_q": 2, "attention_chunk": most}
    for options in ({}, {"num_splits": 3}, {"split_size": 64}, {"split_size": 2**30}, wide, {"max_seqlen_k_new": most}):
        check_twins(132, plain(seqlens, **options), monkeypatch)


def test_huge_lengths_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread adds up several sequences, of which each costs more than an int32 holds."""
    most = 2**31 - 1
    seqlens = np.random.default_rng(0).choice((9, most), 3099)
    check_twins(132, plain(seqlens, 3, cache_leftpad=seqlens % 7), monkeypatch)


def test_huge_lengths_for_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 2**31 - 1  # far above max_seqlen_k, which does not bind
    for options in ({}, {"window_size": (20, 0)}, {"window_size": (1000, 0)}, {"attention_chunk": 50}):
        check_twins(400, plain(np.array([most, most - 5, 7]), 1, max_seqlen_k=1000, **options), monkeypatch)


def test_more_blocks_than_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    check_twins(1000, plain(np.random.default_rng(0).integers(0, 20_000, 50)), monkeypatch)


def test_nonsense_on_a_device_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that the host refuses cannot be seen on a GPU: both planners clamp them alike."""
    monkeypatch.setenv("CUFLASH_NUM_SM", "20")
    rng = np.random.default_rng(0)
    batch = 50
    meta = cuflash.get_scheduler_metadata(
        **plain(np.zeros(batch, int), cu_seqlens_q=np.zeros(batch + 1, int), cu_seqlens_k_new=np.zeros(batch + 1, int))
    )
    low, high = -(2**31), 2**31 - 1
    lengths = Lengths(
        cache_seqlens=rng.integers(low, high, batch, np.int32),
        cu_seqlens_q=rng.integers(low, high, batch + 1, np.int32),
        cu_seqlens_k_new=rng.integers(low, high, batch + 1, np.int32),
        cache_leftpad=rng.integers(low, high, batch, np.int32),
    )
    arrays = [np.full_like(meta.array, -1) for _ in range(2)]
    for plan, array in zip((planner.plan, sim.BACKEND.plan), arrays, strict=True):
        plan(meta.problem, meta.partition, lengths, array)
    np.testing.assert_array_equal(*arrays)


def test_a_plan_survives_its_own_refill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_BACKEND", "sim")
    first, second = np.array([4000, 100, 3]), np.array([1, 9000, 0])
    meta = cuflash.get_scheduler_metadata(**plain(first))
    cuflash.get_scheduler_metadata(**plain(second), out=meta)
    np.testing.assert_array_equal(meta.array, cuflash.get_scheduler_metadata(**plain(second)).array)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_it_compiles(arch: int) -> None:
    assert ".entry plan(" in compile_ptx(source("plan.cu"), ("-std=c++17",), f"sm_{arch}", "plan.cu")
