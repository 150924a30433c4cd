"""DLPack for host memory: NumPy's own knows neither bfloat16 nor float8.

Capsules are read here by ctypes, and made by relabelling the capsule that NumPy makes for the same bits as unsigned
integers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

# The structs of dlpack.h: https://dmlc.github.io/dlpack/latest/c_api.html
HOST_DEVICES = (1, 3)  # kDLCPU, kDLCUDAHost
CUDA_DEVICES = (2, 13)  # kDLCUDA, kDLCUDAManaged
_MAJOR = 1  # version of the structs; of others only what stands before the flags lies where it does here
_READ_ONLY = 1  # bit of DLManagedTensorVersioned.flags

_DTYPES: dict[tuple[int, int], np.dtype] = {
    **{(0, 8 * size): np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    **{(1, 8 * size): np.dtype(f"u{size}") for size in (1, 2, 4, 8)},
    **{(2, 8 * size): np.dtype(f"f{size}") for size in (2, 4, 8)},
    (4, 16): np.dtype(ml_dtypes.bfloat16),
    (6, 8): np.dtype(bool),
    (10, 8): np.dtype(ml_dtypes.float8_e4m3fn),
    (12, 8): np.dtype(ml_dtypes.float8_e5m2),
}
_CODES = {dtype: code for (code, _), dtype in _DTYPES.items()}


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # in elements; NULL: C order
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)  # PYFUNCTYPE keeps the GIL, as NumPy does when it calls a deleter


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("manager_ctx", ctypes.c_void_p), ("deleter", _Deleter))


class _DLManagedTensorVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", _Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    )


_VERSIONED, _UNVERSIONED = b"dltensor_versioned", b"dltensor"
# Names that a consumed capsule bears from then on; the bytes must outlive the capsule.
_USED = {_VERSIONED: b"used_dltensor_versioned", _UNVERSIONED: b"used_dltensor"}

_capsule_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is_valid.argtypes = (ctypes.py_object, ctypes.c_char_p)
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.argtypes, _capsule_pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
_capsule_set_name = ctypes.pythonapi.PyCapsule_SetName
_capsule_set_name.argtypes = (ctypes.py_object, ctypes.c_char_p)


def _managed(capsule: Any) -> tuple[bytes, Any]:
    """Return a capsule's name and the managed tensor in it.

    Raises:
        BufferError: If its layout is that of another major version; it has been released, as DLPack asks for.
    """
    name = _VERSIONED if _capsule_is_valid(capsule, _VERSIONED) else _UNVERSIONED
    struct = _DLManagedTensorVersioned if name is _VERSIONED else _DLManagedTensor
    address = _capsule_pointer(capsule, name)
    managed = struct.from_address(address)
    if name is _VERSIONED and managed.major != _MAJOR:
        version = f"{managed.major}.{managed.minor}"
        _capsule_set_name(capsule, _USED[name])
        if managed.deleter:
            managed.deleter(address)
        raise BufferError(f"it comes by DLPack {version}, not {_MAJOR}")
    return name, managed


class _Foreign:
    """Owns a managed tensor: NumPy keeps it as the base of the arrays that view its memory."""

    __slots__ = ("__array_interface__", "_deleter", "_managed")

    def __init__(self, managed: Any, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface
        self._deleter = managed.deleter
        self._managed = ctypes.addressof(managed)

    def __del__(self) -> None:
        if self._deleter:
            self._deleter(self._managed)


def device_type(name: str, x: Any) -> int:
    """Return in which kind of memory an array lies.

    Raises:
        TypeError: If it does not say so.
    """
    try:
        return int(x.__dlpack_device__()[0])
    except Exception as error:  # whatever a framework raises
        raise TypeError(f"{name} must say in which memory it lies, got {type(x).__name__}: {error}") from error


def import_host(name: str, x: Any, is_immutable: bool) -> np.ndarray:
    """View the host memory behind ``x.__dlpack__()`` as a NumPy array.

    Args:
        name: The argument's name, for the error.
        x: The array.
        is_immutable: Whether it must not be written, if DLPack cannot say so.

    Raises:
        ValueError: If its framework refuses, if its element type has no name in NumPy, or if it has no memory.
    """
    try:
        try:
            capsule = x.__dlpack__(max_version=(1, 1))
        except TypeError:  # older than DLPack 1.0
            capsule = x.__dlpack__()
        capsule_name, managed = _managed(capsule)
    except Exception as error:  # whatever a framework raises
        raise ValueError(f"{name} cannot be shared: {error}") from error
    tensor = managed.tensor
    dtype = _DTYPES.get((tensor.code, tensor.bits))
    if dtype is None or tensor.lanes != 1:
        raise ValueError(f"{name} has elements that NumPy cannot name: {getattr(x, 'dtype', 'unknown')}")
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(s * dtype.itemsize for s in tensor.strides[: tensor.ndim]) if tensor.strides else None
    if capsule_name is _VERSIONED:
        read_only = bool(managed.flags & _READ_ONLY)
    else:
        read_only = is_immutable
    address = (tensor.data or 0) + tensor.byte_offset
    check_memory(name, address, shape)
    # ml_dtypes have no code in the array interface: the bits come as unsigned integers.
    interface = {
        "version": 3,
        "typestr": dtype.str if dtype.isbuiltin == 1 else np.dtype(f"u{dtype.itemsize}").str,
        "shape": shape,
        "strides": strides,
        "data": (address, read_only),
    }
    _capsule_set_name(capsule, _USED[capsule_name])  # from here on the memory is ours to release
    array = np.asarray(_Foreign(managed, interface))
    return array if array.dtype == dtype else array.view(dtype)


def check_memory(name: str, address: int, shape: tuple[int, ...]) -> None:
    """Raise if an array has elements and no memory: frameworks can take a tensor's memory away and leave its shape.

    Raises:
        ValueError: Naming the array.
    """
    if not address and 0 not in shape:
        raise ValueError(f"{name} must have memory, got shape {shape} at address 0")


def float8_name(x: Any) -> str | None:
    """Return the name of the float8 that an array's elements are, None if they are something else."""
    return _float8_name(getattr(x, "dtype", None))


@lru_cache(maxsize=None)
def _float8_name(dtype: Hashable) -> str | None:
    name = str(dtype).rpartition(".")[2]
    return name if name.startswith("float8") else None


class AsBytes:
    """A framework's array of float8 as one of uint8: for importers that have no name for float8, as CuPy has not."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self._array.__dlpack__(**options)
        _managed(capsule)[1].tensor.code = _CODES[np.dtype(np.uint8)]
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self._array.__dlpack_device__()
        return device


class Exporter:
    """Hands a NumPy array to another framework, with the element types that NumPy's own DLPack lacks."""

    def __init__(self, array: np.ndarray) -> None:
        self._code = None if array.dtype.isbuiltin == 1 else _CODES[array.dtype]
        self._bits = array if self._code is None else array.view(f"u{array.dtype.itemsize}")

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self._bits.__dlpack__(**options)
        if self._code is not None:
            _managed(capsule)[1].tensor.code = self._code
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._bits.__dlpack_device__()
