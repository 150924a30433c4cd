"""Kernels: from a problem to launches. Everything here is the same for a GPU and for the simulator.

A family is a module with

- ``NAME``,
- ``partition(problem, device, max_seqlen_k)``: how it cuts a problem for the planner, or None if it does not fit,
- ``variant(problem, partition, form)``: its kernel for calls of this :class:`cuflash.kernels.attention.Form`,
- ``launch(problem, operands, metadata, arrays)``: the launch that attends, and the scratch that it needs.
"""

from __future__ import annotations

from types import ModuleType

from ..device import Device
from ..dtypes import numpy_dtype
from ..metadata import SchedulerMetadata
from ..operands import Operands
from ..partition import Partition
from ..problem import Problem
from . import decode, extend, extend_wgmma, mla, mla_wgmma
from .append import append_launch, append_variant
from .attention import usual_forms
from .launch import Launch, Scratch, Step
from .plan import VARIANT as PLAN_VARIANT
from .plan import plan_launch
from .source import Variant
from .tiles import resident_blocks

FAMILIES: tuple[ModuleType, ...] = (decode, extend_wgmma, extend, mla_wgmma, mla)
_LATENT = (mla_wgmma.NAME, mla.NAME)
NO_FAMILY = "none"
_ROWS_WITHOUT_A_KERNEL = 64
_OPERATIONS_PER_BYTE = 128  # of tensor cores beside what memory reads: some 120 on sm_90 with mma.sync, 160 on sm_80


def choose(problem: Problem, device: Device, max_seqlen_k: int | None = None) -> Partition:
    """Choose the kernel family of a problem, and how it cuts it: the one that costs least of those that fit.

    Where none fits, a plan can be made all the same; the NumPy backend runs on it, no kernel does.
    """
    if max_seqlen_k is not None:
        max_seqlen_k = -(-max_seqlen_k // problem.cp_world_size)  # of the rank, give or take an interleave
    choices = [family.partition(problem, device, max_seqlen_k) for family in FAMILIES]
    fitting: list[Partition] = [partition for partition in choices if partition is not None]
    if not fitting:
        row_blocks = max(1, -(-problem.rows // _ROWS_WITHOUT_A_KERNEL))
        return Partition(NO_FAMILY, _ROWS_WITHOUT_A_KERNEL, row_blocks, resident_blocks(problem, device, 1))
    latent = [partition for partition in fitting if partition.family in _LATENT]  # no other one knows qv
    if latent:
        return latent[0]  # where wgmma fits, it was faster with any number of rows
    if _outdoes_wide_blocks(problem, fitting):
        fitting = [partition for partition in fitting if partition.family != decode.NAME or partition.rows <= 16]
    return min(fitting, key=lambda partition: _cost(problem, partition, max_seqlen_k or 0))


def _outdoes_wide_blocks(problem: Problem, fitting: list[Partition]) -> bool:
    """Whether there is a kernel that is faster than ``decode.cu`` with row blocks of 32, with half of its rows idle.

    Those are short of registers, products of warpgroups are not: 8 queries, 32/8 heads of 128, b32 L4096 take 126 us
    with them and else 130.5, b4 L1024 11.3 and 16.4, a head dim of 64 73.3 and 71.2 (H200).
    """
    is_wide = max(problem.headdim, problem.headdim_v) > 64 and not problem.is_quantised
    return is_wide and any(partition.family == extend_wgmma.NAME for partition in fitting)


def _cost(problem: Problem, partition: Partition, max_seqlen_k: int) -> int:
    """Return what one (sequence, KV head) costs, in units of the time in which an element is read.

    Every row block reads the keys that it sees, or multiplies for longer than that takes; its queries and outputs come
    on top. Of two families that cost the same the first one in ``FAMILIES`` is chosen: it has the smaller row blocks.
    With ``split_size`` a sequence's family may not depend on its batch: one query position decides.
    """
    rows = problem.rows if problem.split_size is None else problem.group
    keys = max(1, max_seqlen_k if problem.split_size is None else problem.split_size)
    elements = problem.headdim + problem.headdim_v
    row_blocks = -(-max(1, rows) // partition.rows)
    return row_blocks * elements * (keys * max(_OPERATIONS_PER_BYTE, partition.rows) + 2 * partition.rows)


def family(problem: Problem, partition: Partition) -> ModuleType:
    """Return the family that made a partition of a problem.

    Raises:
        ValueError: If no kernel fits the problem.
    """
    if partition.family == NO_FAMILY:
        dims, kinds = (problem.headdim, problem.headdim_v), (problem.qkv_dtype, problem.kv_dtype)
        raise ValueError(
            f"headdim and headdim_v must be ones that a kernel has, got {dims} with queries of {kinds[0]} and a "
            f"cache of {kinds[1]}: the NumPy backend alone serves them"
        )
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
        scratch["q_rotated"] = Scratch(operands.q.shape, numpy_dtype(problem.out_dtype), passed_on=True)
        arrays["q"] = "q_rotated"
    if operands.out.size:
        launch, more = family(problem, metadata.partition).launch(problem, operands, metadata, arrays)
        launches.append(launch)
        scratch |= more
    return Step(tuple(launches), tuple(scratch.items()))


def variants(problem: Problem, partition: Partition, appends: bool) -> tuple[Variant, ...]:
    """Return the kernels of a step: the planner's, attention's for all usual calls, the append's where there is one."""
    append = (append_variant(problem.qkv_dtype, problem.kv_dtype, problem.out_dtype),) if appends else ()
    kernel = family(problem, partition)
    attention = (kernel.variant(problem, partition, form) for form in usual_forms(problem, appends))
    return PLAN_VARIANT, *append, *attention


__all__ = ["FAMILIES", "attention_step", "choose", "family", "plan_launch", "variants"]
