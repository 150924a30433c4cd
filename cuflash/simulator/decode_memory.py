"""Rules for memory: loads, stores, atomics, asynchronous copies, mbarriers."""

from __future__ import annotations

from collections.abc import Sequence

from .decoder import SPACES, Decoder, instruction
from .program import (
    ACQUIRE,
    CONST,
    CTA_SCOPE,
    GENERIC,
    GLOBAL,
    LOCAL,
    PARAM,
    RELEASE,
    SHARED,
    SIGNED,
    SIMPLE,
    STRONG,
    WIDE_REG,
    YIELDING,
)
from .ptx import WIDTHS, Imm, Mem, Name, Not, Operand, Reg, Vec


def _decode_memory_mods(dec: Decoder, mods: Sequence[str]) -> tuple[int, int, str, int]:
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
        elif m in ("weak", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "cluster", "gpu", "sys") or m.startswith(
            ("L1::", "L2::")
        ):
            continue
        else:
            raise dec.unknown(f"modifier .{m}")
    if not type_ or WIDTHS[type_] not in (1, 2, 4, 8):
        raise dec.unknown("no type")
    return space, vector, type_, flags


def _decode_hint(dec: Decoder, args: list[Operand], n: int) -> list[Operand]:
    """Drops the cache policy behind the operands."""
    if len(args) == n + 1 and any("cache_hint" in m for m in dec.now.op):
        return args[:n]
    if len(args) != n:
        raise dec.unknown(f"{len(args)} operands")
    return args


@instruction("ld", "ldu")
def _decode_ld(dec: Decoder, mods: Sequence[str]) -> None:
    space, vector, type_, flags = _decode_memory_mods(dec, mods)
    a = _decode_hint(dec, dec.now.args, 2)
    items = a[0].items if isinstance(a[0], Vec) else (a[0],)
    if len(items) != vector:
        raise dec.unknown("the vector has another length")
    outs = {k: dec.dest(x) for k, x in enumerate(items) if not dec.sink(x)}
    if type_[0] == "s":
        flags |= SIGNED
    if WIDTHS[type_] < 8 and any(r.width == 8 for r in outs.values()):
        flags |= WIDE_REG
    mem = a[1]
    if space == PARAM and isinstance(mem, Mem) and isinstance(mem.base, Name):
        where, at = dec.offsets.get(mem.base.text, ("", 0))
        if where == "param":
            return dec.emit(
                "ld.param", outs, imm=at + mem.offset, abcd=(vector, WIDTHS[type_]), flags=flags, cls="ld.param"
            )
        space = LOCAL
    base, width, offset = dec.address(mem)
    cls = {GLOBAL: "ld.global", SHARED: "ld.shared", LOCAL: "ld.local", PARAM: "ld.param", CONST: "ld.const"}.get(
        space, "ld.generic"
    )
    dec.emit(
        "ld",
        outs,
        {12: base} if base else {},
        imm=offset,
        abcd=(vector, WIDTHS[type_], space, width),
        flags=flags,
        cls=cls,
    )


@instruction("st")
def _decode_st(dec: Decoder, mods: Sequence[str]) -> None:
    if mods[0] == "async":
        return _decode_st_async(dec, mods)
    space, vector, type_, flags = _decode_memory_mods(dec, mods)
    a = _decode_hint(dec, dec.now.args, 2)
    items = a[1].items if isinstance(a[1], Vec) else (a[1],)
    if len(items) != vector:
        raise dec.unknown("the vector has another length")
    if WIDTHS[type_] < 8 and any(isinstance(x, Reg) and x.width == 8 for x in items):
        flags |= WIDE_REG
        values = {k: dec.value(x, "u64") for k, x in enumerate(items)}
    else:
        values = {k: dec.value(x, type_) for k, x in enumerate(items)}
    if space == PARAM:
        space = LOCAL
    base, width, offset = dec.address(a[0])
    if base:
        values[12] = base
    cls = {GLOBAL: "st.global", SHARED: "st.shared", LOCAL: "st.local"}.get(space, "st.generic")
    dec.emit("st", {}, values, imm=offset, abcd=(vector, WIDTHS[type_], space, width), flags=flags, cls=cls)


