"""Launches through the CUDA driver, with the one attribute that CuPy's launches lack.

Programmatic dependent launch (CUDA C++ Programming Guide): a kernel is launched while the one ahead of it in the stream
still runs, and waits on the GPU for its turn (``kernels_cu/include/stream.cuh``), so that the time that a launch takes
is not in between. CUDA graphs keep the attribute.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from cupy.cuda import driver

from ..kernels.boxes import MAP_BYTES, Boxed

_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id and a union of 64 bytes, of which this attribute uses an int."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


_EARLY = ctypes.pointer(_Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1))


@lru_cache(maxsize=None)
def _library() -> Any:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


@contextmanager
def relaxed_capture() -> Iterator[None]:
    """Let this thread allocate memory and load kernels while a stream is captured in whatever mode.

    CuPy captures in the mode that allows that; torch's default forbids it to everybody.
    """
    mode = ctypes.c_int(_RELAXED)
    _check(_library().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)))
    try:
        yield
    finally:
        _check(_library().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)))


def _check(status: int) -> None:
    if status:
        driver.check_status(status)


_OF_16_BITS, _SWIZZLE_128B, _PROMOTE_TO_128B = 1, 3, 2  # CU_TENSOR_MAP_DATA_TYPE_UINT16 and so on


def tensor_map(boxed: Boxed, address: int) -> bytes:
    """Return the tensor map of elements of 16 bits, with lines of 128 bytes that are swizzled in shared memory.

    Raises:
        cupy.cuda.driver.CUDADriverError: If the driver refuses.
    """
    assert boxed.itemsize == 2
    rank = len(boxed.shape)
    memory = (ctypes.c_char * (MAP_BYTES + 64))()
    place = -ctypes.addressof(memory) % 64  # of a CUtensorMap, at a multiple of 64
    shape, strides = (ctypes.c_uint64 * rank)(*boxed.shape), (ctypes.c_uint64 * (rank - 1))(*boxed.strides)
    box, steps = (ctypes.c_uint32 * rank)(*boxed.box), (ctypes.c_uint32 * rank)(*(1,) * rank)
    _check(
        _library().cuTensorMapEncodeTiled(
            ctypes.byref(memory, place), _OF_16_BITS, rank, ctypes.c_void_p(address), shape, strides, box, steps,
            0, _SWIZZLE_128B, _PROMOTE_TO_128B, 0,
        )
    )  # fmt: skip
    return memory.raw[place : place + MAP_BYTES]


@lru_cache(maxsize=1024)
def launcher(
    function: int, grid: int, threads: int, shared_bytes: int, stream: int, waits_for_its_turn: bool
) -> Callable[[bytes, Any], None]:
    """Return what launches a kernel of one parameter on the current device.

    All but the parameter, which the driver copies, is converted here, once: a launch is one call of the driver. No
    types are declared for its arguments, which would convert them again every time.

    Args:
        function: The kernel's CUfunction.
        grid: Blocks.
        threads: Threads of a block.
        shared_bytes: Dynamic shared memory of a block.
        stream: The stream's handle.
        waits_for_its_turn: Whether the kernel itself waits for the one ahead of it (sm_90 and later), and so may be
            launched early.

    Returns:
        A function of the parameter's bytes, and of the arrays in it, at which it does not look. It raises
        ``cupy.cuda.driver.CUDADriverError`` if the driver refuses.
    """
    config = ctypes.byref(_Config((grid, 1, 1), (threads, 1, 1), shared_bytes, stream, _EARLY, waits_for_its_turn))
    handle, call = ctypes.c_void_p(function), _library().cuLaunchKernelEx
    byref, c_char_p = ctypes.byref, ctypes.c_char_p

    def launch(params: bytes, arrays: Any) -> None:
        status = call(config, handle, byref(c_char_p(params)), None)
        if status:
            driver.check_status(status)

    return launch
