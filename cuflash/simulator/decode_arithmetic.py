"""Rules for arithmetic, logic, comparisons, moves and conversions."""

from __future__ import annotations

from collections.abc import Sequence

from .decoder import HALF, LOCAL_BASE, PARAM_BASE, SHARED_BASE, SPACES, SPECIAL, TYPES, Decoder, instruction
from .program import CONST, GLOBAL, LOCAL, NOT_C, PARAM, RM, RP, RZ, SAT, SHARED
from .ptx import WIDTHS, Imm, Name, Reg, Vec

_COMPARE = {
    "eq": 0,
    "ne": 1,
    "lt": 2,
    "le": 3,
    "gt": 4,
    "ge": 5,
    "equ": 6,
    "neu": 7,
    "ltu": 8,
    "leu": 9,
    "gtu": 10,
    "geu": 11,
    "num": 12,
    "nan": 13,
    "lo": 2,
    "ls": 3,
    "hi": 4,
    "hs": 5,
}
_ROUND_INT = {"rni": 0, "rzi": 1, "rmi": 2, "rpi": 3}
_ROUND = {"rn": 0, "rz": RZ, "rm": RM, "rp": RP}
INTS = {"u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"}


@instruction(
    "add",
    "sub",
    "mul",
    "div",
    "rem",
    "fma",
    "mad",
    "min",
    "max",
    "neg",
    "abs",
    "sqrt",
    "rcp",
    "rsqrt",
    "ex2",
    "lg2",
    "sin",
    "cos",
    "tanh",
)
def _decode_arithmetic(dec: Decoder, mods: Sequence[str]) -> None:  # add sub mul div fma min max ...
    op = dec.now.op[0]
    type_, rest = dec.type_of(mods)
    n = {
        "fma": 3,
        "mad": 3,
        "neg": 1,
        "abs": 1,
        "sqrt": 1,
        "rcp": 1,
        "rsqrt": 1,
        "ex2": 1,
        "lg2": 1,
        "sin": 1,
        "cos": 1,
        "tanh": 1,
    }.get(op, 2)
    if type_ in HALF:
        half, two = HALF[type_]
        flags = dec.flags(rest, "rn", "ftz", "sat", "relu")
        if op in ("neg", "abs"):
            dec.no_more(rest)
            return dec.nary(f"{op}.half", type_, 1, abcd=(two,))
        name = (
            f"{op}.NaN.{half}" if "NaN" in rest else f"{op}.approx.{half}" if op in ("ex2", "tanh") else f"{op}.{half}"
        )
        rest = [r for r in rest if r not in ("NaN", "approx")]
        dec.no_more(rest)
        return dec.nary(name, type_, n, flags=flags, abcd=(two,))
    if type_ in ("f32", "f64"):
        flags = dec.flags(rest, "rn", "rz", "rm", "rp", "ftz", "sat")
        name = op
        if op == "mad":
            name = "fma"
        if op in ("min", "max") and len(dec.now.args) == 4:
            name, n = f"{op}3", 3
        if "approx" in rest or "full" in rest:
            name += ".approx"
        elif "NaN" in rest:
            name += ".NaN"
        elif op in ("ex2", "lg2", "sin", "cos", "tanh", "rsqrt"):
            raise dec.unknown("not .approx")
        rest = [r for r in rest if r not in ("approx", "full", "NaN")]
        dec.no_more(rest)
        special = "approx" in name
        return dec.nary(f"{name}.{type_}", type_, n, flags=flags, cls="special" if special else "")
    if "cc" in rest and op in ("add", "sub"):
        return _decode_carries(dec, f"{op}c", 0, 1)
    if op in ("mul", "mad"):
        if "cc" in rest:
            rest.remove("cc")
            return _decode_mad_carries(dec, rest, type_, 0, 1)
        which = rest[-1] if rest else ""
        dec.no_more([r for r in rest if r not in ("lo", "hi", "wide")])
        if which == "lo":
            return dec.nary(f"{op}.{dec.plain(type_)}", type_, n)
        if which == "hi":
            return dec.nary(f"{op}hi.{type_}", type_, n)
        if which == "wide":
            wide = f"{type_[0]}{int(type_[1:]) * 2}"
            return dec.nary(f"{op}wide.{type_}", type_, n, [type_, type_, wide][:n])
        raise dec.unknown()
    if op in ("min", "max") and type_ == "s32" and "relu" in rest:  # the larger of the result and 0
        rest.remove("relu")
        op += ".relu"
    dec.no_more(rest)
    sign = op in ("min", "max", "min.relu", "max.relu", "div", "rem", "abs")
    name = type_ if sign else dec.plain(type_)
    return dec.nary(f"{op}.{name}", type_, n)


