"""Gives virtual registers their places in a warp's register file.

PTX has as many registers as values. Registers whose lives do not overlap share a place, so that a warp's file stays in
the processor's cache.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np

from .program import Emitted
from .ptx import Function, Reg

__all__ = ["allocate", "blocks"]

UNITS = {0: 1, 4: 2, 8: 4}  # places of 64 bytes: a predicate, 32 lanes of 4 bytes, of 8 bytes


def _lane(reg: Reg) -> int:
    return 0 if reg.width == 0 else 8 if reg.width == 8 else 4


def allocate(
    function: Function,
    code: Sequence[Emitted],
    labels: Mapping[str, int],
    tables: Sequence[int | str],
    held: Mapping[int, Sequence[Reg]],
) -> tuple[dict[Reg, int], dict[tuple[int, int], tuple[int, int]], int]:
    """Places registers and constants.

    Args:
        function: the kernel.
        code: its instructions.
        labels: where they are.
        tables: targets of indirect branches.
        held: registers that have to keep their places until these instructions.

    Returns:
        The place of each register; of each constant (bytes, value) its place and size; the number of places.
    """
    constants: dict[tuple[int, int], tuple[int, int]] = {}
    at = 0
    for e in code:
        for v in e.ins.values():
            if isinstance(v, tuple) and v not in constants:
                constants[v] = (at, v[0])
                at += UNITS[v[0]]
    intervals = _intervals(function, code, labels, tables, held)
    slots: dict[Reg, int] = {}
    free: dict[int, list[int]] = {0: [], 4: [], 8: []}
    active: list[tuple[int, int, int]] = []  # end, kind, slot
    for start, end, reg in sorted(intervals, key=lambda t: (t[0], t[1], t[2].index)):
        while active and active[0][0] < start:
            _, kind, slot = heapq.heappop(active)
            free[kind].append(slot)
        kind = _lane(reg)
        if free[kind]:
            slot = free[kind].pop()
        else:
            slot = at
            at += UNITS[kind]
        slots[reg] = slot
        heapq.heappush(active, (end, kind, slot))
    if at >= 0xFFFF:
        raise ValueError(f"the kernel needs {at} places of 64 bytes for its registers; the simulator has 65534")
    return slots, constants, at


def blocks(
    code: Sequence[Emitted], labels: Mapping[str, int], tables: Sequence[int | str]
) -> tuple[list[int], list[int], list[list[int]]]:
    """Basic blocks: where they start, where they end, which ones may follow."""
    n = len(code)
    starts = sorted({0, *labels.values(), *(k + 1 for k, e in enumerate(code) if e.ctl in (2, 3, 7) and k + 1 < n)})
    index = {s: k for k, s in enumerate(starts)}
    ends = starts[1:] + [n]
    after: list[list[int]] = []
    for stop in ends:
        last = code[stop - 1]
        following: list[int] = []
        if last.ctl == 2:
            following.append(index[labels[str(last.target)]])
        elif last.ctl == 7:
            assert isinstance(last.target, int)
            for t in tables[last.target : last.target + last.imm]:
                following.append(index[labels[str(t)]])
        if stop < n and not (last.ctl in (2, 3, 7) and last.guard is None):
            following.append(index[stop])
        after.append(following)
    return starts, ends, after


def _intervals(
    function: Function,
    code: Sequence[Emitted],
    labels: Mapping[str, int],
    tables: Sequence[int | str],
    held: Mapping[int, Sequence[Reg]],
) -> list[tuple[int, int, Reg]]:
    """For each register the first and the last instruction between which it must keep its place."""
    uses: list[list[Reg]] = []
    for pc, e in enumerate(code):
        used = [*e.many, *held.get(pc, ()), *(v for v in e.ins.values() if isinstance(v, Reg))]
        if e.guard is not None:
            used.append(e.guard)
            used.extend(e.outs.values())  # lanes that the guard leaves out keep the old value
        uses.append(used)
    n = len(code)
    starts, ends, after = blocks(code, labels, tables)
    gen: list[int] = []
    kill: list[int] = []
    for s, stop in zip(starts, ends):
        g = d = 0
        for pc in range(s, stop):
            for r in uses[pc]:
                bit = 1 << r.index
                if not d & bit:
                    g |= bit
            for r in code[pc].outs.values():
                d |= 1 << r.index
        gen.append(g)
        kill.append(d)
    live_in = [0] * len(starts)
    live_out = [0] * len(starts)
    changed = True
    while changed:
        changed = False
        for k in range(len(starts) - 1, -1, -1):
            out = 0
            for f in after[k]:
                out |= live_in[f]
            new = gen[k] | (out & ~kill[k])
            if out != live_out[k] or new != live_in[k]:
                live_out[k], live_in[k] = out, new
                changed = True
    n_regs = len(function.regs)
    first = np.full(n_regs, n, np.int64)
    last_at = np.full(n_regs, -1, np.int64)
    by_index: dict[int, Reg] = {}
    for pc, e in enumerate(code):
        for r in [*uses[pc], *e.outs.values()]:
            i = r.index
            by_index[i] = r
            if pc < first[i]:
                first[i] = pc
            if pc > last_at[i]:
                last_at[i] = pc
    size = n_regs // 8 + 1

    def members(mask: int) -> np.ndarray:
        return np.unpackbits(np.frombuffer(mask.to_bytes(size, "little"), np.uint8), bitorder="little")[:n_regs].astype(
            bool
        )

    for k, (s, stop) in enumerate(zip(starts, ends)):
        inside, outside = members(live_in[k]), members(live_out[k])
        np.minimum(first, s, out=first, where=inside)
        np.maximum(last_at, s, out=last_at, where=inside)
        np.minimum(first, stop - 1, out=first, where=outside)
        np.maximum(last_at, stop - 1, out=last_at, where=outside)
    return [(int(first[i]), int(last_at[i]), r) for i, r in by_index.items()]
