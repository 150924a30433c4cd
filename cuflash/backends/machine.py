"""The verbs of a backend that runs kernels, written once for the machines that do."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

from .. import journal
from ..arrays import copy_into
from ..device import Device
from ..kernels import attention_step, plan_launch
from ..kernels.boxes import Boxed
from ..kernels.launch import BoundLaunch, BoundStep, Launch, Scratch, Step, bind
from ..kernels.merge import merge_launch
from ..kernels.source import Variant
from ..kv_cache import KVCache, Scales
from ..memory import NativeArray, address_of, gpu_of, has_whole_rows, strides_of
from ..metadata import SchedulerMetadata
from ..operands import Lengths, Operands
from ..partition import Partition
from ..problem import Problem

_MOST = 64  # machines that a step is ready for: streams and threads come and go

Launcher = Callable[[bytes, list[NativeArray]], None]


class Machine(Protocol):
    """What a GPU and the simulator do differently."""

    @property
    def key(self) -> Hashable | None:
        """What machines have in common for which the same is prepared: kernels and scratch; None if nothing is kept."""

    def address(self, array: NativeArray) -> int:
        """Return the address of an array's first element."""

    def scratch(self, name: str, memory: Scratch) -> NativeArray:
        """Return memory of at least this size, of whatever dtype; it lives as long as a captured graph may use it."""

    def tensor_map(self, boxed: Boxed, address: int) -> bytes:
        """Return the tensor map of a tensor at an address."""

    def prepare(self, bound: BoundLaunch, scratch: list[NativeArray]) -> Launcher:
        """Return what launches a kernel, given its parameter and the arrays of the call.

        Args:
            bound: The launch. The memory that it may touch has places among the arrays, and the scratch behind them.
            scratch: The scratch of its step.
        """


class KernelBackend:
    """A backend that runs kernels; a subclass says on which machine."""

    uses_plan = True

    def device(self, array: NativeArray) -> Device:
        """Return the GPU that plans of an array's memory are made for."""
        raise NotImplementedError

    def machine(self, gpu: int | None) -> AbstractContextManager[Machine]:
        """Return the machine that is a GPU, or has host memory (None); it is current as long as it is in use."""
        raise NotImplementedError

    def prepare(self, variants: tuple[Variant, ...], array: NativeArray) -> int:
        """Compile and load kernels where an array lives; return how many of them were not there yet."""
        raise NotImplementedError

    def plan(self, problem: Problem, partition: Partition, lengths: Lengths, array: NativeArray) -> Step:
        """Fill a plan; see :func:`cuflash.get_scheduler_metadata`. Returns what fills it again."""
        step = Step((plan_launch(problem, partition, lengths, array.size),))
        with self.machine(gpu_of(array)) as machine:
            run(machine, step, {"plan": array, **lengths.arrays})
        return step

    def attend(self, problem: Problem, operands: Operands, metadata: SchedulerMetadata) -> Step | None:
        """Write ``operands.out`` and ``operands.softmax_lse``; see :func:`cuflash.flash_attn_with_kvcache`.

        Returns:
            What does it again for arrays of the same layout; None if an array had to be replaced first.
        """
        with self.machine(gpu_of(operands.q)) as machine:
            readable = _readable(machine, operands)
            step = attention_step(problem, readable, metadata)
            run(machine, step, {"plan": metadata.array, **readable.arrays})
        return step if readable is operands else None

    def bind(self, step: Step, given: Mapping[str, int | None], count: int) -> BoundStep:
        """Return a step that can be repeated, on arrays that have places; see :func:`cuflash.kernels.launch.bind`."""
        return bind(step, given, count)

    def repeat(self, step: BoundStep, gpu: int, arrays: list[Any], addresses: list[int]) -> None:
        """Run a step once more, on arrays in their places, which begin at these addresses.

        Args:
            step: The step.
            gpu: The number of the GPU on which they lie.
            arrays: The arrays, of whatever kind: only a machine that checks what kernels touch looks at them.
            addresses: Where they begin.
        """
        with self.machine(gpu) as machine:
            run_bound(machine, step, arrays, addresses)

    def merge(
        self,
        outs: NativeArray,
        lses: NativeArray,
        mask: NativeArray | None,
        out: NativeArray,
        lse: NativeArray,
        base2: bool,
    ) -> None:
        """Write ``out`` and ``lse``; see :func:`cuflash.merge_attn_states`."""
        if lse.size:  # outputs may have no columns
            arrays = {"outs": outs, "lses": lses, "mask": mask, "out": out, "lse": lse}
            with self.machine(gpu_of(outs)) as machine:
                run(machine, Step((merge_launch(outs, lses, mask, base2),)), arrays)

    def exchange(self, launch: Launch, arrays: dict[str, NativeArray | None]) -> None:
        """Write ``out`` and ``softmax_lse``, merged with what other ranks do at once; see ``kernels/exchange.py``."""
        with self.machine(gpu_of(arrays["partial"])) as machine:
            run(machine, Step((launch,)), arrays)