def _decode_carries(dec: Decoder, name: str, takes: int, leaves: int) -> None:
    a = dec.count(3)
    dec.carry = dec.carry or dec.temp(0)
    dec.emit(
        name,
        {0: dec.dest(a[0])} | ({3: dec.carry} if leaves else {}),
        {1: dec.value(a[1], "u32"), 2: dec.value(a[2], "u32"), 3: dec.carry},
        abcd=(takes, leaves),
    )


def _decode_mad_carries(dec: Decoder, mods: list[str], type_: str, takes: int, leaves: int) -> None:
    a = dec.count(4)
    dec.carry = dec.carry or dec.temp(0)
    dec.emit(
        "madc",
        {0: dec.dest(a[0])} | ({3: dec.carry} if leaves else {}),
        {1: dec.value(a[1], "u32"), 2: dec.value(a[2], "u32"), 4: dec.value(a[3], "u32"), 3: dec.carry},
        abcd=(takes, leaves, int("hi" in mods), int(type_[0] == "s")),
    )


@instruction("addc", "subc", "madc")
def _decode_carry_in(dec: Decoder, mods: Sequence[str]) -> None:
    type_, rest = dec.type_of(mods)
    if type_ not in ("u32", "s32", "b32"):
        raise dec.unknown("64-bit carries")
    if dec.now.op[0] == "madc":
        return _decode_mad_carries(dec, rest, type_, 1, int("cc" in rest))
    return _decode_carries(dec, dec.now.op[0], 1, int("cc" in rest))


@instruction("and", "or", "xor", "not", "cnot")
def _decode_logic(dec: Decoder, mods: Sequence[str]) -> None:
    op = dec.now.op[0]
    type_, rest = dec.type_of(mods)
    dec.no_more(rest)
    if type_ == "pred":
        a = dec.now.args
        ins: dict[int, Reg | tuple[int, int]] = {}
        for k, arg in enumerate(a[1:]):
            reg, inverted = dec.pred(arg)
            if inverted:
                t = dec.temp(0)
                dec.emit("not.pred", {0: t}, {1: reg})
                reg = t
            ins[k + 1] = reg
        return dec.emit(f"{op}.pred", {0: dec.dest(a[0], True)}, ins)
    return dec.nary(f"{op}.{dec.plain(type_)}", type_, 1 if op in ("not", "cnot") else 2)


@instruction("shl", "shr")
def _decode_shift(dec: Decoder, mods: Sequence[str]) -> None:
    type_, rest = dec.type_of(mods)
    dec.no_more(rest)
    name = f"s{type_[1:]}" if dec.now.op[0] == "shr" and type_[0] == "s" else dec.plain(type_)
    dec.nary(f"{dec.now.op[0]}.{name}", type_, 2, [type_, "u32"])


@instruction("popc", "clz", "brev", "bfe", "bfi", "bfind")
def _decode_bits_of(dec: Decoder, mods: Sequence[str]) -> None:  # popc clz brev bfe bfi bfind
    op = dec.now.op[0]
    type_, rest = dec.type_of(mods)
    if op == "bfind":
        shift = "shiftamt" in rest
        a = dec.count(2)
        name = type_ if type_[0] != "b" else dec.plain(type_)
        return dec.emit(f"bfind.{name}", {0: dec.dest(a[0])}, {1: dec.value(a[1], type_), 2: (4, int(shift))})
    dec.no_more(rest)
    if op == "bfe":
        return dec.nary(f"bfe.{type_}", type_, 3, [type_, "u32", "u32"])
    if op == "bfi":
        return dec.nary(f"bfi.{type_}", type_, 4, [type_, type_, "u32", "u32"])
    return dec.nary(f"{op}.{type_}", type_, 1)


@instruction("prmt")
def _decode_prmt(dec: Decoder, mods: Sequence[str]) -> None:
    modes = ["f4e", "b4e", "rc8", "ecl", "ecr", "rc16"]
    mode = modes.index(mods[1]) + 1 if len(mods) == 2 else 0
    dec.nary("prmt", "b32", 3, abcd=(mode,))


