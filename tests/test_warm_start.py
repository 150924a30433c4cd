"""Kernels are compiled once per variant, and may be before the first call."""

from __future__ import annotations

import numpy as np
import pytest

import cuflash
from cuflash import simulator
from cuflash.backends import sim


@pytest.fixture(autouse=True)
def on_the_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_BACKEND", "sim")
    sim._function.cache_clear()


def step(lengths: np.ndarray, meta: cuflash.SchedulerMetadata) -> None:
    batch = len(lengths)
    q, k = np.ones((batch, 1, 4, 64), np.float32), np.ones((batch, 1, 1, 64), np.float32)
    cache = np.ones((2, batch, 300, 1, 64), np.float32)
    cuflash.flash_attn_with_kvcache(q, *cache, k, k, cache_seqlens=lengths, scheduler_metadata=meta)


def plan(lengths: np.ndarray) -> cuflash.SchedulerMetadata:
    return cuflash.get_scheduler_metadata(
        len(lengths), 1, 300, 4, 1, 64, lengths, qkv_dtype="float32", max_seqlen_k_new=1
    )


def test_one_compilation_per_variant() -> None:
    """Other lengths and another number of sequences are the same variants."""
    for lengths in ([100, 5], [1, 299], [7, 9], [40, 50, 60]):
        meta = plan(np.array(lengths))
        for _layer in range(3):
            step(np.array(lengths), meta)
    assert sim._function.cache_info().misses == 3  # plan, append, decode


def test_compile_leaves_nothing_to_compile() -> None:
    meta = plan(np.array([100, 5]))
    assert cuflash.compile(meta) == 2  # the planner has run
    assert cuflash.compile(meta) == 0
    misses = sim._function.cache_info().misses
    step(np.array([100, 5]), meta)
    assert sim._function.cache_info().misses == misses


def test_numpy_has_nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_BACKEND", "numpy")
    assert cuflash.compile(plan(np.array([100, 5]))) == 0


def test_only_a_plan_can_be_compiled() -> None:
    with pytest.raises(TypeError, match="scheduler_metadata"):
        cuflash.compile(np.zeros(8, np.int32))  # type: ignore[arg-type]


def test_the_disk_cache_goes_by_content(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text is found again whatever its name; another text is not."""
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path))
    code = 'extern "C" __global__ void one(float* x) { x[0] = 1.0f; }'
    first = simulator.compile_ptx(code, (), "sm_90", "a.cu")
    assert simulator.compile_ptx(code, (), "sm_90", "a.cu") == first
    assert simulator.compile_ptx(code.replace("1.0f", "2.0f"), (), "sm_90", "a.cu") != first
