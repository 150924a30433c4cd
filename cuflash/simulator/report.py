"""Findings: what a check saw, said so that the reader knows where to look."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .program import Program
    from .ptx import Loc

__all__ = ["Finding", "SimulationError", "describe"]

# By number in runtime.hpp: the check's name, whether the address is in shared memory, and what to look at.
_KINDS: dict[int, tuple[str, str, str]] = {
    1: (
        "bounds",
        "global",
        "look at the index: is the last element one too far, is a mask missing, is the array named in `arrays`?",
    ),
    2: ("bounds", "shared", "look at the index and at the bytes of shared memory of the launch"),
    3: ("bounds", "local", "look at the index of the thread's own array or of the parameter"),
    4: ("misalignment", "any", "vector accesses need addresses that are multiples of their size"),
    5: ("uninitialised", "shared", "look for the store or copy that should have come before"),
    6: ("in_flight", "shared", "look at cp.async.wait_group: does it wait for the group that wrote these bytes?"),
    7: ("never_waited", "shared", "wait for all copies (cp.async.wait_all) before the kernel ends"),
    8: ("shared_race", "shared", "a barrier (__syncthreads, or __syncwarp within a warp) has to stand between the two"),
    9: (
        "global_race",
        "global",
        "the writer has to release (fence and atomic after a block barrier) and the reader to acquire",
    ),
    10: ("divergent_barrier", "none", "all threads of the block have to reach the same barrier"),
    11: ("divergent_warp", "none", "all lanes named by the mask have to be alive and to execute the same instruction"),
    12: ("deadlock", "none", "see which threads wait, and for what"),
    13: (
        "deadlock",
        "none",
        "a loop that waits for something that never comes, or a launch that needs a longer time_limit",
    ),
    14: ("assert", "none", ""),
    15: ("bounds", "global", "the array is read-only: not writeable in NumPy, or named in `readonly`"),
    16: ("mbarrier", "shared", "look at the barrier's initialisation and at its counts"),
    17: ("trap", "none", ""),
    18: ("internal", "none", "the simulator itself is at fault"),
    19: ("internal", "none", "calls nest too deeply"),
    20: ("warpgroup", "none", "look at wgmma.fence, commit_group, wait_group, and at what the four warps issue"),
    21: (
        "proxy",
        "shared",
        "the writer executes fence.proxy.async before the barrier, or the reader after it, ahead of wgmma",
    ),
    22: ("registers", "none", "look at the counts of setmaxnreg and at __launch_bounds__"),
    23: ("turn", "global", "the kernel ahead may still run: griddepcontrol.wait comes first, in every thread"),
}


@dataclass(frozen=True)
class Finding:
    """What one check saw.

    Attributes:
        check: name of the check.
        kernel: name of the kernel.
        file: source file.
        line: source line; 0 if the compiler gave none.
        block: the block's index in the grid.
        thread: the thread's index in the block.
        address: such as "k_cache + 1040384".
        message: what happened.
        other_line: of a race, the line of the other access.
        other_block: its block.
        other_thread: its thread.
        instruction: the PTX instruction.
        text: the whole report.
    """

    check: str
    kernel: str
    file: str
    line: int
    block: tuple[int, int, int]
    thread: tuple[int, int, int]
    address: str
    message: str
    other_line: int | None
    other_block: tuple[int, int, int] | None
    other_thread: tuple[int, int, int] | None
    instruction: str
    text: str

    def __str__(self) -> str:
        return self.text


class SimulationError(RuntimeError):
    """A check found something; `findings` has it, `finding` is the first."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__("\n".join(f.text for f in findings))
        self.findings = list(findings)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.findings,), vars(self)

    @property
    def finding(self) -> Finding:
        """The first finding."""
        return self.findings[0]


def _index(linear: int, shape: Sequence[int]) -> tuple[int, int, int]:
    return linear % shape[0], linear // shape[0] % shape[1], linear // (shape[0] * shape[1])


