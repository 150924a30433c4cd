"""From parsed PTX to the instructions of the machine in `engine.cpp`.

Each PTX instruction becomes one `Ins` (a handler of the machine, its operands as register slots, its parameters), now and then two. Whatever is not known
raises `UnsupportedInstruction`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .ptx import WIDTHS, Function, Imm, Instr, Loc, Mem, Module, Name, Not, Operand, PtxError, Reg, Symbol, Vec
from .registers import allocate

__all__ = ["INS", "Program", "UnsupportedInstruction", "decode"]

INS = np.dtype([("op", "u8"), ("imm", "i8"), ("o", "u2", 16), ("target", "u4"), ("guard", "u2"), ("guard_not", "u1"), ("ctl", "u1"),
                ("a", "u1"), ("b", "u1"), ("c", "u1"), ("d", "u1"), ("flags", "u4")])  # fmt: skip
NONE = 0xFFFF

# Control, Flags and Space of runtime.hpp
SIMPLE, LABEL, BRANCH, EXIT, MEET, MEET_ALL, BARRIER, BRANCH_TABLE, YIELDING, CLUSTER_BARRIER = range(10)
FTZ, SAT, RZ, RM, RP, RELU, NAN_WINS, APPROX, STRONG, ACQUIRE, RELEASE, CTA_SCOPE, SIGNED, WIDE_REG, NOT_C, HAS_COUNT, WAITS = (
    1 << k for k in range(17)
)
CLUSTER_SPACE, ALIGNED, BULK_READ = 1 << 17, 1 << 18, 1 << 19
GENERIC, GLOBAL, SHARED, LOCAL, PARAM, CONST = range(6)
SPACES = {"global": GLOBAL, "shared": SHARED, "shared::cta": SHARED, "shared::cluster": SHARED, "local": LOCAL, "param": PARAM,
          "param::entry": PARAM, "param::func": PARAM, "const": CONST}  # fmt: skip
SHARED_BASE, LOCAL_BASE, PARAM_BASE = 1 << 56, 2 << 56, 4 << 56
_VARIABLE = 0x5EED << 48

_AXES = {"x": 0, "y": 1, "z": 2}
_SPECIAL = {"%laneid": 12, "%warpid": 13, "%nwarpid": 14, "%smid": 15, "%nsmid": 16, "%lanemask_eq": 17, "%lanemask_lt": 18, "%lanemask_le": 19,
            "%lanemask_gt": 20, "%lanemask_ge": 21, "%clock": 22, "%clock64": 22, "%globaltimer": 22, "%globaltimer_lo": 22, "%clock_hi": 23,
            "%globaltimer_hi": 23, "%dynamic_smem_size": 24, "%total_smem_size": 25, "%cluster_ctarank": 38, "%cluster_nctarank": 39, "%gridid": 40,
            "%is_explicit_cluster": 40}  # fmt: skip
for _name, _code in {"tid": 0, "ntid": 3, "ctaid": 6, "nctaid": 9, "clusterid": 26, "cluster_ctaid": 29, "cluster_nctaid": 32, "nclusterid": 35}.items():
    for _axis, _k in _AXES.items():
        _SPECIAL[f"%{_name}.{_axis}"] = _code + _k

_COMPARE = {"eq": 0, "ne": 1, "lt": 2, "le": 3, "gt": 4, "ge": 5, "equ": 6, "neu": 7, "ltu": 8, "leu": 9, "gtu": 10, "geu": 11, "num": 12, "nan": 13,
            "lo": 2, "ls": 3, "hi": 4, "hs": 5}  # fmt: skip
_ROUND_INT = {"rni": 0, "rzi": 1, "rmi": 2, "rpi": 3}
_ROUND = {"rn": 0, "rz": RZ, "rm": RM, "rp": RP}
_HALF = {"f16": ("f16", 0), "f16x2": ("f16", 1), "bf16": ("bf16", 0), "bf16x2": ("bf16", 1)}
_INTS = {"u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"}
_TYPES = set(WIDTHS) | {"e4m3x2", "e5m2x2", "tf32"}


class UnsupportedInstruction(NotImplementedError):
    """An instruction that the machine does not know."""


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
    ptx_lines: list[int]
    classes: list[str]
    files: dict[int, str]
    max_threads: int = 0
    cluster: tuple[int, int, int] = (0, 0, 0)
    dynamic_offset: int = 0
    variables: dict[int, tuple[str, int]] = field(default_factory=dict)  # row of `constants`: variable and offset whose address it is


def _align(value: int, to: int) -> int:
    return -(-value // to) * to


class _Decoder:
    def __init__(self, module: Module, function: Function) -> None:
        self.module = module
        self.fn = function
        self.variables: dict[int, tuple[str, int]] = {}
        self.out: list[Emitted] = []
        self.labels: dict[str, int] = {}
        self.now: Instr = Instr(("none",), [])
        self.tables: list[int | str] = []
        self.place()
        self.carry: Reg | None = None

    def place(self) -> None:
        """Gives parameters, shared and local variables their addresses."""
        self.offsets: dict[str, tuple[str, int]] = {}
        at, self.params = 0, []
        for sym in self.fn.params:
            at = _align(at, sym.align)
            self.offsets[sym.name] = ("param", at)
            self.params.append((sym.name, at, sym.size))
            at += sym.size
        self.params_size = at
        shared: list[Symbol] = [s for s in self.module.symbols.values() if s.space == "shared"]
        shared += [s for s in self.fn.symbols.values() if s.space == "shared"]
        at, self.shared_symbols = 0, []
        for sym in shared:
            if sym.size:
                at = _align(at, sym.align)
                self.offsets[sym.name] = ("shared", at)
                self.shared_symbols.append((sym.name, at, sym.size))
                at += sym.size
        dynamic = [s for s in shared if not s.size]
        at = _align(at, max([s.align for s in dynamic] + [16]))
        self.dynamic_offset = at
        for sym in dynamic:
            self.offsets[sym.name] = ("shared", at)
            self.shared_symbols.append((sym.name, at, 0))
        self.static_shared = at
        at = 0
        entry_params = {s.name for s in self.fn.params}
        for sym in self.fn.symbols.values():
            if sym.space == "local" or (sym.space == "param" and sym.name not in entry_params):
                at = _align(at, max(sym.align, 8))
                self.offsets[sym.name] = ("local", at)
                at += sym.size
        self.local_size = _align(at, 16)

    # -- errors and operands

    def unknown(self, what: str = "") -> UnsupportedInstruction:
        text = f": {what}" if what else ""
        return UnsupportedInstruction(
            f"{'.'.join(self.now.op)} is not an instruction that the simulator knows{text} (PTX line {self.now.ptx_line}: {self.now.text})"
        )

    def temp(self, width: int) -> Reg:
        reg = Reg(f"%temp{len(self.fn.regs)}", width, len(self.fn.regs))
        self.fn.regs.append(reg)
        return reg

    def emit(self, name: str, outs: dict[int, Reg] | None = None, ins: dict[int, Reg | tuple[int, int]] | None = None, *, imm: int = 0,
             target: int | str = 0, ctl: int = SIMPLE, abcd: Sequence[int] = (), flags: int = 0, cls: str = "", guarded: bool = True) -> None:  # fmt: skip
        a, b, c, d = (*abcd, 0, 0, 0, 0)[:4]
        self.out.append(Emitted(name, outs or {}, ins or {}, imm, target, self.now.guard if guarded else None, self.now.guard_not, ctl, (a, b, c, d),
                                flags, self.now, cls))  # fmt: skip

    def bits(self, imm: Imm, kind: str) -> int:
        width = WIDTHS.get(kind, 4)
        if kind in ("f32", "f64"):
            if imm.bits is not None:
                if imm.width == WIDTHS[kind]:
                    return imm.bits
                if imm.width == 4:
                    value = struct.unpack("<f", struct.pack("<I", imm.bits))[0]
                else:
                    value = struct.unpack("<d", struct.pack("<Q", imm.bits))[0]
            else:
                value = float(imm.value)
            return int.from_bytes(struct.pack("<f" if kind == "f32" else "<d", value), "little")
        if imm.bits is not None:
            return imm.bits & ((1 << 8 * max(width, 4)) - 1)
        if isinstance(imm.value, float):
            raise self.unknown("a fraction as an integer operand")
        return imm.value & ((1 << 8 * max(width, 4)) - 1)

    def value(self, arg: Operand, kind: str) -> Reg | tuple[int, int]:
        """An operand that is read: a register or a constant of the width of the type `kind`."""
        lane = 8 if WIDTHS.get(kind, 4) == 8 else 4
        if isinstance(arg, Reg):
            if arg.width == 0:
                raise self.unknown("a predicate where a value is wanted")
            if (arg.width == 8) != (lane == 8):
                if lane == 8:
                    raise self.unknown(f"{arg.name} has too few bits")
                narrow = self.temp(4)
                self.emit("cvt.u32.u64", {0: narrow}, {1: arg})
                return narrow
            return arg
        if isinstance(arg, Imm):
            return (lane, self.bits(arg, kind))
        if isinstance(arg, Name):
            if arg.text == "WARP_SZ":
                return (lane, 32)
            if arg.text in _SPECIAL:
                reg = self.temp(lane)
                self.special(reg, arg.text)
                return reg
            return (lane, self.address_of(arg.text))
        if isinstance(arg, Mem) and isinstance(arg.base, Name):
            at = self.address_of(arg.base.text)
            if at in self.variables:
                self.variables[at + arg.offset] = (arg.base.text, arg.offset)
            return (lane, at + arg.offset)
        raise self.unknown(f"operand {arg}")

    def special(self, reg: Reg, name: str) -> None:
        self.emit("special", {0: reg}, abcd=(_SPECIAL[name], int(reg.width == 8)), cls="move")

    def address_of(self, name: str) -> int:
        if name in self.offsets:
            return self.offsets[name][1]
        symbol = self.module.symbols.get(name)
        if symbol is not None and symbol.space in ("global", "const"):
            # The address is known only when the module is loaded; until then a number stands for it that nothing else uses.
            number = _VARIABLE | list(self.module.symbols).index(name) << 32
            self.variables[number] = (name, 0)
            return number
        raise self.unknown(f"{name} has no address")

    def pred(self, arg: Operand) -> tuple[Reg | tuple[int, int], bool]:
        """A predicate operand and whether it is inverted."""
        if isinstance(arg, Not):
            return arg.reg, True
        if isinstance(arg, Reg) and arg.width == 0:
            return arg, False
        if isinstance(arg, Imm):
            return (0, 0xFFFFFFFF if arg.value else 0), False
        raise self.unknown(f"{arg} is no predicate")

    def dest(self, arg: Operand, pred: bool = False) -> Reg:
        if isinstance(arg, Reg) and (arg.width == 0) == pred:
            return arg
        raise self.unknown(f"{arg} cannot be written")

    @staticmethod
    def sink(arg: Operand) -> bool:
        return isinstance(arg, Name) and arg.text == "_"

    def address(self, arg: Operand, space: int) -> tuple[Reg | None, int, int]:
        """`[base + offset]`: the register, its bytes, the offset."""
        if not isinstance(arg, Mem):
            raise self.unknown(f"{arg} is no address")
        if isinstance(arg.base, Reg):
            return arg.base, 8 if arg.base.width == 8 else 4, arg.offset
        if isinstance(arg.base, Imm):
            return None, 8, int(arg.base.value) + arg.offset
        at = self.address_of(arg.base.text)
        if at in self.variables:  # only constants are filled in when the module is loaded, so the address goes through a register
            reg = self.temp(8)
            self.emit("mov.u64", {0: reg}, {1: (8, at)})
            return reg, 8, arg.offset
        return None, 8, at + arg.offset

    def count(self, *allowed: int) -> list[Operand]:
        if len(self.now.args) not in allowed:
            raise self.unknown(f"{len(self.now.args)} operands")
        return self.now.args

    # -- the way of one instruction

    def decode(self) -> None:
        for item in self.fn.code:
            if isinstance(item, Name):
                self.labels[item.text] = len(self.out)
                self.now = Instr(("label",), [])
                self.out.append(Emitted("nop", ctl=LABEL))
                continue
            self.now = item
            handler = _TABLE.get(item.op[0])
            if handler is None:
                raise self.unknown()
            before = len(self.out)
            handler(self, item.op[1:])
            for e in self.out[before:]:
                e.cls = e.cls or _CLASSES.get(item.op[0], "int")
        self.now = Instr(("ret",), [])
        self.emit("nop", ctl=EXIT, cls="branch")

    def type_of(self, mods: Sequence[str]) -> tuple[str, list[str]]:
        if not mods or mods[-1] not in _TYPES:
            raise self.unknown("no type")
        return mods[-1], list(mods[:-1])

    def flags(self, mods: list[str], *allowed: str) -> int:
        """Takes the modifiers that are flags out of the list."""
        known = {"ftz": FTZ, "sat": SAT, "rn": 0, "rz": RZ, "rm": RM, "rp": RP, "relu": RELU, "satfinite": 0, "noftz": 0}
        flags = 0
        for m in list(mods):
            if m in allowed and m in known:
                flags |= known[m]
                mods.remove(m)
        return flags

    def no_more(self, mods: Sequence[str]) -> None:
        if mods:
            raise self.unknown(f"modifier .{mods[0]}")

    @staticmethod
    def cls_of(type_: str) -> str:
        return "fp64" if type_ == "f64" else "fp16" if type_ in _HALF else "fp32" if type_ == "f32" else "int"

    @staticmethod
    def plain(type_: str) -> str:
        """The type of an operation that does not care for signs."""
        return {"b": "u", "s": "u", "u": "u"}[type_[0]] + type_[1:]

    def nary(self, name: str, type_: str, n: int, types: Sequence[str] | None = None, flags: int = 0, abcd: Sequence[int] = (), cls: str = "") -> None:
        args = self.count(n + 1)
        kinds = types or [type_] * n
        dst = self.dest(args[0])
        self.emit(name, {0: dst}, {k + 1: self.value(args[k + 1], kinds[k]) for k in range(n)}, flags=flags, abcd=abcd, cls=cls or self.cls_of(type_))

    def arithmetic(self, mods: Sequence[str]) -> None:  # add sub mul div fma min max ...
        op = self.now.op[0]
        type_, rest = self.type_of(mods)
        n = {"fma": 3, "mad": 3, "neg": 1, "abs": 1, "sqrt": 1, "rcp": 1, "rsqrt": 1, "ex2": 1, "lg2": 1, "sin": 1, "cos": 1, "tanh": 1}.get(op, 2)
        if type_ in _HALF:
            half, two = _HALF[type_]
            flags = self.flags(rest, "rn", "ftz", "sat", "relu")
            if op in ("neg", "abs"):
                self.no_more(rest)
                return self.nary(f"{op}.half", type_, 1, abcd=(two,))
            name = f"{op}.NaN.{half}" if "NaN" in rest else f"{op}.approx.{half}" if op in ("ex2", "tanh") else f"{op}.{half}"
            rest = [r for r in rest if r not in ("NaN", "approx")]
            self.no_more(rest)
            return self.nary(name, type_, n, flags=flags, abcd=(two,))
        if type_ in ("f32", "f64"):
            flags = self.flags(rest, "rn", "rz", "rm", "rp", "ftz", "sat")
            name = op
            if op == "mad":
                name = "fma"
            if op in ("min", "max") and len(self.now.args) == 4:
                name, n = f"{op}3", 3
            if "approx" in rest or "full" in rest:
                name += ".approx"
            elif "NaN" in rest:
                name += ".NaN"
            elif op in ("ex2", "lg2", "sin", "cos", "tanh", "rsqrt"):
                raise self.unknown("not .approx")
            rest = [r for r in rest if r not in ("approx", "full", "NaN")]
            self.no_more(rest)
            special = "approx" in name
            return self.nary(f"{name}.{type_}", type_, n, flags=flags, cls="special" if special else "")
        if "cc" in rest and op in ("add", "sub"):
            return self.carries(f"{op}c", 0, 1)
        if op in ("mul", "mad"):
            if "cc" in rest:
                rest.remove("cc")
                return self.mad_carries(rest, type_, 0, 1)
            which = rest[-1] if rest else ""
            self.no_more([r for r in rest if r not in ("lo", "hi", "wide")])
            if which == "lo":
                return self.nary(f"{op}.{self.plain(type_)}", type_, n)
            if which == "hi":
                return self.nary(f"{op}hi.{type_}", type_, n)
            if which == "wide":
                wide = f"{type_[0]}{int(type_[1:]) * 2}"
                return self.nary(f"{op}wide.{type_}", type_, n, [type_, type_, wide][:n])
            raise self.unknown()
        self.no_more(rest)
        sign = op in ("min", "max", "div", "rem", "abs")
        name = type_ if sign else self.plain(type_)
        return self.nary(f"{op}.{name}", type_, n)

    def carries(self, name: str, takes: int, leaves: int) -> None:
        a = self.count(3)
        self.carry = self.carry or self.temp(0)
        self.emit(name, {0: self.dest(a[0])} | ({3: self.carry} if leaves else {}), {1: self.value(a[1], "u32"), 2: self.value(a[2], "u32"), 3: self.carry},
                  abcd=(takes, leaves))  # fmt: skip

    def mad_carries(self, mods: list[str], type_: str, takes: int, leaves: int) -> None:
        a = self.count(4)
        self.carry = self.carry or self.temp(0)
        self.emit("madc", {0: self.dest(a[0])} | ({3: self.carry} if leaves else {}),
                  {1: self.value(a[1], "u32"), 2: self.value(a[2], "u32"), 4: self.value(a[3], "u32"), 3: self.carry},
                  abcd=(takes, leaves, int("hi" in mods), int(type_[0] == "s")))  # fmt: skip

    def carry_in(self, mods: Sequence[str]) -> None:
        type_, rest = self.type_of(mods)
        if type_ not in ("u32", "s32", "b32"):
            raise self.unknown("64-bit carries")
        if self.now.op[0] == "madc":
            return self.mad_carries(rest, type_, 1, int("cc" in rest))
        return self.carries(self.now.op[0], 1, int("cc" in rest))

    def logic(self, mods: Sequence[str]) -> None:
        op = self.now.op[0]
        type_, rest = self.type_of(mods)
        self.no_more(rest)
        if type_ == "pred":
            a = self.now.args
            ins: dict[int, Reg | tuple[int, int]] = {}
            for k, arg in enumerate(a[1:]):
                reg, inverted = self.pred(arg)
                if inverted:
                    t = self.temp(0)
                    self.emit("not.pred", {0: t}, {1: reg})
                    reg = t
                ins[k + 1] = reg
            return self.emit(f"{op}.pred", {0: self.dest(a[0], True)}, ins)
        return self.nary(f"{op}.{self.plain(type_)}", type_, 1 if op in ("not", "cnot") else 2)

    def shift(self, mods: Sequence[str]) -> None:
        type_, rest = self.type_of(mods)
        self.no_more(rest)
        name = f"s{type_[1:]}" if self.now.op[0] == "shr" and type_[0] == "s" else self.plain(type_)
        self.nary(f"{self.now.op[0]}.{name}", type_, 2, [type_, "u32"])

    def bits_of(self, mods: Sequence[str]) -> None:  # popc clz brev bfe bfi bfind
        op = self.now.op[0]
        type_, rest = self.type_of(mods)
        if op == "bfind":
            shift = "shiftamt" in rest
            a = self.count(2)
            name = type_ if type_[0] != "b" else self.plain(type_)
            return self.emit(f"bfind.{name}", {0: self.dest(a[0])}, {1: self.value(a[1], type_), 2: (4, int(shift))})
        self.no_more(rest)
        if op == "bfe":
            return self.nary(f"bfe.{type_}", type_, 3, [type_, "u32", "u32"])
        if op == "bfi":
            return self.nary(f"bfi.{type_}", type_, 4, [type_, type_, "u32", "u32"])
        return self.nary(f"{op}.{type_}", type_, 1)

    def prmt(self, mods: Sequence[str]) -> None:
        modes = ["f4e", "b4e", "rc8", "ecl", "ecr", "rc16"]
        mode = modes.index(mods[1]) + 1 if len(mods) == 2 else 0
        self.nary("prmt", "b32", 3, abcd=(mode,))

    def lop3(self, mods: Sequence[str]) -> None:
        a = self.count(5)
        table = a[4]
        if list(mods) != ["b32"] or not isinstance(table, Imm):
            raise self.unknown()
        self.emit("lop3", {0: self.dest(a[0])}, {k: self.value(a[k], "b32") for k in (1, 2, 3)}, abcd=(int(table.value) & 255,))

    def funnel(self, mods: Sequence[str]) -> None:
        self.nary(f"shf.{mods[0]}.{mods[1]}", "b32", 3)

    def dot(self, mods: Sequence[str]) -> None:
        self.nary(f"dp4a.{mods[0]}.{mods[1]}", "b32", 3)

    def sad(self, mods: Sequence[str]) -> None:
        type_, rest = self.type_of(mods)
        self.no_more(rest)
        self.nary(f"sad.{type_}", type_, 3)

    def mul24(self, mods: Sequence[str]) -> None:
        type_, rest = self.type_of(mods)
        if rest != ["lo"]:
            raise self.unknown()
        self.nary(f"{self.now.op[0]}.{type_}", type_, 2 if self.now.op[0] == "mul24" else 3)

    def copysign(self, mods: Sequence[str]) -> None:
        self.nary(f"copysign.{mods[-1]}", mods[-1], 2)

    def testp(self, mods: Sequence[str]) -> None:
        a = self.count(2)
        which = ["finite", "infinite", "number", "notanumber", "normal", "subnormal"].index(mods[0])
        self.emit("testp", {0: self.dest(a[0], True)}, {1: self.value(a[1], mods[1])}, abcd=(which, int(mods[1] == "f64")))

    # -- comparisons

    def comparison(self, mods: Sequence[str]) -> tuple[str, str, int, int, int, list[str]]:
        type_, rest = self.type_of(mods)
        flags = self.flags(rest, "ftz")
        cmp = _COMPARE.get(rest[0], -1)
        boolean = 0
        if len(rest) > 1 and rest[1] in ("and", "or", "xor"):
            boolean = 1 + ["and", "or", "xor"].index(rest[1])
            rest = rest[:1] + rest[2:]
        if cmp < 0:
            raise self.unknown(f".{rest[0]}")
        name = self.plain(type_) if type_[0] == "b" and type_ not in _HALF else type_
        return type_, name, cmp, boolean, flags, rest[1:]

    def setp(self, mods: Sequence[str]) -> None:
        type_, name, cmp, boolean, flags, rest = self.comparison(mods)
        self.no_more(rest)
        a = self.count(4 if boolean else 3)
        targets = a[0].items if isinstance(a[0], Vec) else (a[0],)
        outs = {k: self.dest(t, True) for k, t in enumerate(targets) if not self.sink(t)}
        ins: dict[int, Reg | tuple[int, int]] = {2: self.value(a[1], type_), 3: self.value(a[2], type_)}
        if boolean:
            ins[4], inverted = self.pred(a[3])
            flags |= NOT_C if inverted else 0
        if type_ in _HALF:
            half, two = _HALF[type_]
            name = f"setp2.{half}" if two else f"setp.{half}"
        else:
            name = f"setp.{name}"
        self.emit(name, outs, ins, flags=flags, abcd=(cmp, boolean), cls=self.cls_of(type_))

    def set(self, mods: Sequence[str]) -> None:
        type_, name, cmp, boolean, flags, rest = self.comparison(mods)
        if len(rest) != 1:
            raise self.unknown()
        a = self.count(4 if boolean else 3)
        ins: dict[int, Reg | tuple[int, int]] = {2: self.value(a[1], type_), 3: self.value(a[2], type_)}
        if boolean:
            ins[4], inverted = self.pred(a[3])
            flags |= NOT_C if inverted else 0
        two = 0
        if type_ in _HALF:
            half, two = _HALF[type_]
            if rest[0] not in _HALF and rest[0] not in ("u32", "s32", "b32", "u16", "s16"):
                raise self.unknown()
            if rest[0] in ("u32", "s32") and not two:
                raise self.unknown()
            name = half
        self.emit(f"set.{name}", {0: self.dest(a[0])}, ins, flags=flags, abcd=(cmp, boolean, int("f" in rest[0]), two), cls=self.cls_of(type_))

    def selp(self, mods: Sequence[str]) -> None:
        type_, rest = self.type_of(mods)
        self.no_more(rest)
        a = self.count(4)
        p, inverted = self.pred(a[3])
        x, y = self.value(a[1], type_), self.value(a[2], type_)
        if inverted:
            x, y = y, x
        self.emit("selp.b64" if WIDTHS[type_] == 8 else "selp.b32", {0: self.dest(a[0])}, {1: x, 2: y, 3: p})

    def slct(self, mods: Sequence[str]) -> None:
        rest = list(mods)
        flags = self.flags(rest, "ftz")
        a = self.count(4)
        self.emit("slct.b64" if WIDTHS[rest[0]] == 8 else "slct.b32", {0: self.dest(a[0])},
                  {1: self.value(a[1], rest[0]), 2: self.value(a[2], rest[0]), 3: self.value(a[3], rest[1])}, flags=flags, abcd=(int(rest[1] == "f32"),))  # fmt: skip

    # -- moves and conversions

    def mov(self, mods: Sequence[str]) -> None:
        type_, rest = self.type_of(mods)
        self.no_more(rest)
        d, s = self.count(2)
        if type_ == "pred":
            p, inverted = self.pred(s)
            return self.emit("not.pred" if inverted else "mov.pred", {0: self.dest(d, True)}, {1: p})
        if isinstance(d, Vec):
            part = 8 * WIDTHS[type_] // len(d.items)
            src = self.value(s, type_)
            parts = [None if self.sink(x) else self.dest(x) for x in d.items]
            if len(parts) == 2 and part in (32, 16):
                # the source is operand 2; a part may be the very register that is taken apart
                return self.emit("unpack32x2" if part == 32 else "unpack16x2", {k: r for k, r in enumerate(parts) if r is not None}, {2: src})
            return self.emit("unpack", {k + 1: r for k, r in enumerate(parts) if r is not None}, {0: src}, abcd=(len(parts), part, WIDTHS[type_]))
        if isinstance(s, Vec):
            part = 8 * WIDTHS[type_] // len(s.items)
            kind = f"b{part}"
            ins = {k + 1: self.value(x, kind) for k, x in enumerate(s.items)}
            dst = self.dest(d)
            if len(ins) == 2 and part in (32, 16):
                return self.emit("pack32x2" if part == 32 else "pack16x2", {0: dst}, ins)
            return self.emit("pack", {0: dst}, ins, abcd=(len(ins), part, WIDTHS[type_]))
        dst = self.dest(d)
        if isinstance(s, Name) and s.text in _SPECIAL:
            return self.special(dst, s.text)
        kind = type_ if type_ in ("f32", "f64") else "u64" if WIDTHS[type_] == 8 else "u32"
        if (dst.width == 8) != (WIDTHS[type_] == 8):
            raise self.unknown("the register has another width")
        self.emit("mov.u64" if WIDTHS[type_] == 8 else "mov.u32", {0: dst}, {1: self.value(s, kind)})

    def cvt(self, mods: Sequence[str]) -> None:
        rest = list(mods)
        if len(rest) < 2 or rest[-1] not in _TYPES or rest[-2] not in _TYPES:
            raise self.unknown()
        d, s = rest[-2:]
        rest = rest[:-2]
        flags = self.flags(rest, "ftz", "sat", "relu", "satfinite")
        integral = 9
        tf32 = -1
        for m in list(rest):
            if m in _ROUND_INT:
                integral = _ROUND_INT[m]
            elif m in _ROUND:
                flags |= _ROUND[m]
                tf32 = {"rn": 1, "rz": 2}.get(m, -1)
            elif m == "rna":
                tf32 = 0
            else:
                continue
            rest.remove(m)
        self.no_more(rest)
        a = self.count(2, 3)
        dst = self.dest(a[0])
        if d in ("f16x2", "bf16x2", "e4m3x2", "e5m2x2") and s == "f32":
            if len(a) != 3:
                raise self.unknown()
            return self.emit(f"cvt.{d}.f32", {0: dst}, {1: self.value(a[1], s), 2: self.value(a[2], s)}, flags=flags)
        if len(a) != 2:
            raise self.unknown()
        if d in ("e4m3x2", "e5m2x2") and s == "f16x2" or d == "f16x2" and s in ("e4m3x2", "e5m2x2"):
            return self.emit(f"cvt.{d}.{s}", {0: dst}, {1: self.value(a[1], "b32")}, flags=flags)
        if d == "tf32":
            return self.emit("cvt.tf32.f32", {0: dst}, {1: self.value(a[1], "f32")}, abcd=(tf32,))
        floats = ("f32", "f64", "f16", "bf16")
        if (d not in _INTS and d not in floats) or (s not in _INTS and s not in floats):
            raise self.unknown()
        if (dst.width == 8) != (WIDTHS[d] == 8):
            wide = dst.width == 8 and d in _INTS
            if not wide:
                raise self.unknown("the register has another width")
            narrow = self.temp(4)
            self.emit(f"cvt.{'sat.' if flags & SAT else ''}{d}.{s}", {0: narrow}, {1: self.value(a[1], s)}, flags=flags, abcd=(integral,))
            return self.emit(f"cvt.{'s64' if d[0] == 's' else 'u64'}.{d}", {0: dst}, {1: narrow})
        if d in _INTS and s in _INTS and flags & SAT and s not in ("u8", "s8"):
            return self.emit(f"cvt.sat.{d}.{s}", {0: dst}, {1: self.value(a[1], s)})
        if d in _INTS and s in floats and integral == 9:
            raise self.unknown("no rounding to an integer")
        self.emit(f"cvt.{d}.{s}", {0: dst}, {1: self.value(a[1], s)}, flags=flags, abcd=(integral,))

    def cvta(self, mods: Sequence[str]) -> None:
        rest = list(mods)
        to = rest[0] == "to"
        if to:
            rest.pop(0)
        space = SPACES.get(rest[0])
        d, s = self.count(2)
        dst = self.dest(d)
        if dst.width != 8 or space is None:
            raise self.unknown()
        src = self.value(s, "u64")
        if space in (GLOBAL, CONST):
            return self.emit("mov.u64", {0: dst}, {1: src})
        if to:
            return self.emit("to_shared", {0: dst}, {1: src})
        base = {SHARED: SHARED_BASE, LOCAL: LOCAL_BASE, PARAM: PARAM_BASE}[space]
        return self.emit("address", {0: dst}, {1: src}, imm=base)

    def isspacep(self, mods: Sequence[str]) -> None:
        d, s = self.count(2)
        self.emit("isspacep", {0: self.dest(d, True)}, {1: self.value(s, "u64")}, abcd=(SPACES[mods[0]], int(mods[0] == "shared::cluster")))

    # -- memory

    def memory_mods(self, mods: Sequence[str]) -> tuple[int, int, str, int]:
        """Space, vector length, type and flags of ld and st."""
        space, vector, type_, flags = GENERIC, 1, "", 0
        for m in mods:
            if m in SPACES:
                space = SPACES[m]
            elif m in ("v2", "v4", "v8"):
                vector = int(m[1])
            elif m in WIDTHS:
                type_ = m
            elif m in ("volatile", "relaxed", "mmio"):
                flags |= STRONG
            elif m == "acquire":
                flags |= STRONG | ACQUIRE
            elif m == "release":
                flags |= STRONG | RELEASE
            elif m == "cta":
                flags |= CTA_SCOPE
            elif m in ("weak", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "cluster", "gpu", "sys") or m.startswith(("L1::", "L2::")):
                continue
            else:
                raise self.unknown(f"modifier .{m}")
        if not type_ or WIDTHS[type_] not in (1, 2, 4, 8):
            raise self.unknown("no type")
        return space, vector, type_, flags

    def hint(self, args: list[Operand], n: int) -> list[Operand]:
        """Drops the cache policy behind the operands."""
        if len(args) == n + 1 and any("cache_hint" in m for m in self.now.op):
            return args[:n]
        if len(args) != n:
            raise self.unknown(f"{len(args)} operands")
        return args

    def ld(self, mods: Sequence[str]) -> None:
        space, vector, type_, flags = self.memory_mods(mods)
        a = self.hint(self.now.args, 2)
        items = a[0].items if isinstance(a[0], Vec) else (a[0],)
        if len(items) != vector:
            raise self.unknown("the vector has another length")
        outs = {k: self.dest(x) for k, x in enumerate(items) if not self.sink(x)}
        if type_[0] == "s":
            flags |= SIGNED
        if WIDTHS[type_] < 8 and any(r.width == 8 for r in outs.values()):
            flags |= WIDE_REG
        mem = a[1]
        if space == PARAM and isinstance(mem, Mem) and isinstance(mem.base, Name):
            where, at = self.offsets.get(mem.base.text, ("", 0))
            if where == "param":
                return self.emit("ld.param", outs, imm=at + mem.offset, abcd=(vector, WIDTHS[type_]), flags=flags, cls="ld.param")
            space = LOCAL
        base, width, offset = self.address(mem, space)
        cls = {GLOBAL: "ld.global", SHARED: "ld.shared", LOCAL: "ld.local", PARAM: "ld.param", CONST: "ld.const"}.get(space, "ld.generic")
        self.emit("ld", outs, {12: base} if base else {}, imm=offset, abcd=(vector, WIDTHS[type_], space, width), flags=flags, cls=cls)

    def st(self, mods: Sequence[str]) -> None:
        if mods[0] == "async":
            return self.st_async(mods)
        space, vector, type_, flags = self.memory_mods(mods)
        a = self.hint(self.now.args, 2)
        items = a[1].items if isinstance(a[1], Vec) else (a[1],)
        if len(items) != vector:
            raise self.unknown("the vector has another length")
        if WIDTHS[type_] < 8 and any(isinstance(x, Reg) and x.width == 8 for x in items):
            flags |= WIDE_REG
            values = {k: self.value(x, "u64") for k, x in enumerate(items)}
        else:
            values = {k: self.value(x, type_) for k, x in enumerate(items)}
        if space == PARAM:
            space = LOCAL
        base, width, offset = self.address(a[0], space)
        if base:
            values[12] = base
        cls = {GLOBAL: "st.global", SHARED: "st.shared", LOCAL: "st.local"}.get(space, "st.generic")
        self.emit("st", {}, values, imm=offset, abcd=(vector, WIDTHS[type_], space, width), flags=flags, cls=cls)

    def atom(self, mods: Sequence[str]) -> None:
        ops = ["add", "min", "max", "inc", "dec", "and", "or", "xor", "exch", "cas"]
        types = {"u32": 0, "b32": 0, "s32": 1, "f32": 2, "u64": 3, "b64": 3, "s64": 4, "f64": 5, "f16x2": 6, "bf16x2": 7, "f16": 8, "bf16": 9}
        space, op, type_, flags = GENERIC, -1, "", STRONG
        for m in mods:
            if m in SPACES:
                space = SPACES[m]
            elif m in ops:
                op = ops.index(m)
            elif m in types:
                type_ = m
            elif m == "acquire":
                flags |= ACQUIRE
            elif m == "release":
                flags |= RELEASE
            elif m == "acq_rel":
                flags |= ACQUIRE | RELEASE
            elif m == "cta":
                flags |= CTA_SCOPE
            elif m in ("relaxed", "cluster", "gpu", "sys", "noftz") or m.startswith("L2::"):
                continue
            else:
                raise self.unknown(f"modifier .{m}")
        if op < 0 or not type_:
            raise self.unknown()
        red = self.now.op[0] == "red"
        n = (2 if red else 3) + (ops[op] == "cas")
        a = self.hint(self.now.args, n)
        outs: dict[int, Reg] = {}
        if not red:
            if not self.sink(a[0]):
                outs[0] = self.dest(a[0])
            a = a[1:]
        ins = {k + 1: self.value(x, type_) for k, x in enumerate(a[1:])}
        base, width, offset = self.address(a[0], space)
        if base:
            ins[12] = base
        self.emit("atom", outs, ins, imm=offset, abcd=(op, types[type_], space, width), flags=flags, cls="atomic")

    def cp(self, mods: Sequence[str]) -> None:
        if mods[0] != "async":
            raise self.unknown()
        rest = list(mods[1:])
        a = self.now.args
        if rest == ["commit_group"]:
            return self.emit("cp.async.commit_group", cls="cp.async.commit")
        if rest == ["wait_all"]:
            return self.emit("cp.async.wait_all", cls="cp.async.wait")
        if rest == ["wait_group"]:
            n = a[0]
            if not isinstance(n, Imm):
                raise self.unknown()
            return self.emit("cp.async.wait_group", imm=int(n.value), cls="cp.async.wait")
        if rest and rest[0] in ("ca", "cg"):
            allowed = {"ca", "cg", "shared", "shared::cta", "global"}
            self.no_more([m for m in rest if m not in allowed and not m.startswith("L2::")])
            args = a[:-1] if any("cache_hint" in m for m in rest) else a
            if len(args) not in (3, 4):
                raise self.unknown()
            size = args[2]
            if not isinstance(size, Imm) or size.value not in (4, 8, 16):
                raise self.unknown("copies of 4, 8 or 16 bytes only")
            dst, dw, doff = self.address(args[0], SHARED)
            src, sw, soff = self.address(args[1], GLOBAL)
            ins: dict[int, Reg | tuple[int, int]] = {}
            if dst:
                ins[0] = dst
            if src:
                ins[1] = src
            if len(args) == 4:
                third = args[3]
                if isinstance(third, Not) or (isinstance(third, Reg) and third.width == 0):
                    ins[3], inverted = self.pred(third)
                    if inverted:
                        raise self.unknown("an inverted predicate")
                else:
                    ins[2] = self.value(third, "u32")
            return self.emit("cp.async", {}, ins, imm=doff, target=soff & 0xFFFFFFFF, abcd=(int(size.value), dw, 0, sw), cls="cp.async")
        if rest[:2] == ["mbarrier", "arrive"]:
            base, width, offset = self.address(self.count(1)[0], SHARED)
            return self.emit("cp.async.mbarrier.arrive", {}, {12: base} if base else {}, imm=offset, abcd=(int("noinc" in rest), 0, 0, width), cls="mbarrier")
        if rest and rest[0] == "bulk":
            return self.bulk(rest[1:])
        raise self.unknown()

    def bulk(self, mods: list[str]) -> None:
        a = self.now.args
        if mods == ["commit_group"]:
            return self.emit("cp.async.bulk.commit_group", cls="bulk")
        if mods and mods[0] == "wait_group":
            n = a[0]
            if not isinstance(n, Imm):
                raise self.unknown()
            return self.emit("cp.async.bulk.wait_group", imm=int(n.value), cls="bulk")
        if mods and mods[0] == "prefetch" and "tensor" not in mods:
            return self.emit("nop", cls="bulk")
        if any("cache_hint" in m for m in mods):
            a = a[:-1]
        to_shared = bool(mods) and mods[0] in ("shared::cluster", "shared::cta")
        if len(mods) < 3 or "tensor" in mods or "multicast::cluster" in mods or len(a) != (4 if to_shared else 3):
            raise self.unknown()
        if not to_shared and (mods[0] != "global" or not mods[1].startswith("shared") or mods[2] != "bulk_group"):
            raise self.unknown()
        if to_shared and (mods[1] not in ("global", "shared::cta") or mods[2] != "mbarrier::complete_tx::bytes"):
            raise self.unknown()
        dst, dw, doff = self.address(a[0], GENERIC)
        src, sw, soff = self.address(a[1], GENERIC)
        ins: dict[int, Reg | tuple[int, int]] = {2: self.value(a[2], "u32")}
        if dst:
            ins[0] = dst
        if src:
            ins[1] = src
        width = 4
        if to_shared:
            bar, width, boff = self.address(a[3], SHARED)
            if bar is None or boff:
                wide = self.temp(width)
                if bar is None:
                    self.emit("mov.u64" if width == 8 else "mov.u32", {0: wide}, {1: (width, boff)})
                else:
                    kind = "u64" if width == 8 else "u32"
                    self.emit(f"add.{kind}", {0: wide}, {1: bar, 2: (width, boff & ((1 << 8 * width) - 1))})
                bar = wide
            ins[3] = bar
        name = "cp.async.bulk.shared" if to_shared else "cp.async.bulk.global"
        source = GLOBAL if mods[1] == "global" else SHARED
        self.emit(name, {}, ins, imm=doff, target=soff & 0xFFFFFFFF, abcd=(dw, sw, source, width), cls="bulk")

    def st_async(self, mods: Sequence[str]) -> None:
        rest = [m for m in mods if m not in ("async", "weak", "shared::cluster", "mbarrier::complete_tx::bytes")]
        type_, rest = self.type_of(rest)
        vector = int(rest.pop(0)[1:]) if rest and rest[0] in ("v2", "v4") else 1
        self.no_more(rest)
        a = self.count(3)
        items = a[1].items if isinstance(a[1], Vec) else (a[1],)
        if len(items) != vector or WIDTHS[type_] not in (4, 8):
            raise self.unknown()
        values = {k: self.value(x, type_) for k, x in enumerate(items)}
        base, width, offset = self.address(a[0], SHARED)
        bar, bar_width, bar_offset = self.address(a[2], SHARED)
        if base is None or bar is None or width != bar_width:
            raise self.unknown("addresses of different widths")
        self.emit("st.async", {}, values | {12: base, 13: bar}, imm=offset, target=bar_offset & 0xFFFFFFFF, abcd=(vector, WIDTHS[type_], 0, width), cls="st.async")

    def mbarrier(self, mods: Sequence[str]) -> None:
        op = mods[0]
        a = list(self.now.args)
        parity = "parity" in mods
        acquire = 0 if "relaxed" in mods else ACQUIRE
        release = 0 if "relaxed" in mods else RELEASE
        if op == "pending_count":
            return self.emit("mbarrier.pending_count", {0: self.dest(a[0])}, cls="mbarrier")
        outs: dict[int, Reg] = {}
        ins: dict[int, Reg | tuple[int, int]] = {}
        drop = op.startswith("arrive_drop")
        if op in ("test_wait", "try_wait"):
            outs[0] = self.dest(a.pop(0), True)
        elif op in ("arrive", "arrive_drop") and not isinstance(a[0], Mem):
            target = a.pop(0)
            if not self.sink(target):
                outs[0] = self.dest(target)
        base, width, offset = self.address(a.pop(0), SHARED)
        if base:
            ins[12] = base
        name, flags, which = f"mbarrier.{op}", 0, 0
        if op == "init":
            ins[1] = self.value(a[0], "u32")
        elif op in ("test_wait", "try_wait"):
            name, flags, which = "mbarrier.wait", acquire, int(parity)
            ins[1] = self.value(a[0], "u32" if parity else "u64")
        elif op in ("arrive", "arrive_drop"):
            name, flags, which = "mbarrier.arrive", release, int(drop)
            if "noComplete" in mods:
                raise self.unknown()
            if a:
                ins[2 if "expect_tx" in mods else 1] = self.value(a[0], "u32")
        elif op in ("expect_tx", "complete_tx"):
            name, which = "mbarrier.expect_tx", int(op == "complete_tx")
            ins[2] = self.value(a[0], "u32")
        elif op != "inval":
            raise self.unknown()
        waits = op in ("test_wait", "try_wait")
        self.emit(name, outs, ins, imm=offset, abcd=(which, 0, 0, width), flags=flags, ctl=YIELDING if waits else SIMPLE, cls="mbarrier")

    def mapa(self, mods: Sequence[str]) -> None:
        a = self.count(3)
        type_ = mods[-1]
        shared = "shared::cluster" in mods
        source = self.value(a[1], type_)
        if not shared and type_ != "u64":
            raise self.unknown()
        self.emit("mapa", {0: self.dest(a[0])}, {1: source, 2: self.value(a[2], "u32")}, abcd=(int(type_ == "u64"), int(not shared)), cls="move")

    def getctarank(self, mods: Sequence[str]) -> None:
        a = self.count(2)
        wide = mods[-1] == "u64"
        self.emit("getctarank", {0: self.dest(a[0])}, {1: self.value(a[1], mods[-1])}, abcd=(int(wide),), cls="move")

    def ldmatrix(self, mods: Sequence[str]) -> None:
        rest = [m for m in mods if m not in ("sync", "aligned", "m8n8", "b16")]
        n, trans, space = 0, 0, GENERIC
        for m in rest:
            if m in ("x1", "x2", "x4"):
                n = int(m[1])
            elif m == "trans":
                trans = 1
            elif m in SPACES and SPACES[m] == SHARED:
                space = SHARED
            else:
                raise self.unknown(f"modifier .{m}")
        a = self.count(2)
        store = self.now.op[0] == "stmatrix"
        data, mem = (a[1], a[0]) if store else (a[0], a[1])
        items = data.items if isinstance(data, Vec) else (data,)
        if len(items) != n or "b16" not in mods or "m8n8" not in mods:
            raise self.unknown()
        base, width, offset = self.address(mem, space)
        ins: dict[int, Reg | tuple[int, int]] = {12: base} if base else {}
        outs: dict[int, Reg] = {}
        if store:
            ins.update({k: self.value(x, "b32") for k, x in enumerate(items)})
        else:
            outs = {k: self.dest(x) for k, x in enumerate(items)}
        self.emit(self.now.op[0], outs, ins, imm=offset, abcd=(n, trans, space, width), ctl=MEET_ALL, cls=self.now.op[0])

    def mma(self, mods: Sequence[str]) -> None:
        rest = [m for m in mods if m not in ("sync", "aligned", "row", "col", "satfinite", "kind::f8f6f4")]
        if len(rest) != 5 or "row" not in mods or "col" not in mods:
            raise self.unknown()
        shape, dt, at, bt, ct = rest
        if at != bt or dt != ct or not shape.startswith("m16n8k"):
            raise self.unknown()
        k = int(shape[6:])
        name = f"mma.{k}.{dt}.{at}"
        a = self.count(4)
        d, x, y, c = (v.items if isinstance(v, Vec) else (v,) for v in a)
        ins = {4 + j: self.value(v, "b32") for j, v in enumerate(x)}
        ins |= {8 + j: self.value(v, "b32") for j, v in enumerate(y)}
        ins |= {12 + j: self.value(v, dt if dt != "f16" else "b32") for j, v in enumerate(c)}
        self.emit(name, {j: self.dest(v) for j, v in enumerate(d)}, ins, ctl=MEET_ALL, cls="mma")

    def movmatrix(self, mods: Sequence[str]) -> None:
        a = self.count(2)
        if "trans" not in mods or "b16" not in mods:
            raise self.unknown()
        self.emit("movmatrix", {0: self.dest(a[0])}, {1: self.value(a[1], "b32")}, ctl=MEET_ALL, cls="movmatrix")

    # -- warp operations

    def shfl(self, mods: Sequence[str]) -> None:
        a = self.count(5)
        if mods[0] != "sync" or mods[2] != "b32":
            raise self.unknown()
        targets = a[0].items if isinstance(a[0], Vec) else (a[0],)
        outs = {k: self.dest(t, k == 1) for k, t in enumerate(targets) if not self.sink(t)}
        ins = {2: self.value(a[1], "b32"), 3: self.value(a[2], "b32"), 4: self.value(a[3], "b32"), 15: self.value(a[4], "b32")}
        self.emit("shfl", outs, ins, ctl=MEET, abcd=(["up", "down", "bfly", "idx"].index(mods[1]),), cls="shfl")

    def vote(self, mods: Sequence[str]) -> None:
        a = self.count(3)
        which = ["all", "any", "uni", "ballot"].index(mods[1])
        if mods[0] != "sync":
            raise self.unknown()
        p, inverted = self.pred(a[1])
        self.emit("vote", {0: self.dest(a[0], which != 3)}, {1: p, 15: self.value(a[2], "b32")}, ctl=MEET, abcd=(which,), flags=NOT_C if inverted else 0, cls="vote")

    def match(self, mods: Sequence[str]) -> None:
        a = self.count(3)
        targets = a[0].items if isinstance(a[0], Vec) else (a[0],)
        outs = {k: self.dest(t, k == 1) for k, t in enumerate(targets) if not self.sink(t)}
        self.emit(f"match.{mods[2]}", outs, {2: self.value(a[1], mods[2]), 15: self.value(a[2], "b32")}, ctl=MEET, abcd=(int(mods[0] == "all"),), cls="vote")

    def redux(self, mods: Sequence[str]) -> None:
        a = self.count(3)
        if mods[0] != "sync" or mods[2] not in ("u32", "s32", "b32"):
            raise self.unknown()
        which = ["add", "min", "max", "and", "or", "xor"].index(mods[1])
        self.emit("redux", {0: self.dest(a[0])}, {1: self.value(a[1], mods[2]), 15: self.value(a[2], "b32")}, ctl=MEET, abcd=(which, int(mods[2] == "s32")), cls="shfl")

    def elect(self, mods: Sequence[str]) -> None:
        a = self.count(2)
        targets = a[0].items if isinstance(a[0], Vec) else (a[0],)
        outs = {k: self.dest(t, k == 1) for k, t in enumerate(targets) if not self.sink(t)}
        self.emit("elect", outs, {15: self.value(a[1], "b32")}, ctl=MEET, cls="vote")

    def activemask(self, mods: Sequence[str]) -> None:
        self.emit("activemask", {0: self.dest(self.count(1)[0])}, cls="vote")

    # -- barriers and fences

    def bar(self, mods: Sequence[str]) -> None:
        rest = [m for m in mods if m != "cta"]
        aligned = ALIGNED if self.now.op[0] == "bar" or "aligned" in rest else 0
        rest = [m for m in rest if m != "aligned"]
        a = self.now.args
        if rest[0] == "cluster":
            return self.cluster_barrier(rest[1:], aligned)
        if rest[:2] == ["warp", "sync"]:
            return self.emit("bar.warp.sync", {}, {15: self.value(self.count(1)[0], "b32")}, ctl=MEET, cls="warp_sync")
        if rest[0] in ("sync", "arrive"):
            self.count(1, 2)
            ins = {0: self.value(a[0], "u32")}
            flags = aligned
            if len(a) == 2:
                ins[1] = self.value(a[1], "u32")
                flags |= HAS_COUNT
            return self.emit("nop", {}, ins, ctl=BARRIER, abcd=(int(rest[0] == "arrive"),), flags=flags, cls="barrier")
        if rest[0] == "red":
            which = ["popc", "and", "or"].index(rest[1])
            d = self.dest(a[0], which > 0)
            p, inverted = self.pred(a[-1])
            flags = aligned | (NOT_C if inverted else 0)
            ins = {0: self.value(a[1], "u32"), 3: p}
            if self.count(3, 4) and len(a) == 4:
                ins[1] = self.value(a[2], "u32")
                flags |= HAS_COUNT
            return self.emit("nop", {2: d}, ins, ctl=BARRIER, abcd=(2 + which,), flags=flags, cls="barrier")
        raise self.unknown()

    def cluster_barrier(self, mods: Sequence[str], aligned: int) -> None:
        wait = mods[0] == "wait"
        relaxed = "relaxed" in mods
        self.emit("nop", ctl=CLUSTER_BARRIER, abcd=(int(wait),), flags=aligned | (0 if relaxed else ACQUIRE if wait else RELEASE), cls="barrier")

    def fence(self, mods: Sequence[str]) -> None:
        flags = CTA_SCOPE if "cta" in mods else 0
        if "proxy" in mods or any(m.startswith("mbarrier_init") for m in mods):
            return self.emit("nop", cls="fence")
        acquire = "acquire" in mods and "acq_rel" not in mods
        release = "release" in mods and "acq_rel" not in mods
        flags |= ACQUIRE if acquire else RELEASE if release else ACQUIRE | RELEASE
        self.emit("fence", flags=flags, cls="fence")

    def nothing(self, mods: Sequence[str]) -> None:
        self.emit("nop", cls="other")

    def createpolicy(self, mods: Sequence[str]) -> None:
        self.emit("mov.u64", {0: self.dest(self.now.args[0])}, {1: (8, 0x12F0000000000000)}, cls="move")

    def nanosleep(self, mods: Sequence[str]) -> None:
        self.emit("yield", ctl=YIELDING, cls="other")

    # -- control flow

    def bra(self, mods: Sequence[str]) -> None:
        a = self.count(1)[0]
        if not isinstance(a, Name):
            raise self.unknown()
        self.emit("nop", target=a.text, ctl=BRANCH, cls="branch")

    def brx(self, mods: Sequence[str]) -> None:
        index, table = self.count(2)
        if mods[0] != "idx" or not isinstance(table, Name) or table.text not in self.fn.branch_tables:
            raise self.unknown()
        labels = self.fn.branch_tables[table.text]
        self.emit("nop", {}, {0: self.value(index, "u32")}, imm=len(labels), target=len(self.tables), ctl=BRANCH_TABLE, cls="branch")
        self.tables += labels

    def ret(self, mods: Sequence[str]) -> None:
        self.emit("nop", ctl=EXIT, cls="branch")

    def trap(self, mods: Sequence[str]) -> None:
        self.emit("trap", cls="other")

    def call(self, mods: Sequence[str]) -> None:
        a = self.now.args
        names = [x.text for x in a if isinstance(x, Name)]
        params: list[int] = []
        results: list[int] = []
        for k, x in enumerate(a):
            if isinstance(x, Vec):
                at = [self.offsets[i.text][1] for i in x.items if isinstance(i, Name)]
                if k == 0:
                    results = at
                else:
                    params = at
        if names == ["vprintf"]:
            return self.emit("vprintf", imm=params[0] | params[1] << 16 | results[0] << 32, cls="call")
        if names == ["__assertfail"]:
            return self.emit("__assertfail", imm=params[0] | params[1] << 16 | params[2] << 32, cls="call")
        raise self.unknown("functions that are not inlined; mark them __forceinline__")

    # -- the result

    def program(self, op_index: Mapping[str, int]) -> Program:
        slots_of, constants, slots = allocate(self.fn, self.out, self.labels, self.tables)
        code = np.zeros(len(self.out), INS)
        code["o"] = NONE
        code["guard"] = NONE
        rows = []
        for pc, e in enumerate(self.out):
            if e.name not in op_index:
                self.now = e.source or self.now
                raise self.unknown(f"no handler {e.name}")
            o = [NONE] * 16
            for k, r in e.outs.items():
                o[k] = slots_of[r]
            for k, v in e.ins.items():
                o[k] = constants[v][0] if isinstance(v, tuple) else slots_of[v]
            target = e.target
            if isinstance(target, str):
                if target not in self.labels:
                    raise PtxError(f"PTX line {e.source.ptx_line if e.source else 0}: no label {target}")
                target = self.labels[target]
            rows.append((op_index[e.name], e.imm if e.imm < 1 << 63 else e.imm - (1 << 64), o, target, slots_of[e.guard] if e.guard else NONE,
                         int(e.guard_not), e.ctl, *e.abcd, e.flags))  # fmt: skip
        code[:] = rows
        table = np.array([(slot, width, value) for (width, value), (slot, _) in constants.items()], np.uint64).reshape(-1, 3)
        tables = np.array([self.labels[t] if isinstance(t, str) else t for t in self.tables], np.uint32)
        maxntid = self.fn.directives.get("maxntid", ()) or self.fn.directives.get("reqntid", ())
        threads = int(np.prod(maxntid)) if maxntid else 0
        cluster = tuple(self.fn.directives.get("reqnctapercluster", ()) or (0, 0, 0))
        cluster = (*cluster, 1, 1)[:3] if cluster[0] else (0, 0, 0)
        sources = [e.source for e in self.out]
        return Program(self.fn.name, code, [e.name for e in self.out], table, slots, self.params, self.params_size, self.static_shared,
                       self.shared_symbols, self.local_size, tables, [s.loc if s else None for s in sources], [s.text if s else "" for s in sources],
                       [s.ptx_line if s else 0 for s in sources], [e.cls for e in self.out], dict(self.module.files), threads,
                       (cluster[0], cluster[1], cluster[2]), self.dynamic_offset,
                       {row: self.variables[value] for row, (width, value) in enumerate(constants) if width == 8 and value in self.variables})  # fmt: skip


_D = _Decoder
_TABLE: dict[str, Callable[[_Decoder, Sequence[str]], None]] = {}
_TABLE.update({k: _D.arithmetic for k in "add sub mul div rem fma mad min max neg abs sqrt rcp rsqrt ex2 lg2 sin cos tanh".split()})
_TABLE.update({k: _D.logic for k in "and or xor not cnot".split()})
_TABLE.update({k: _D.bits_of for k in "popc clz brev bfe bfi bfind".split()})
_TABLE.update({k: _D.carry_in for k in "addc subc madc".split()})
_TABLE.update({k: _D.nothing for k in "prefetch prefetchu discard applypriority griddepcontrol setmaxnreg pmevent brkpt".split()})
_TABLE.update(
    shl=_D.shift, shr=_D.shift, prmt=_D.prmt, lop3=_D.lop3, shf=_D.funnel, dp4a=_D.dot, sad=_D.sad, mul24=_D.mul24, mad24=_D.mul24, copysign=_D.copysign,
    testp=_D.testp, setp=_D.setp, set=_D.set, selp=_D.selp, slct=_D.slct, mov=_D.mov, cvt=_D.cvt, cvta=_D.cvta, isspacep=_D.isspacep, ld=_D.ld,
    ldu=_D.ld, st=_D.st, atom=_D.atom, red=_D.atom, cp=_D.cp, ldmatrix=_D.ldmatrix, stmatrix=_D.ldmatrix, mma=_D.mma, movmatrix=_D.movmatrix,
    shfl=_D.shfl, vote=_D.vote, match=_D.match, redux=_D.redux, elect=_D.elect, activemask=_D.activemask, bar=_D.bar, barrier=_D.bar, membar=_D.fence,
    fence=_D.fence, createpolicy=_D.createpolicy, nanosleep=_D.nanosleep, mbarrier=_D.mbarrier, mapa=_D.mapa, getctarank=_D.getctarank, bra=_D.bra, brx=_D.brx, ret=_D.ret, exit=_D.ret, trap=_D.trap, call=_D.call,
)  # fmt: skip
_CLASSES = {"cvt": "convert", "mov": "move", "selp": "int", "setp": "int", "cvta": "move", "prmt": "int", "copysign": "fp32"}


def decode(module: Module, name: str, op_index: Mapping[str, int]) -> Program:
    """Decodes one kernel of a module.

    Args:
        module: a parsed PTX module.
        name: the entry's name.
        op_index: the machine's handlers by name.

    Returns:
        The program.

    Raises:
        UnsupportedInstruction: for an instruction that the machine does not know.
    """
    function = module.functions[name]
    decoder = _Decoder(module, function)
    decoder.decode()
    return decoder.program(op_index)
