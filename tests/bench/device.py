"""The GPU that plans are made for, and the backend that runs them, for a while."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def plan_for(num_sm: int, arch: int = 90, backend: str = "numpy") -> Iterator[None]:
    """Set the environment variables of the library.

    Args:
        num_sm: Multiprocessors.
        arch: Architecture, 90 for sm_90.
        backend: Name of the backend.
    """
    wanted = {"CUFLASH_NUM_SM": str(num_sm), "CUFLASH_ARCH": str(arch), "CUFLASH_BACKEND": backend}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