@instruction("lop3")
def _decode_lop3(dec: Decoder, mods: Sequence[str]) -> None:
    a = dec.count(5)
    table = a[4]
    if list(mods) != ["b32"] or not isinstance(table, Imm):
        raise dec.unknown()
    dec.emit(
        "lop3",
        {0: dec.dest(a[0])},
        {k: dec.value(a[k], "b32") for k in (1, 2, 3)},
        abcd=(int(table.value) & 255,),
    )


@instruction("shf")
def _decode_funnel(dec: Decoder, mods: Sequence[str]) -> None:
    dec.nary(f"shf.{mods[0]}.{mods[1]}", "b32", 3)


@instruction("dp4a")
def _decode_dot(dec: Decoder, mods: Sequence[str]) -> None:
    dec.nary(f"dp4a.{mods[0]}.{mods[1]}", "b32", 3)


@instruction("sad")
def _decode_sad(dec: Decoder, mods: Sequence[str]) -> None:
    type_, rest = dec.type_of(mods)
    dec.no_more(rest)
    dec.nary(f"sad.{type_}", type_, 3)


@instruction("mul24", "mad24")
def _decode_mul24(dec: Decoder, mods: Sequence[str]) -> None:
    type_, rest = dec.type_of(mods)
    if rest != ["lo"]:
        raise dec.unknown()
    dec.nary(f"{dec.now.op[0]}.{type_}", type_, 2 if dec.now.op[0] == "mul24" else 3)


@instruction("copysign")
def _decode_copysign(dec: Decoder, mods: Sequence[str]) -> None:
    dec.nary(f"copysign.{mods[-1]}", mods[-1], 2)


@instruction("testp")
def _decode_testp(dec: Decoder, mods: Sequence[str]) -> None:
    a = dec.count(2)
    which = ["finite", "infinite", "number", "notanumber", "normal", "subnormal"].index(mods[0])
    dec.emit("testp", {0: dec.dest(a[0], True)}, {1: dec.value(a[1], mods[1])}, abcd=(which, int(mods[1] == "f64")))


def _decode_comparison(dec: Decoder, mods: Sequence[str]) -> tuple[str, str, int, int, int, list[str]]:
    type_, rest = dec.type_of(mods)
    flags = dec.flags(rest, "ftz")
    cmp = _COMPARE.get(rest[0], -1)
    boolean = 0
    if len(rest) > 1 and rest[1] in ("and", "or", "xor"):
        boolean = 1 + ["and", "or", "xor"].index(rest[1])
        rest = rest[:1] + rest[2:]
    if cmp < 0:
        raise dec.unknown(f".{rest[0]}")
    name = dec.plain(type_) if type_[0] == "b" and type_ not in HALF else type_
    return type_, name, cmp, boolean, flags, rest[1:]


@instruction("setp")
def _decode_setp(dec: Decoder, mods: Sequence[str]) -> None:
    type_, name, cmp, boolean, flags, rest = _decode_comparison(dec, mods)
    dec.no_more(rest)
    a = dec.count(4 if boolean else 3)
    targets = a[0].items if isinstance(a[0], Vec) else (a[0],)
    outs = {k: dec.dest(t, True) for k, t in enumerate(targets) if not dec.sink(t)}
    ins: dict[int, Reg | tuple[int, int]] = {2: dec.value(a[1], type_), 3: dec.value(a[2], type_)}
    if boolean:
        ins[4], inverted = dec.pred(a[3])
        flags |= NOT_C if inverted else 0
    if type_ in HALF:
        half, two = HALF[type_]
        name = f"setp2.{half}" if two else f"setp.{half}"
    else:
        name = f"setp.{name}"
    dec.emit(name, outs, ins, flags=flags, abcd=(cmp, boolean), cls=dec.cls_of(type_))


