"""Context parallelism with a GPU per rank; what a rank does stands in context_parallel_ranks.py."""

from __future__ import annotations

import importlib.util

import pytest
from conftest import HAS_GPU
from test_context_parallel import RANKS, check_missing, needs_mpi, run, start


def _gpus() -> int:
    if not HAS_GPU or importlib.util.find_spec("nccl") is None:
        return 0
    import cupy

    return int(cupy.cuda.runtime.getDeviceCount())


pytestmark = [
    pytest.mark.gpu,
    needs_mpi,
    pytest.mark.skipif(_gpus() < 2, reason="fewer than two GPUs, or no nccl4py"),
    pytest.mark.parametrize("how", ["direct", "collective"]),
]


@pytest.mark.parametrize("cases", ["0369", "147", "258"])  # kernels compile side by side
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_give_what_one_call_gives(ranks: int, cases: str, how: str) -> None:
    if ranks > _gpus():
        pytest.skip(f"fewer than {ranks} GPUs")
    run(ranks, "-m", "mpi4py", str(RANKS), "results", how, *cases, backend="auto")


def test_a_step_in_one_graph(how: str) -> None:
    run(2, "-m", "mpi4py", str(RANKS), "graph", how, backend="auto")


def test_ranks_that_disagree(how: str) -> None:
    assert run(2, "-m", "mpi4py", str(RANKS), "disagreements", how, backend="auto").count("done") == 2


@pytest.mark.parametrize("what", ["raises", "never calls", "never replays", "is killed"])
def test_a_rank_is_missing(what: str, how: str) -> None:
    check_missing({what: start(2, str(RANKS), what, how, backend="auto")}, 1, 6)
