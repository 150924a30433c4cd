"""Registers of wgmma.mma_async: what a kernel's text says of them.

A product's accumulators, and its A in registers, belong to it until wgmma.wait_group has waited for its group; and
ordinary accesses to them before it need a wgmma.fence in between. The control flow tells which instructions may break
that. An access to what may be under way gets a check ahead of it, which looks at run time whether it is; a product
without its fence is marked. Plain copies are renamings to the assembler (compilers move accumulators that way, as in
`x = 0` or at the end of a loop): they need no fence, and may read what is under way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from .program import Emitted
from .ptx import Reg
from .registers import blocks

__all__ = ["warpgroup_checks"]

_PRODUCT = "wgmma.mma_async"
_COPIES = ("mov.u32", "mov.u64")
_GROUPS = 6  # groups that are told apart
_NOTHING = (0, 0)


@dataclass(frozen=True)
class _State:
    """What holds before an instruction, on some way to it. Sets of registers are bit masks."""

    touched: int = 0  # since the last fence
    groups: tuple[tuple[int, int], ...] = (_NOTHING,)  # under way, accumulators and A: not committed, latest group, ...

    def __or__(self, other: _State) -> _State:
        groups = zip_longest(self.groups, other.groups, fillvalue=_NOTHING)
        return _State(self.touched | other.touched, tuple((a | c, b | d) for (a, b), (c, d) in groups))

    @property
    def accumulators(self) -> int:
        return _union([d for d, _ in self.groups])

    @property
    def fragments(self) -> int:
        return _union([a for _, a in self.groups])


def _union(masks: Sequence[int]) -> int:
    out = 0
    for mask in masks:
        out |= mask
    return out


def _mask(registers: Sequence[object]) -> int:
    return _union([1 << r.index for r in registers if isinstance(r, Reg)])


class _Flow:
    """Runs over a kernel's control flow until nothing changes."""

    def __init__(self, code: Sequence[Emitted], labels: Mapping[str, int], tables: Sequence[int | str]) -> None:
        self.code = code
        self.accumulators = {pc: _mask(e.many) for pc, e in enumerate(code) if e.name == _PRODUCT}
        self.fragments = {
            pc: _mask([code[pc].ins.get(k) for k in range(4)]) if code[pc].abcd[2] & 1 else 0
            for pc in self.accumulators
        }
        theirs = _union([*self.accumulators.values(), *self.fragments.values()])
        self.reads = {pc: _mask(list(e.ins.values())) & theirs for pc, e in enumerate(code)}
        self.writes = {pc: _mask(list(e.outs.values())) & theirs for pc, e in enumerate(code)}
        starts, ends, self.after = blocks(code, labels, tables)
        self.steps = [
            [pc for pc in range(s, t) if code[pc].name.startswith("wgmma.") or self.reads[pc] | self.writes[pc]]
            for s, t in zip(starts, ends)
        ]

    def step(self, pc: int, state: _State) -> _State:
        """What holds behind an instruction."""
        e = self.code[pc]
        open_, *committed = state.groups
        if e.name == _PRODUCT:
            open_ = (open_[0] | self.accumulators[pc], open_[1] | self.fragments[pc])
            return _State(state.touched, (open_, *committed))
        if e.name == "wgmma.fence" and e.guard is None:
            return _State(0, state.groups)
        if e.name == "wgmma.commit_group" and e.guard is None:
            groups = [_NOTHING, open_, *committed]
            if len(groups) > _GROUPS:
                last = groups.pop()
                groups[-1] = (groups[-1][0] | last[0], groups[-1][1] | last[1])
            return _State(state.touched, tuple(groups))
        if e.name == "wgmma.wait_group" and e.guard is None:
            return _State(state.touched, state.groups[: 1 + e.imm])
        if e.name.startswith("wgmma.") or e.name in _COPIES:
            return state
        return _State(state.touched | self.reads[pc] | self.writes[pc], state.groups)

    def states(self) -> dict[int, _State]:
        """What holds before each instruction that matters."""
        before: list[_State | None] = [None] * len(self.steps)
        before[0] = _State()
        work = [0]
        found: dict[int, _State] = {}
        while work:
            block = work.pop()
            state = before[block]
            assert state is not None
            for pc in self.steps[block]:
                found[pc] = state
                state = self.step(pc, state)
            for following in self.after[block]:
                known = before[following]
                joined = state if known is None else known | state
                if joined != known:
                    before[following] = joined
                    work.append(following)
        return found


