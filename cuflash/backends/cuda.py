"""CUDA through CuPy: RawModule variants, launched on the current stream."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import Any

import cupy
import numpy as np
from cupy.cuda import nvrtc

from ..device import Device
from ..kernels.boxes import Boxed
from ..kernels.launch import BoundLaunch, Scratch
from ..kernels.source import Variant, source
from ..memory import NativeArray
from .cubin import cubin
from .driver import launcher, relaxed_capture, tensor_map
from .machine import KernelBackend, Launcher, Machine

_PER_THREAD_STREAM = 2  # cudaStreamPerThread: one handle for a stream of every host thread


class _Thread(threading.local):
    """A number that no other thread gets: an ended thread's identifier is given to the next one, its stream is not."""

    def __init__(self) -> None:
        self.number = next(_numbers)


_numbers = itertools.count()
_thread = _Thread()


class CompileError(RuntimeError):
    """NVRTC refused a kernel variant."""


class Cuda(KernelBackend):
    """The GPUs that CuPy sees."""

    def device(self, array: NativeArray) -> Device:
        """Return the GPU on which an array lives."""
        return _device(array.device.id)

    def machine(self, gpu: int | None) -> AbstractContextManager[Machine]:
        """Return that GPU and CuPy's current stream on it."""
        assert gpu is not None
        return _Gpu(gpu) if gpu == cupy.cuda.runtime.getDevice() else _other(gpu)

    def prepare(self, variants: tuple[Variant, ...], array: NativeArray) -> int:
        """Compile and load kernels on that GPU; return how many of them were not there yet."""
        number = array.device.id
        before = _function.cache_info().misses
        with array.device:
            for variant in variants:
                _function(variant, number)
        return _function.cache_info().misses - before


@contextmanager
def _other(number: int) -> Iterator[Machine]:
    """A GPU that is not the current one becomes it for a while."""
    with cupy.cuda.Device(number):
        yield _Gpu(number)


@lru_cache(maxsize=None)
def _device(number: int) -> Device:
    gpu = cupy.cuda.Device(number)
    return Device(gpu.attributes["MultiProcessorCount"], int(gpu.compute_capability))


@lru_cache(maxsize=None)
def _function(variant: Variant, number: int) -> Any:
    """Compile and load a variant on the current device, ``number``; the binary lies in CuPy's disk cache."""
    arch = f"sm_{_device(number).arch}{variant.arch_suffix}"
    try:
        with relaxed_capture():
            if variant.arch_suffix:  # CuPy itself compiles for sm_90, not for sm_90a
                module = cupy.RawModule(path=str(cubin(source(variant.file), variant.options, arch)))
            else:
                module = cupy.RawModule(code=source(variant.file), options=variant.options)
            kernel = module.get_function(variant.kernel)
    except (cupy.cuda.compiler.CompileException, nvrtc.NVRTCError) as error:
        lines = str(error).splitlines()
        reasons = [line for line in lines if "error" in line] or lines
        raise CompileError(f"{variant} does not compile for {arch}:\n" + "\n".join(reasons[:8])) from error
    # Dynamic shared memory above 48 KB must be allowed: as much as a launch may ever want, so that no launch has to
    # ask. And shared memory rather than L1, so that all blocks that a plan counts on are resident.
    most = cupy.cuda.Device(number).attributes["MaxSharedMemoryPerBlockOptin"]
    kernel.max_dynamic_shared_size_bytes = most - kernel.shared_size_bytes
    if variant.kernel not in ("plan", "append", "merge", "exchange"):
        kernel.preferred_shared_memory_carveout = 100
    return kernel.kernel  # of the device: the RawKernel would look up the device in every launch


class _Workspaces:
    """Memory that launches on one stream share: they follow one another.

    It is never given back, since a captured graph may hold its address: what is too small is replaced and stays alive,
    and sizes are powers of two, so all that were replaced are smaller than the one in use. Graphs that were captured on
    one stream share the memory of that stream, too: they must not be replayed at the same time.
    """

    def __init__(self) -> None:
        self._arrays: dict[tuple[Any, ...], NativeArray] = {}
        self._replaced: list[NativeArray] = []
        self._lock = threading.Lock()

    def get(self, key: tuple[Any, ...], size: int, zero: bool) -> NativeArray:
        """Return an array of at least ``size`` bytes on the current device."""
        array = self._arrays.get(key)
        if array is not None and array.size >= size:
            return array
        with self._lock:
            array = self._arrays.get(key)
            if array is None or array.size < size:
                # On a stream of its own, so that a capture in progress does not record the zeroing instead of doing it.
                with relaxed_capture(), cupy.cuda.Stream(non_blocking=True) as own:
                    new = cupy.empty(1 << (size - 1).bit_length(), np.uint8)
                    if zero:
                        new.data.memset_async(0, new.nbytes)
                    own.synchronize()
                if array is not None:
                    self._replaced.append(array)
                self._arrays[key] = array = new
        return array


_workspaces = _Workspaces()


class _Gpu:
    """A :class:`Machine`: the current device, ``number``, and the current stream of CuPy, for one call."""

    def __init__(self, number: int) -> None:
        # Without the number CuPy would ask for the current device once more.
        stream = cupy.cuda.get_current_stream(number).ptr
        self.key = number, stream, _thread.number if stream == _PER_THREAD_STREAM else threading.get_ident()

    def __enter__(self) -> _Gpu:
        return self  # nothing to do, and nothing that takes time: calls come through here

    def __exit__(self, *error: object) -> None:
        pass

    def address(self, array: NativeArray) -> int:
        return array.data.ptr

    def scratch(self, name: str, memory: Scratch) -> NativeArray:
        # Not from CuPy's pool: a captured graph uses it after this call, too.
        number, stream, thread = self.key
        key = number, stream, name, thread if memory.passed_on or stream == _PER_THREAD_STREAM else None
        return _workspaces.get(key, max(memory.nbytes, 1), memory.zeroed)

    def tensor_map(self, boxed: Boxed, address: int) -> bytes:
        return tensor_map(boxed, address)

    def prepare(self, bound: BoundLaunch, scratch: list[NativeArray]) -> Launcher:
        number, stream, _ = self.key
        launch, function = bound.launch, _function(bound.launch.variant, number)
        can_wait = _device(number).arch >= 90
        return launcher(function.ptr, launch.grid, launch.threads, launch.shared_bytes, stream, can_wait)


BACKEND = Cuda()