@instruction("atom", "red")
def _decode_atom(dec: Decoder, mods: Sequence[str]) -> None:
    ops = ["add", "min", "max", "inc", "dec", "and", "or", "xor", "exch", "cas"]
    types = {
        "u32": 0,
        "b32": 0,
        "s32": 1,
        "f32": 2,
        "u64": 3,
        "b64": 3,
        "s64": 4,
        "f64": 5,
        "f16x2": 6,
        "bf16x2": 7,
        "f16": 8,
        "bf16": 9,
    }
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
            raise dec.unknown(f"modifier .{m}")
    if op < 0 or not type_:
        raise dec.unknown()
    red = dec.now.op[0] == "red"
    n = (2 if red else 3) + (ops[op] == "cas")
    a = _decode_hint(dec, dec.now.args, n)
    outs: dict[int, Reg] = {}
    if not red:
        if not dec.sink(a[0]):
            outs[0] = dec.dest(a[0])
        a = a[1:]
    ins = {k + 1: dec.value(x, type_) for k, x in enumerate(a[1:])}
    base, width, offset = dec.address(a[0])
    if base:
        ins[12] = base
    dec.emit("atom", outs, ins, imm=offset, abcd=(op, types[type_], space, width), flags=flags, cls="atomic")


@instruction("cp")
def _decode_cp(dec: Decoder, mods: Sequence[str]) -> None:
    if mods[0] != "async":
        raise dec.unknown()
    rest = list(mods[1:])
    a = dec.now.args
    if rest == ["commit_group"]:
        return dec.emit("cp.async.commit_group", cls="cp.async.commit")
    if rest == ["wait_all"]:
        return dec.emit("cp.async.wait_all", cls="cp.async.wait")
    if rest == ["wait_group"]:
        n = a[0]
        if not isinstance(n, Imm):
            raise dec.unknown()
        return dec.emit("cp.async.wait_group", imm=int(n.value), cls="cp.async.wait")
    if rest and rest[0] in ("ca", "cg"):
        allowed = {"ca", "cg", "shared", "shared::cta", "global"}
        dec.no_more([m for m in rest if m not in allowed and not m.startswith("L2::")])
        args = a[:-1] if any("cache_hint" in m for m in rest) else a
        if len(args) not in (3, 4):
            raise dec.unknown()
        size = args[2]
        if not isinstance(size, Imm) or size.value not in (4, 8, 16):
            raise dec.unknown("copies of 4, 8 or 16 bytes only")
        dst, dw, doff = dec.address(args[0])
        src, sw, soff = dec.address(args[1])
        ins: dict[int, Reg | tuple[int, int]] = {}
        if dst:
            ins[0] = dst
        if src:
            ins[1] = src
        if len(args) == 4:
            third = args[3]
            if isinstance(third, Not) or (isinstance(third, Reg) and third.width == 0):
                ins[3], inverted = dec.pred(third)
                if inverted:
                    raise dec.unknown("an inverted predicate")
            else:
                ins[2] = dec.value(third, "u32")
        return dec.emit(
            "cp.async",
            {},
            ins,
            imm=doff,
            target=soff & 0xFFFFFFFF,
            abcd=(int(size.value), dw, 0, sw),
            cls="cp.async",
        )
    if rest[:2] == ["mbarrier", "arrive"]:
        base, width, offset = dec.address(dec.count(1)[0])
        return dec.emit(
            "cp.async.mbarrier.arrive",
            {},
            {12: base} if base else {},
            imm=offset,
            abcd=(int("noinc" in rest), 0, 0, width),
            cls="mbarrier",
        )
    if rest and rest[0] == "bulk":
        return _decode_bulk(dec, rest[1:])
    raise dec.unknown()


