"""A stand-in for a GPU, CuPy and torch: arrays that live "on a device" and a backend that launches what it is told to.

With it the host code of calls on a GPU runs on any machine, where it can be timed and tested.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from cuflash import arrays, backends, layouts, memo
from cuflash.backends.machine import KernelBackend, Launcher
from cuflash.device import Device
from cuflash.dtypes import FLOAT_DTYPES, numpy_dtype
from cuflash.kernels.boxes import MAP_BYTES, Boxed
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

    def reshape(self, *shape: Any) -> DeviceArray:
        """Return a view."""
        return DeviceArray(self.host.reshape(*shape))

    def __getitem__(self, where: Any) -> DeviceArray:
        return DeviceArray(self.host[_on_host(where)])

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
        self.host[_on_host(where)] = _on_host(value)


def _on_host(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(_on_host, x))
    return x.host if isinstance(x, DeviceArray) else x


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


@dataclass(frozen=True)
class _Device:
    """What the library reads of a ``torch.device``."""

    type: str
    index: int


class Tensor(ForeignArray):
    """What the library reads of a ``torch.Tensor``, in about the time that torch takes."""

    __slots__ = ("requires_grad", "negative", "_address", "_device", "_stride")

    def __init__(self, native: DeviceArray) -> None:
        self.requires_grad = self.negative = False
        self.set_(native)

    def set_(self, native: DeviceArray) -> None:
        """Take other memory, as torch's does."""
        super().__init__(native)
        self._address, self._device = native.data.ptr, _Device("cuda", native.data.device_id)
        self._stride = tuple(stride // native.itemsize for stride in native.strides)

    @property
    def shape(self) -> tuple[int, ...]:
        """As torch's."""
        return self.native.shape

    @property
    def device(self) -> _Device:
        """As torch's."""
        return self._device

    @classmethod
    def empty(cls, *shape: int, dtype: Any, device: _Device) -> Tensor:
        """Return a new tensor, as ``torch.empty`` does."""
        return cls(empty(shape, dtype))

    def stride(self) -> tuple[int, ...]:
        """As torch's: in elements."""
        return self._stride

    def data_ptr(self) -> int:
        """As torch's."""
        return self._address

    def is_neg(self) -> bool:
        """As torch's: whether its values are the negative ones of what lies in memory."""
        return self.negative

    def reshape(self, *shape: Any) -> Tensor:
        """Return a view."""
        return Tensor(self.native.reshape(*shape))

    def __array_namespace__(self) -> Any:
        return SimpleNamespace(from_dlpack=Tensor)


def host(array: DeviceArray | ForeignArray) -> np.ndarray:
    """Return the memory of an array of whatever kind."""
    return array.native.host if isinstance(array, ForeignArray) else array.host


def from_dlpack(x: ForeignArray) -> DeviceArray:
    """Return another object on the same memory."""
    if getattr(x, "requires_grad", False):
        raise BufferError("it requires a gradient")
    native = x.native
    array: DeviceArray = object.__new__(DeviceArray)
    array.host, array.data = native.host, native.data
    array.dtype, array.itemsize, array.ndim, array.size = native.dtype, native.itemsize, native.ndim, native.size
    return array


def empty(shape: Any, dtype: Any) -> DeviceArray:
    """Return a new array on the device."""
    return DeviceArray(arrays.empty(shape, dtype, np.empty(0)))


def filled(value: Any, shape: Any, dtype: Any) -> DeviceArray:
    """Return a new array of equal elements on the device."""
    array = empty(shape if isinstance(shape, tuple) else (shape,), dtype)
    array[...] = value
    return array


def asarray(x: Any) -> DeviceArray:
    """Return an array itself, or a copy on the device of one on the host."""
    return x if isinstance(x, DeviceArray) else filled(x, np.shape(x), np.asarray(x).dtype)


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

    def tensor_map(self, boxed: Boxed, address: int) -> bytes:
        """Return no map: nobody looks at it."""
        return bytes(MAP_BYTES)

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
    modules = {name: sys.modules.get(name) for name in ("cupy", "torch")}
    select, unplanned = backends.select, dict(memo.unplanned)
    memo.unplanned.clear()
    stream = SimpleNamespace(is_capturing=lambda: False, ptr=0)
    cuda = SimpleNamespace(runtime=SimpleNamespace(getDevice=lambda: 0), get_current_stream=lambda gpu=-1: stream)
    sys.modules["cupy"] = SimpleNamespace(  # type: ignore
        __name__="cupy", ndarray=DeviceArray, empty=empty, cuda=cuda, from_dlpack=from_dlpack,
        zeros=partial(filled, 0), ones=partial(filled, 1), asarray=asarray,
    )  # fmt: skip
    sys.modules["torch"] = SimpleNamespace(  # type: ignore
        Tensor=Tensor, empty=Tensor.empty, _C=SimpleNamespace(_cuda_getCurrentRawStream=lambda gpu: 0),
        **{name: numpy_dtype(name) for name in (*FLOAT_DTYPES, "int32")},
    )  # fmt: skip
    readers = dict(layouts.readers)
    layouts.readers.clear()
    backends.select = lambda array: backend
    try:
        yield backend
    finally:
        backends.select = select
        memo.unplanned.clear()
        memo.unplanned.update(unplanned)
        layouts.readers.clear()
        layouts.readers.update(readers)
        arrays._importers.pop(DeviceArray, None)
        for name, module in modules.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