@instruction("set")
def _decode_set(dec: Decoder, mods: Sequence[str]) -> None:
    type_, name, cmp, boolean, flags, rest = _decode_comparison(dec, mods)
    if len(rest) != 1:
        raise dec.unknown()
    a = dec.count(4 if boolean else 3)
    ins: dict[int, Reg | tuple[int, int]] = {2: dec.value(a[1], type_), 3: dec.value(a[2], type_)}
    if boolean:
        ins[4], inverted = dec.pred(a[3])
        flags |= NOT_C if inverted else 0
    two = 0
    if type_ in HALF:
        half, two = HALF[type_]
        if rest[0] not in HALF and rest[0] not in ("u32", "s32", "b32", "u16", "s16"):
            raise dec.unknown()
        if rest[0] in ("u32", "s32") and not two:
            raise dec.unknown()
        name = half
    dec.emit(
        f"set.{name}",
        {0: dec.dest(a[0])},
        ins,
        flags=flags,
        abcd=(cmp, boolean, int("f" in rest[0]), two),
        cls=dec.cls_of(type_),
    )


@instruction("selp")
def _decode_selp(dec: Decoder, mods: Sequence[str]) -> None:
    type_, rest = dec.type_of(mods)
    dec.no_more(rest)
    a = dec.count(4)
    p, inverted = dec.pred(a[3])
    x, y = dec.value(a[1], type_), dec.value(a[2], type_)
    if inverted:
        x, y = y, x
    dec.emit("selp.b64" if WIDTHS[type_] == 8 else "selp.b32", {0: dec.dest(a[0])}, {1: x, 2: y, 3: p})


@instruction("slct")
def _decode_slct(dec: Decoder, mods: Sequence[str]) -> None:
    rest = list(mods)
    flags = dec.flags(rest, "ftz")
    a = dec.count(4)
    dec.emit(
        "slct.b64" if WIDTHS[rest[0]] == 8 else "slct.b32",
        {0: dec.dest(a[0])},
        {1: dec.value(a[1], rest[0]), 2: dec.value(a[2], rest[0]), 3: dec.value(a[3], rest[1])},
        flags=flags,
        abcd=(int(rest[1] == "f32"),),
    )


@instruction("mov")
def _decode_mov(dec: Decoder, mods: Sequence[str]) -> None:
    type_, rest = dec.type_of(mods)
    dec.no_more(rest)
    d, s = dec.count(2)
    if type_ == "pred":
        p, inverted = dec.pred(s)
        return dec.emit("not.pred" if inverted else "mov.pred", {0: dec.dest(d, True)}, {1: p})
    if isinstance(d, Vec):
        part = 8 * WIDTHS[type_] // len(d.items)
        src = dec.value(s, type_)
        parts = [None if dec.sink(x) else dec.dest(x) for x in d.items]
        if len(parts) == 2 and part in (32, 16):
            # the source is operand 2; a part may be the very register that is taken apart
            return dec.emit(
                "unpack32x2" if part == 32 else "unpack16x2",
                {k: r for k, r in enumerate(parts) if r is not None},
                {2: src},
            )
        return dec.emit(
            "unpack",
            {k + 1: r for k, r in enumerate(parts) if r is not None},
            {0: src},
            abcd=(len(parts), part, WIDTHS[type_]),
        )
    if isinstance(s, Vec):
        part = 8 * WIDTHS[type_] // len(s.items)
        kind = f"b{part}"
        ins = {k + 1: dec.value(x, kind) for k, x in enumerate(s.items)}
        dst = dec.dest(d)
        if len(ins) == 2 and part in (32, 16):
            return dec.emit("pack32x2" if part == 32 else "pack16x2", {0: dst}, ins)
        return dec.emit("pack", {0: dst}, ins, abcd=(len(ins), part, WIDTHS[type_]))
    dst = dec.dest(d)
    if isinstance(s, Name) and s.text in SPECIAL:
        return dec.special(dst, s.text)
    kind = type_ if type_ in ("f32", "f64") else "u64" if WIDTHS[type_] == 8 else "u32"
    if (dst.width == 8) != (WIDTHS[type_] == 8):
        raise dec.unknown("the register has another width")
    dec.emit("mov.u64" if WIDTHS[type_] == 8 else "mov.u32", {0: dst}, {1: dec.value(s, kind)})


