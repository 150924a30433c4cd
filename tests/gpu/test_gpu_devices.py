"""Several GPUs in one machine: a call runs where its arrays are, whatever GPU is the current one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import HAS_GPU

import cuflash


def _has_two() -> bool:
    if not HAS_GPU:
        return False
    import cupy

    return int(cupy.cuda.runtime.getDeviceCount()) > 1


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not _has_two(), reason="fewer than two GPUs")]

BATCH, HEADS_Q, HEADS_KV, DIM, PAGE, PAGES = 3, 8, 2, 64, 16, 20


def _arguments(number: int) -> dict[str, Any]:
    import cupy

    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(np.float16)

    host = {
        "q": normal(BATCH, 1, HEADS_Q, DIM),
        "k_cache": normal(BATCH * PAGES, PAGE, HEADS_KV, DIM),
        "v_cache": normal(BATCH * PAGES, PAGE, HEADS_KV, DIM),
        "k": normal(BATCH, 1, HEADS_KV, DIM),
        "v": normal(BATCH, 1, HEADS_KV, DIM),
        "cache_seqlens": np.array([5, 300, 77], np.int32),
        "page_table": rng.permutation(BATCH * PAGES).astype(np.int32).reshape(BATCH, PAGES),
    }
    with cupy.cuda.Device(number):
        return {name: cupy.asarray(array) for name, array in host.items()}


def _plan(arguments: dict[str, Any], out: Any = None) -> cuflash.SchedulerMetadata:
    return cuflash.get_scheduler_metadata(
        BATCH, 1, PAGE * PAGES, HEADS_Q, HEADS_KV, DIM, arguments["cache_seqlens"], qkv_dtype="float16",
        page_size=PAGE, max_seqlen_k_new=1, causal=True, out=out,
    )  # fmt: skip


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("is_planned", [True, False])
def test_a_call_runs_where_its_arrays_are(number: int, is_planned: bool) -> None:
    import cupy

    results = []
    for current in (number, 1 - number, 1 - number):
        arguments = _arguments(number)
        with cupy.cuda.Device(current):
            metadata = _plan(arguments) if is_planned else None
            if is_planned:
                for _ in range(2):
                    assert _plan(arguments, metadata) is metadata
            for _ in range(2):  # checked, then remembered; the append writes the same again
                out, lse = cuflash.flash_attn_with_kvcache(
                    **arguments, causal=True, scheduler_metadata=metadata, return_softmax_lse=True
                )
                assert out.device.id == lse.device.id == number
        with cupy.cuda.Device(number):
            cupy.cuda.get_current_stream().synchronize()
            results.append((out.get(), lse.get(), arguments["k_cache"].get()))
    for other in results[1:]:
        for found, wanted in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_arrays_on_two_gpus_are_refused() -> None:
    arguments = _arguments(0)
    arguments["page_table"] = _arguments(1)["page_table"]
    with pytest.raises(ValueError, match="page_table must be in the memory of GPU 0 like q"):
        cuflash.flash_attn_with_kvcache(**arguments, causal=True)