def run(machine: Machine, step: Step, arrays: dict[str, NativeArray | None]) -> None:
    """Run the launches of a step.

    Args:
        machine: Where.
        step: What.
        arrays: The arrays of the call by name; None is a null pointer.
    """
    given = {name: array for name, array in arrays.items() if array is not None}
    places = {**dict.fromkeys(arrays), **{name: place for place, name in enumerate(given)}}
    native = list(given.values())
    run_bound(machine, bind(step, places, len(given)), native, [machine.address(array) for array in native])


def run_bound(machine: Machine, step: BoundStep, arrays: list[Any], addresses: list[int]) -> None:
    """Run the launches of a step on arrays in their places.

    Args:
        machine: Where.
        step: What.
        arrays: The arrays; see :meth:`KernelBackend.repeat`.
        addresses: Where they begin.
    """
    ready = step.ready.get(machine.key)
    if ready is None:
        ready = _prepare(machine, step)
    if journal.launches:
        journal.launches.get(threading.get_ident(), []).extend(bound.launch for bound in step.launches)
    for words, pack, constants, launch in ready:
        launch(pack(*words([*addresses, *constants])), arrays)


def _prepare(machine: Machine, step: BoundStep) -> list[tuple[Any, ...]]:
    """Return the launches of a step with all that does not change from call to call: kernels, and scratch."""
    scratch = [machine.scratch(name, memory) for name, memory in step.scratch]
    addresses = [machine.address(array) for array in scratch]
    ready = [
        (*bound.packing(step.count, addresses, machine.tensor_map), machine.prepare(bound, scratch))
        for bound in step.launches
    ]
    if machine.key is not None:
        if len(step.ready) >= _MOST:
            step.ready.clear()
        step.ready[machine.key] = ready
    return ready


def _readable(machine: Machine, operands: Operands) -> Operands:
    """Return operands that the kernels can read: copies of queries and new keys, and a page where they cannot."""
    copies: dict[str, Any] = {}
    for name in ("q", "qv", "k", "v"):
        array = getattr(operands, name)
        if array is not None and not _is_readable(array):
            copies[name] = _array(machine, f"{name} copied", Scratch(array.shape, array.dtype, passed_on=True))
            copy_into(name, copies[name], array)
    if operands.cache.is_paged and operands.cache.page_size and not operands.cache.k.shape[0]:
        copies["cache"] = _with_a_page(machine, operands.cache)
    return replace(operands, **copies) if copies else operands


def _array(machine: Machine, name: str, scratch: Scratch) -> NativeArray:
    """Return scratch as the array that it is to hold."""
    memory = machine.scratch(name, scratch).view(scratch.dtype)
    return memory.ravel()[: math.prod(scratch.shape)].reshape(scratch.shape)


def _with_a_page(machine: Machine, cache: KVCache) -> KVCache:
    """Return one page of zeros for a cache without pages: kernels read page 0 in place of pages that are not there."""

    def zeros(array: NativeArray) -> NativeArray:
        page = Scratch((1, *array.shape[1:]), array.dtype, zeroed=True)  # nobody writes to it
        return _array(machine, "no pages", page)

    def scales(of: Scales) -> Scales:
        return replace(of, array=zeros(of.array)) if of.per_key else of

    k, k_scales = zeros(cache.k), scales(cache.k_scales)
    v = k[..., : cache.v.shape[3]] if cache.may_be_joint else zeros(cache.v)
    v_scales = k_scales if cache.shares_scales else scales(cache.v_scales)
    return replace(cache, k=k, v=v, k_scales=k_scales, v_scales=v_scales)


def _is_readable(array: NativeArray) -> bool:
    """Whether the rows of queries or new keys begin at multiples of 16 bytes."""
    steps = strides_of(array)[:-1]
    return address_of(array) % 16 == 0 and has_whole_rows(array) and all(stride % 16 == 0 for stride in steps)