@instruction("cvt")
def _decode_cvt(dec: Decoder, mods: Sequence[str]) -> None:
    rest = list(mods)
    if rest[0] == "pack":
        return _decode_pack(dec, rest[1:])
    if len(rest) < 2 or rest[-1] not in TYPES or rest[-2] not in TYPES:
        raise dec.unknown()
    d, s = rest[-2:]
    rest = rest[:-2]
    flags = dec.flags(rest, "ftz", "sat", "relu", "satfinite")
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
    dec.no_more(rest)
    a = dec.count(2, 3)
    dst = dec.dest(a[0])
    if d in ("f16x2", "bf16x2", "e4m3x2", "e5m2x2") and s == "f32":
        if len(a) != 3:
            raise dec.unknown()
        return dec.emit(f"cvt.{d}.f32", {0: dst}, {1: dec.value(a[1], s), 2: dec.value(a[2], s)}, flags=flags)
    if len(a) != 2:
        raise dec.unknown()
    if d in ("e4m3x2", "e5m2x2") and s == "f16x2" or d == "f16x2" and s in ("e4m3x2", "e5m2x2"):
        return dec.emit(f"cvt.{d}.{s}", {0: dst}, {1: dec.value(a[1], "b32")}, flags=flags)
    if d == "tf32":
        return dec.emit("cvt.tf32.f32", {0: dst}, {1: dec.value(a[1], "f32")}, abcd=(tf32,))
    floats = ("f32", "f64", "f16", "bf16")
    if (d not in INTS and d not in floats) or (s not in INTS and s not in floats):
        raise dec.unknown()
    if (dst.width == 8) != (WIDTHS[d] == 8):
        wide = dst.width == 8 and d in INTS
        if not wide:
            raise dec.unknown("the register has another width")
        narrow = dec.temp(4)
        dec.emit(
            f"cvt.{'sat.' if flags & SAT else ''}{d}.{s}",
            {0: narrow},
            {1: dec.value(a[1], s)},
            flags=flags,
            abcd=(integral,),
        )
        return dec.emit(f"cvt.{'s64' if d[0] == 's' else 'u64'}.{d}", {0: dst}, {1: narrow})
    if d in INTS and s in INTS and flags & SAT and s not in ("u8", "s8"):
        return dec.emit(f"cvt.sat.{d}.{s}", {0: dst}, {1: dec.value(a[1], s)})
    if d in INTS and s in floats and integral == 9:
        raise dec.unknown("no rounding to an integer")
    dec.emit(f"cvt.{d}.{s}", {0: dst}, {1: dec.value(a[1], s)}, flags=flags, abcd=(integral,))


def _decode_pack(dec: Decoder, mods: list[str]) -> None:
    """cvt.pack.sat: two integers saturated to 16 bits, or to 8 bits with two bytes of a third operand above them."""
    narrow = len(mods) == 4 and mods[1] in ("s8", "u8") and mods[3] == "b32"
    if (
        mods[0] != "sat"
        or not (narrow or (len(mods) == 3 and mods[1] in ("s16", "u16")))
        or mods[2] not in ("s32", "u32")
    ):
        raise dec.unknown()
    dec.nary(f"cvt.pack.{mods[1]}", "b32", 3 if narrow else 2, abcd=(int(mods[2] == "s32"),))


@instruction("cvta")
def _decode_cvta(dec: Decoder, mods: Sequence[str]) -> None:
    rest = list(mods)
    to = rest[0] == "to"
    if to:
        rest.pop(0)
    space = SPACES.get(rest[0])
    d, s = dec.count(2)
    dst = dec.dest(d)
    if dst.width != 8 or space is None:
        raise dec.unknown()
    src = dec.value(s, "u64")
    if space in (GLOBAL, CONST):
        return dec.emit("mov.u64", {0: dst}, {1: src})
    if to:
        return dec.emit("to_shared", {0: dst}, {1: src})
    base = {SHARED: SHARED_BASE, LOCAL: LOCAL_BASE, PARAM: PARAM_BASE}[space]
    return dec.emit("address", {0: dst}, {1: src}, imm=base)


@instruction("isspacep")
def _decode_isspacep(dec: Decoder, mods: Sequence[str]) -> None:
    d, s = dec.count(2)
    dec.emit(
        "isspacep",
        {0: dec.dest(d, True)},
        {1: dec.value(s, "u64")},
        abcd=(SPACES[mods[0]], int(mods[0] == "shared::cluster")),
    )


@instruction("createpolicy")
def _decode_createpolicy(dec: Decoder, mods: Sequence[str]) -> None:
    dec.emit("mov.u64", {0: dec.dest(dec.now.args[0])}, {1: (8, 0x12F0000000000000)}, cls="move")
