"""A stand-in for a GPU and CuPy: arrays that live "on a device" and a backend that launches what it is told to.

With it the host code of calls on a GPU runs on any machine, where it can be timed and tested.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from cuflash import arrays, backends, kernels
from cuflash import repeat as repeated
from cuflash.device import Device


class DeviceArray:
    """What the library uses of a ``cupy.ndarray``, around a NumPy array."""

    __slots__ = ("data", "dtype", "host", "itemsize", "ndim", "size")

    def __init__(self, host: np.ndarray) -> None:
        self.host = host
        self.dtype, self.itemsize, self.ndim, self.size = host.dtype, host.itemsize, host.ndim, host.size
        self.data = SimpleNamespace(ptr=host.ctypes.data, device_id=0)

    @property
    def shape(self) -> tuple[int, ...]:
        """As NumPy's."""
        return self.host.shape

    @property
    def strides(self) -> tuple[int, ...]:
        """As NumPy's."""
        return self.host.strides

    @property
    def flags(self) -> Any:
        """As NumPy's."""
        return self.host.flags

    def get(self) -> np.ndarray:
        """Return the array in host memory."""
        return self.host

    def copy(self) -> DeviceArray:
        """Return a copy."""
        return DeviceArray(self.host.copy())

    def __deepcopy__(self, memo: Any) -> DeviceArray:
        return self.copy()

    def astype(self, dtype: Any) -> DeviceArray:
        """Return a copy of another type."""
        return DeviceArray(self.host.astype(dtype))

    def swapaxes(self, first: int, second: int) -> DeviceArray:
        """Return a view."""
        return DeviceArray(self.host.swapaxes(first, second))

    def __setitem__(self, where: Any, value: Any) -> None:
        self.host[where] = value.host if isinstance(value, DeviceArray) else value


def empty(shape: Any, dtype: Any) -> DeviceArray:
    """Return a new array on the device."""
    return DeviceArray(arrays.empty(shape, dtype, np.empty(0)))


class Machine:
    """A :class:`cuflash.kernels.Machine` that does not launch."""

    def __init__(self) -> None:
        self._workspace: tuple[DeviceArray, DeviceArray] | None = None

    def address(self, array: DeviceArray) -> int:
        """Return the address of an array."""
        pointer: int = array.data.ptr
        return pointer

    def empty(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """Return a new array."""
        return empty(shape, dtype)

    def workspace(self, partials: int, counters: int) -> tuple[DeviceArray, DeviceArray]:
        """Return the memory between blocks, made once."""
        if self._workspace is None or self._workspace[0].size < partials:
            zeros = DeviceArray(np.zeros(counters, np.int32))
            self._workspace = empty((partials,), np.float32), zeros
        return self._workspace

    def launch(
        self, variant: kernels.Variant, grid: int, threads: int, shared_bytes: int, params: np.ndarray, arrays: Any
    ) -> None:
        """Do nothing."""


@contextlib.contextmanager
def gpu(device: Device, machine: kernels.Machine) -> Iterator[SimpleNamespace]:
    """Let the library find a GPU for a while.

    Args:
        device: What GPU.
        machine: What launches on it.

    Yields:
        Its backend, with the verbs of ``cuflash.backends.cuda``.
    """

    def plan(problem: Any, tiling: Any, num_blocks: int, lengths: Any, array: Any) -> Any:
        launches = kernels.plan(problem, tiling, num_blocks, array.size)
        launches(machine, {"plan": array, **lengths.__dict__})
        return launches

    def attend(problem: Any, operands: Any, metadata: Any) -> Any:
        readable = kernels.aligned(machine, operands)
        launches = kernels.Attention(problem, readable, metadata)
        launches(machine, kernels.named(readable, metadata))
        return launches if readable is operands else None

    def repeat(launches: Any, arrays: dict[str, Any]) -> None:
        launches(machine, arrays)

    backend = SimpleNamespace(USES_PLAN=True, device=lambda array: device, plan=plan, attend=attend, repeat=repeat)
    cupy, select, unplanned = sys.modules.get("cupy"), backends.select, dict(repeated.unplanned)
    repeated.unplanned.clear()
    runtime = SimpleNamespace(getDevice=lambda: 0)
    arrays._importers[DeviceArray] = arrays._import_itself
    sys.modules["cupy"] = SimpleNamespace(  # type: ignore[assignment]
        ndarray=DeviceArray, empty=empty, cuda=SimpleNamespace(runtime=runtime)
    )
    backends.select = lambda array: backend  # type: ignore[assignment, return-value]
    try:
        yield backend
    finally:
        backends.select = select
        repeated.unplanned.clear()
        repeated.unplanned.update(unplanned)
        del arrays._importers[DeviceArray]
        if cupy is None:
            del sys.modules["cupy"]
        else:
            sys.modules["cupy"] = cupy
