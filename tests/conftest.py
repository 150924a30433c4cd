"""What all tests share: the backends they run on, and what is left out on this machine, said in one line."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: BLAS threads would wait for each other, spinning
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest
from problems import Backend

try:
    import cupy

    HAS_GPU = bool(cupy.cuda.is_available())
except ImportError:
    HAS_GPU = False
HAS_SIMULATOR = importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None


def on(backend: str, *values: Any) -> Any:
    """Return a parameter set of a test on one backend; what needs a GPU is marked so, for ``pytest -m gpu``."""
    return pytest.param(backend, *values, marks=[pytest.mark.gpu] if backend == "cuda" else [])


BACKENDS = ["numpy", *["sim"] * HAS_SIMULATOR, *["cuda"] * HAS_GPU]
"""What this machine has; tests are not even collected for others."""


def backend_of(name: str) -> Backend:
    if name == "cuda":
        return Backend(name, cupy.asarray, cupy.asnumpy)
    return Backend(name, lambda array: array, np.asarray)


@pytest.fixture(params=[on(name) for name in BACKENDS])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Every backend that this machine has; ``pytest -k numpy`` selects one."""
    monkeypatch.setenv("CUFLASH_BACKEND", request.param)
    if request.param == "sim":  # a small GPU, so that items share blocks; test_cluster.py has a large one
        monkeypatch.setenv("CUFLASH_NUM_SM", "8")
    yield backend_of(request.param)


@pytest.fixture(scope="session", autouse=True)
def built_machine(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Build the simulator's machine once: processes that begin side by side would each build their own."""
    if not HAS_SIMULATOR or "PYTEST_XDIST_WORKER" not in os.environ:
        return
    from cuflash.simulator import compile

    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    # Whoever needs a compiler that is not there says so.
    with (tmp_path_factory.getbasetemp().parent / "machine.lock").open("w") as lock, contextlib.suppress(RuntimeError):
        fcntl.flock(lock, fcntl.LOCK_EX)
        compile.load_machine()


@pytest.fixture(autouse=True)
def zeros_stay(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What launches find as zeros, they leave as zeros: the simulator makes new ones every time, a GPU does not."""
    if not HAS_SIMULATOR:
        yield
        return
    from cuflash.backends.sim import SimulatedMachine

    zeros, scratch = [], SimulatedMachine.scratch

    def watched(self: Any, name: str, memory: Any) -> Any:
        array = scratch(self, name, memory)
        if memory.zeroed:
            zeros.append((name, array))
        return array

    monkeypatch.setattr(SimulatedMachine, "scratch", watched)
    yield
    assert not {name for name, array in zeros if array.any()}


# Replaces texts in the source of a kernel (its headers included) that the simulator runs.
ChangeSource = Callable[[str, dict[str, str]], None]


@pytest.fixture
def change_source(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChangeSource]:
    """Change the source of a kernel for as long as a test lasts."""
    from cuflash import memo
    from cuflash.backends import sim as sim_backend
    from cuflash.kernels.source import source

    def forget() -> None:
        sim_backend._function.cache_clear()
        memo.unplanned.clear()

    def change(changed_file: str, texts: dict[str, str]) -> None:
        def changed(file: str) -> str:
            found = source(file)
            if file != changed_file:
                return found
            for text, other in texts.items():
                assert text in found
                found = found.replace(text, other)
            return found

        monkeypatch.setattr(sim_backend, "source", changed)
        forget()

    yield change
    forget()


# -------------------------------------------------------------------------------------------- what is left out, and why
def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the long sweeps too")


def _left_out(config: pytest.Config) -> dict[str, str]:
    """Return the markers of tests that do not run here, and why."""
    reasons = {}
    if not HAS_GPU:
        reasons["gpu"] = "tests on a GPU (CuPy sees none)"
    if not config.getoption("--slow") and "slow" not in config.getoption("-m"):
        reasons["slow"] = "long sweeps (--slow runs them)"
    return reasons


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = set(_left_out(config))
    for item in items:
        callspec = getattr(item, "callspec", None)
        is_on_sim = callspec is None or callspec.params.get("backend", "sim") == "sim"
        if is_on_sim and item.get_closest_marker("slow_on_sim"):
            item.add_marker("slow")

    def is_away(item: pytest.Item) -> bool:
        # Not by keywords: those hold the names of folders, too, and a checkout may lie in one called "slow".
        return not left_out.isdisjoint(marker.name for marker in item.iter_markers())

    away = [item for item in items if is_away(item)]
    if away:
        config.hook.pytest_deselected(items=away)
        items[:] = [item for item in items if not is_away(item)]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reasons = list(_left_out(config).values())
    if not HAS_SIMULATOR:
        reasons.append('the simulator (pip install -e ".[sim]")')
    if reasons:
        terminalreporter.write_line(f"not run: {', '.join(reasons)}")
