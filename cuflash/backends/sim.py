"""The CUDA kernels on the simulator: the launches of the CUDA backend, on host arrays."""

from __future__ import annotations

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

_modules: dict[tuple[kernels.Variant, str], Any] = {}

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


class _Simulator:
    """A :class:`cuflash.kernels.Machine` of fibers."""

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
        from ..simulator import SimModule

        arch = f"sm_{host_device().arch}"
        module = _modules.get((variant, arch))
        if module is None:
            module = SimModule(kernels.source(variant.file), variant.options, arch=arch, name=variant.file)
            _modules[variant, arch] = module
        function = module.get_function(variant.kernel)
        function((grid,), (threads,), (params,), shared_mem=shared_bytes, arrays=arrays)


_machine = _Simulator()
