"""The CUDA kernels on the simulator: the launches of the CUDA backend, on host arrays."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import kernels
from ..arrays import NativeArray
from ..device import Device, host_device

if TYPE_CHECKING:
    from ..attention import Operands
    from ..problem import Problem
    from ..scheduling import Lengths, SchedulerMetadata
    from ..tiling import Tiling


USES_PLAN = True


def device(array: NativeArray) -> Device:
    """Return the GPU that is simulated."""
    return host_device()


def plan(problem: Problem, tiling: Tiling, num_blocks: int, lengths: Lengths, array: NativeArray) -> None:
    """Fill a plan; see :func:`cuflash.get_scheduler_metadata`."""
    kernels.plan(problem, tiling, num_blocks, array.size)(_machine, {"plan": array, **lengths.__dict__})


def attend(problem: Problem, operands: Operands, metadata: SchedulerMetadata) -> None:
    """Write ``operands.out`` and ``operands.softmax_lse``; see :func:`cuflash.flash_attn_with_kvcache`."""
    operands = kernels.aligned(_machine, operands)
    kernels.Attention(problem, operands, metadata)(_machine, kernels.named(operands, metadata))


def merge(outs: NativeArray, lses: NativeArray, out: NativeArray, lse: NativeArray) -> None:
    """Write ``out`` and ``lse``; see :func:`cuflash.merge_attn_states`."""
    kernels.merge(_machine, outs, lses, out, lse)


def prepare(variants: tuple[kernels.Variant, ...], array: NativeArray) -> int:
    """Compile kernels for the simulator; return how many of them were not there yet."""
    before = _function.cache_info().misses
    for variant in variants:
        _function(variant, f"sm_{host_device().arch}")
    return _function.cache_info().misses - before


@lru_cache(maxsize=None)
def _function(variant: kernels.Variant, arch: str) -> Any:
    from ..simulator import SimModule

    module = SimModule(kernels.source(variant.file), variant.options, arch=arch, name=variant.file)
    return module.get_function(variant.kernel)


class _Simulator:
    """A :class:`cuflash.kernels.Machine`: the CPU, by way of the simulator."""

    def address(self, array: NativeArray) -> int:
        return array.ctypes.data

    def empty(self, shape: tuple[int, ...], dtype: Any) -> NativeArray:
        return np.empty(shape, dtype)

    def workspace(self, partials: int, counters: int) -> tuple[NativeArray, NativeArray]:
        # NaN, so that a partial result which nobody wrote shows.
        return np.full(partials, np.nan, np.float32), np.zeros(counters, np.int32)

    def launch(
        self,
        variant: kernels.Variant,
        grid: int,
        threads: int,
        shared_bytes: int,
        params: np.ndarray,
        arrays: dict[str, NativeArray],
    ) -> None:
        function = _function(variant, f"sm_{host_device().arch}")
        function((grid,), (threads,), (params,), shared_mem=shared_bytes, arrays=arrays)


_machine = _Simulator()
