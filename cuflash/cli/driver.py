"""What NVIDIA's driver tells about the GPUs of the machine, without CuPy."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from typing import NamedTuple


class Gpu(NamedTuple):
    """What the driver says about a GPU."""

    name: str
    arch: int
    num_sm: int
    memory: int


def load() -> ctypes.CDLL | None:
    """Return the driver, initialised, or None where there is none."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None
    status = library.cuInit(0)
    if status:
        raise RuntimeError(f"the CUDA driver does not start: error {status}")
    return library


def version() -> int | None:
    """Return the CUDA version of the driver as 1000 * major + 10 * minor, or None without a driver."""
    library = load()
    if library is None:
        return None
    number = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(number))
    return number.value


def gpus() -> Iterator[Gpu]:
    """Yield the GPUs."""
    library = load()
    if library is None:
        return
    count = ctypes.c_int()
    library.cuDeviceGetCount(ctypes.byref(count))
    for number in range(count.value):
        name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
        library.cuDeviceGetName(name, 256, number)
        library.cuDeviceTotalMem_v2(ctypes.byref(memory), number)

        def attribute(code: int, number: int = number) -> int:
            value = ctypes.c_int()
            library.cuDeviceGetAttribute(ctypes.byref(value), code, number)
            return value.value

        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR and _MULTIPROCESSOR_COUNT
        yield Gpu(name.value.decode(), 10 * attribute(75) + attribute(76), attribute(16), memory.value)
