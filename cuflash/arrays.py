"""The border: any framework's arrays in, arrays of the caller's kind out, without a copy.

Inside, an array is a ``numpy.ndarray`` (host memory) or a ``cupy.ndarray`` (GPU memory); everything else with a
``__dlpack__`` method passes through :func:`import_array` and :func:`exporter`. No framework is
imported here: whoever hands over a torch tensor has imported torch.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from .dlpack import CUDA_DEVICES, HOST_DEVICES, AsBytes, Exporter, check_memory, device_type, float8_name, import_host
from .memory import NativeArray, is_aligned, is_on_device

_ALIGNMENT = 64  # what XLA wants of memory that it takes over without a copy; also a cache line
_INT32_MAX = 2**31 - 1
_IMMUTABLE = (("jax", "Array"), ("tensorflow", "Tensor"))  # arrays that never change, which DLPack < 1.0 cannot say


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


def import_device_array(name: str, x: Any) -> NativeArray | None:
    """Return ``x`` as a CuPy array if it lives on a GPU, else None: also for what is no array at all."""
    kind = type(x)
    if not hasattr(kind, "__dlpack_device__") or isinstance(x, np.ndarray):
        return None
    if device_type(name, x) not in CUDA_DEVICES:
        return None
    return _import_cuda(name, x) if _importers.get(kind) is _import_dlpack else import_array(name, x)


def import_index(name: str, x: Any, wraps: bool = False) -> NativeArray:
    """Return an array of indices or lengths as int32.

    Args:
        name: The argument's name, for the error.
        x: On the host an array of any integer type with values in the range of int32, on a device of int32.
        wraps: Whether values beyond the range are legal where nobody looks: they become the nearest that int32 has
            (all negative ones -1).

    Returns:
        An int32 array; aligned, and contiguous on the host, where it may be a copy.

    Raises:
        TypeError: If ``x`` is not an integer array.
        ValueError: If a value does not fit.
    """
    array = import_array(name, x)
    if is_on_device(array):
        if array.dtype != np.int32:
            raise TypeError(f"{name} must be int32 on a device, got {array.dtype}")
        return aligned(name, array)
    if array.dtype != np.int32:
        if array.dtype.kind not in "iu":
            raise TypeError(f"{name} must be an integer array, got {array.dtype}")
        if wraps:
            array = np.clip(array, np.asarray(-1 if array.dtype.kind == "i" else 0, array.dtype), None)
            array = np.minimum(array, np.asarray(min(_INT32_MAX, np.iinfo(array.dtype).max), array.dtype))
        elif array.size and not (-_INT32_MAX <= array.min() and array.max() <= _INT32_MAX):
            raise ValueError(f"{name} must have values in the range of int32, got {array.min()} to {array.max()}")
    # Not ascontiguousarray, which makes one dimension of none.
    return np.require(array, np.int32, ["A"]) if array.flags.c_contiguous else np.array(array, np.int32, order="C")


def exporter(like: Any) -> Callable[[NativeArray], Any]:
    """Return what makes arrays of the kind of ``like`` of native ones, on the same memory.

    NumPy and CuPy callers get native arrays; those of a framework its own view (JAX may copy memory that does not begin
    at a multiple of 64 bytes: what :func:`empty` allocates does). Who hands over an object of a kind that nobody can
    make gets the native array. :func:`check_way_back` says beforehand whether it works.

    Args:
        like: An array of the caller's.
    """
    kind = type(like)
    found = _exporters.get(kind)
    if found is None:
        found = _exporters[kind] = _exporter(like)
    return found


def check_way_back(name: str, like: Any, native: NativeArray) -> None:
    """Find before a call writes anything whether a result can be handed over as an array of the kind of ``like``.

    Args:
        name: The argument's name, for the error.
        like: An array of the caller's.
        native: Where the result goes.

    Raises:
        TypeError: If the framework of ``like`` does not take it.
    """
    key = type(like), native.dtype
    if key in _taken:
        return
    try:
        exporter(like)(native)
    except Exception as error:
        raise TypeError(
            f"{name} must be of a kind that an array of {native.dtype} can be returned in, got "
            f"{type(like).__name__}: {error}"
        ) from error
    _taken.add(key)


def aligned(name: str, array: NativeArray) -> NativeArray:
    """Return an array whose elements begin at multiples of their size: itself, or a copy of a small one.

    Raises:
        ValueError: If the copy cannot be made, or would not outlive a capture.
    """
    if is_aligned(array):
        return array
    if is_on_device(array):
        refuse_in_capture(name, f"have all elements at multiples of {array.itemsize} bytes")
    copy = empty(array.shape, array.dtype, array)
    copy_into(name, copy, array)
    return copy


def copy_into(name: str, target: NativeArray, array: NativeArray) -> None:
    """Copy an array wherever it begins; elements off their own boundaries cannot be read one by one on a GPU.

    Raises:
        ValueError: For strided elements that are off their boundaries, on a GPU.
    """
    if not is_on_device(array) or is_aligned(array):
        target[...] = array
    elif array.flags.c_contiguous:
        target.data.copy_from_device_async(array.data, array.nbytes)
    else:
        raise ValueError(
            f"{name} must have all elements at multiples of {array.itemsize} bytes or be contiguous, got strides "
            f"{array.strides}"
        )


def refuse_in_capture(name: str, rule: str) -> None:
    """Raise if a CUDA graph is being captured: it would go on using a copy that is gone when the call returns.

    Raises:
        ValueError: During a capture, naming the argument and what it must be to need no copy.
    """
    cupy = sys.modules.get("cupy")
    if cupy is not None and cupy.cuda.get_current_stream().is_capturing():
        raise ValueError(f"{name} must {rule} while a graph is captured: memory made by the call would not outlive it")


def empty(shape: tuple[int, ...], dtype: Any, like: NativeArray) -> NativeArray:
    """Return a new, uninitialised array where ``like`` lives, aligned so that every framework can take it over."""
    if is_on_device(like):
        return empty_on(like.data.device_id, shape, dtype)
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + size].view(dtype).reshape(shape)


def empty_on(gpu: int, shape: tuple[int, ...], dtype: Any) -> NativeArray:
    """Return a new, uninitialised array on a GPU."""
    cupy = sys.modules["cupy"]
    if gpu == cupy.cuda.runtime.getDevice():
        return cupy.empty(shape, dtype)
    with cupy.cuda.Device(gpu):
        return cupy.empty(shape, dtype)


def is_writeable(native: NativeArray, given: Any) -> bool:
    """Whether memory may be written; CuPy has no flag for that, so that the caller's own array decides on a GPU."""
    return getattr(native.flags, "writeable", not _is_immutable(given))


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
    if _is_traced(x):
        raise TypeError(
            f"{name} is traced by JAX (jit, vmap or grad) and has no memory to read: call cuflash outside of these, "
            f"or by jax.pure_callback"
        )
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
    device = device_type(name, x)
    if getattr(x, "is_neg", bool)():  # torch hands over what lies in memory, and its values are the negative ones
        raise ValueError(f"{name} must have its values in memory, got a negated view: resolve_neg() makes them")
    if device in CUDA_DEVICES:
        return _import_cuda(name, x)
    if device not in HOST_DEVICES:
        raise TypeError(f"{name} must be in host or CUDA memory, got DLPack device type {device}")
    return import_host(name, x, _is_immutable(x))


