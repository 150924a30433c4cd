"""Rules for warp operations, matrices, barriers and control flow."""

from __future__ import annotations

from collections.abc import Sequence

from .decoder import SPACES, Decoder, instruction
from .program import (
    ACQUIRE,
    ALIGNED,
    BARRIER,
    BRANCH,
    BRANCH_TABLE,
    CLUSTER_BARRIER,
    CTA_SCOPE,
    EXIT,
    GENERIC,
    HAS_COUNT,
    MEET,
    MEET_ALL,
    NOT_C,
    RELEASE,
    SHARED,
    YIELDING,
)
from .ptx import Name, Reg, Vec


@instruction("ldmatrix", "stmatrix")
def _decode_ldmatrix(dec: Decoder, mods: Sequence[str]) -> None:
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
            raise dec.unknown(f"modifier .{m}")
    a = dec.count(2)
    store = dec.now.op[0] == "stmatrix"
    data, mem = (a[1], a[0]) if store else (a[0], a[1])
    items = data.items if isinstance(data, Vec) else (data,)
    if len(items) != n or "b16" not in mods or "m8n8" not in mods:
        raise dec.unknown()
    base, width, offset = dec.address(mem)
    ins: dict[int, Reg | tuple[int, int]] = {12: base} if base else {}
    outs: dict[int, Reg] = {}
    if store:
        ins.update({k: dec.value(x, "b32") for k, x in enumerate(items)})
    else:
        outs = {k: dec.dest(x) for k, x in enumerate(items)}
    dec.emit(dec.now.op[0], outs, ins, imm=offset, abcd=(n, trans, space, width), ctl=MEET_ALL, cls=dec.now.op[0])


@instruction("mma")
def _decode_mma(dec: Decoder, mods: Sequence[str]) -> None:
    rest = [m for m in mods if m not in ("sync", "aligned", "row", "col", "satfinite", "kind::f8f6f4")]
    if len(rest) != 5 or "row" not in mods or "col" not in mods:
        raise dec.unknown()
    shape, dt, at, bt, ct = rest
    if at != bt or dt != ct or not shape.startswith("m16n8k"):
        raise dec.unknown()
    k = int(shape[6:])
    name = f"mma.{k}.{dt}.{at}"
    a = dec.count(4)
    d, x, y, c = (v.items if isinstance(v, Vec) else (v,) for v in a)
    ins = {4 + j: dec.value(v, "b32") for j, v in enumerate(x)}
    ins |= {8 + j: dec.value(v, "b32") for j, v in enumerate(y)}
    ins |= {12 + j: dec.value(v, dt if dt != "f16" else "b32") for j, v in enumerate(c)}
    dec.emit(name, {j: dec.dest(v) for j, v in enumerate(d)}, ins, ctl=MEET_ALL, cls="mma")


@instruction("movmatrix")
def _decode_movmatrix(dec: Decoder, mods: Sequence[str]) -> None:
    a = dec.count(2)
    if "trans" not in mods or "b16" not in mods:
        raise dec.unknown()
    dec.emit("movmatrix", {0: dec.dest(a[0])}, {1: dec.value(a[1], "b32")}, ctl=MEET_ALL, cls="movmatrix")


@instruction("shfl")
def _decode_shfl(dec: Decoder, mods: Sequence[str]) -> None:
    a = dec.count(5)
    if mods[0] != "sync" or mods[2] != "b32":
        raise dec.unknown()
    targets = a[0].items if isinstance(a[0], Vec) else (a[0],)
    outs = {k: dec.dest(t, k == 1) for k, t in enumerate(targets) if not dec.sink(t)}
    ins = {
        2: dec.value(a[1], "b32"),
        3: dec.value(a[2], "b32"),
        4: dec.value(a[3], "b32"),
        15: dec.value(a[4], "b32"),
    }
    dec.emit("shfl", outs, ins, ctl=MEET, abcd=(["up", "down", "bfly", "idx"].index(mods[1]),), cls="shfl")


