"""CUDA through CuPy: RawModule variants, launched on the current stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import cupy
import numpy as np

from .. import kernels
from ..arrays import NativeArray
from ..device import Device

if TYPE_CHECKING:
    from ..attention import Operands
    from ..problem import Problem
    from ..scheduling import Lengths, SchedulerMetadata
    from ..tiling import Tiling


Launches = Callable[[kernels.Machine, dict[str, Any]], None]


class CompileError(RuntimeError):
    """NVRTC refused a kernel variant."""

USES_PLAN = True


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
        readable = kernels.aligned(_machine, operands)
        launches = kernels.Attention(problem, readable, metadata)
        launches(_machine, kernels.named(readable, metadata))
    return launches if readable is operands else None


def repeat(launches: Launches, arrays: dict[str, Any]) -> None:
    """Launch once more, on arrays by the names of their parameters."""
    number = arrays["plan"].data.device_id
    if number == cupy.cuda.runtime.getDevice():
        launches(_machine, arrays)
    else:
        with cupy.cuda.Device(number):
            launches(_machine, arrays)


def merge(outs: NativeArray, lses: NativeArray, out: NativeArray, lse: NativeArray) -> None:
    """Write ``out`` and ``lse``; see :func:`cuflash.merge_attn_states`."""
    with outs.device:
        kernels.merge(_machine, outs, lses, out, lse)


@lru_cache(maxsize=None)
def _device(number: int) -> Device:
    attributes = cupy.cuda.Device(number).attributes
    arch = attributes["ComputeCapabilityMajor"] * 10 + attributes["ComputeCapabilityMinor"]
    return Device(attributes["MultiProcessorCount"], arch)


@lru_cache(maxsize=None)
def _function(variant: kernels.Variant, number: int) -> Any:
    """Compile and load a variant on a device; CuPy keeps the binary in its disk cache by content."""
    module = cupy.RawModule(code=kernels.source(variant.file), options=variant.options)
    try:
        function = module.get_function(variant.kernel)
    except cupy.cuda.compiler.CompileException as error:
        first = "\n".join(str(error).splitlines()[:8])
        raise CompileError(f"{variant} does not compile for sm_{_device(number).arch}:\n{first}") from error
    return function


class _Gpu:
    """A :class:`cuflash.kernels.Machine`: the current device and stream of CuPy."""

    def __init__(self) -> None:
        # Launches on one stream follow one another and can share a workspace; those on two streams cannot.
        self._workspaces: dict[tuple[int, int], tuple[NativeArray, NativeArray]] = {}

    def address(self, array: NativeArray) -> int:
        return array.data.ptr

    def empty(self, shape: tuple[int, ...], dtype: Any) -> NativeArray:
        return cupy.empty(shape, dtype)

    def workspace(self, partials: int, counters: int) -> tuple[NativeArray, NativeArray]:
        stream = cupy.cuda.get_current_stream()
        key = cupy.cuda.runtime.getDevice(), stream.ptr
        workspace = self._workspaces.get(key)
        if workspace is None or workspace[0].size < partials:
            # On a stream of its own, so that a capture in progress does not record the zeroing instead of doing it.
            with cupy.cuda.Stream(non_blocking=True) as own:
                workspace = cupy.empty(partials, cupy.float32), cupy.zeros(counters, cupy.int32)
                own.synchronize()
            # The one before stays alive: a captured graph may hold its address.
            self._retired.append(self._workspaces.get(key))
            self._workspaces[key] = workspace
        return workspace

    _retired: list[Any] = []

    def launch(
        self,
        variant: kernels.Variant,
        grid: int,
        threads: int,
        shared_bytes: int,
        params: np.ndarray,
        arrays: dict[str, NativeArray],
    ) -> None:
        function = _function(variant, cupy.cuda.runtime.getDevice())
        if shared_bytes > 48 * 1024 and function.max_dynamic_shared_size_bytes < shared_bytes:
            function.max_dynamic_shared_size_bytes = shared_bytes
        function((grid,), (threads,), (params,), shared_mem=shared_bytes)


_machine = _Gpu()
