"""What decoding needs whatever the instruction is: operands, addresses, register places, the program.

Each PTX instruction becomes one `Ins` of the machine (a handler, its operands as register slots, its parameters), now
and then two. Whatever is not known raises `UnsupportedInstruction`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .program import (
    CONST,
    EXIT,
    FTZ,
    GLOBAL,
    INS,
    LABEL,
    LOCAL,
    NONE,
    PARAM,
    RELU,
    RM,
    RP,
    RZ,
    SAT,
    SHARED,
    SIMPLE,
    SYSTEM_SHARED,
    Emitted,
    Program,
)
from .ptx import WIDTHS, Function, Imm, Instr, Mem, Module, Name, Not, Operand, PtxError, Reg, Symbol
from .registers import allocate
from .warpgroup import warpgroup_checks

__all__ = ["INSTRUCTIONS", "Decoder", "UnsupportedInstruction", "instruction"]

SPACES = {
    "global": GLOBAL,
    "shared": SHARED,
    "shared::cta": SHARED,
    "shared::cluster": SHARED,
    "local": LOCAL,
    "param": PARAM,
    "param::entry": PARAM,
    "param::func": PARAM,
    "const": CONST,
}
SHARED_BASE, LOCAL_BASE, PARAM_BASE = 1 << 56, 2 << 56, 4 << 56
_VARIABLE = 0x5EED << 48

_AXES = {"x": 0, "y": 1, "z": 2}
SPECIAL = {
    "%laneid": 12,
    "%warpid": 13,
    "%nwarpid": 14,
    "%smid": 15,
    "%nsmid": 16,
    "%lanemask_eq": 17,
    "%lanemask_lt": 18,
    "%lanemask_le": 19,
    "%lanemask_gt": 20,
    "%lanemask_ge": 21,
    "%clock": 22,
    "%clock64": 22,
    "%globaltimer": 22,
    "%globaltimer_lo": 22,
    "%clock_hi": 23,
    "%globaltimer_hi": 23,
    "%dynamic_smem_size": 24,
    "%total_smem_size": 25,
    "%cluster_ctarank": 38,
    "%cluster_nctarank": 39,
    "%gridid": 40,
    "%is_explicit_cluster": 40,
}
for _name, _code in {
    "tid": 0,
    "ntid": 3,
    "ctaid": 6,
    "nctaid": 9,
    "clusterid": 26,
    "cluster_ctaid": 29,
    "cluster_nctaid": 32,
    "nclusterid": 35,
}.items():
    for _axis, _k in _AXES.items():
        SPECIAL[f"%{_name}.{_axis}"] = _code + _k

HALF = {"f16": ("f16", 0), "f16x2": ("f16", 1), "bf16": ("bf16", 0), "bf16x2": ("bf16", 1)}
TYPES = set(WIDTHS) | {"e4m3x2", "e5m2x2", "tf32"}


class UnsupportedInstruction(NotImplementedError):
    """An instruction that the machine does not know."""


def _align(value: int, to: int) -> int:
    return -(-value // to) * to


Rule = Callable[["Decoder", Sequence[str]], None]
INSTRUCTIONS: dict[str, Rule] = {}
CLASSES: dict[str, str] = {
    "cvt": "convert",
    "mov": "move",
    "selp": "int",
    "setp": "int",
    "cvta": "move",
    "prmt": "int",
    "copysign": "fp32",
}


def instruction(*names: str) -> Callable[[Rule], Rule]:
    """Registers how instructions are decoded, by the first part of their opcode."""

    def register(rule: Rule) -> Rule:
        for name in names:
            INSTRUCTIONS[name] = rule
        return rule

    return register


class Decoder:
    """Decodes one kernel. The rules of the instructions call its methods, `now` is the instruction at hand."""

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
        at, self.shared_symbols = SYSTEM_SHARED, []
        for sym in shared:
            if sym.size:
                at = _align(at, sym.align)
                self.offsets[sym.name] = ("shared", at)
                self.shared_symbols.append((sym.name, at, sym.size))
                at += sym.size
        dynamic = [s for s in shared if not s.size]
        at = _align(at, max([s.align for s in dynamic] + [16]))
        for sym in dynamic:
            self.offsets[sym.name] = ("shared", at)
            self.shared_symbols.append((sym.name, at, 0))
        self.static_shared = at - SYSTEM_SHARED
        at = 0
        entry_params = {s.name for s in self.fn.params}
        for sym in self.fn.symbols.values():
            if sym.space == "local" or (sym.space == "param" and sym.name not in entry_params):
                at = _align(at, max(sym.align, 8))
                self.offsets[sym.name] = ("local", at)
                at += sym.size
        self.local_size = _align(at, 16)

    def unknown(self, what: str = "") -> UnsupportedInstruction:
        """The error for the instruction at hand."""
        text = f": {what}" if what else ""
        return UnsupportedInstruction(
            f"{'.'.join(self.now.op)} is not an instruction that the simulator knows{text} "
            f"(PTX line {self.now.ptx_line}: {self.now.text})"
        )

    def temp(self, width: int) -> Reg:
        """A register that the kernel does not have."""
        reg = Reg(f"%temp{len(self.fn.regs)}", width, len(self.fn.regs))
        self.fn.regs.append(reg)
        return reg

    def emit(
        self,
        name: str,
        outs: dict[int, Reg] | None = None,
        ins: dict[int, Reg | tuple[int, int]] | None = None,
        *,
        imm: int = 0,
        target: int | str = 0,
        ctl: int = SIMPLE,
        abcd: Sequence[int] = (),
        flags: int = 0,
        cls: str = "",
        guarded: bool = True,
        many: Sequence[Reg] = (),
    ) -> None:
        """Appends an instruction of the machine."""
        a, b, c, d = (*abcd, 0, 0, 0, 0)[:4]
        self.out.append(
            Emitted(
                name,
                outs or {},
                ins or {},
                imm,
                target,
                self.now.guard if guarded else None,
                self.now.guard_not,
                ctl,
                (a, b, c, d),
                flags,
                self.now,
                cls,
                tuple(many),
            )
        )

    def bits(self, imm: Imm, kind: str) -> int:
        """The bits of a literal as a type."""
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
            if arg.text in SPECIAL:
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
        """Reads a special register."""
        self.emit("special", {0: reg}, abcd=(SPECIAL[name], int(reg.width == 8)), cls="move")

    def address_of(self, name: str) -> int:
        """The address of a variable within its space."""
        if name in self.offsets:
            return self.offsets[name][1]
        symbol = self.module.symbols.get(name)
        if symbol is not None and symbol.space in ("global", "const"):
            # The address is known only when the module is loaded; until then a number stands for it.
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
        """A register that is written."""
        if isinstance(arg, Reg) and (arg.width == 0) == pred:
            return arg
        raise self.unknown(f"{arg} cannot be written")

    @staticmethod
    def sink(arg: Operand) -> bool:
        """Whether an operand is `_`, which drops the result."""
        return isinstance(arg, Name) and arg.text == "_"

    def address(self, arg: Operand) -> tuple[Reg | None, int, int]:
        """`[base + offset]`: the register, its bytes, the offset."""
        if not isinstance(arg, Mem):
            raise self.unknown(f"{arg} is no address")
        if isinstance(arg.base, Reg):
            return arg.base, 8 if arg.base.width == 8 else 4, arg.offset
        if isinstance(arg.base, Imm):
            return None, 8, int(arg.base.value) + arg.offset
        at = self.address_of(arg.base.text)
        if (
            at in self.variables
        ):  # only constants are filled in when the module is loaded, so the address goes through a register
            reg = self.temp(8)
            self.emit("mov.u64", {0: reg}, {1: (8, at)})
            return reg, 8, arg.offset
        return None, 8, at + arg.offset

    def count(self, *allowed: int) -> list[Operand]:
        """The operands, whose number must be one of those given."""
        if len(self.now.args) not in allowed:
            raise self.unknown(f"{len(self.now.args)} operands")
        return self.now.args

    def decode(self) -> None:
        """Decodes the whole kernel."""
        for item in self.fn.code:
            if isinstance(item, Name):
                self.labels[item.text] = len(self.out)
                self.now = Instr(("label",), [])
                self.out.append(Emitted("nop", ctl=LABEL))
                continue
            self.now = item
            handler = INSTRUCTIONS.get(item.op[0])
            if handler is None:
                raise self.unknown()
            before = len(self.out)
            handler(self, item.op[1:])
            for e in self.out[before:]:
                e.cls = e.cls or CLASSES.get(item.op[0], "int")
        self.now = Instr(("ret",), [])
        self.emit("nop", ctl=EXIT, cls="branch")

    def type_of(self, mods: Sequence[str]) -> tuple[str, list[str]]:
        """The type, which comes last, and the other modifiers."""
        if not mods or mods[-1] not in TYPES:
            raise self.unknown("no type")
        return mods[-1], list(mods[:-1])

    def flags(self, mods: list[str], *allowed: str) -> int:
        """Takes the modifiers that are flags out of the list."""
        known = {
            "ftz": FTZ,
            "sat": SAT,
            "rn": 0,
            "rz": RZ,
            "rm": RM,
            "rp": RP,
            "relu": RELU,
            "satfinite": 0,
            "noftz": 0,
        }
        flags = 0
        for m in list(mods):
            if m in allowed and m in known:
                flags |= known[m]
                mods.remove(m)
        return flags

    def no_more(self, mods: Sequence[str]) -> None:
        """Raises if a modifier is left over."""
        if mods:
            raise self.unknown(f"modifier .{mods[0]}")

    @staticmethod
    def cls_of(type_: str) -> str:
        """The class that counters put arithmetic of a type into."""
        return "fp64" if type_ == "f64" else "fp16" if type_ in HALF else "fp32" if type_ == "f32" else "int"

    @staticmethod
    def plain(type_: str) -> str:
        """The type of an operation that does not care for signs."""
        return {"b": "u", "s": "u", "u": "u"}[type_[0]] + type_[1:]

    def nary(
        self,
        name: str,
        type_: str,
        n: int,
        types: Sequence[str] | None = None,
        flags: int = 0,
        abcd: Sequence[int] = (),
        cls: str = "",
    ) -> None:
        """An operation of n operands and one result."""
        args = self.count(n + 1)
        kinds = types or [type_] * n
        dst = self.dest(args[0])
        self.emit(
            name,
            {0: dst},
            {k + 1: self.value(args[k + 1], kinds[k]) for k in range(n)},
            flags=flags,
            abcd=abcd,
            cls=cls or self.cls_of(type_),
        )

    def launch_registers(self, threads: int) -> int:
        """Registers of a thread as ptxas has it for a kernel with setmaxnreg: what the launch bounds leave room for."""
        named = self.fn.directives.get("maxnreg")
        if named:
            return named[0]
        blocks = (self.fn.directives.get("minnctapersm") or (1,))[0]
        return min(65536 // (threads * max(blocks, 1)) // 8 * 8, 256) if threads else 0

    def program(self, op_index: Mapping[str, int]) -> Program:
        """The finished program."""
        self.out, self.labels, held = warpgroup_checks(self.out, self.labels, self.tables)
        slots_of, constants, slots = allocate(self.fn, self.out, self.labels, self.tables, held)
        tables = [self.labels[t] if isinstance(t, str) else t for t in self.tables]
        code = np.zeros(len(self.out), INS)
        code["o"] = NONE
        code["guard"] = NONE
        rows = []
        for e in self.out:
            if e.name not in op_index:
                self.now = e.source or self.now
                raise self.unknown(f"no handler {e.name}")
            o = [NONE] * 16
            for k, r in e.outs.items():
                o[k] = slots_of[r]
            for k, v in e.ins.items():
                o[k] = constants[v][0] if isinstance(v, tuple) else slots_of[v]
            target = e.target
            if e.many:
                target = len(tables)
                tables += [slots_of[r] for r in e.many]
            if isinstance(target, str):
                if target not in self.labels:
                    raise PtxError(f"PTX line {e.source.ptx_line if e.source else 0}: no label {target}")
                target = self.labels[target]
            rows.append(
                (
                    op_index[e.name],
                    e.imm if e.imm < 1 << 63 else e.imm - (1 << 64),
                    o,
                    target,
                    slots_of[e.guard] if e.guard else NONE,
                    int(e.guard_not),
                    e.ctl,
                    *e.abcd,
                    e.flags,
                )
            )
        code[:] = rows
        table = np.array([(slot, width, value) for (width, value), (slot, _) in constants.items()], np.uint64).reshape(
            -1, 3
        )
        maxntid = self.fn.directives.get("maxntid", ()) or self.fn.directives.get("reqntid", ())
        threads = int(np.prod(maxntid)) if maxntid else 0
        cluster = tuple(self.fn.directives.get("reqnctapercluster", ()) or (0, 0, 0))
        cluster = (*cluster, 1, 1)[:3] if cluster[0] else (0, 0, 0)
        sources = [e.source for e in self.out]
        return Program(
            self.fn.name,
            code,
            [e.name for e in self.out],
            table,
            slots,
            self.params,
            self.params_size,
            self.static_shared,
            self.shared_symbols,
            self.local_size,
            np.array(tables, np.uint32),
            [s.loc if s else None for s in sources],
            [s.text if s else "" for s in sources],
            [e.cls for e in self.out],
            dict(self.module.files),
            threads,
            (cluster[0], cluster[1], cluster[2]),
            self.launch_registers(threads),
            {
                row: self.variables[value]
                for row, (width, value) in enumerate(constants)
                if width == 8 and value in self.variables
            },
        )
