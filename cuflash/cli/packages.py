"""Which packages the library can use, and the commands that install what is missing."""

from __future__ import annotations

from importlib import metadata
from typing import NamedTuple

from ..requirements import MATPLOTLIB, SIMULATOR, install
from . import driver

__all__ = ["CUDA", "MATPLOTLIB", "MPI", "NCCL", "SIMULATOR", "Cuda", "cuda", "install"]


class Cuda(NamedTuple):
    """What runs kernels on a GPU."""

    cupy: str
    nvrtc: str
    headers: str


# By the major version of CUDA; pyproject.toml has the same in its extras.
CUDA = {
    12: Cuda("cupy-cuda12x>=14.2,<15", "nvidia-cuda-nvrtc-cu12>=12.8,<13", "nvidia-cuda-runtime-cu12>=12.8,<13"),
    13: Cuda("cupy-cuda13x>=14.2,<15", "nvidia-cuda-nvrtc>=13,<14", "nvidia-cuda-runtime>=13,<14"),
}
MPI = ("mpi4py>=4.1", "mpich>=5")
NCCL = "nccl4py>=0.6,<0.7"


def cuda() -> Cuda:
    """Return the packages that fit the installed CuPy; without one those that fit the driver."""
    for major, packages in CUDA.items():
        if _is_installed(f"cupy-cuda{major}x"):
            return packages
    try:
        version = driver.version()
    except RuntimeError:
        version = None
    return CUDA[12 if version is not None and version < 13000 else 13]  # CUDA 13 needs a driver of 580 or later


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
