"""The CUDA kernels on the simulator: the launches of the CUDA backend, on host arrays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

from ..device import Device, host_device
from ..kernels.boxes import Boxed
from ..kernels.launch import BoundLaunch, Scratch
from ..kernels.source import Variant, source
from ..memory import NativeArray
from .machine import KernelBackend, Launcher, Machine


class Simulator(KernelBackend):
    """The CPU, by way of the simulator."""

    def device(self, array: NativeArray) -> Device:
        """Return the GPU that is simulated."""
        return host_device()

    @contextmanager
    def machine(self, gpu: int | None) -> Iterator[Machine]:
        """Return a new machine."""
        yield SimulatedMachine()

    def prepare(self, variants: tuple[Variant, ...], array: NativeArray) -> int:
        """Compile kernels for the simulator; return how many of them were not there yet."""
        before = _function.cache_info().misses
        for variant in variants:
            _function(variant, f"sm_{host_device().arch}")
        return _function.cache_info().misses - before


class SimulatedMachine:
    """A :class:`Machine` on which every launch has memory of its own."""

    key = None

    def address(self, array: NativeArray) -> int:
        """Return the address of an array's first element."""
        return array.ctypes.data

    def scratch(self, name: str, memory: Scratch) -> NativeArray:
        """Return memory in which what nobody wrote shows: NaN."""
        if memory.zeroed:
            return np.zeros(memory.shape, memory.dtype)
        return np.full(memory.shape, np.nan, memory.dtype)

    def tensor_map(self, boxed: Boxed, address: int) -> bytes:
        """Return a tensor map of the simulator."""
        from ..simulator.boxes import tensor_map

        return tensor_map(boxed.itemsize, address, boxed.shape, boxed.strides, boxed.box)

    def prepare(self, bound: BoundLaunch, scratch: list[NativeArray]) -> Launcher:
        """Return what runs a kernel to its end."""
        launch = bound.launch
        function = _function(launch.variant, f"sm_{host_device().arch}")

        def run(params: bytes, arrays: list[NativeArray]) -> None:
            struct = np.frombuffer(params, launch.struct)
            memory = [*arrays, *scratch]
            named = {name: memory[place] for name, place in zip(launch.pointers, bound.places)}
            function((launch.grid,), (launch.threads,), (struct,), shared_mem=launch.shared_bytes, arrays=named)

        return run


@lru_cache(maxsize=None)
def _function(variant: Variant, arch: str) -> Any:
    from ..simulator import SimModule

    module = SimModule(source(variant.file), variant.options, arch=arch, name=variant.file)
    return module.get_function(variant.kernel)


BACKEND = Simulator()
