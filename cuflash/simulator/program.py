"""A kernel as the machine runs it, and its instructions before their registers have slots: data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .ptx import Instr, Loc, Reg

INS = np.dtype(
    [
        ("op", "u8"),
        ("imm", "i8"),
        ("o", "u2", 16),
        ("target", "u4"),
        ("guard", "u2"),
        ("guard_not", "u1"),
        ("ctl", "u1"),
        ("a", "u1"),
        ("b", "u1"),
        ("c", "u1"),
        ("d", "u1"),
        ("flags", "u4"),
    ]
)
NONE = 0xFFFF

# Control, Flags and Space of runtime.hpp
SIMPLE, LABEL, BRANCH, EXIT, MEET, MEET_ALL, BARRIER, BRANCH_TABLE, YIELDING, CLUSTER_BARRIER = range(10)
(
    FTZ,
    SAT,
    RZ,
    RM,
    RP,
    RELU,
    NAN_WINS,
    APPROX,
    STRONG,
    ACQUIRE,
    RELEASE,
    CTA_SCOPE,
    SIGNED,
    WIDE_REG,
    NOT_C,
    HAS_COUNT,
    WAITS,
) = (1 << k for k in range(17))
CLUSTER_SPACE, ALIGNED, BULK_READ = 1 << 17, 1 << 18, 1 << 19
GENERIC, GLOBAL, SHARED, LOCAL, PARAM, CONST = range(6)

# Shared memory of a block that the driver keeps for itself, as on sm_80 and later: a program's own begins behind it.
SYSTEM_SHARED = 1024


@dataclass
class Emitted:
    """An instruction before its registers have slots."""

    name: str
    outs: dict[int, Reg] = field(default_factory=dict)
    ins: dict[int, Reg | tuple[int, int]] = field(default_factory=dict)  # a tuple is a constant: (bytes, bits)
    imm: int = 0
    target: int | str = 0
    guard: Reg | None = None
    guard_not: bool = False
    ctl: int = SIMPLE
    abcd: tuple[int, int, int, int] = (0, 0, 0, 0)
    flags: int = 0
    source: Instr | None = None
    cls: str = "other"
    many: tuple[Reg, ...] = ()  # read and written, more than fit into `outs`: their slots are at `target` of the tables


@dataclass
class Program:
    """A kernel that the machine can run."""

    name: str
    code: np.ndarray  # of INS; `op` is an index into `names`
    names: list[str]
    constants: np.ndarray  # (n, 3) uint64: slot, bytes, value
    slots: int
    params: list[tuple[str, int, int]]  # name, offset, size
    params_size: int
    static_shared: int
    shared_symbols: list[tuple[str, int, int]]
    local_size: int
    tables: np.ndarray
    locs: list[Loc | None]
    texts: list[str]
    classes: list[str]
    files: dict[int, str]
    max_threads: int = 0
    cluster: tuple[int, int, int] = (0, 0, 0)
    registers: int = 0  # of a thread as launched, where launch bounds say so
    variables: dict[int, tuple[str, int]] = field(
        default_factory=dict
    )  # row of `constants`: variable and offset whose address it is

    @cached_property
    def waits(self) -> bool:
        """Whether it waits for its turn in the stream."""
        return "griddepcontrol.wait" in self.names
