"""CUDA through CuPy: RawModule variants, launched on the current stream."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import cupy
import numpy as np

from .. import kernels
from ..arrays import NativeArray
from ..device import Device
from .launch import launch

if TYPE_CHECKING:
    from ..attention import Operands
    from ..problem import Problem
    from ..scheduling import Lengths, SchedulerMetadata
    from ..tiling import Tiling


USES_PLAN = True
Launches = Callable[[kernels.Machine, dict[str, Any]], None]
_PER_THREAD_STREAM = 2  # cudaStreamPerThread: one handle for a stream of every host thread


class CompileError(RuntimeError):
    """NVRTC refused a kernel variant."""


def device(array: NativeArray) -> Device:
    """Return the GPU on which an array lives."""
    return _device(array.device.id)


def plan(problem: Problem, tiling: Tiling, num_blocks: int, lengths: Lengths, array: NativeArray) -> Launches:
    """Fill a plan; see :func:`cuflash.get_scheduler_metadata`. Returns what fills it again."""
    launches = kernels.plan(problem, tiling, num_blocks, array.size)
    repeat(launches, {"plan": array, **lengths.__dict__})
    return launches


def attend(problem: Problem, operands: Operands, metadata: SchedulerMetadata) -> Launches | None:
    """Write ``operands.out`` and ``operands.softmax_lse``; see :func:`cuflash.flash_attn_with_kvcache`.

    Returns:
        What does it again for arrays of the same layout; None if an array had to be copied first.
    """
    with operands.q.device:
        machine = _Gpu()
        readable = kernels.aligned(machine, operands)
        launches = kernels.Attention(problem, readable, metadata)
        launches(machine, kernels.named(readable, metadata))
    return launches if readable is operands else None


def repeat(launches: Launches, arrays: dict[str, Any]) -> None:
    """Launch once more, on arrays by the names of their parameters."""
    number = arrays["plan"].data.device_id
    if number == cupy.cuda.runtime.getDevice():
        launches(_Gpu(), arrays)
    else:
        with cupy.cuda.Device(number):
            launches(_Gpu(), arrays)


def merge(outs: NativeArray, lses: NativeArray, out: NativeArray, lse: NativeArray) -> None:
    """Write ``out`` and ``lse``; see :func:`cuflash.merge_attn_states`."""
    with outs.device:
        kernels.merge(_Gpu(), outs, lses, out, lse)


def prepare(variants: tuple[kernels.Variant, ...], array: NativeArray) -> int:
    """Compile and load kernels on the GPU of ``array``; return how many of them were not there yet."""
    number = array.device.id
    before = _function.cache_info().misses
    with array.device:
        for variant in variants:
            _function(variant, number)
    return _function.cache_info().misses - before


@lru_cache(maxsize=None)
def _device(number: int) -> Device:
    gpu = cupy.cuda.Device(number)
    return Device(gpu.attributes["MultiProcessorCount"], int(gpu.compute_capability))


@lru_cache(maxsize=None)
def _function(variant: kernels.Variant, number: int) -> Any:
    """Compile and load a variant on the current device, ``number``; CuPy keeps the binary in its disk cache."""
    module = cupy.RawModule(code=kernels.source(variant.file), options=variant.options)
    try:
        kernel = module.get_function(variant.kernel)
    except cupy.cuda.compiler.CompileException as error:
        lines = str(error).splitlines()
        reasons = [line for line in lines if "error" in line] or lines
        raise CompileError(
            f"{variant} does not compile for sm_{_device(number).arch}:\n" + "\n".join(reasons[:8])
        ) from error
    # Dynamic shared memory above 48 KB must be allowed: as much as a launch may ever want, so that no launch has to
    # ask. And shared memory rather than L1, so that all blocks that a plan counts on are resident.
    most = cupy.cuda.Device(number).attributes["MaxSharedMemoryPerBlockOptin"]
    kernel.max_dynamic_shared_size_bytes = most - kernel.shared_size_bytes
    if variant.kernel == "decode":
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

    def get(self, key: tuple[Any, ...], size: int, dtype: Any, zero: bool = False) -> NativeArray:
        """Return an array of at least ``size`` elements on the current device."""
        array = self._arrays.get(key)
        if array is not None and array.size >= size:
            return array
        with self._lock:
            array = self._arrays.get(key)
            if array is None or array.size < size:
                # On a stream of its own, so that a capture in progress does not record the zeroing instead of doing it.
                with cupy.cuda.Stream(non_blocking=True) as own:
                    new = cupy.empty(1 << (size - 1).bit_length(), dtype)
                    if zero:
                        new.data.memset_async(0, new.nbytes)
                    own.synchronize()
                if array is not None:
                    self._replaced.append(array)
                self._arrays[key] = array = new
        return array


_workspaces = _Workspaces()


class _Gpu:
    """A :class:`cuflash.kernels.Machine`: the current device and stream of CuPy, for one call."""

    def __init__(self) -> None:
        stream = cupy.cuda.get_current_stream().ptr
        thread = threading.get_ident() if stream == _PER_THREAD_STREAM else 0
        self._number, self._stream = cupy.cuda.runtime.getDevice(), stream
        self._key = self._number, stream, thread
        self._taken = 0

    def address(self, array: NativeArray) -> int:
        return array.data.ptr

    def empty(self, shape: tuple[int, ...], dtype: Any) -> NativeArray:
        # Not from CuPy's pool: a captured graph uses it after this call, too. Other threads may call in between.
        self._taken += 1
        dtype = np.dtype(dtype)
        size = max(math.prod(shape) * dtype.itemsize, 1)
        memory = _workspaces.get((*self._key, self._taken, threading.get_ident()), size, np.uint8)
        return cupy.ndarray(shape, dtype, memory.data)

    def workspace(self, partials: int, counters: int) -> tuple[NativeArray, NativeArray]:
        # Kernels leave the counters at zero.
        return (
            _workspaces.get((*self._key, "partials"), partials, np.float32),
            _workspaces.get((*self._key, "counters"), counters, np.int32, zero=True),
        )

    def launch(
        self,
        variant: kernels.Variant,
        grid: int,
        threads: int,
        shared_bytes: int,
        params: np.ndarray,
        arrays: dict[str, NativeArray],
    ) -> None:
        function = _function(variant, self._number)
        can_wait = _device(self._number).arch >= 90
        launch(function.ptr, grid, threads, shared_bytes, self._stream, params.ctypes.data, can_wait)
