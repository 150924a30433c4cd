"""Rules for the instructions of a warpgroup, of sm_90a."""

from __future__ import annotations

from collections.abc import Sequence

from .decoder import Decoder, instruction
from .program import MEET_ALL
from .ptx import Imm, Operand, Reg, Vec

_TYPES = {"f16": (0, 16), "bf16": (1, 16), "e4m3": (2, 32), "e5m2": (3, 32)}  # number of the type, k
# Form of wgmma.cpp
_A_IN_REGISTERS, _TRANSPOSED_A, _TRANSPOSED_B, _MINUS_A, _MINUS_B = 1, 2, 4, 8, 16


def _number(dec: Decoder, arg: Operand, *allowed: int) -> int:
    if not isinstance(arg, Imm) or arg.value not in allowed:
        raise dec.unknown(f"an immediate of {allowed} is wanted")
    return int(arg.value)


@instruction("wgmma")
def _decode_wgmma(dec: Decoder, mods: Sequence[str]) -> None:
    op = mods[0]
    if list(mods[1:3]) != ["sync", "aligned"]:
        raise dec.unknown()
    if op == "mma_async":
        return _decode_product(dec, mods[3:])
    imm = 0
    if op == "wait_group":
        imm = _number(dec, dec.count(1)[0], *range(8))
    elif op not in ("fence", "commit_group"):
        raise dec.unknown()
    dec.emit(f"wgmma.{op}", imm=imm, ctl=MEET_ALL, cls="wgmma.sync")


def _decode_product(dec: Decoder, mods: Sequence[str]) -> None:
    if len(mods) != 4 or mods[1] != "f32" or mods[2] not in _TYPES or mods[3] != mods[2]:
        raise dec.unknown("accumulators are f32, A and B both f16, bf16, e4m3 or e5m2")
    kind, k = _TYPES[mods[2]]
    shape = mods[0]
    n = int(shape[4 : shape.index("k")])
    if shape != f"m64n{n}k{k}" or n % 8 or not 8 <= n <= 256:
        raise dec.unknown()
    a = list(dec.now.args)
    in_registers = isinstance(a[1], Vec)
    if len(a) != 6 + (0 if k == 32 else 1 if in_registers else 2):
        raise dec.unknown(f"{len(a)} operands")
    d = a[0].items if isinstance(a[0], Vec) else (a[0],)
    if len(d) != n // 2:
        raise dec.unknown(f"{len(d)} accumulators")
    add, inverted = dec.pred(a[3])
    if inverted:
        turned = dec.temp(0)
        dec.emit("not.pred", {0: turned}, {1: add})
        add = turned
    ins: dict[int, Reg | tuple[int, int]] = {4: dec.value(a[2], "u64"), 5: add}
    form = 0
    if isinstance(a[1], Vec):
        form = _A_IN_REGISTERS
        if len(a[1].items) != 4:
            raise dec.unknown()
        ins |= {j: dec.value(v, "b32") for j, v in enumerate(a[1].items)}
    else:
        ins[0] = dec.value(a[1], "u64")
    form |= _MINUS_A if _number(dec, a[4], 1, -1) < 0 else 0
    form |= _MINUS_B if _number(dec, a[5], 1, -1) < 0 else 0
    transposed = [_number(dec, v, 0, 1) for v in a[6:]]
    if transposed and transposed[-1]:
        form |= _TRANSPOSED_B
    if len(transposed) == 2 and transposed[0]:
        form |= _TRANSPOSED_A
    dec.emit(
        "wgmma.mma_async",
        {},
        ins,
        many=[dec.dest(v) for v in d],
        abcd=(n // 8 - 1, kind, form),
        ctl=MEET_ALL,
        cls="wgmma",
    )


@instruction("setmaxnreg")
def _decode_setmaxnreg(dec: Decoder, mods: Sequence[str]) -> None:
    count = dec.count(1)[0]
    if list(mods[1:]) != ["sync", "aligned", "u32"] or mods[0] not in ("inc", "dec") or not isinstance(count, Imm):
        raise dec.unknown()
    dec.emit("setmaxnreg", imm=int(count.value), abcd=(int(mods[0] == "inc"),), ctl=MEET_ALL, cls="other")
