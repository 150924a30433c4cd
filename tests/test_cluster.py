"""Small problems: a cluster of blocks per item, merged through distributed shared memory, on the simulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from problems import Backend, Case, check, first_pairs, make_inputs
from test_attention import PAIRS

import cuflash
from cuflash import simulator
from cuflash.device import Device
from cuflash.kernels.tiles import tiling
from cuflash.problem import make_problem

FREE = [case for case in PAIRS if not case.num_splits and not case.split_size]


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.setenv("CUFLASH_BACKEND", "sim")
    monkeypatch.setenv("CUFLASH_NUM_SM", "132")
    monkeypatch.setenv("CUFLASH_ARCH", "90")
    return Backend("sim", lambda array: array, np.asarray)


def cluster(batch: int, heads: int, seqlen: int, arch: int = 90, headdim: int = 128, **options: Any) -> int:
    problem = make_problem(batch, 1, 4 * heads, heads, headdim, **options)
    return tiling(problem, Device(132, arch), seqlen).cluster


def test_small_problems_have_clusters() -> None:
    assert cluster(1, 4, 1024) == 8
    assert cluster(1, 8, 4096) == 8
    assert cluster(3, 8, 1024) == 4
    assert cluster(4, 8, 1024) == 4  # 128 blocks, of which two fit one multiprocessor
    assert cluster(2, 8, 1024) == 4  # 128 blocks of 128 keys are no better than 64 of 256
    assert cluster(8, 8, 512) == 2
    assert cluster(1, 1, 128) == 2


def test_others_have_none() -> None:
    assert cluster(32, 8, 4096) == 1  # more items than multiprocessors
    assert cluster(1, 8, 32768) == 1  # reading takes longer than merging
    assert cluster(8, 8, 1024) == 1  # sequences of other lengths would wait for the longest
    assert cluster(4, 8, 1024, headdim=256) == 1  # no two blocks fit one multiprocessor
    assert cluster(1, 4, 100) == 1  # fewer than 64 keys a block
    assert cluster(1, 4, 1024, arch=80) == 1  # clusters came with sm_90
    for options in ({"num_splits": 4}, {"num_splits": 1}, {"split_size": 64}, {"sm_margin": 4}):
        assert cluster(1, 4, 1024, **options) == 1
    assert tiling(make_problem(1, 1, 16, 4, 128), Device(132, 90)).cluster == 1  # no bound of the lengths


@pytest.mark.parametrize("case", first_pairs(FREE, 0.3))
def test_features(case: Case, sim: Backend) -> None:
    """The cases of test_attention.py that do not ask for splits, with every check and in random order."""
    with simulator.record(seed=case.seed, cp_async="random"):
        check(case, make_inputs(case), sim)


@pytest.mark.parametrize("lengths", [(1024,), (130, 0, 1, 1000), (513, 512, 511)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lengths(lengths: tuple[int, ...], dtype: str, sim: Backend) -> None:
    case = Case(dtype=dtype, headdim=(128, 128), heads=(4, 1), seqlens=lengths, seqlens_q=1, page_size=16, seed=1)
    with simulator.record(seed=1, cp_async="late") as launches:
        check(case, make_inputs(case), sim)
    decode = [launch for launch in launches if launch.kernel == "decode"]
    assert decode and all(launch.cluster[0] > 1 for launch in decode)


def test_one_launch_without_partial_results(sim: Backend) -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 1, 8, 64), np.float32)
    k, v = rng.standard_normal((2, 1, 1024, 2, 64), np.float32)
    meta = cuflash.get_scheduler_metadata(1, 1, 1024, 8, 2, 64, np.array([1024]), qkv_dtype="float32")
    with simulator.record() as launches:
        cuflash.flash_attn_with_kvcache(q, k, v, cache_seqlens=np.array([1024]), scheduler_metadata=meta)
    (launch,) = launches
    assert launch.cluster == (8, 1, 1) and launch.grid == (16, 1, 1)
    assert "partials" not in launch.counters.arrays
