"""Sequences whose keys lie on several ranks: 1 to 4 processes over MPI give what one call gives, or a clear error.

What a rank does stands in context_parallel_ranks.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import HAS_GPU
from problems import DTYPES, Backend

import cuflash
from cuflash.context_parallel import nccl as nccl_transport
from cuflash.context_parallel.agreement import difference
from cuflash.context_parallel.group import merge_blocks
from cuflash.context_parallel.nccl import NcclTransport
from cuflash.packing import Packing

HERE = Path(__file__).parent
RANKS = HERE / "context_parallel_ranks.py"
MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
needs_mpi = pytest.mark.skipif(
    MPIEXEC is None or importlib.util.find_spec("mpi4py") is None, reason="no MPI: pip install mpi4py mpich"
)


def start(ranks: int, *arguments: str, backend: str = "numpy") -> subprocess.Popen[str]:
    """Start Python on some ranks of this machine; they may share its cores."""
    paths = [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    more = {"PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1", "CUFLASH_BACKEND": backend}
    command = [str(MPIEXEC), "-n", str(ranks), sys.executable, *arguments]
    return subprocess.Popen(command, env=os.environ | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return exit code, output and errors; nothing may hang."""
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def run(ranks: int, *arguments: str, backend: str = "numpy") -> str:
    """Run Python on some ranks; return what they print."""
    code, out, err = finish(start(ranks, *arguments, backend=backend))
    assert code == 0, err
    return out


@needs_mpi
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_give_what_one_call_gives(ranks: int) -> None:
    run(ranks, "-m", "mpi4py", str(RANKS), "results")


@needs_mpi
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_disagree(ranks: int) -> None:
    assert run(ranks, "-m", "mpi4py", str(RANKS), "disagreements").count("done") == ranks


@needs_mpi
def test_a_rank_is_missing() -> None:
    """Both others say so within the timeout, and all end; so they do, sooner or later, if one is killed."""
    check_missing({what: start(3, str(RANKS), what) for what in ("raises", "never calls", "stuck", "is killed")}, 2, 2)


def check_missing(processes: dict[str, subprocess.Popen[str]], last: int, seconds: float) -> None:
    """All but the last rank name it in time, and all end with an error."""
    for what, process in processes.items():
        code, out, err = finish(process)
        assert code != 0, what
        if what != "is killed":  # then the launcher ends the others before they can say anything
            pattern = rf"^([\d.]+) s: .*rank {last} did not answer within {seconds:g} s$"
            times = re.findall(pattern, out, re.MULTILINE)
            assert len(times) == last, out + err
            assert all(float(time) < seconds + 2 for time in times)


@needs_mpi
def test_demo() -> None:
    out = run(3, "-m", "cuflash", "--context-parallel", "--batch", "3", "--seqlen", "200", "--heads", "6/2")
    assert "3 ranks" in out and "within float32's rounding" in out


@needs_mpi
def test_bench() -> None:
    """The instrument, which checks what it times, on host arrays."""
    out = run(2, "-m", "tests.bench", "ranks", "--shapes", "b2 L640", "--rounds", "1", "--json")
    (record,) = json.loads(out)
    assert record["workload"] == "b2 L640" and record["collective_us"] > 0


@needs_mpi
@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_bench_without_a_gpu() -> None:
    """It says so, and takes a shape that a host has memory for."""
    code, out, err = finish(start(1, "-m", "tests.bench", "ranks", "--rounds", "1", "--json"))
    assert code == 0, err
    assert "no GPU found" in err and "on host arrays, b1 L640" in err
    assert [record["workload"] for record in json.loads(out)] == ["b1 L640"]


# ------------------------------------------------------------------------------------------------ one process
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(2, 3), (5,)], ids=["dense", "ragged"])
def test_packed_results_are_merged_where_they_lie(rows: tuple[int, ...], dtype: str, backend: Backend) -> None:
    rng = np.random.default_rng(0)
    ranks, heads, dim = 3, 4, 40
    packing = Packing(rows, heads, dim, DTYPES[dtype])
    assert packing.nbytes % 16 == 0
    outs = rng.standard_normal((ranks, *packing.out_shape), np.float32).astype(DTYPES[dtype])
    lses = rng.standard_normal((ranks, *packing.lse_shape), np.float32)
    lses[1, ..., 0] = -np.inf
    blocks = np.full((ranks, packing.nbytes), 255, np.uint8)  # NaN where nothing is packed
    for rank in range(ranks):
        packing.fill(blocks[rank : rank + 1], outs[rank], lses[rank])
    wanted = cuflash.merge_attn_states(*(backend.to_native(x) for x in (outs, lses)))
    native = backend.to_native(blocks)
    found = [backend.to_native(np.zeros_like(backend.to_numpy(x))) for x in wanted]
    merge_blocks(packing.outs(native), packing.lses(native), *found)
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(x), backend.to_numpy(y))


