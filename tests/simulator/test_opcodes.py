"""Single instructions against NumPy, on edge values and random ones."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from simulated import PREFIX, run

from cuflash.simulator import SimModule

bf16 = ml_dtypes.bfloat16
# letter of the case table: C type, constraint of asm, NumPy type
TYPES: dict[str, tuple[str, str, Any]] = {
    "h": ("unsigned short", "h", np.uint16),
    "r": ("unsigned", "r", np.uint32),
    "l": ("unsigned long long", "l", np.uint64),
    "f": ("float", "f", np.float32),
    "d": ("double", "d", np.float64),
}
N = 256
FLOATS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    np.inf,
    -np.inf,
    np.nan,
    1e-40,
    -1e-40,
    3.4e38,
    -3.4e38,
    0.5,
    1.5,
    2.5,
    -2.5,
    65504.0,
    65520.0,
    1e-7,
    6e-8,
    2.0**31,
    -(2.0**31),
]


def values(letter: str, position: int) -> np.ndarray:
    rng = np.random.default_rng(position + 10 * ord(letter))
    kind = TYPES[letter][2]
    if letter in "fd":
        out = (rng.standard_normal(N) * np.exp(rng.uniform(-20, 20, N))).astype(kind)
        edge = rng.permutation(np.array(FLOATS, kind))
    else:
        info = np.iinfo(kind)
        out = rng.integers(0, info.max, N, dtype=kind, endpoint=True)
        out[N // 2 :] = rng.integers(0, 100, N - N // 2)
        edge = np.array([0, 1, 2, info.max, info.max - 1, info.max // 2, info.max // 2 + 1, 31, 32, 33], kind)
        edge = np.roll(edge, position * 3)
    out[: len(edge)] = edge
    return out


def s(x: np.ndarray) -> np.ndarray:
    """The same bits, signed."""
    return x.view(x.dtype.str.replace("u", "i"))


def ftz(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x).astype(np.float32)


def half(x: np.ndarray, kind: Any = np.float16) -> np.ndarray:
    return (x & 0xFFFF).astype(np.uint16).view(kind)


def bits(x: np.ndarray) -> np.ndarray:
    """16-bit floats as integers; every NaN as the one that the hardware makes."""
    return np.where(np.isnan(x.astype(np.float32)), np.uint16(0x7FFF), x.view(np.uint16))


def wide(a: np.ndarray) -> np.ndarray:
    return a.astype(object)


def u(x: Any, n: int) -> np.ndarray:
    return np.array([int(v) & ((1 << n) - 1) for v in x], np.uint64)


def shift(f: Callable[[int, int], int], a: np.ndarray, b: np.ndarray) -> list[int]:
    return [f(int(x), int(y)) for x, y in zip(a, b)]


def bfe(a: int, b: int, c: int) -> int:
    return (a >> (b & 255)) & ((1 << (c & 255)) - 1)


def bfi(a: int, b: int, c: int, d: int) -> int:
    mask = ((1 << d) - 1) << c & 0xFFFFFFFF
    return (b & ~mask) | ((a << c) & mask)


def prmt(a: int, b: int, sel: int) -> int:
    out = 0
    for k in range(4):
        n = sel >> 4 * k & 15
        byte = ((b << 32 | a) >> 8 * (n & 7)) & 255
        if n & 8:
            byte = 255 if byte & 128 else 0
        out |= byte << 8 * k
    return out


def saturating(x: np.ndarray, kind: Any, rounding: Callable[[Any], Any]) -> np.ndarray:
    info = np.iinfo(kind)
    with np.errstate(all="ignore"):
        y = rounding(x.astype(np.float64))
        return np.array(
            [
                0
                if np.isnan(v)
                else min(max(int(v) if np.isfinite(v) else (info.max if v > 0 else info.min), info.min), info.max)
                for v in y
            ],
            kind,
        )


def saturated(a: np.ndarray, lo: int, hi: int) -> np.ndarray:
    """Signed integers clipped to 8 or 16 bits, as bits."""
    return wide(np.clip(s(a), lo, hi)) & (255 if hi < 256 else 65535)


def pick(a: np.ndarray, b: np.ndarray, better: Callable[[Any, Any], Any]) -> np.ndarray:
    best = np.where(a == b, np.where(np.signbit(a) == (better is np.minimum), a, b), better(a, b))  # -0 is less than +0
    return np.where(np.isnan(a), b, np.where(np.isnan(b), a, best))


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """A fused multiply-add in exact arithmetic, rounded once."""
    out = np.zeros(len(a), np.float32)
    for k, (x, y, z) in enumerate(zip(a, b, c)):
        if not (np.isfinite(x) and np.isfinite(y) and np.isfinite(z)):
            out[k] = np.float32(x) * np.float32(y) + np.float32(z)
            continue
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        near = np.float32(float(exact))  # may be off by one unit from rounding twice
        best = (
            min(
                (abs(Fraction(float(v)) - exact), int(v.view(np.uint32)) & 1, v)
                for v in (near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf)))
                if np.isfinite(v)
            )
            if np.isfinite(near)
            else (0, 0, near)
        )
        out[k] = best[2]
        if exact == 0:
            out[k] = np.float32(x) * np.float32(y) + np.float32(z)
    return out


# name: (asm, letters of out and inputs, reference)
CASES: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "add_s32": ("add.s32 %0, %1, %2;", "rrr", lambda a, b: a + b),
    "sub_u64": ("sub.u64 %0, %1, %2;", "lll", lambda a, b: a - b),
    "add_u16": ("add.u16 %0, %1, %2;", "hhh", lambda a, b: a + b),
    "mul_lo_u16": ("mul.lo.u16 %0, %1, %2;", "hhh", lambda a, b: u(wide(a) * wide(b), 16)),
    "mul_lo_s32": ("mul.lo.s32 %0, %1, %2;", "rrr", lambda a, b: a * b),
    "mul_lo_u64": ("mul.lo.u64 %0, %1, %2;", "lll", lambda a, b: a * b),
    "mul_hi_u32": ("mul.hi.u32 %0, %1, %2;", "rrr", lambda a, b: u(wide(a) * wide(b) >> 32, 32)),
    "mul_hi_s32": ("mul.hi.s32 %0, %1, %2;", "rrr", lambda a, b: u(wide(s(a)) * wide(s(b)) >> 32, 32)),
    "mul_hi_u64": ("mul.hi.u64 %0, %1, %2;", "lll", lambda a, b: u(wide(a) * wide(b) >> 64, 64)),
    "mul_hi_s64": ("mul.hi.s64 %0, %1, %2;", "lll", lambda a, b: u(wide(s(a)) * wide(s(b)) >> 64, 64)),
    "mul_wide_s32": ("mul.wide.s32 %0, %1, %2;", "lrr", lambda a, b: u(wide(s(a)) * wide(s(b)), 64)),
    "mul_wide_u16": ("mul.wide.u16 %0, %1, %2;", "rhh", lambda a, b: u(wide(a) * wide(b), 32)),
    "mad_wide_u32": ("mad.wide.u32 %0, %1, %2, %3;", "lrrl", lambda a, b, c: u(wide(a) * wide(b) + wide(c), 64)),
    "mad_wide_s32": ("mad.wide.s32 %0, %1, %2, %3;", "lrrl", lambda a, b, c: u(wide(s(a)) * wide(s(b)) + wide(c), 64)),
    "mad_lo_s32": ("mad.lo.s32 %0, %1, %2, %3;", "rrrr", lambda a, b, c: a * b + c),
    "mad_hi_u32": ("mad.hi.u32 %0, %1, %2, %3;", "rrrr", lambda a, b, c: u((wide(a) * wide(b) >> 32) + wide(c), 32)),
    "min_s32": ("min.s32 %0, %1, %2;", "rrr", lambda a, b: np.minimum(s(a), s(b))),
    "min_relu_s32": ("min.relu.s32 %0, %1, %2;", "rrr", lambda a, b: np.maximum(np.minimum(s(a), s(b)), 0)),
    "max_relu_s32": ("max.relu.s32 %0, %1, %2;", "rrr", lambda a, b: np.maximum(np.maximum(s(a), s(b)), 0)),
    "max_u32": ("max.u32 %0, %1, %2;", "rrr", np.maximum),
    "max_s64": ("max.s64 %0, %1, %2;", "lll", lambda a, b: np.maximum(s(a), s(b))),
    "div_u32": ("{.reg .u32 t; max.u32 t, %2, 1; div.u32 %0, %1, t;}", "rrr", lambda a, b: a // np.maximum(b, 1)),
    "rem_s32": ("{.reg .s32 t; or.b32 t, %2, 2; rem.s32 %0, %1, t;}", "rrr", lambda a, b: np.fmod(s(a), s(b | 2))),
    "div_s32": (
        "{.reg .s32 t; or.b32 t, %2, 2; div.s32 %0, %1, t;}",
        "rrr",
        lambda a, b: u(
            [int(abs(x) // abs(y)) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(wide(s(a)), wide(s(b | 2)))], 32
        ),
    ),
    "abs_s32": ("abs.s32 %0, %1;", "rr", lambda a: u(np.abs(wide(s(a))), 32)),
    "neg_s64": ("neg.s64 %0, %1;", "ll", lambda a: -a),
    "not_b32": ("not.b32 %0, %1;", "rr", lambda a: ~a),
    "xor_b64": ("xor.b64 %0, %1, %2;", "lll", np.bitwise_xor),
    "lop3": ("lop3.b32 %0, %1, %2, %3, 0xb8;", "rrrr", lambda a, b, c: a ^ b & (c ^ a)),
    "shl_b32": ("shl.b32 %0, %1, %2;", "rrr", lambda a, b: u(shift(lambda x, n: x << n if n < 32 else 0, a, b), 32)),
    "shr_u32": ("shr.u32 %0, %1, %2;", "rrr", lambda a, b: u(shift(lambda x, n: x >> n if n < 32 else 0, a, b), 32)),
    "shr_s32": ("shr.s32 %0, %1, %2;", "rrr", lambda a, b: u(shift(lambda x, n: x >> min(n, 31), s(a), b), 32)),
    "shl_b64": ("shl.b64 %0, %1, %2;", "llr", lambda a, b: u(shift(lambda x, n: x << n if n < 64 else 0, a, b), 64)),
    "shr_s64": ("shr.s64 %0, %1, %2;", "llr", lambda a, b: u(shift(lambda x, n: x >> min(n, 63), s(a), b), 64)),
    "shr_s16": ("shr.s16 %0, %1, %2;", "hhr", lambda a, b: u(shift(lambda x, n: x >> min(n, 15), s(a), b), 16)),
    "shf_l_wrap": (
        "shf.l.wrap.b32 %0, %1, %2, %3;",
        "rrrr",
        lambda a, b, c: u([((int(y) << 32 | int(x)) << (int(z) & 31)) >> 32 for x, y, z in zip(a, b, c)], 32),
    ),
    "shf_r_clamp": (
        "shf.r.clamp.b32 %0, %1, %2, %3;",
        "rrrr",
        lambda a, b, c: u([(int(y) << 32 | int(x)) >> min(int(z), 32) for x, y, z in zip(a, b, c)], 32),
    ),
    "bfe_u32": (
        "{.reg .u32 p, n; and.b32 p, %2, 31; and.b32 n, %3, 31; bfe.u32 %0, %1, p, n;}",
        "rrrr",
        lambda a, b, c: [bfe(int(x), int(y) & 31, int(z) & 31) for x, y, z in zip(a, b, c)],
    ),
    "bfe_s32": ("bfe.s32 %0, %1, 4, 5;", "rr", lambda a: u([((int(x) >> 4 & 31) ^ 16) - 16 for x in a], 32)),
    "bfi_b32": (
        "{.reg .u32 p, n; and.b32 p, %3, 15; and.b32 n, %4, 31; bfi.b32 %0, %1, %2, p, n;}",
        "rrrrr",
        lambda a, b, c, d: [bfi(int(w), int(x), int(y) & 15, int(z) & 31) for w, x, y, z in zip(a, b, c, d)],
    ),
    "prmt": (
        "prmt.b32 %0, %1, %2, %3;",
        "rrrr",
        lambda a, b, c: [prmt(int(x), int(y), int(z)) for x, y, z in zip(a, b, c)],
    ),
    "popc": ("popc.b64 %0, %1;", "rl", lambda a: [bin(int(x)).count("1") for x in a]),
    "clz": ("clz.b32 %0, %1;", "rr", lambda a: [32 - int(x).bit_length() for x in a]),
    "brev": ("brev.b32 %0, %1;", "rr", lambda a: [int(f"{int(x):032b}"[::-1], 2) for x in a]),
    "bfind_u32": ("bfind.u32 %0, %1;", "rr", lambda a: u([int(x).bit_length() - 1 for x in a], 32)),
    "dp4a": (
        "dp4a.s32.s32 %0, %1, %2, %3;",
        "rrrr",
        lambda a, b, c: u(
            (a.view(np.int8).reshape(-1, 4).astype(int) * b.view(np.int8).reshape(-1, 4)).sum(1) + c.astype(int), 32
        ),
    ),
    "addc": (
        "{add.cc.u32 %0, %1, %2; addc.u32 %0, %1, %2;}",
        "rrr",
        lambda a, b: u(wide(a) + wide(b) + (wide(a) + wide(b) >> 32), 32),
    ),
    "slct": ("slct.u32.s32 %0, %1, %2, %3;", "rrrr", lambda a, b, c: np.where(s(c) >= 0, a, b)),
    "setp_selp": (
        "{.reg .pred p, q; setp.lt.u32 p, %1, %2; setp.gt.and.s32 q, %1, %3, !p; selp.u32 %0, %1, %2, q;}",
        "rrrr",
        lambda a, b, c: np.where((s(a) > s(c)) & ~(a < b), a, b),
    ),
    "setp_two": (
        "{.reg .pred p, q; setp.eq.or.s32 p|q, %1, %2, 0; selp.u32 %0, 1, 2, p; @q add.u32 %0, %0, 10;}",
        "rrr",
        lambda a, b: np.where(a == b, 1, 12),
    ),
    "setp_hs": ("{.reg .pred p; setp.hs.u32 p, %1, %2; selp.u32 %0, 1, 0, p;}", "rrr", lambda a, b: a >= b),
    "guard": (
        "{.reg .pred p; setp.ne.u32 p, %2, 0; mov.u32 %0, 7; @p mov.u32 %0, %1; @!p add.u32 %0, %0, 1;}",
        "rrr",
        lambda a, b: np.where(b != 0, a, 8),
    ),
    "set_f32": ("set.ge.f32.f32 %0, %1, %2;", "fff", lambda a, b: a >= b),
    "setp_nan": (
        "{.reg .pred p, q; setp.ltu.f32 p, %1, %2; setp.ne.f32 q, %1, %2; selp.u32 %0, 1, 0, p; @q add.u32 %0, %0, 2;}",
        "rff",
        lambda a, b: (~(a >= b)) + 2 * ((a < b) | (a > b)),
    ),
    "setp_ftz": (
        "{.reg .pred p; setp.eq.ftz.f32 p, %1, 0f00000000; selp.u32 %0, 1, 0, p;}",
        "rf",
        lambda a: ftz(a) == 0,
    ),
    "add_f32": ("add.f32 %0, %1, %2;", "fff", lambda a, b: a + b),
    "add_ftz": ("add.ftz.f32 %0, %1, %2;", "fff", lambda a, b: ftz(ftz(a) + ftz(b))),
    "add_rz": ("add.rz.f32 %0, %1, %2;", "fff", lambda a, b: toward_zero(a, b)),
    "mul_ftz": ("mul.ftz.f32 %0, %1, %2;", "fff", lambda a, b: ftz(ftz(a) * ftz(b))),
    "mul_sat": (
        "mul.sat.f32 %0, %1, %2;",
        "fff",
        lambda a, b: np.nan_to_num(np.clip(a * b, 0, 1), nan=0.0) + np.float32(0),
    ),
    "fma_f32": ("fma.rn.f32 %0, %1, %2, %3;", "ffff", fma32),
    "div_rn": ("div.rn.f32 %0, %1, %2;", "fff", lambda a, b: a / b),
    "sqrt_rn": ("sqrt.rn.f32 %0, %1;", "ff", np.sqrt),
    "min_f32": ("min.f32 %0, %1, %2;", "fff", lambda a, b: pick(a, b, np.minimum)),
    "max_f32": ("max.f32 %0, %1, %2;", "fff", lambda a, b: pick(a, b, np.maximum)),
    "max_nan": ("max.NaN.f32 %0, %1, %2;", "fff", np.maximum),
    "abs_f32": ("abs.f32 %0, %1;", "ff", np.abs),
    "neg_ftz": ("neg.ftz.f32 %0, %1;", "ff", lambda a: -ftz(a)),
    "copysign": ("copysign.f32 %0, %1, %2;", "fff", lambda a, b: np.copysign(b, a)),
    "fma_f64": ("fma.rn.f64 %0, %1, %1, 0d0000000000000000;", "dd", lambda a: a * a),
    "add_f64": ("add.f64 %0, %1, %2;", "ddd", lambda a, b: a + b),
    "cvt_s64_s32": ("cvt.s64.s32 %0, %1;", "lr", lambda a: s(a).astype(np.int64)),
    "cvt_u64_u32": ("cvt.u64.u32 %0, %1;", "lr", lambda a: a),
    "cvt_s32_s8": ("cvt.s32.s8 %0, %1;", "rr", lambda a: s((a & 255).astype(np.uint8)).astype(np.int32)),
    "cvt_s32_s16": ("cvt.s32.s16 %0, %1;", "rh", lambda a: s(a).astype(np.int32)),
    "cvt_sat_u8": ("cvt.sat.u8.s32 %0, %1;", "rr", lambda a: np.clip(s(a), 0, 255)),
    "cvt_rni_s8": ("cvt.rni.sat.s8.f32 %0, %1;", "rf", lambda a: saturating(a, np.int8, np.rint).astype(np.int32)),
    "cvt_rni_s8_f16": (
        "cvt.rni.sat.s8.f16 %0, %1;",
        "rh",
        lambda a: saturating(half(a), np.int8, np.rint).astype(np.int32),
    ),
    "cvt_f16_s8": ("cvt.rn.f16.s8 %0, %1;", "hr", lambda a: bits(s((a & 255).astype(np.uint8)).astype(np.float16))),
    "cvt_pack_s8": (
        "cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;",
        "rrrr",
        lambda a, b, c: saturated(a, -128, 127) << 8 | saturated(b, -128, 127) | wide(c) << 16,
    ),
    "cvt_pack_u8": (
        "cvt.pack.sat.u8.s32.b32 %0, %1, %2, %3;",
        "rrrr",
        lambda a, b, c: saturated(a, 0, 255) << 8 | saturated(b, 0, 255) | wide(c) << 16,
    ),
    "cvt_pack_s16": (
        "cvt.pack.sat.s16.s32 %0, %1, %2;",
        "rrr",
        lambda a, b: saturated(a, -32768, 32767) << 16 | saturated(b, -32768, 32767),
    ),
    "cvt_rzi": ("cvt.rzi.s32.f32 %0, %1;", "rf", lambda a: saturating(a, np.int32, np.trunc)),
    "cvt_rni_u32": ("cvt.rni.u32.f32 %0, %1;", "rf", lambda a: saturating(a, np.uint32, np.rint)),
    "cvt_rmi": ("cvt.rmi.f32.f32 %0, %1;", "ff", np.floor),
    "cvt_rpi_ftz": ("cvt.rpi.ftz.f32.f32 %0, %1;", "ff", lambda a: np.ceil(ftz(a))),
    "cvt_f32_s32": ("cvt.rn.f32.s32 %0, %1;", "fr", lambda a: s(a).astype(np.float32)),
    "cvt_f32_u64": ("cvt.rn.f32.u64 %0, %1;", "fl", lambda a: a.astype(np.float32)),
    "cvt_f64_f32": ("cvt.f64.f32 %0, %1;", "df", lambda a: a.astype(np.float64)),
    "cvt_f32_f64": ("cvt.rn.f32.f64 %0, %1;", "fd", lambda a: a.astype(np.float32)),
    "cvt_f16_f32": ("cvt.rn.f16.f32 %0, %1;", "hf", lambda a: bits(a.astype(np.float16))),
    "cvt_bf16_f32": ("cvt.rn.bf16.f32 %0, %1;", "hf", lambda a: bits(a.astype(bf16))),
    "cvt_f32_f16": ("cvt.f32.f16 %0, %1;", "fh", lambda a: half(a).astype(np.float32)),
    "cvt_f32_bf16": ("cvt.f32.bf16 %0, %1;", "fh", lambda a: half(a, bf16).astype(np.float32)),
    "cvt_bf16x2": (
        "cvt.rn.bf16x2.f32 %0, %1, %2;",
        "rff",
        lambda a, b: bits(a.astype(bf16)).astype(np.uint32) << 16 | bits(b.astype(bf16)),
    ),
    "cvt_f16x2": (
        "cvt.rn.f16x2.f32 %0, %1, %2;",
        "rff",
        lambda a, b: bits(a.astype(np.float16)).astype(np.uint32) << 16 | bits(b.astype(np.float16)),
    ),
    "cvt_rz_bf16": ("cvt.rz.bf16.f32 %0, %1;", "hf", lambda a: np.where(np.isnan(a), 0x7FFF, a.view(np.uint32) >> 16)),
    "cvt_rni_f16": ("cvt.rni.f16.f16 %0, %1;", "hh", lambda a: bits(np.rint(half(a)))),
    "cvt_f16_s32": ("cvt.rn.f16.s32 %0, %1;", "hr", lambda a: bits(s(a).astype(np.float64).astype(np.float16))),
    "cvt_s32_f16": ("cvt.rzi.s32.f16 %0, %1;", "rh", lambda a: saturating(half(a), np.int32, np.trunc)),
    "cvt_e4m3": (
        "{.reg .b16 t; cvt.rn.satfinite.e4m3x2.f32 t, %1, %2; cvt.u32.u16 %0, t;}",
        "rff",
        lambda a, b: fp8(a, ml_dtypes.float8_e4m3fn) << 8 | fp8(b, ml_dtypes.float8_e4m3fn),
    ),
    "cvt_e5m2": (
        "{.reg .b16 t; cvt.rn.satfinite.e5m2x2.f32 t, %1, %2; cvt.u32.u16 %0, t;}",
        "rff",
        lambda a, b: fp8(a, ml_dtypes.float8_e5m2) << 8 | fp8(b, ml_dtypes.float8_e5m2),
    ),
    "cvt_from_e4m3": (
        "{.reg .b16 t; cvt.u16.u32 t, %1; cvt.rn.f16x2.e4m3x2 %0, t;}",
        "rr",
        lambda a: from_fp8(a, ml_dtypes.float8_e4m3fn),
    ),
    "cvt_from_e5m2": (
        "{.reg .b16 t; cvt.u16.u32 t, %1; cvt.rn.f16x2.e5m2x2 %0, t;}",
        "rr",
        lambda a: from_fp8(a, ml_dtypes.float8_e5m2),
    ),
    "add_f16": ("add.f16 %0, %1, %2;", "hhh", lambda a, b: bits(half(a) + half(b))),
    "mul_f16x2": ("mul.f16x2 %0, %1, %2;", "rrr", lambda a, b: pairs(lambda x, y: x * y, np.float16, a, b)),
    "fma_f16": (
        "fma.rn.f16 %0, %1, %2, %3;",
        "hhhh",
        lambda a, b, c: bits((half(a).astype(np.float64) * half(b) + half(c)).astype(np.float16)),
    ),
    "max_bf16x2": (
        "max.bf16x2 %0, %1, %2;",
        "rrr",
        lambda a, b: pairs(lambda x, y: pick(x, y, np.maximum), bf16, a, b),
    ),
    "add_bf16x2": (
        "add.rn.bf16x2 %0, %1, %2;",
        "rrr",
        lambda a, b: pairs(lambda x, y: (x.astype(np.float32) + y.astype(np.float32)).astype(bf16), bf16, a, b),
    ),
    "neg_f16x2": ("neg.f16x2 %0, %1;", "rr", lambda a: a ^ 0x80008000),
    "mov_pack": ("{.reg .b16 x, y; mov.b32 {x, y}, %1; mov.b32 %0, {y, x};}", "rr", lambda a: a << 16 | a >> 16),
    "mov_pack64": (
        "{.reg .b32 x, y; mov.b64 {x, y}, %1; mov.b64 %0, {y, x};}",
        "ll",
        lambda a: a << np.uint64(32) | a >> np.uint64(32),
    ),
    "mov_pack4": (
        "{.reg .b16 a, b, c, d; mov.b64 {a, b, c, d}, %1; mov.b64 %0, {d, c, b, a};}",
        "ll",
        lambda a: a.view(np.uint16).reshape(-1, 4)[:, ::-1].copy().view(np.uint64)[:, 0],
    ),
    "sad": (
        "sad.s32 %0, %1, %2, %3;",
        "rrrr",
        lambda a, b, c: u([abs(int(x) - int(y)) + int(z) for x, y, z in zip(s(a), s(b), c)], 32),
    ),
    "testp": ("{.reg .pred p; testp.infinite.f32 p, %1; selp.u32 %0, 1, 0, p;}", "rf", np.isinf),
}

APPROXIMATE: dict[str, tuple[str, Callable[..., Any], float]] = {
    "ex2": ("ex2.approx.ftz.f32 %0, %1;", np.exp2, 3e-7),
    "lg2": ("lg2.approx.ftz.f32 %0, %1;", np.log2, 3e-7),
    "rcp": ("rcp.approx.ftz.f32 %0, %1;", lambda a: 1 / a, 2e-7),
    "rsqrt": ("rsqrt.approx.ftz.f32 %0, %1;", lambda a: 1 / np.sqrt(a), 3e-7),
    "sqrt": ("sqrt.approx.ftz.f32 %0, %1;", np.sqrt, 2e-7),
    "sin": ("sin.approx.ftz.f32 %0, %1;", np.sin, 3e-7),
    "tanh": ("tanh.approx.f32 %0, %1;", np.tanh, 3e-7),
}


def toward_zero(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        out = a + b
    for k, (x, y) in enumerate(zip(a, b)):
        if np.isfinite(x) and np.isfinite(y):
            exact = Fraction(float(x)) + Fraction(float(y))
            if np.isinf(out[k]) or abs(Fraction(float(out[k]))) > abs(exact):
                out[k] = np.nextafter(out[k], np.float32(0))
    return out


def fp8(a: np.ndarray, kind: Any) -> np.ndarray:
    top = np.float32(ml_dtypes.finfo(kind).max)
    out = np.clip(a, -top, top).astype(kind).view(np.uint8)
    return np.where(np.isnan(a), 0x7F, out).astype(np.uint32)


def from_fp8(a: np.ndarray, kind: Any) -> np.ndarray:
    parts = [bits((a >> k & 255).astype(np.uint8).view(kind).astype(np.float16)).astype(np.uint32) for k in (0, 8)]
    return parts[1] << 16 | parts[0]


def pairs(f: Callable[..., Any], kind: Any, *args: np.ndarray) -> np.ndarray:
    parts = [bits(f(*(half(a >> k, kind) for a in args))).astype(np.uint32) for k in (0, 16)]
    return parts[1] << 16 | parts[0]


def source_of(name: str, asm: str, letters: str) -> str:
    out, *ins = letters
    params = ", ".join([f"{TYPES[out][0]}* o", *(f"const {TYPES[k][0]}* i{n}" for n, k in enumerate(ins))])
    operands = ", ".join(f'"{TYPES[k][1]}"(i{n}[threadIdx.x])' for n, k in enumerate(ins))
    return f"""extern "C" __global__ void op_{name}({params}) {{
  {TYPES[out][0]} v;
  asm volatile("{asm}" : "={TYPES[out][1]}"(v) : {operands});
  o[threadIdx.x] = v;
}}
"""


@pytest.fixture(scope="module")
def module() -> SimModule:
    parts = [source_of(name, asm, letters) for name, (asm, letters, _) in CASES.items()]
    parts += [source_of(f"approximate_{name}", asm, "ff") for name, (asm, _, _) in APPROXIMATE.items()]
    return SimModule(PREFIX + "".join(parts), name="opcodes.cu")


@pytest.mark.parametrize("name", CASES)
def test_exact(module: SimModule, name: str) -> None:
    _, letters, reference = CASES[name]
    inputs = [values(k, n) for n, k in enumerate(letters[1:])]
    kind = TYPES[letters[0]][2]
    out = np.zeros(N, kind)
    run(module.get_function(f"op_{name}"), 1, N, (out, *inputs))
    with np.errstate(all="ignore"):
        expected = np.asarray(reference(*inputs))
    if letters[0] in "fd":
        np.testing.assert_array_equal(out, expected.astype(kind))
        number = ~np.isnan(out)
        np.testing.assert_array_equal(np.signbit(out[number]), np.signbit(expected.astype(kind)[number]))
    else:
        mask = (1 << 8 * np.dtype(kind).itemsize) - 1
        np.testing.assert_array_equal(out, np.array([int(v) & mask for v in expected], kind))


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximate(module: SimModule, name: str) -> None:
    _, reference, tolerance = APPROXIMATE[name]
    x = np.concatenate([np.random.default_rng(0).uniform(-3, 3, N - 32), np.linspace(-126, 127, 32)]).astype(np.float32)
    if name in ("lg2", "rsqrt", "sqrt"):
        x = np.abs(x)
    out = np.zeros(N, np.float32)
    run(module.get_function(f"op_approximate_{name}"), 1, N, (out, x))
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(out, reference(x.astype(np.float64)), rtol=tolerance, atol=1e-7)


def test_jitter_moves_approximate_results_only_a_little(module: SimModule) -> None:
    x = np.random.default_rng(0).uniform(-3, 3, N).astype(np.float32)
    plain, moved = np.zeros(N, np.float32), np.zeros(N, np.float32)
    run(module.get_function("op_approximate_ex2"), 1, N, (plain, x))
    run(module.get_function("op_approximate_ex2"), 1, N, (moved, x), seed=1, jitter=2)
    ulps = np.abs(plain.view(np.int32) - moved.view(np.int32))
    assert 0 < ulps.max() <= 2
