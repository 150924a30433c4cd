"""The border: any framework's arrays in, arrays of the caller's kind out, without a copy.

Inside, an array is a ``numpy.ndarray`` (host memory) or a ``cupy.ndarray`` (GPU memory); everything else with a
``__dlpack__`` method passes through the two functions :func:`import_array` and :func:`export_array`. No framework is
imported here: whoever hands over a torch tensor has imported torch.

NumPy's own DLPack knows neither bfloat16 nor float8, so host capsules are read here (ctypes), and made by relabelling
the capsule that NumPy makes for the same bits as unsigned integers.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

NativeArray = Any  # numpy.ndarray | cupy.ndarray

_ALIGNMENT = 64  # what XLA wants of memory that it takes over without a copy; also a cache line
_IMMUTABLE = ("jax", "jaxlib", "tensorflow")  # frameworks whose arrays never change, though DLPack < 1.0 cannot say so


def import_array(name: str, x: Any) -> NativeArray:
    """Return ``x`` as a NumPy or CuPy array on the same memory.

    Strides are kept. Memory that must not be written (read-only NumPy arrays, JAX arrays) gives an array whose
    ``flags.writeable`` is False.

    Args:
        name: The argument's name, for the error.
        x: A NumPy or CuPy array, or any object with ``__dlpack__``.

    Returns:
        ``x`` itself where it is a NumPy or CuPy array, else a view of it.

    Raises:
        TypeError: If ``x`` is not an array, or not one in host or CUDA memory.
        ValueError: If its framework refuses to share it, or its element type has no name in NumPy.
    """
    kind = type(x)
    importer = _importers.get(kind)
    if importer is None:
        importer = _importers[kind] = _importer(name, x)
    return importer(name, x)


def import_index(name: str, x: Any) -> NativeArray:
    """Return an array of indices or lengths as int32.

    Args:
        name: The argument's name, for the error.
        x: On the host an array of any integer type with values in the range of int32, on a device of int32.

    Returns:
        An int32 array; contiguous on the host, where it may be a copy.

    Raises:
        TypeError: If ``x`` is not an integer array.
        ValueError: If a value does not fit.
    """
    array = import_array(name, x)
    if is_on_device(array):
        if array.dtype != np.int32:
            raise TypeError(f"{name} must be int32 on a device, got {array.dtype}")
        return array
    if array.dtype != np.int32:
        if array.dtype.kind not in "iu":
            raise TypeError(f"{name} must be an integer array, got {array.dtype}")
        if array.size and not (-(2**31) <= array.min() and array.max() < 2**31):
            raise ValueError(f"{name} must have values in the range of int32, got {array.min()} to {array.max()}")
    return np.ascontiguousarray(array, np.int32)


def export_array(native: NativeArray, like: Any) -> Any:
    """Return ``native`` as an array of the same kind as ``like``, on the same memory.

    Args:
        native: A NumPy or CuPy array.
        like: An array of the caller's.

    Returns:
        ``native`` itself for NumPy and CuPy callers, else their framework's view of it. (JAX may copy memory that
        does not begin at a multiple of 64 bytes: what :func:`empty` allocates does.)
    """
    kind = type(like)
    if kind is np.ndarray or kind is type(native) or isinstance(like, np.ndarray):
        return native
    # The array API standard's way to the namespace; torch and others have from_dlpack at the top of the package.
    namespace = getattr(like, "__array_namespace__", None)
    module = namespace() if namespace is not None else sys.modules[_root(kind)]
    # On a GPU, from_dlpack tells CuPy the framework's current stream, which then waits for CuPy's current stream.
    return module.from_dlpack(native if is_on_device(native) else _Exporter(native))


def empty(shape: tuple[int, ...], dtype: Any, like: NativeArray) -> NativeArray:
    """Return a new, uninitialised array where ``like`` lives, aligned so that every framework can take it over."""
    if is_on_device(like):
        cupy, number = sys.modules["cupy"], like.data.device_id
        if number == cupy.cuda.runtime.getDevice():
            return cupy.empty(shape, dtype)
        with cupy.cuda.Device(number):
            return cupy.empty(shape, dtype)
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + size].view(dtype).reshape(shape)


def is_writeable(native: NativeArray, given: Any) -> bool:
    """Whether memory may be written; CuPy has no flag for that, so that the caller's own array decides on a GPU."""
    return getattr(native.flags, "writeable", _root(type(given)) not in _IMMUTABLE)


