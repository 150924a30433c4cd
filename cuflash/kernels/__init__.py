"""Kernels: from a problem to launches. Everything here is the same for a GPU and for the simulator.

A family is a module with

- ``NAME``,
- ``partition(problem, device, max_seqlen_k)``: how it cuts a problem for the planner, or None if it does not fit,
- ``variant(problem, partition)``: its kernel,
- ``launch(problem, operands, metadata, arrays)``: the launch that attends, and the scratch that it needs.
"""

from __future__ import annotations

from types import ModuleType

from ..device import Device
from ..metadata import SchedulerMetadata
from ..operands import Operands
from ..partition import Partition
from ..problem import Problem
from . import decode
from .append import append_launch, append_variant
from .launch import Launch, Scratch, Step
from .plan import VARIANT as PLAN_VARIANT
from .plan import plan_launch
from .source import Variant

FAMILIES: tuple[ModuleType, ...] = (decode,)


def choose(problem: Problem, device: Device, max_seqlen_k: int | None = None) -> Partition:
    """Choose the kernel family of a problem, and how it cuts it: the first that fits.

    Raises:
        ValueError: If none fits.
    """
    for family in FAMILIES:
        partition: Partition | None = family.partition(problem, device, max_seqlen_k)
        if partition is not None:
            return partition
    raise ValueError(f"headdim {problem.headdim} does not fit the shared memory of sm_{device.arch}")


def family(partition: Partition) -> ModuleType:
    """Return the family that made a partition."""
    return next(family for family in FAMILIES if family.NAME == partition.family)


def attention_step(problem: Problem, operands: Operands, metadata: SchedulerMetadata) -> Step:
    """Return the launches of a call: attention on a plan, and before it the append if there are new keys.

    They fit every call on this plan whose arrays have the same shapes, strides and dtypes.
    """
    launches: list[Launch] = []
    scratch: dict[str, Scratch] = {}
    arrays = {}
    append = append_launch(problem, operands)
    if append is not None:
        launches.append(append)
    if operands.rotary is not None:
        scratch["q_rotated"] = Scratch(operands.q.shape, operands.q.dtype, passed_on=True)
        arrays["q"] = "q_rotated"
    if operands.out.size:
        launch, more = family(metadata.partition).launch(problem, operands, metadata, arrays)
        launches.append(launch)
        scratch |= more
    return Step(tuple(launches), tuple(scratch.items()))


def variants(problem: Problem, partition: Partition, appends: bool) -> tuple[Variant, ...]:
    """Return the kernels of a step: the planner's, attention's, and the append's where there is one."""
    append = (append_variant(problem.qkv_dtype, problem.kv_dtype),) if appends else ()
    return PLAN_VARIANT, *append, family(partition).variant(problem, partition)


__all__ = ["FAMILIES", "attention_step", "choose", "family", "plan_launch", "variants"]