def _place(program: Program, loc: Loc | None, module: str) -> tuple[str, int, str]:
    if loc is None:
        return module, 0, f"{module} (no line)"
    name = PurePosixPath(program.files.get(loc.file, module)).name
    text = f"{name}:{loc.line}"
    if loc.inlined_at is not None:
        outer = PurePosixPath(program.files.get(loc.inlined_at.file, module)).name
        text += f", inlined at {outer}:{loc.inlined_at.line}"
    return name, loc.line, text


def _shared_name(program: Program, offset: int) -> str:
    best = None
    for name, start, _ in program.shared_symbols:
        if start <= offset and (best is None or start >= best[1]):
            best = (name, start)
    return f"shared {_variable(best[0])} + {offset - best[1]}" if best else f"shared + {offset}"


def _variable(mangled: str) -> str:
    """The name in the source of a variable that is static in a function: _ZZ6kernelE4tile is tile."""
    local = re.match(r"_ZZ.*E(\d+)(\w+)$", mangled)
    return local.group(2)[: int(local.group(1))] if local else mangled


def _global_name(regions: Sequence[tuple[str, int, int]], address: int) -> str:
    for name, lo, hi in regions:
        if lo <= address < hi:
            return f"{name} + {address - lo}"
    near = [(abs(address - edge), name, lo, hi) for name, lo, hi in regions for edge in (lo, hi)]
    if near:
        _, name, lo, hi = min(near)
        if address >= hi:
            return f"{name} + {address - lo} ({address - hi} bytes past its end)"
        return f"{name} - {lo - address} ({lo - address} bytes before its start)"
    return f"{address:#x}"


def describe(
    raw: Any,
    program: Program,
    module: str,
    grid: Sequence[int],
    block: Sequence[int],
    regions: Sequence[tuple[str, int, int]],
) -> Finding:
    """Turns what the machine wrote down into a finding."""
    check, space, hint = _KINDS[raw.kind]

    def loc_of(pc: int) -> Loc | None:  # a label has no line, but what follows it has
        return next((loc for loc in program.locs[pc : pc + 4] if loc is not None), None)

    def waiting(match: re.Match[str]) -> str:
        return f"{match.group(1)} at {_place(program, loc_of(int(match.group(2))), module)[2]};"

    file, line, place = _place(program, loc_of(raw.pc), module)
    address = ""
    if space == "any":
        instruction = program.texts[raw.pc]
        space = "shared" if "shared" in instruction else "global"
    if space == "shared":
        address = _shared_name(program, raw.address & 0xFFFFFF)
    elif space == "global":
        address = _global_name(regions, raw.address)
    elif space == "local":
        address = f"local + {raw.address}"
    where, thread = _index(raw.block, grid), _index(raw.thread, block)
    message = re.sub(r"(\d+)@(\d+)", waiting, raw.text.decode(errors="replace")).rstrip(";")
    other_line = other_block = other_thread = None
    lines = [
        f"{check}: {message}",
        f"  kernel      {program.name}",
        f"  source      {place}",
        f"  block       {where}, thread {thread}",
    ]
    if address:
        lines.append(f"  address     {address}")
    if raw.has_other:
        _, other_line, other_place = _place(program, loc_of(raw.other_pc), module)
        other_block, other_thread = _index(raw.other_block, grid), _index(raw.other_thread, block)
        lines.append(
            f"  other       {('read', 'write', 'waits')[raw.other_write]} at {other_place}, "
            f"block {other_block}, thread {other_thread}"
        )
    lines.append(f"  instruction {program.texts[raw.pc]}")
    if hint:
        lines.append(f"  look at     {hint}")
    return Finding(
        check,
        program.name,
        file,
        line,
        where,
        thread,
        address,
        message,
        other_line,
        other_block,
        other_thread,
        program.texts[raw.pc],
        "\n".join(lines),
    )