def _import_cuda(name: str, x: Any) -> NativeArray:
    cupy: Any = sys.modules.get("cupy")  # an import statement takes as long as all else here
    if cupy is None:
        try:
            cupy = importlib.import_module("cupy")
        except ImportError as error:
            raise ImportError(f"{name} lives on a GPU, which needs CuPy: see python -m cuflash info") from error
    try:
        # CuPy hands its current stream to x.__dlpack__, which makes it wait for the producer's stream. Its DLPack
        # knows bfloat16 but not float8, which comes as uint8.
        array = cupy.from_dlpack(x if float8_name(x) is None else AsBytes(x))
    except BufferError as error:
        raise ValueError(f"{name} cannot be shared: {error}") from error
    check_memory(name, array.data.ptr, array.shape)
    return array


def _root(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _exporter(like: Any) -> Callable[[NativeArray], Any]:
    cupy = sys.modules.get("cupy")
    if isinstance(like, np.ndarray) or (cupy is not None and isinstance(like, cupy.ndarray)):
        return _itself
    # The array API standard's way to the namespace; torch and others have from_dlpack at the top of the package. A
    # subclass in somebody's module is what its base class is.
    find = getattr(like, "__array_namespace__", None)
    modules = [find()] if find is not None else []
    modules += [sys.modules.get(_root(kind)) for kind in type(like).__mro__ if _is_at_home(kind)]
    for module in modules:
        from_dlpack = getattr(module, "from_dlpack", None)
        if from_dlpack is not None:
            # On a GPU, from_dlpack tells CuPy the framework's current stream, which then waits for CuPy's current one.
            return lambda native: from_dlpack(native if is_on_device(native) else Exporter(native))
    return _itself


def _is_immutable(x: Any) -> bool:
    return any(isinstance(x, getattr(sys.modules.get(module), name, ())) for module, name in _IMMUTABLE)


def _is_traced(x: Any) -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(x, getattr(getattr(jax, "core", None), "Tracer", ()))


def _is_at_home(kind: type) -> bool:
    """Whether a class is what its module has under its name: modules of that name may be anybody's."""
    return getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind is not object


def _itself(native: NativeArray) -> NativeArray:
    return native


_importers: dict[type, Callable[[str, Any], NativeArray]] = {}
_exporters: dict[type, Callable[[NativeArray], Any]] = {}
_taken: set[tuple[type, Any]] = set()  # kinds, and element types of native arrays that they have taken over