def _decode_bulk(dec: Decoder, mods: list[str]) -> None:
    a = dec.now.args
    if mods == ["commit_group"]:
        return dec.emit("cp.async.bulk.commit_group", cls="bulk")
    if mods and mods[0] == "wait_group":
        n = a[0]
        if not isinstance(n, Imm):
            raise dec.unknown()
        return dec.emit("cp.async.bulk.wait_group", imm=int(n.value), cls="bulk")
    if mods and mods[0] == "prefetch" and "tensor" not in mods:
        return dec.emit("nop", cls="bulk")
    if any("cache_hint" in m for m in mods):
        a = a[:-1]
    if mods[:1] == ["tensor"]:
        return _decode_box(dec, mods[1:], a)
    to_shared = bool(mods) and mods[0] in ("shared::cluster", "shared::cta")
    if len(mods) < 3 or "multicast::cluster" in mods or len(a) != (4 if to_shared else 3):
        raise dec.unknown()
    if not to_shared and (mods[0] != "global" or not mods[1].startswith("shared") or mods[2] != "bulk_group"):
        raise dec.unknown()
    if to_shared and (mods[1] not in ("global", "shared::cta") or mods[2] != "mbarrier::complete_tx::bytes"):
        raise dec.unknown()
    dst, dw, doff = dec.address(a[0])
    src, sw, soff = dec.address(a[1])
    ins: dict[int, Reg | tuple[int, int]] = {2: dec.value(a[2], "u32")}
    if dst:
        ins[0] = dst
    if src:
        ins[1] = src
    width = 4
    if to_shared:
        ins[3], width = _barrier(dec, a[3])
    name = "cp.async.bulk.shared" if to_shared else "cp.async.bulk.global"
    source = GLOBAL if mods[1] == "global" else SHARED
    dec.emit(name, {}, ins, imm=doff, target=soff & 0xFFFFFFFF, abcd=(dw, sw, source, width), cls="bulk")


def _barrier(dec: Decoder, operand: Operand) -> tuple[Reg, int]:
    """Return a register with the address of an mbarrier, and its width."""
    bar, width, offset = dec.address(operand)
    if bar is None or offset:
        wide = dec.temp(width)
        if bar is None:
            dec.emit("mov.u64" if width == 8 else "mov.u32", {0: wide}, {1: (width, offset)})
        else:
            kind = "u64" if width == 8 else "u32"
            dec.emit(f"add.{kind}", {0: wide}, {1: bar, 2: (width, offset & ((1 << 8 * width) - 1))})
        bar = wide
    return bar, width


def _decode_box(dec: Decoder, mods: Sequence[str], a: Sequence[Operand]) -> None:
    """Copies of boxes of tensors with four axes, to this block or to some of its cluster."""
    rest = [m for m in mods if m not in ("tile", "multicast::cluster") and "cache_hint" not in m]
    to_many = "multicast::cluster" in mods
    kinds = ["4d", "shared::cluster", "global", "mbarrier::complete_tx::bytes"]
    if rest not in (kinds, [kinds[0], "shared::cta", *kinds[2:]]) or len(a) != 3 + to_many:
        raise dec.unknown()
    source = a[1]
    if not isinstance(source, Mem) or source.coordinates is None or len(source.coordinates.items) != 4:
        raise dec.unknown("no map with four coordinates")
    dst, dst_width, dst_offset = dec.address(a[0])
    at, at_width, at_offset = dec.address(Mem(source.base, source.offset))
    bar, width = _barrier(dec, a[2])
    ins: dict[int, Reg | tuple[int, int]] = {2: bar}
    ins |= {3 + k: dec.value(x, "s32") for k, x in enumerate(source.coordinates.items)}
    if to_many:
        ins[7] = dec.value(a[3], "u16")
    if dst:
        ins[0] = dst
    if at:
        ins[1] = at
    dec.emit(
        "cp.async.bulk.tensor",
        {},
        ins,
        imm=dst_offset,
        target=at_offset & 0xFFFFFFFF,
        abcd=(dst_width, at_width, 0, width),
        cls="bulk",
    )


