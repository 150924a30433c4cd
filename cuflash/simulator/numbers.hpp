// Number formats: bits of floats, flush to zero, half precision, 8-bit floats.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "runtime.hpp"

inline f32 as_f32(u32 v) {
    f32 r;
    memcpy(&r, &v, 4);
    return r;
}
inline u32 as_u32(f32 v) {
    u32 r;
    memcpy(&r, &v, 4);
    return r;
}
inline f64 as_f64(u64 v) {
    f64 r;
    memcpy(&r, &v, 8);
    return r;
}
inline u64 as_u64(f64 v) {
    u64 r;
    memcpy(&r, &v, 8);
    return r;
}

// Subnormal numbers become zeros of their sign; lim is 0x00800000 to flush, 0 to leave x alone.
inline f32 flush(f32 x, u32 lim) {
    u32 v = as_u32(x);
    return as_f32((v & 0x7fffffff) < lim ? v & 0x80000000 : v);
}

inline f32 fma_once(f32 a, f32 b, f32 c) { return __builtin_fmaf(a, b, c); }
inline f64 fma_once(f64 a, f64 b, f64 c) { return __builtin_fma(a, b, c); }

// a + b rounded to odd, so that a second rounding to fewer bits gives the correctly rounded sum.
inline f64 add_odd(f64 a, f64 b) {
    f64 s = a + b, bb = s - a, e = (a - (s - bb)) + (b - bb);
    if (e != 0 && std::isfinite(s) && !(as_u64(s) & 1)) s = as_f64((e > 0) == (s > 0) ? as_u64(s) + 1 : as_u64(s) - 1);
    return s;
}

// 2^x to about one ulp, in a form that the compiler can vectorise.
inline f32 exp2_fast(f32 x) {
    f32 y = x < -200.f ? -200.f : x > 200.f ? 200.f : x;
    f32 n = __builtin_floorf(y + 0.5f), f = (y - n) * 0.69314718056f;
    f32 p = 1.f / 5040;
    p = fma_once(p, f, 1.f / 720);
    p = fma_once(p, f, 1.f / 120);
    p = fma_once(p, f, 1.f / 24);
    p = fma_once(p, f, 1.f / 6);
    p = fma_once(p, f, 0.5f);
    p = fma_once(p, f, 1.f);
    p = fma_once(p, f, 1.f);
    s32 e = s32(n), half = e >> 1;
    f32 r = p * as_f32(u32(half + 127) << 23) * as_f32(u32(e - half + 127) << 23);
    return x != x ? x : r;
}

struct F16 {
    static constexpr u32 one = 0x3c00, digits = 11, nan = 0x7fff, inf = 0x7c00;
    static constexpr int lowest = -24, largest = 15;  // exponents of the least subnormal and of the greatest number
    static f32 widen(u16 h) {
        _Float16 v;
        memcpy(&v, &h, 2);
        return f32(v);
    }
    static u16 narrow(f32 x) {
        _Float16 v = _Float16(x);
        u16 h;
        memcpy(&h, &v, 2);
        return x != x ? u16(0x7fff) : h;
    }
};

struct Bf16 {
    static constexpr u32 one = 0x3f80, digits = 8, nan = 0x7fff, inf = 0x7f80;
    static constexpr int lowest = -133, largest = 127;
    static f32 widen(u16 h) { return as_f32(u32(h) << 16); }
    static u16 narrow(f32 x) {
        u32 v = as_u32(x);
        u32 r = (v + 0x7fff + ((v >> 16) & 1)) >> 16;
        return x != x ? u16(0x7fff) : u16(r);
    }
};

// Rounds a double to the 16-bit format H as the flags say (nearest even without a flag), and applies .relu, .sat and
// .ftz.
template <class H>
inline u32 finish(f64 x, u32 flags) {
    if (x != x) return flags & (RELU | SAT) ? (flags & SAT ? 0 : H::nan) : H::nan;
    if ((flags & RELU) && x < 0) x = 0;
    if (flags & SAT) x = x < 0 ? 0 : x > 1 ? 1 : x;
    u32 sign = std::signbit(x) ? 0x8000 : 0;
    f64 a = std::fabs(x);
    if (a == 0) return sign;
    bool up = (flags & RP && !sign) || (flags & RM && sign),
         down = (flags & RZ) || (flags & RP && sign) || (flags & RM && !sign);
    if (std::isinf(a)) return sign | H::inf;
    int e = std::ilogb(a);
    int step = std::max(e - int(H::digits) + 1, H::lowest);
    f64 q = std::ldexp(a, -step);
    q = up ? std::ceil(q) : down ? std::floor(q) : std::nearbyint(q);
    f64 r = std::ldexp(q, step);
    if (r >= std::ldexp(1.0, H::largest + 1)) return sign | (down ? H::inf - 1 : H::inf);
    if (r == 0) return sign;
    e = std::ilogb(r);
    int least = H::lowest + int(H::digits) - 1;  // exponent of the least normal number
    if (e < least) return flags & FTZ ? sign : sign | u32(std::ldexp(r, -H::lowest));
    u32 mantissa = u32(std::ldexp(r, int(H::digits) - 1 - e)) & ((1u << (H::digits - 1)) - 1);
    return sign | u32(e - least + 1) << (H::digits - 1) | mantissa;
}
template <class H>
inline f64 input(u32 bits, u32 flags) {
    f64 x = H::widen(u16(bits));
    if ((flags & FTZ) && (bits & H::inf) == 0) x = std::copysign(0.0, x);
    return x;
}

template <int EXP, int MAN, bool FN>
struct Fp8 {  // FN: no infinities, one NaN (e4m3)
    static f32 widen(u8 v) {
        struct Table {
            f32 at[256];
            Table() {
                constexpr int bias = (1 << (EXP - 1)) - 1;
                for (int k = 0; k < 256; k++) {
                    int e = (k >> MAN) & ((1 << EXP) - 1), man = k & ((1 << MAN) - 1);
                    f64 x = e ? std::ldexp(1 + f64(man) / (1 << MAN), e - bias)
                              : std::ldexp(f64(man) / (1 << MAN), 1 - bias);
                    if (FN ? (k & 127) == 127 : e == (1 << EXP) - 1) x = !FN && man == 0 ? HUGE_VAL : std::nan("");
                    at[k] = f32(k & 128 ? -x : x);
                }
            }
        };
        static const Table table;
        return table.at[v];
    }
    static u8 narrow(f32 x, bool relu) {  // to nearest even, saturating to the greatest finite number
        constexpr int bias = (1 << (EXP - 1)) - 1;
        constexpr u32 top = FN ? 126 : 0x7b;
        if (x != x) return 0x7f;
        if (relu && x < 0) x = 0;
        u32 sign = std::signbit(x) ? 128 : 0;
        f64 a = std::fabs(f64(x));
        if (a == 0) return u8(sign);
        if (std::isinf(a)) return u8(sign | top);
        int e = std::max(std::ilogb(a), 1 - bias);
        f64 q = std::nearbyint(std::ldexp(a, MAN - e));  // in units of the last place
        if (q >= (2 << MAN)) {
            q /= 2;
            e++;
        }
        u32 bits = q < (1 << MAN) ? u32(q) : u32(e + bias) << MAN | (u32(q) & ((1 << MAN) - 1));
        return u8(sign | std::min(bits, top));
    }
};
using E4m3 = Fp8<4, 3, true>;
using E5m2 = Fp8<5, 2, false>;
