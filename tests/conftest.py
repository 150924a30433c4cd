"""What all tests share: the backends they run on, and the ``slow`` marker."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

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
HAS_SIMULATOR = importlib.util.find_spec("cuflash.backends.sim") is not None


def _backend(name: str) -> Backend:
    if name == "cuda":
        return Backend(name, cupy.asarray, cupy.asnumpy)
    return Backend(name, lambda array: array, np.asarray)


@pytest.fixture(
    params=[
        "numpy",
        pytest.param("sim", marks=pytest.mark.skipif(not HAS_SIMULATOR, reason="no simulator")),
        pytest.param("cuda", marks=pytest.mark.skipif(not HAS_GPU, reason="no GPU")),
    ]
)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Every backend that this machine has; ``pytest -k numpy`` selects one."""
    monkeypatch.setenv("CUFLASH_BACKEND", request.param)
    if request.param == "sim":  # a small GPU, so that items share blocks; test_cluster.py has a large one
        monkeypatch.setenv("CUFLASH_NUM_SM", "8")
    yield _backend(request.param)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the long sweeps too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow") and "slow" not in config.getoption("-m"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