def _decode_st_async(dec: Decoder, mods: Sequence[str]) -> None:
    rest = [m for m in mods if m not in ("async", "weak", "shared::cluster", "mbarrier::complete_tx::bytes")]
    type_, rest = dec.type_of(rest)
    vector = int(rest.pop(0)[1:]) if rest and rest[0] in ("v2", "v4") else 1
    dec.no_more(rest)
    a = dec.count(3)
    items = a[1].items if isinstance(a[1], Vec) else (a[1],)
    if len(items) != vector or WIDTHS[type_] not in (4, 8):
        raise dec.unknown()
    values = {k: dec.value(x, type_) for k, x in enumerate(items)}
    base, width, offset = dec.address(a[0])
    bar, bar_width, bar_offset = dec.address(a[2])
    if base is None or bar is None or width != bar_width:
        raise dec.unknown("addresses of different widths")
    dec.emit(
        "st.async",
        {},
        values | {12: base, 13: bar},
        imm=offset,
        target=bar_offset & 0xFFFFFFFF,
        abcd=(vector, WIDTHS[type_], 0, width),
        cls="st.async",
    )


@instruction("mbarrier")
def _decode_mbarrier(dec: Decoder, mods: Sequence[str]) -> None:
    op = mods[0]
    a = list(dec.now.args)
    parity = "parity" in mods
    acquire = 0 if "relaxed" in mods else ACQUIRE
    release = 0 if "relaxed" in mods else RELEASE
    if op == "pending_count":
        return dec.emit("mbarrier.pending_count", {0: dec.dest(a[0])}, cls="mbarrier")
    outs: dict[int, Reg] = {}
    ins: dict[int, Reg | tuple[int, int]] = {}
    drop = op.startswith("arrive_drop")
    if op in ("test_wait", "try_wait"):
        outs[0] = dec.dest(a.pop(0), True)
    elif op in ("arrive", "arrive_drop") and not isinstance(a[0], Mem):
        target = a.pop(0)
        if not dec.sink(target):
            outs[0] = dec.dest(target)
    base, width, offset = dec.address(a.pop(0))
    if base:
        ins[12] = base
    name, flags, which = f"mbarrier.{op}", 0, 0
    if op == "init":
        ins[1] = dec.value(a[0], "u32")
    elif op in ("test_wait", "try_wait"):
        name, flags, which = "mbarrier.wait", acquire, int(parity)
        ins[1] = dec.value(a[0], "u32" if parity else "u64")
    elif op in ("arrive", "arrive_drop"):
        name, flags, which = "mbarrier.arrive", release, int(drop)
        if "noComplete" in mods:
            raise dec.unknown()
        if a:
            ins[2 if "expect_tx" in mods else 1] = dec.value(a[0], "u32")
    elif op in ("expect_tx", "complete_tx"):
        name, which = "mbarrier.expect_tx", int(op == "complete_tx")
        ins[2] = dec.value(a[0], "u32")
    elif op != "inval":
        raise dec.unknown()
    waits = op in ("test_wait", "try_wait")
    dec.emit(
        name,
        outs,
        ins,
        imm=offset,
        abcd=(which, 0, 0, width),
        flags=flags,
        ctl=YIELDING if waits else SIMPLE,
        cls="mbarrier",
    )


@instruction("mapa")
def _decode_mapa(dec: Decoder, mods: Sequence[str]) -> None:
    a = dec.count(3)
    type_ = mods[-1]
    shared = "shared::cluster" in mods
    source = dec.value(a[1], type_)
    if not shared and type_ != "u64":
        raise dec.unknown()
    dec.emit(
        "mapa",
        {0: dec.dest(a[0])},
        {1: source, 2: dec.value(a[2], "u32")},
        abcd=(int(type_ == "u64"), int(not shared)),
        cls="move",
    )


@instruction("getctarank")
def _decode_getctarank(dec: Decoder, mods: Sequence[str]) -> None:
    a = dec.count(2)
    wide = mods[-1] == "u64"
    dec.emit("getctarank", {0: dec.dest(a[0])}, {1: dec.value(a[1], mods[-1])}, abcd=(int(wide),), cls="move")
