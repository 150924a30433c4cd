"""Who does the work: NumPy, CUDA through CuPy, or the CUDA kernels on the simulator.

A backend has five verbs: ``device``, ``plan``, ``attend``, ``merge`` and ``prepare``; one that runs kernels can repeat
what it did, too. It knows nothing of the caller's arguments, only of problems, native arrays and plans.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from ..memory import is_on_device

NAMES = ("auto", "cuda", "numpy", "sim")


def select(array: Any) -> Any:
    """Return the backend for arrays that live where ``array`` lives.

    ``CUFLASH_BACKEND`` chooses: auto (default) takes CUDA for arrays on a GPU and NumPy for arrays in host memory; sim
    runs the CUDA kernels on the simulator for arrays in host memory.

    Args:
        array: A native array.

    Returns:
        The backend.

    Raises:
        ValueError: If ``CUFLASH_BACKEND`` names no backend, or one that cannot reach the array.
    """
    name = os.environ.get("CUFLASH_BACKEND") or "auto"
    if name not in NAMES:
        raise ValueError(f"CUFLASH_BACKEND must be one of {', '.join(NAMES)}, got {name!r}")
    on_device = is_on_device(array)
    if name == "auto":
        name = "cuda" if on_device else "numpy"
    elif on_device != (name == "cuda"):
        place = "on a GPU" if on_device else "in host memory"
        raise ValueError(f"CUFLASH_BACKEND={name} cannot use arrays that are {place}")
    return importlib.import_module(f".{name}", __name__).BACKEND
