"""The simulator as a package: on its own, from a zip file, interrupted."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided
from simulated import compiled, run

from cuflash import simulator
from cuflash.simulator import SimulationError

HERE = Path(simulator.__file__).parent


@pytest.mark.parametrize("path", sorted(HERE.rglob("*.py")), ids=lambda path: path.name)
def test_imports_nothing_from_the_rest(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(name.name.split(".")[0] == "cuflash" for name in node.names), node.lineno
        if isinstance(node, ast.ImportFrom):
            inside = len(path.relative_to(HERE).parts)  # as many dots stay in the package
            assert node.level <= inside, node.lineno
            assert node.level or (node.module or "").split(".")[0] != "cuflash", node.lineno


def test_from_a_zip_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "package.zip", "w") as archive:
        for path in HERE.parent.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                archive.write(path, path.relative_to(HERE.parents[1]))
    code = """
import numpy as np
import cuflash
from cuflash.simulator import SimModule
assert ".zip" in cuflash.__file__, cuflash.__file__
x = np.ones(32, np.float32)
SimModule('extern "C" __global__ void f(float* x) { x[threadIdx.x] = 3; }').get_function("f")(1, 32, (x,))
assert (x == 3).all()
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "package.zip")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("stride", [2**40, -(2**40), 0, 1])
def test_an_axis_of_size_1_may_have_any_stride(stride: int) -> None:
    kernel = compiled('extern "C" __global__ void kernel(float* x) { x[threadIdx.x] *= 2; }')
    x = np.arange(32, dtype=np.float32)
    run(kernel, 1, 32, (as_strided(x, (1, 32, 1), (stride, 4, stride)),))
    np.testing.assert_array_equal(x, 2 * np.arange(32))
    with pytest.raises(SimulationError, match="bounds"):
        run(kernel, 1, 64, (as_strided(x, (1, 32, 1), (stride, 4, stride)),))


LOOPS = {
    "arithmetic": "for (int i = 0; i < n; ++i) x = x * x + 1.0f;",
    "memory": "for (int i = 0; i < n; ++i) { tile[t] = x; __syncwarp(); x += tile[t ^ 1]; __syncwarp(); }",
    "barriers": "for (int i = 0; i < n; ++i) __syncthreads();",
    "spinning": "while (*(volatile float*)out == 0) ;",
}
ENDLESS = """
import os, signal, threading, time
import numpy as np
from cuflash.simulator import SimModule, record

def launch(loop, out, n):
    head = 'extern "C" __global__ void kernel(float* out, int n)'
    code = head + "{ __shared__ float tile[128]; int t = threadIdx.x; " + loop + "}"
    with record(time_limit=600):
        SimModule(code).get_function("kernel")(1, 128, (out, np.int32(n)))

signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts this may have it ignored
launch("out[t] = n;", np.zeros(128, np.float32), 1)
sent = []
def interrupt():
    sent.append(time.perf_counter())
    os.kill(os.getpid(), signal.SIGINT)

timer = threading.Timer(2, interrupt)
timer.start()
try:
    launch("float x = 0; LOOP out[t] = x + tile[t];", np.zeros(128, np.float32), 2**31 - 1)
except KeyboardInterrupt:
    assert time.perf_counter() - sent[0] < 0.5, time.perf_counter() - sent[0]
    out = np.zeros(128, np.float32)
    launch("tile[t] = n; __syncthreads(); out[t] = tile[t ^ 1];", out, 7)
    assert (out == 7).all()
    print("interrupted")
"""


@pytest.mark.parametrize("loop", LOOPS)
def test_control_c(loop: str) -> None:
    """In a process of its own; afterwards the machine is as it was."""
    done = subprocess.run(
        [sys.executable, "-c", ENDLESS.replace("LOOP", LOOPS[loop])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        timeout=120,
    )
    assert done.stdout == "interrupted\n", done.stderr


def test_other_signals_and_threads_have_their_turn() -> None:
    """The launch goes on until its time limit."""
    seen: list[int] = []
    ticks: list[int] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(0.01):
            ticks.append(1)

    kernel = compiled('extern "C" __global__ void kernel(volatile int* x) { while (*x == 0) ; }')
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    thread = threading.Thread(target=tick)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    thread.start()
    start = time.perf_counter()
    try:
        with pytest.raises(SimulationError, match="longer than"):
            run(kernel, 1, 32, (np.zeros(1, np.int32),), time_limit=1.0)
    finally:
        stop.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    assert time.perf_counter() - start < 3
    assert seen == [signal.SIGUSR1]
    assert len(ticks) > 5
