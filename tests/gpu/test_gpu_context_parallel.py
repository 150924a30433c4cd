"""Context parallelism over NCCL, a GPU per rank; what a rank does stands in context_parallel_ranks.py."""

from __future__ import annotations

import importlib.util

import pytest
from conftest import HAS_GPU
from test_context_parallel import RANKS, needs_mpi, run


def _gpus() -> int:
    if not HAS_GPU or importlib.util.find_spec("nccl") is None:
        return 0
    import cupy

    return int(cupy.cuda.runtime.getDeviceCount())


pytestmark = [
    pytest.mark.gpu,
    needs_mpi,
    pytest.mark.skipif(_gpus() < 2, reason="fewer than two GPUs, or no nccl4py"),
]


@pytest.mark.parametrize("scenario", ["results", "graph"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_with_a_gpu_each(ranks: int, scenario: str) -> None:
    if ranks > _gpus():
        pytest.skip(f"fewer than {ranks} GPUs")
    run(ranks, "-m", "mpi4py", str(RANKS), scenario, "nccl", backend="auto")