@instruction("vote")
def _decode_vote(dec: Decoder, mods: Sequence[str]) -> None:
    a = dec.count(3)
    which = ["all", "any", "uni", "ballot"].index(mods[1])
    if mods[0] != "sync":
        raise dec.unknown()
    p, inverted = dec.pred(a[1])
    dec.emit(
        "vote",
        {0: dec.dest(a[0], which != 3)},
        {1: p, 15: dec.value(a[2], "b32")},
        ctl=MEET,
        abcd=(which,),
        flags=NOT_C if inverted else 0,
        cls="vote",
    )


@instruction("match")
def _decode_match(dec: Decoder, mods: Sequence[str]) -> None:
    a = dec.count(3)
    targets = a[0].items if isinstance(a[0], Vec) else (a[0],)
    outs = {k: dec.dest(t, k == 1) for k, t in enumerate(targets) if not dec.sink(t)}
    dec.emit(
        f"match.{mods[2]}",
        outs,
        {2: dec.value(a[1], mods[2]), 15: dec.value(a[2], "b32")},
        ctl=MEET,
        abcd=(int(mods[0] == "all"),),
        cls="vote",
    )


@instruction("redux")
def _decode_redux(dec: Decoder, mods: Sequence[str]) -> None:
    a = dec.count(3)
    if mods[0] != "sync" or mods[2] not in ("u32", "s32", "b32"):
        raise dec.unknown()
    which = ["add", "min", "max", "and", "or", "xor"].index(mods[1])
    dec.emit(
        "redux",
        {0: dec.dest(a[0])},
        {1: dec.value(a[1], mods[2]), 15: dec.value(a[2], "b32")},
        ctl=MEET,
        abcd=(which, int(mods[2] == "s32")),
        cls="shfl",
    )


@instruction("elect")
def _decode_elect(dec: Decoder, mods: Sequence[str]) -> None:
    a = dec.count(2)
    targets = a[0].items if isinstance(a[0], Vec) else (a[0],)
    outs = {k: dec.dest(t, k == 1) for k, t in enumerate(targets) if not dec.sink(t)}
    dec.emit("elect", outs, {15: dec.value(a[1], "b32")}, ctl=MEET, cls="vote")


@instruction("activemask")
def _decode_activemask(dec: Decoder, mods: Sequence[str]) -> None:
    dec.emit("activemask", {0: dec.dest(dec.count(1)[0])}, cls="vote")


@instruction("bar", "barrier")
def _decode_bar(dec: Decoder, mods: Sequence[str]) -> None:
    rest = [m for m in mods if m != "cta"]
    aligned = ALIGNED if dec.now.op[0] == "bar" or "aligned" in rest else 0
    rest = [m for m in rest if m != "aligned"]
    a = dec.now.args
    if rest[0] == "cluster":
        return _decode_cluster_barrier(dec, rest[1:], aligned)
    if rest[:2] == ["warp", "sync"]:
        return dec.emit("bar.warp.sync", {}, {15: dec.value(dec.count(1)[0], "b32")}, ctl=MEET, cls="warp_sync")
    if rest[0] in ("sync", "arrive"):
        dec.count(1, 2)
        ins = {0: dec.value(a[0], "u32")}
        flags = aligned
        if len(a) == 2:
            ins[1] = dec.value(a[1], "u32")
            flags |= HAS_COUNT
        return dec.emit("nop", {}, ins, ctl=BARRIER, abcd=(int(rest[0] == "arrive"),), flags=flags, cls="barrier")
    if rest[0] == "red":
        which = ["popc", "and", "or"].index(rest[1])
        d = dec.dest(a[0], which > 0)
        p, inverted = dec.pred(a[-1])
        flags = aligned | (NOT_C if inverted else 0)
        ins = {0: dec.value(a[1], "u32"), 3: p}
        if dec.count(3, 4) and len(a) == 4:
            ins[1] = dec.value(a[2], "u32")
            flags |= HAS_COUNT
        return dec.emit("nop", {2: d}, ins, ctl=BARRIER, abcd=(2 + which,), flags=flags, cls="barrier")
    raise dec.unknown()


