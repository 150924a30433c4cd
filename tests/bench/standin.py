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

from cuflash import arrays, backends, memo
from cuflash.backends.machine import KernelBackend, Launcher
from cuflash.device import Device
from cuflash.kernels.launch import BoundLaunch, Scratch


class DeviceArray:
    """What the library uses of a ``cupy.ndarray``, around a NumPy array."""

    __slots__ = ("data", "dtype", "host", "itemsize", "ndim", "size")

    def __init__(self, host: np.ndarray) -> None:
        self.host = host
        self.dtype, self.itemsize, self.ndim, self.size = host.dtype, host.itemsize, host.ndim, host.size
        self.data = SimpleNamespace(ptr=host.ctypes.data, device_id=0)

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        """Not called: arrays of this type come in as CuPy's."""
        raise NotImplementedError

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

    def view(self, dtype: Any) -> DeviceArray:
        """Return a view."""
        return DeviceArray(self.host.view(dtype))

    def ravel(self) -> DeviceArray:
        """Return a view of one dimension."""
        return DeviceArray(self.host.reshape(-1))

    def reshape(self, shape: tuple[int, ...]) -> DeviceArray:
        """Return a view."""
        return DeviceArray(self.host.reshape(shape))

    def __getitem__(self, where: Any) -> DeviceArray:
        return DeviceArray(self.host[where])

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


class ForeignArray:
    """An array of another framework on the device, around a :class:`DeviceArray`."""

    __slots__ = ("dtype", "native")

    def __init__(self, native: DeviceArray) -> None:
        self.native, self.dtype = native, native.dtype

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.native.data.device_id

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        """Not called: see :func:`from_dlpack`."""
        raise NotImplementedError

    def __array_namespace__(self) -> Any:
        return SimpleNamespace(from_dlpack=ForeignArray)


def from_dlpack(x: ForeignArray) -> DeviceArray:
    """Return another object on the same memory."""
    native = x.native
    array: DeviceArray = object.__new__(DeviceArray)
    array.host, array.data = native.host, native.data
    array.dtype, array.itemsize, array.ndim, array.size = native.dtype, native.itemsize, native.ndim, native.size
    return array


def empty(shape: Any, dtype: Any) -> DeviceArray:
    """Return a new array on the device."""
    return DeviceArray(arrays.empty(shape, dtype, np.empty(0)))


class Machine:
    """A :class:`cuflash.backends.machine.Machine` that does not launch."""

    key = 0

    def __init__(self) -> None:
        self._scratch: dict[str, DeviceArray] = {}

    def address(self, array: DeviceArray) -> int:
        """Return the address of an array."""
        pointer: int = array.data.ptr
        return pointer

    def scratch(self, name: str, memory: Scratch) -> DeviceArray:
        """Return memory of a step, made once."""
        array = self._scratch.get(name)
        if array is None or array.host.nbytes < memory.nbytes:
            array = self._scratch[name] = DeviceArray(np.zeros(memory.shape, memory.dtype))
        return array

    def prepare(self, bound: BoundLaunch, scratch: list[DeviceArray]) -> Launcher:
        """Return what does nothing."""
        return lambda params, arrays: None


class _Backend(KernelBackend):
    """A GPU on which a machine launches."""

    def __init__(self, device: Device, machine: Machine) -> None:
        self._device, self._machine = device, machine

    def device(self, array: Any) -> Device:
        return self._device

    def machine(self, gpu: int | None) -> contextlib.AbstractContextManager[Machine]:
        return contextlib.nullcontext(self._machine)


@contextlib.contextmanager
def gpu(device: Device, machine: Machine) -> Iterator[KernelBackend]:
    """Let the library find a GPU for a while.

    Args:
        device: What GPU.
        machine: What launches on it.

    Yields:
        Its backend.
    """
    backend = _Backend(device, machine)
    cupy, select, unplanned = sys.modules.get("cupy"), backends.select, dict(memo.unplanned)
    memo.unplanned.clear()
    stream = SimpleNamespace(is_capturing=lambda: False)
    cuda = SimpleNamespace(runtime=SimpleNamespace(getDevice=lambda: 0), get_current_stream=lambda: stream)
    arrays.device_types.add(DeviceArray)
    sys.modules["cupy"] = SimpleNamespace(ndarray=DeviceArray, empty=empty, cuda=cuda, from_dlpack=from_dlpack)  # type: ignore
    backends.select = lambda array: backend
    try:
        yield backend
    finally:
        backends.select = select
        memo.unplanned.clear()
        memo.unplanned.update(unplanned)
        arrays.device_types.discard(DeviceArray)
        arrays._importers.pop(DeviceArray, None)
        if cupy is None:
            del sys.modules["cupy"]
        else:
            sys.modules["cupy"] = cupy
