"""What counts as an array in annotations: NumPy's, CuPy's, torch's, JAX's and all others that speak DLPack."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar


class Array(Protocol):
    """An array whose memory can be shared by DLPack (https://dmlc.github.io/dlpack/latest/python_spec.html).

    At run time it needs ``__dlpack_device__``, too, which the type stubs of JAX do not have.

    Example:
        >>> import numpy as np
        >>> from cuflash.array_types import Array
        >>> def size(x: Array) -> int:
        ...     return np.from_dlpack(x).size
        >>> size(np.ones((2, 3)))
        6
    """

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        """Return a capsule with the array's memory, shape, strides and element type."""


ArrayT = TypeVar("ArrayT", bound=Array)
"""A caller's kind of array: what comes in is what goes out."""