def _decode_cluster_barrier(dec: Decoder, mods: Sequence[str], aligned: int) -> None:
    wait = mods[0] == "wait"
    relaxed = "relaxed" in mods
    dec.emit(
        "nop",
        ctl=CLUSTER_BARRIER,
        abcd=(int(wait),),
        flags=aligned | (0 if relaxed else ACQUIRE if wait else RELEASE),
        cls="barrier",
    )


@instruction("membar", "fence")
def _decode_fence(dec: Decoder, mods: Sequence[str]) -> None:
    flags = CTA_SCOPE if "cta" in mods else 0
    if list(mods[:2]) == ["proxy", "async"] and mods[2:] != ["global"]:
        return dec.emit("fence.proxy", cls="fence")
    if "proxy" in mods:
        return dec.emit("nop", cls="fence")
    # fence.mbarrier_init releases initialisations of mbarriers alone; here, as any release does, all that was written.
    acquire = "acquire" in mods and "acq_rel" not in mods
    release = "release" in mods and "acq_rel" not in mods
    flags |= ACQUIRE if acquire else RELEASE if release else ACQUIRE | RELEASE
    dec.emit("fence", flags=flags, cls="fence")


@instruction("griddepcontrol")
def _decode_turn(dec: Decoder, mods: Sequence[str]) -> None:
    if list(mods) not in (["wait"], ["launch_dependents"]):
        raise dec.unknown()
    dec.emit("griddepcontrol.wait" if mods[0] == "wait" else "nop", cls="other")


@instruction("prefetch", "prefetchu", "discard", "applypriority", "pmevent", "brkpt")
def _decode_nothing(dec: Decoder, mods: Sequence[str]) -> None:
    dec.emit("nop", cls="other")


@instruction("nanosleep")
def _decode_nanosleep(dec: Decoder, mods: Sequence[str]) -> None:
    dec.emit("yield", ctl=YIELDING, cls="other")


@instruction("bra")
def _decode_bra(dec: Decoder, mods: Sequence[str]) -> None:
    a = dec.count(1)[0]
    if not isinstance(a, Name):
        raise dec.unknown()
    dec.emit("nop", target=a.text, ctl=BRANCH, cls="branch")


@instruction("brx")
def _decode_brx(dec: Decoder, mods: Sequence[str]) -> None:
    index, table = dec.count(2)
    if mods[0] != "idx" or not isinstance(table, Name) or table.text not in dec.fn.branch_tables:
        raise dec.unknown()
    labels = dec.fn.branch_tables[table.text]
    dec.emit(
        "nop",
        {},
        {0: dec.value(index, "u32")},
        imm=len(labels),
        target=len(dec.tables),
        ctl=BRANCH_TABLE,
        cls="branch",
    )
    dec.tables += labels


@instruction("ret", "exit")
def _decode_ret(dec: Decoder, mods: Sequence[str]) -> None:
    dec.emit("nop", ctl=EXIT, cls="branch")


@instruction("trap")
def _decode_trap(dec: Decoder, mods: Sequence[str]) -> None:
    dec.emit("trap", cls="other")


@instruction("call")
def _decode_call(dec: Decoder, mods: Sequence[str]) -> None:
    a = dec.now.args
    names = [x.text for x in a if isinstance(x, Name)]
    params: list[int] = []
    results: list[int] = []
    for k, x in enumerate(a):
        if isinstance(x, Vec):
            at = [dec.offsets[i.text][1] for i in x.items if isinstance(i, Name)]
            if k == 0:
                results = at
            else:
                params = at
    if names == ["vprintf"]:
        return dec.emit("vprintf", imm=params[0] | params[1] << 16 | results[0] << 32, cls="call")
    if names == ["__assertfail"]:
        return dec.emit("__assertfail", imm=params[0] | params[1] << 16 | params[2] << 32, cls="call")
    raise dec.unknown("functions that are not inlined; mark them __forceinline__")