def warpgroup_checks(
    code: list[Emitted], labels: dict[str, int], tables: Sequence[int | str]
) -> tuple[list[Emitted], dict[str, int], dict[int, list[Reg]]]:
    """Adds the checks that a kernel with wgmma needs.

    Returns:
        The instructions, where the labels are now, and the registers that have to keep their places until an
        instruction because a product that it waits for has them.
    """
    if not any(e.name == _PRODUCT for e in code):
        return code, labels, {}
    flow = _Flow(code, labels, tables)
    checks = _checks(flow)
    moved: list[int] = []
    out: list[Emitted] = []
    for pc, e in enumerate(code):
        moved.append(len(out))
        out += checks.get(pc, [])
        out.append(e)
    for e in out:
        if e.name == _PRODUCT and e.abcd[3]:
            e.imm = moved[e.imm]
    labels = {name: moved[pc] for name, pc in labels.items()}
    return out, labels, _held(_Flow(out, labels, tables))


def _checks(flow: _Flow) -> dict[int, list[Emitted]]:
    """Marks products without a fence; returns what goes ahead of other instructions."""
    names = {r.index: r for e in flow.code for r in (*e.many, *e.outs.values(), *e.ins.values()) if isinstance(r, Reg)}
    checks: dict[int, list[Emitted]] = {}
    for pc, state in flow.states().items():
        e = flow.code[pc]
        touches = flow.reads[pc] | flow.writes[pc]
        if e.name == _PRODUCT:
            unfenced = state.touched & (flow.accumulators[pc] | flow.fragments[pc])
            if unfenced:
                e.abcd, e.imm = (*e.abcd[:3], 1), _toucher(flow, pc, unfenced)
            touches = flow.fragments[pc] & state.accumulators | flow.accumulators[pc] & state.fragments
        elif e.name in _COPIES:
            if flow.reads[pc] & state.accumulators:
                checks.setdefault(pc, []).append(Emitted("wgmma.settle", guard=e.guard, guard_not=e.guard_not))
            touches = flow.writes[pc]
        elif e.name.startswith("wgmma."):
            continue
        touches &= state.accumulators | state.fragments
        for index in range(touches.bit_length()):
            if touches >> index & 1:
                checks.setdefault(pc, []).append(
                    Emitted("wgmma.touched", ins={0: names[index]}, guard=e.guard, guard_not=e.guard_not, cls="")
                )
    for ahead in checks.values():
        for k, check in enumerate(ahead):
            check.imm = len(ahead) - k
    return checks


def _toucher(flow: _Flow, product: int, registers: int) -> int:
    """An instruction that accesses one of the registers: the last above the product, else the last of all."""
    found = [
        pc
        for pc, e in enumerate(flow.code)
        if (flow.reads[pc] | flow.writes[pc]) & registers and e.name not in _COPIES and not e.name.startswith("wgmma.")
    ]
    return max([pc for pc in found if pc < product] or found)


def _held(flow: _Flow) -> dict[int, list[Reg]]:
    names = {r.index: r for e in flow.code for r in (*e.many, *e.ins.values()) if isinstance(r, Reg)}
    held = {}
    for pc, state in flow.states().items():
        e = flow.code[pc]
        if e.name == "wgmma.wait_group":
            mask = _union([d | a for d, a in state.groups[1 + e.imm :]])
            held[pc] = [names[k] for k in range(mask.bit_length()) if mask >> k & 1]
    return held
