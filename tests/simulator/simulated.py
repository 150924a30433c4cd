"""What the simulator's tests share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuflash.simulator import Checks, Finding, Launch, SimModule, SimulationError, record

PREFIX = r"""
typedef unsigned u32;
typedef unsigned long long u64;
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
"""


def compiled(source: str, name: str = "kernel", options: tuple[str, ...] = (), arch: str = "sm_90") -> Any:
    """Compiles a kernel whose line numbers are those of `source`."""
    return SimModule(PREFIX + '#line 1 "planted.cu"\n' + source, options, arch=arch, name="planted.cu").get_function(
        name
    )


def line_of(source: str, mark: str) -> int:
    """The line of the source that carries the mark in a comment."""
    found = [k for k, line in enumerate(source.splitlines(), 1) if f"// {mark}" in line]
    assert len(found) == 1, (mark, found)
    return found[0]


def run(
    kernel: Any,
    grid: Any,
    block: Any,
    args: Any,
    *,
    shared_mem: int = 0,
    cluster: Any = None,
    arrays: Any = None,
    **settings: Any,
) -> Launch:
    """Launches with all checks and returns the record of the launch."""
    with record(**settings) as launches:
        kernel(grid, block, args, shared_mem=shared_mem, cluster=cluster, arrays=arrays)
    return launches[-1]


def found(kernel: Any, grid: Any, block: Any, args: Any, **more: Any) -> Finding:
    """The finding that a launch must have."""
    with pytest.raises(SimulationError) as error:
        run(kernel, grid, block, args, **more)
    return error.value.finding


ORDERS: list[dict[str, Any]] = [{}, {"cp_async": "early"}, {"seed": 1, "cp_async": "random"}, {"seed": 2}]
"""Settings under which a correct kernel must be clean, and a wrong one caught."""

__all__ = ["ORDERS", "Checks", "compiled", "found", "line_of", "np", "run"]