def test_shares_of_heads_are_packed_for_their_ranks() -> None:
    out, lse = np.arange(2 * 3 * 6 * 8.0, dtype=np.float32).reshape(2, 3, 6, 8), np.ones((2, 6, 3), np.float32)
    packing = Packing((2, 3), 2, 8, np.dtype(np.float16))
    blocks = np.zeros((3, packing.nbytes), np.uint8)
    packing.fill(blocks, out, lse)
    np.testing.assert_array_equal(np.concatenate(list(packing.outs(blocks)), 2), out)
    np.testing.assert_array_equal(np.concatenate(list(packing.lses(blocks)), 1), lse)


def test_differences_name_the_ranks() -> None:
    same = {"call": "plan", "headdim": 64}
    text = difference([same, same | {"headdim": 96}, same, same])
    assert text == "ranks must agree about headdim: rank 1 has 96, ranks 0, 2 and 3 have 64"
    assert "about new" in difference([same, same | {"new": 1}])


class FakeNccl:
    """An nccl4py communicator whose collectives never end, or break; an abort takes a while, or waits for a graph."""

    rank, nranks, is_valid = 1, 4, True

    def __init__(self, state: int = 0) -> None:
        self.state, self.calls, self.graph_is_gone = state, list[str](), threading.Event()
        self.graph_is_gone.set()

    def allgather(self, send: np.ndarray, received: np.ndarray, *, stream: int) -> None:
        assert received.shape == (4, send.size) and stream == 7
        self.calls.append("allgather")

    def get_async_error(self) -> int:
        return self.state

    def get_last_error(self) -> str:
        return "the network is gone"

    def abort(self) -> None:
        self.calls.append("abort")
        self.graph_is_gone.wait()
        time.sleep(0.05)
        self.is_valid = False


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A stand-in for CuPy, whose stream never ends; whether it is being captured."""
    state = [False]
    event = types.SimpleNamespace(record=lambda stream: None, done=False)
    stream = types.SimpleNamespace(ptr=7, is_capturing=lambda: state[0])
    cuda = types.SimpleNamespace(Event=lambda **_: event, get_current_stream=lambda: stream)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda, empty=np.empty, asarray=np.asarray))
    monkeypatch.setattr(nccl_transport, "_MOST_OF_ABORT", 0.01)  # shorter than any abort
    return state


@pytest.mark.parametrize("state, text", [(0, "waited 0.5 s"), (7, "waited 0.5 s"), (6, "the network is gone")])
def test_nccl_that_does_not_end(state: int, text: str, capturing: list[bool]) -> None:
    """Without GPUs: the communicator is aborted at the deadline, once, and has been when the error comes."""
    comm = FakeNccl(state)
    transport = NcclTransport(comm, None, 0.5)
    with pytest.raises(cuflash.ContextParallelError, match=text):
        transport.gather(b"12345678")
    assert not comm.is_valid
    transport.tell("again")
    assert comm.calls == ["allgather", "abort"]


def test_nccl_that_a_graph_holds(capturing: list[bool]) -> None:
    """Then an abort ends no sooner than the graph, and is not waited for."""
    comm = FakeNccl()
    transport = NcclTransport(comm, None, 60.0)
    capturing[0] = True
    transport.all_gather(np.zeros(8, np.uint8), np.zeros((4, 8), np.uint8))
    capturing[0] = False
    comm.graph_is_gone.clear()
    begin = time.monotonic()
    transport.tell("over")
    assert time.monotonic() - begin < 5 and comm.is_valid
    comm.graph_is_gone.set()
    assert comm.calls == ["allgather", "abort"]


def test_nccl_is_called_as_it_wants() -> None:
    nccl = pytest.importorskip("nccl.core", reason="pip install nccl4py", exc_type=ImportError)
    for name in ("alltoall", "allgather"):
        inspect.signature(getattr(nccl.Communicator, name)).bind(None, "send", "received", stream=0)
    for name in ("abort", "destroy", "get_async_error", "get_last_error", "rank", "nranks", "is_valid", "init"):
        assert hasattr(nccl.Communicator, name)


def test_the_example_of_the_page() -> None:
    page = (Path(cuflash.__file__).parent / "context_parallel" / "README.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "README.md", "exec"), {})
    assert printed.getvalue().count("32768 keys") == 4
    assert float(printed.getvalue().split()[-1]) < 1e-6


def test_what_is_no_communicator() -> None:
    with pytest.raises(TypeError, match="comm must be a communicator of mpi4py or nccl4py, got int"):
        cuflash.ContextParallel(0)
