"""Which packages the library can use, and the commands that install what is missing.

The commands name the packages themselves: they work wherever this one was installed from.
"""

from __future__ import annotations

from importlib import metadata
from typing import NamedTuple

from . import driver


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
SIMULATOR = ("cuda-bindings>=13,<14", "nvidia-cuda-nvrtc>=13,<14")
MATPLOTLIB = "matplotlib>=3.8"
MPI = ("mpi4py>=4.1", "mpich>=5")
NCCL = "nccl4py>=0.6,<0.7"


def install(*requirements: str) -> str:
    """Return a command that installs packages."""
    return " ".join(["pip install", *(f'"{r}"' if set(r) & set("<>[") else r for r in requirements)])


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