def is_on_device(native: NativeArray) -> bool:
    """Whether a native array lives in GPU memory."""
    return not isinstance(native, np.ndarray)


def is_device_type(kind: type) -> bool:
    """Whether arrays of a type that has come in before are CuPy's own, which come in as they are."""
    return _importers.get(kind) is _import_itself


def memory_of(native: NativeArray) -> str:
    """Name the memory in which a native array lives."""
    return f"the memory of GPU {native.data.device_id}" if is_on_device(native) else "host memory"


def to_host(native: NativeArray) -> np.ndarray:
    """Return a native array's values in host memory: a wait and a copy for one on a GPU."""
    return native.get() if is_on_device(native) else native


def checks_values(on_device: bool) -> bool:
    """Whether a call looks at what index arrays hold: always on the host, on a GPU if ``CUFLASH_VALIDATE`` asks."""
    return not on_device or os.environ.get("CUFLASH_VALIDATE", "0") not in ("", "0")


# ------------------------------------------------------------------------------------------------ kinds of arrays
def _importer(name: str, x: Any) -> Callable[[str, Any], NativeArray]:
    """Choose how arrays of the type of ``x`` come in."""
    if isinstance(x, np.ndarray):
        return _import_numpy
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(x, cupy.ndarray):
        return _import_itself
    if not hasattr(type(x), "__dlpack__") or not hasattr(type(x), "__dlpack_device__"):
        raise TypeError(f"{name} must be an array (NumPy, CuPy or any with __dlpack__), got {type(x).__name__}")
    return _import_dlpack


def _import_itself(name: str, x: Any) -> NativeArray:
    return x


def _import_numpy(name: str, x: np.ndarray) -> np.ndarray:
    if not x.dtype.isnative:
        raise ValueError(f"{name} must be in the machine's byte order, got {x.dtype}")
    return x if type(x) is np.ndarray else x.view(np.ndarray)


def _import_dlpack(name: str, x: Any) -> NativeArray:
    device, _ = x.__dlpack_device__()
    try:
        if device in _HOST_DEVICES:
            return _import_host(name, x)
        if device in _CUDA_DEVICES:
            try:
                import cupy
            except ImportError as error:
                raise ImportError(f"{name} lives on a GPU, which needs CuPy: see python -m cuflash info") from error
            # CuPy hands its current stream to x.__dlpack__, which makes it wait for the producer's stream (not yet
            # run on a GPU by this project's tests). Its DLPack knows bfloat16 but not float8.
            return cupy.from_dlpack(x)
    except BufferError as error:
        raise ValueError(f"{name} cannot be shared: {error}") from error
    raise TypeError(f"{name} must be in host or CUDA memory, got DLPack device type {int(device)}")


def _root(kind: type) -> str:
    return kind.__module__.partition(".")[0]


_importers: dict[type, Callable[[str, Any], NativeArray]] = {}


# ---------------------------------------------------------------------------------------------------- host DLPack
# The structs of dlpack.h: https://dmlc.github.io/dlpack/latest/c_api.html
_HOST_DEVICES = (1, 3)  # kDLCPU, kDLCUDAHost
_CUDA_DEVICES = (2, 13)  # kDLCUDA, kDLCUDAManaged
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
    """Return a capsule's name and the managed tensor in it."""
    name = _VERSIONED if _capsule_is_valid(capsule, _VERSIONED) else _UNVERSIONED
    struct = _DLManagedTensorVersioned if name is _VERSIONED else _DLManagedTensor
    return name, struct.from_address(_capsule_pointer(capsule, name))


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


def _import_host(name: str, x: Any) -> np.ndarray:
    """View the host memory behind ``x.__dlpack__()`` as a NumPy array."""
    try:
        capsule = x.__dlpack__(max_version=(1, 1))
    except TypeError:  # older than DLPack 1.0
        capsule = x.__dlpack__()
    capsule_name, managed = _managed(capsule)
    tensor = managed.tensor
    dtype = _DTYPES.get((tensor.code, tensor.bits))
    if dtype is None or tensor.lanes != 1:
        raise ValueError(f"{name} has elements that NumPy cannot name: {getattr(x, 'dtype', 'unknown')}")
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(s * dtype.itemsize for s in tensor.strides[: tensor.ndim]) if tensor.strides else None
    if capsule_name is _VERSIONED:
        read_only = bool(managed.flags & _READ_ONLY)
    else:
        read_only = _root(type(x)) in _IMMUTABLE
    address = (tensor.data or 0) + tensor.byte_offset
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


class _Exporter:
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
