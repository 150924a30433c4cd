// Arithmetic, logic, comparisons, conversions and matrix products: instructions that touch registers only.
#include <cfenv>
#include <cmath>
#include <type_traits>

#include "numbers.hpp"
#include "runtime.hpp"
#include "machine.hpp"

namespace {

template <class T>
using Slot = std::conditional_t<sizeof(T) == 8, u64, u32>;

template <class T>
inline T get(Slot<T> bits) {
    if constexpr (std::is_same_v<T, f32>) {
        return as_f32(bits);
    } else if constexpr (std::is_same_v<T, f64>) {
        return as_f64(bits);
    } else {
        return T(bits);
    }
}

template <class T>
inline Slot<T> put(T v) {
    if constexpr (std::is_same_v<T, f32>) {
        return as_u32(v);
    } else if constexpr (std::is_same_v<T, f64>) {
        return as_u64(v);
    } else if constexpr (sizeof(T) < 4) {
        return u32(s32(v));  // registers of 32 bits hold narrow values extended by their sign
    } else {
        return Slot<T>(v);
    }
}

// d = f(a), f(a, b), f(a, b, c) on lanes; D, A, B, C are the types of the operands.
template <class F, class D, class A>
void op1(Warp &w, const Ins &i, u32 m) {
    auto *d = w.reg<Slot<D>>(i.o[0]);
    const auto *a = w.reg<Slot<A>>(i.o[1]);
    LANES(m, d[l] = put<D>(D(F()(get<A>(a[l])))))
}
template <class F, class D, class A, class B>
void op2(Warp &w, const Ins &i, u32 m) {
    auto *d = w.reg<Slot<D>>(i.o[0]);
    const auto *a = w.reg<Slot<A>>(i.o[1]);
    const auto *b = w.reg<Slot<B>>(i.o[2]);
    LANES(m, d[l] = put<D>(D(F()(get<A>(a[l]), get<B>(b[l])))))
}
template <class F, class D, class A, class B, class C>
void op3(Warp &w, const Ins &i, u32 m) {
    auto *d = w.reg<Slot<D>>(i.o[0]);
    const auto *a = w.reg<Slot<A>>(i.o[1]);
    const auto *b = w.reg<Slot<B>>(i.o[2]);
    const auto *c = w.reg<Slot<C>>(i.o[3]);
    LANES(m, d[l] = put<D>(D(F()(get<A>(a[l]), get<B>(b[l]), get<C>(c[l])))))
}

#define FN1(name, expr)                     \
    struct name {                           \
        template <class T>                  \
        inline auto operator()(T a) const { \
            return expr;                    \
        }                                   \
    };
#define FN2(name, expr)                          \
    struct name {                                \
        template <class T, class S>              \
        inline auto operator()(T a, S b) const { \
            return expr;                         \
        }                                        \
    };
#define FN3(name, expr)                               \
    struct name {                                     \
        template <class T, class S, class U>          \
        inline auto operator()(T a, S b, U c) const { \
            return expr;                              \
        }                                             \
    };

FN2(Add, a + b)
FN2(Sub, a - b)
FN2(Mul, a *b)
FN3(Mad, a *b + c)
FN2(And, a &b)
FN2(Or, a | b)
FN2(Xor, a ^ b)
FN1(NotOf, ~a)
FN1(Neg, T(0) - a)
FN1(Same, a)
FN2(Min, a < b ? a : b)
FN2(Max, a > b ? a : b)
FN2(MinRelu, Max()(Min()(a, b), decltype(a)(0)))
FN2(MaxRelu, Max()(Max()(a, b), decltype(a)(0)))
FN2(Div, b == 0 ? T(-1) : (std::is_signed_v<T> && b == T(-1) ? T(T(0) - a) : T(a / b)))
FN2(Rem, b == 0 ? a : (std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b)))
FN1(Abs, a < 0 ? T(T(0) - a) : a)
FN2(Shl, b >= 8 * sizeof(T) ? T(0) : T(a << b))
FN2(Shr, b >= 8 * sizeof(T) ? (a < 0 ? T(-1) : T(0)) : T(a >> b))
FN1(CNot, a == 0 ? T(1) : T(0))
FN1(Popc, sizeof(T) == 8 ? __builtin_popcountll(u64(a)) : __builtin_popcount(u32(a)))
FN1(Clz, a == 0 ? int(8 * sizeof(T)) : sizeof(T) == 8 ? __builtin_clzll(u64(a)) : __builtin_clz(u32(a)))

// Products of twice the width.
template <class T>
struct Twice;
template <>
struct Twice<u16> {
    using type = u32;
};
template <>
struct Twice<s16> {
    using type = s32;
};
template <>
struct Twice<u32> {
    using type = u64;
};
template <>
struct Twice<s32> {
    using type = s64;
};
template <>
struct Twice<u64> {
    using type = unsigned __int128;
};
template <>
struct Twice<s64> {
    using type = __int128;
};
FN2(MulWide, typename Twice<T>::type(a) * typename Twice<T>::type(b))
FN2(MulHi, T((typename Twice<T>::type(a) * typename Twice<T>::type(b)) >> (8 * sizeof(T))))
FN3(MadWide, typename Twice<T>::type(a) * typename Twice<T>::type(b) + c)
FN3(MadHi, T((typename Twice<T>::type(a) * typename Twice<T>::type(b)) >> (8 * sizeof(T))) + c)
FN2(Mul24, (T(a << 8) >> 8) * (T(b << 8) >> 8))
FN3(Mad24, (T(a << 8) >> 8) * (T(b << 8) >> 8) + c)
FN3(Sad, (a < b ? b - a : a - b) + c)

struct MulLo16 {
    template <class T>
    u32 operator()(T a, T b) const {
        return u32(a) * u32(b);
    }
};

struct Brev {
    template <class T>
    T operator()(T a) const {
        T r = 0;
        for (unsigned k = 0; k < 8 * sizeof(T); k++) r |= ((a >> k) & 1) << (8 * sizeof(T) - 1 - k);
        return r;
    }
};
struct Bfind {  // most significant bit that is not the sign; b says whether the shift amount is wanted instead
    template <class T, class S>
    u32 operator()(T a, S shift) const {
        using U = std::make_unsigned_t<T>;
        U v = (std::is_signed_v<T> && a < 0) ? U(~a) : U(a);
        if (!v) return ~0u;
        u32 bit = 8 * sizeof(T) - 1 - (sizeof(T) == 8 ? __builtin_clzll(v) : __builtin_clz(u32(v)));
        return shift ? 8 * sizeof(T) - 1 - bit : bit;
    }
};
struct Bfe {
    template <class T>
    T operator()(T a, u32 b, u32 c) const {
        using U = std::make_unsigned_t<T>;
        constexpr u32 msb = 8 * sizeof(T) - 1;
        u32 pos = b & 255, len = c & 255;
        U sign = std::is_signed_v<T> && len ? (U(a) >> (pos + len - 1 < msb ? pos + len - 1 : msb)) & 1 : 0;
        U field = pos > msb ? 0 : U(a) >> pos;
        if (pos > msb && sign) field = ~U(0);
        u32 have = pos > msb ? 0 : msb + 1 - pos;
        if (len < have) have = len;
        U mask = have > msb ? ~U(0) : (U(1) << have) - 1;
        U r = field & mask;
        if (sign) r |= ~mask;
        return T(r);
    }
};
template <class T>
void bfi(Warp &w, const Ins &i, u32 m) {  // d = b with len bits of a put at pos
    auto *d = w.reg<Slot<T>>(i.o[0]);
    const auto *a = w.reg<Slot<T>>(i.o[1]), *b = w.reg<Slot<T>>(i.o[2]);
    const u32 *pos = w.reg<u32>(i.o[3]), *len = w.reg<u32>(i.o[4]);
    LANES(m, u32 p = pos[l] & 255; u32 n = len[l] & 255; T one = T(n >= 8 * sizeof(T) ? ~T(0) : (T(1) << n) - 1);
          T mask = p >= 8 * sizeof(T) ? T(0) : T(one << p); T v = p >= 8 * sizeof(T) ? T(0) : T(T(a[l]) << p);
          d[l] = (b[l] & ~mask) | (v & mask))
}
void prmt(Warp &w, const Ins &i, u32 m) {
    u32 *d = w.reg<u32>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]), *b = w.reg<u32>(i.o[2]), *c = w.reg<u32>(i.o[3]);
    u32 mode = i.a;
    LANES(
        m, u64 ab = u64(b[l]) << 32 | a[l]; u32 sel = c[l]; u32 r = 0; for (u32 k = 0; k < 4; k++) {
            u32 s;
            u32 n = sel & 3;
            switch (mode) {
                case 1: s = (n + k) & 7; break;            // f4e
                case 2: s = (n - k) & 7; break;            // b4e
                case 3: s = n; break;                      // rc8
                case 4: s = k < n ? n : k; break;          // ecl
                case 5: s = k > n ? n : k; break;          // ecr
                case 6: s = (n & 1) * 2 + (k & 1); break;  // rc16
                default: s = (sel >> (4 * k)) & 15;
            }
            u32 byte = u32(ab >> (8 * (s & 7))) & 255;
            if (s & 8) byte = byte & 128 ? 255 : 0;
            r |= byte << (8 * k);
        } d[l] = r)
}
void lop3(Warp &w, const Ins &i, u32 m) {
    u32 *d = w.reg<u32>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]), *b = w.reg<u32>(i.o[2]), *c = w.reg<u32>(i.o[3]);
    u32 t = i.a;
    LANES(m, u32 x = a[l]; u32 y = b[l]; u32 z = c[l]; u32 r = 0; if (t & 1) r |= ~x & ~y & ~z;
          if (t & 2) r |= ~x & ~y & z; if (t & 4) r |= ~x & y & ~z; if (t & 8) r |= ~x & y & z;
          if (t & 16) r |= x & ~y & ~z; if (t & 32) r |= x & ~y & z; if (t & 64) r |= x & y & ~z;
          if (t & 128) r |= x & y & z; d[l] = r)
}
struct ShfL {
    u32 operator()(u32 a, u32 b, u32 c) const { return u32(((u64(b) << 32 | a) << c) >> 32); }
};
struct ShfR {
    u32 operator()(u32 a, u32 b, u32 c) const { return u32((u64(b) << 32 | a) >> c); }
};
FN3(ShfLWrap, ShfL()(a, b, c & 31))
FN3(ShfRWrap, ShfR()(a, b, c & 31))
FN3(ShfLClamp, ShfL()(a, b, c > 32 ? 32 : c))
FN3(ShfRClamp, ShfR()(a, b, c > 32 ? 32 : c))

template <class X, class Y>
struct Dp4 {
    u32 operator()(u32 a, u32 b, u32 c) const {
        u32 r = c;
        for (int k = 0; k < 4; k++) r += u32(s32(X(a >> 8 * k)) * s32(Y(b >> 8 * k)));
        return r;
    }
};

// Carry chains keep the carry in a predicate of the warp's own.
template <bool SUB>
void carry(Warp &w, const Ins &i, u32 m) {
    u32 *d = w.reg<u32>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]), *b = w.reg<u32>(i.o[2]);
    u32 &cc = w.pred(i.o[3]);
    u32 in = i.a ? cc : 0, out = 0;
    LANES(m, u32 c = (in >> l) & 1; u64 r = SUB ? u64(a[l]) - b[l] - c : u64(a[l]) + b[l] + c; d[l] = u32(r);
          out |= u32((r >> 32) & 1) << l)
    if (i.b) cc = (cc & ~m) | (out & m);
}
void mad_carry(Warp &w, const Ins &i, u32 m) {  // a: takes the carry, b: leaves one, c: high half, d: signed
    u32 *d = w.reg<u32>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]), *b = w.reg<u32>(i.o[2]), *c = w.reg<u32>(i.o[4]);
    u32 &cc = w.pred(i.o[3]);
    u32 in = i.a ? cc : 0, out = 0;
    LANES(m, u64 p = i.d ? u64(s64(s32(a[l])) * s32(b[l])) : u64(a[l]) * b[l];
          u64 r = (i.c ? p >> 32 : p & FULL) + c[l] + ((in >> l) & 1); d[l] = u32(r); out |= u32((r >> 32) & 1) << l)
    if (i.b) cc = (cc & ~m) | (out & m);
}

// -- single and double precision

inline f32 saturate(f32 x) { return x > 0 ? (x < 1 ? x : 1) : 0; }  // NaN becomes 0

struct Rounding {  // for .rz .rm .rp: the host rounds that way while this lives
    int old = 0;
    bool on;
    explicit Rounding(u32 flags) : on(flags & (RZ | RM | RP)) {
        if (on) {
            old = fegetround();
            fesetround(flags & RZ ? FE_TOWARDZERO : flags & RM ? FE_DOWNWARD : FE_UPWARD);
            asm volatile("" ::: "memory");
        }
    }
    ~Rounding() {
        if (on) {
            asm volatile("" ::: "memory");
            fesetround(old);
        }
    }
};

inline u32 out32(f32 r, u32 lim, bool sat) {
    r = flush(r, lim);
    if (sat) r = saturate(r);
    return as_u32(r != r ? as_f32(0x7fffffff) : r);
}
template <class F>
void f1(Warp &w, const Ins &i, u32 m) {
    Rounding rounding(i.flags);
    u32 lim = i.flags & FTZ ? 0x00800000 : 0;
    bool sat = i.flags & SAT;
    u32 *d = w.reg<u32>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]);
    LANES(m, d[l] = out32(F()(flush(as_f32(a[l]), lim)), lim, sat))
}
template <class F>
void f2(Warp &w, const Ins &i, u32 m) {
    Rounding rounding(i.flags);
    u32 lim = i.flags & FTZ ? 0x00800000 : 0;
    bool sat = i.flags & SAT;
    u32 *d = w.reg<u32>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]), *b = w.reg<u32>(i.o[2]);
    LANES(m, d[l] = out32(F()(flush(as_f32(a[l]), lim), flush(as_f32(b[l]), lim)), lim, sat))
}
template <class F>
void f3(Warp &w, const Ins &i, u32 m) {
    Rounding rounding(i.flags);
    u32 lim = i.flags & FTZ ? 0x00800000 : 0;
    bool sat = i.flags & SAT;
    u32 *d = w.reg<u32>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]), *b = w.reg<u32>(i.o[2]), *c = w.reg<u32>(i.o[3]);
    LANES(m, d[l] = out32(F()(flush(as_f32(a[l]), lim), flush(as_f32(b[l]), lim), flush(as_f32(c[l]), lim)), lim, sat))
}
FN3(Fma, fma_once(a, b, c))
FN2(FDiv, a / b)
FN1(Sqrt, std::sqrt(a))
FN1(Rcp, T(1) / a)
FN1(Rsqrt, T(1) / std::sqrt(a))
FN1(FNeg, -a)
FN1(FAbs, std::fabs(a))
// A NaN operand loses; -0 is less than +0.
FN2(FMin, a != a ? b : (b != b ? a : (a == b ? (std::signbit(a) ? a : b) : (a < b ? a : b))))
FN2(FMax, a != a ? b : (b != b ? a : (a == b ? (std::signbit(a) ? b : a) : (a > b ? a : b))))
FN2(FMinNan, a != a ? a : (b != b ? b : FMin()(a, b)))
FN2(FMaxNan, a != a ? a : (b != b ? b : FMax()(a, b)))
FN3(FMin3, FMin()(FMin()(a, b), c))
FN3(FMax3, FMax()(FMax()(a, b), c))
FN2(CopySign, std::copysign(b, a))
FN1(Lg2, std::log2(a))
FN1(Sin, std::sin(a))
FN1(Cos, std::cos(a))
FN1(Tanh, std::tanh(a))
struct Ex2 {
    inline f32 operator()(f32 x) const { return exp2_fast(x); }
};

// Approximate functions: the host's, some ulp off if the launch asks for jitter.
template <class F>
void approx1(Warp &w, const Ins &i, u32 m) {
    f1<F>(w, i, m);
    if (u32 ulps = w.launch->jitter) jitter(w, w.reg<u32>(i.o[0]), m, ulps);
}
template <class F>
void approx2(Warp &w, const Ins &i, u32 m) {
    f2<F>(w, i, m);
    if (u32 ulps = w.launch->jitter) jitter(w, w.reg<u32>(i.o[0]), m, ulps);
}
template <class F, class D, class A>
void r1(Warp &w, const Ins &i, u32 m) {
    Rounding r(i.flags);
    op1<F, D, A>(w, i, m);
}
template <class F, class D>
void r2(Warp &w, const Ins &i, u32 m) {
    Rounding r(i.flags);
    op2<F, D, D, D>(w, i, m);
}
template <class F, class D>
void r3(Warp &w, const Ins &i, u32 m) {
    Rounding r(i.flags);
    op3<F, D, D, D, D>(w, i, m);
}

// -- half precision: computed in double, rounded once

template <class H>
struct Pair {};
template <class H, class F>
inline u32 half1(u32 a, u32 flags, F f) {
    return finish<H>(f(H::wide(u16(a))), flags);
}
template <class H, class F>
void h1(Warp &w, const Ins &i, u32 m) {
    u32 *d = w.reg<u32>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]);
    LANES(m, u32 r = finish<H>(F()(input<H>(a[l], i.flags)), i.flags);
          if (i.a) r |= finish<H>(F()(input<H>(a[l] >> 16, i.flags)), i.flags) << 16; d[l] = r)
}
template <class H, class F>
void h2(Warp &w, const Ins &i, u32 m) {
    u32 *d = w.reg<u32>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]), *b = w.reg<u32>(i.o[2]);
    u32 f = i.flags;
    LANES(m, u32 r = finish<H>(F()(input<H>(a[l], f), input<H>(b[l], f)), f);
          if (i.a) r |= finish<H>(F()(input<H>(a[l] >> 16, f), input<H>(b[l] >> 16, f)), f) << 16; d[l] = r)
}
struct HalfFma {
    f64 operator()(f64 a, f64 b, f64 c) const { return add_odd(a * b, c); }
};
template <class H, class F>
void h3(Warp &w, const Ins &i, u32 m) {
    u32 *d = w.reg<u32>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]), *b = w.reg<u32>(i.o[2]), *c = w.reg<u32>(i.o[3]);
    u32 f = i.flags;
    LANES(m, u32 r = finish<H>(F()(input<H>(a[l], f), input<H>(b[l], f), input<H>(c[l], f)), f);
          if (i.a) r |= finish<H>(F()(input<H>(a[l] >> 16, f), input<H>(b[l] >> 16, f), input<H>(c[l] >> 16, f)), f)
                        << 16;
          d[l] = r)
}
struct HEx2 {
    f64 operator()(f64 a) const { return std::exp2(a); }
};
template <u32 XOR, u32 AND>
void hbits(Warp &w, const Ins &i, u32 m) {
    u32 *d = w.reg<u32>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]);
    u32 keep = i.a ? FULL : 0xffff;
    LANES(m, d[l] = ((a[l] ^ XOR) & AND) & keep)
}

// -- comparisons

enum Cmp : u8 { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NANP };

template <class T>
inline bool compare(u8 cmp, T a, T b) {
    bool nan = a != a || b != b;
    switch (cmp) {
        case EQ: return a == b;
        case NE: return a != b && !nan;
        case LT: return a < b;
        case LE: return a <= b;
        case GT: return a > b;
        case GE: return a >= b;
        case EQU: return a == b || nan;
        case NEU: return a != b;
        case LTU: return a < b || nan;
        case LEU: return a <= b || nan;
        case GTU: return a > b || nan;
        case GEU: return a >= b || nan;
        case NUM: return !nan;
        default: return nan;
    }
}
template <class T, class F>
inline u32 mask_of(const Slot<T> *a, const Slot<T> *b, u32 m, F f) {
    alignas(64) u8 bits[32];
    if (m == FULL) {
        _Pragma("GCC ivdep") for (u32 l = 0; l < 32; l++) bits[l] = f(get<T>(a[l]), get<T>(b[l]));
    } else {
        memset(bits, 0, 32);
        for (u32 t = m; t; t &= t - 1) {
            u32 l = first(t);
            bits[l] = f(get<T>(a[l]), get<T>(b[l]));
        }
    }
    u32 r = 0;
    for (u32 k = 0; k < 4; k++) {
        u64 eight;
        memcpy(&eight, bits + 8 * k, 8);
        r |= u32((eight * 0x0102040810204080ull) >> 56) << (8 * k);  // gathers the eight low bits
    }
    return r;
}
template <class T, bool FLUSH = false>
u32 compare_mask(Warp &w, const Ins &i, u32 m, u16 oa, u16 ob) {
    const auto *a = w.reg<Slot<T>>(oa), *b = w.reg<Slot<T>>(ob);
    u32 lim = i.flags & FTZ ? 0x00800000 : 0;
    auto in = [lim](T x) {
        if constexpr (FLUSH) return flush(x, lim);
        else return x;
    };
    switch (i.a) {
        case EQ: return mask_of<T>(a, b, m, [&](T x, T y) { return in(x) == in(y); });
        case NE:
            if constexpr (!std::is_floating_point_v<T>) return mask_of<T>(a, b, m, [&](T x, T y) { return x != y; });
            break;
        case LT: return mask_of<T>(a, b, m, [&](T x, T y) { return in(x) < in(y); });
        case LE: return mask_of<T>(a, b, m, [&](T x, T y) { return in(x) <= in(y); });
        case GT: return mask_of<T>(a, b, m, [&](T x, T y) { return in(x) > in(y); });
        case GE: return mask_of<T>(a, b, m, [&](T x, T y) { return in(x) >= in(y); });
        case NEU: return mask_of<T>(a, b, m, [&](T x, T y) { return in(x) != in(y); });
        default: break;
    }
    u8 cmp = i.a;
    return mask_of<T>(a, b, m, [&](T x, T y) { return compare(cmp, in(x), in(y)); });
}
template <class H>
u32 compare_half(Warp &w, const Ins &i, u32 m, u16 oa, u16 ob, u32 shift) {
    const u32 *a = w.reg<u32>(oa), *b = w.reg<u32>(ob);
    u32 r = 0;
    LANES(m, r |= u32(compare(i.a, input<H>(a[l] >> shift, i.flags), input<H>(b[l] >> shift, i.flags))) << l)
    return r;
}
inline u32 combine(Warp &w, const Ins &i, u32 r) {
    if (i.b) {  // .and .or .xor with a predicate
        u32 c = w.pred(i.o[4]);
        if (i.flags & NOT_C) c = ~c;
        r = i.b == 1 ? r & c : i.b == 2 ? r | c : r ^ c;
    }
    return r;
}
inline void set_pred(Warp &w, const Ins &i, u32 m, u32 r) {
    u32 p = combine(w, i, r), q = combine(w, i, ~r);
    if (i.o[0] != NONE) w.pred(i.o[0]) = (w.pred(i.o[0]) & ~m) | (p & m);
    if (i.o[1] != NONE) w.pred(i.o[1]) = (w.pred(i.o[1]) & ~m) | (q & m);
}
template <class T>
void setp(Warp &w, const Ins &i, u32 m) {
    set_pred(w, i, m, compare_mask<T, std::is_same_v<T, f32>>(w, i, m, i.o[2], i.o[3]));
}
template <class H>
void setp_half(Warp &w, const Ins &i, u32 m) {
    set_pred(w, i, m, compare_half<H>(w, i, m, i.o[2], i.o[3], 0));
}
template <class H>
void setp_half2(Warp &w, const Ins &i, u32 m) {  // p from the low halves, q from the high ones
    u32 lo = combine(w, i, compare_half<H>(w, i, m, i.o[2], i.o[3], 0)),
        hi = combine(w, i, compare_half<H>(w, i, m, i.o[2], i.o[3], 16));
    if (i.o[0] != NONE) w.pred(i.o[0]) = (w.pred(i.o[0]) & ~m) | (lo & m);
    if (i.o[1] != NONE) w.pred(i.o[1]) = (w.pred(i.o[1]) & ~m) | (hi & m);
}
inline void set_value(Warp &w, const Ins &i, u32 m, u32 p) {
    u32 *d = w.reg<u32>(i.o[0]);
    u32 yes = i.c ? 0x3f800000 : FULL;
    p = combine(w, i, p);
    LANES(m, d[l] = (p >> l) & 1 ? yes : 0)
}
template <class T>
void set(Warp &w, const Ins &i, u32 m) {
    set_value(w, i, m, compare_mask<T, std::is_same_v<T, f32>>(w, i, m, i.o[2], i.o[3]));
}
template <class H>
void set_half2(Warp &w, const Ins &i, u32 m) {  // 1.0 or all ones in each half
    u32 lo = combine(w, i, compare_half<H>(w, i, m, i.o[2], i.o[3], 0)),
        hi = i.d ? combine(w, i, compare_half<H>(w, i, m, i.o[2], i.o[3], 16)) : 0;
    u32 *d = w.reg<u32>(i.o[0]);
    u32 yes = i.c ? H::one : 0xffff;
    LANES(m, d[l] = ((lo >> l) & 1 ? yes : 0) | ((hi >> l) & 1 ? yes << 16 : 0))
}
template <class S>
void selp(Warp &w, const Ins &i, u32 m) {
    S *d = w.reg<S>(i.o[0]);
    const S *a = w.reg<S>(i.o[1]), *b = w.reg<S>(i.o[2]);
    u32 p = w.pred(i.o[3]);
    LANES(m, d[l] = (p >> l) & 1 ? a[l] : b[l])
}
template <class S>
void slct(Warp &w, const Ins &i, u32 m) {
    S *d = w.reg<S>(i.o[0]);
    const S *a = w.reg<S>(i.o[1]), *b = w.reg<S>(i.o[2]);
    const u32 *c = w.reg<u32>(i.o[3]);
    if (i.a) {
        u32 lim = i.flags & FTZ ? 0x00800000 : 0;
        LANES(m, d[l] = flush(as_f32(c[l]), lim) >= 0 ? a[l] : b[l])
    } else {
        LANES(m, d[l] = s32(c[l]) >= 0 ? a[l] : b[l])
    }
}
void testp(Warp &w, const Ins &i, u32 m) {
    u32 r = 0;
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t);
        f64 x = i.b ? get<f64>(w.reg<u64>(i.o[1])[l]) : f64(as_f32(w.reg<u32>(i.o[1])[l]));
        bool sub = i.b ? (x != 0 && std::fabs(x) < 2.2250738585072014e-308)
                       : (x != 0 && std::fabs(x) < 1.1754943508222875e-38);
        bool yes = i.a == 0   ? std::isfinite(x)
                   : i.a == 1 ? std::isinf(x)
                   : i.a == 2 ? x == x
                   : i.a == 3 ? x != x
                   : i.a == 4 ? std::isfinite(x) && x != 0 && !sub
                              : sub;
        r |= u32(yes) << l;
    }
    w.pred(i.o[0]) = (w.pred(i.o[0]) & ~m) | (r & m);
}
template <int F>
void pred2(Warp &w, const Ins &i, u32 m) {
    u32 a = w.pred(i.o[1]), b = w.pred(i.o[2]);
    u32 r = F == 0 ? a & b : F == 1 ? a | b : a ^ b;
    u32 &d = w.pred(i.o[0]);
    d = (d & ~m) | (r & m);
}
void pred_not(Warp &w, const Ins &i, u32 m) {
    u32 &d = w.pred(i.o[0]);
    d = (d & ~m) | (~w.pred(i.o[1]) & m);
}
void pred_mov(Warp &w, const Ins &i, u32 m) {
    u32 &d = w.pred(i.o[0]);
    d = (d & ~m) | (w.pred(i.o[1]) & m);
}

// -- moves

void pack32x2(Warp &w, const Ins &i, u32 m) {
    u64 *d = w.reg<u64>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]), *b = w.reg<u32>(i.o[2]);
    LANES(m, d[l] = u64(b[l]) << 32 | a[l])
}
void unpack32x2(Warp &w, const Ins &i, u32 m) {
    const u64 *s = w.reg<u64>(i.o[2]);
    if (i.o[0] != NONE) {
        u32 *d = w.reg<u32>(i.o[0]);
        LANES(m, d[l] = u32(s[l]))
    }
    if (i.o[1] != NONE) {
        u32 *d = w.reg<u32>(i.o[1]);
        LANES(m, d[l] = u32(s[l] >> 32))
    }
}
void pack16x2(Warp &w, const Ins &i, u32 m) {
    u32 *d = w.reg<u32>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]), *b = w.reg<u32>(i.o[2]);
    LANES(m, d[l] = b[l] << 16 | (a[l] & 0xffff))
}
void unpack16x2(Warp &w, const Ins &i, u32 m) {
    const u32 *s = w.reg<u32>(i.o[2]);
    if (i.o[1] == i.o[2]) {  // the high half goes where the source is: the low half first
        if (i.o[0] != NONE) {
            u32 *d = w.reg<u32>(i.o[0]);
            LANES(m, d[l] = s[l] & 0xffff)
        }
        u32 *d = w.reg<u32>(i.o[1]);
        LANES(m, d[l] = s[l] >> 16)
        return;
    }
    if (i.o[1] != NONE) {
        u32 *d = w.reg<u32>(i.o[1]);
        LANES(m, d[l] = s[l] >> 16)
    }
    if (i.o[0] != NONE) {
        u32 *d = w.reg<u32>(i.o[0]);
        LANES(m, d[l] = s[l] & 0xffff)
    }
}
void pack_any(Warp &w, const Ins &i, u32 m) {  // a: parts, b: bits of a part, c: bytes of the result
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t);
        u64 v = 0;
        for (u32 k = 0; k < i.a; k++) v |= (u64(w.reg<u32>(i.o[1 + k])[l]) & ((1ull << i.b) - 1)) << (i.b * k);
        if (i.c == 8) w.reg<u64>(i.o[0])[l] = v;
        else w.reg<u32>(i.o[0])[l] = u32(v);
    }
}
void unpack_any(Warp &w, const Ins &i, u32 m) {
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t);
        u64 v = i.c == 8 ? w.reg<u64>(i.o[0])[l] : w.reg<u32>(i.o[0])[l];
        for (u32 k = 0; k < i.a; k++)
            if (i.o[1 + k] != NONE) w.reg<u32>(i.o[1 + k])[l] = u32((v >> (i.b * k)) & ((1ull << i.b) - 1));
    }
}
void address(Warp &w, const Ins &i, u32 m) {  // cvta: d = a + base
    u64 *d = w.reg<u64>(i.o[0]);
    const u64 *a = w.reg<u64>(i.o[1]);
    u64 base = u64(i.imm);
    LANES(m, d[l] = a[l] + base)
}
void to_shared(Warp &w, const Ins &i,
               u32 m) {  // cvta.to.shared of a generic address; peers of a cluster keep their rank
    u64 *d = w.reg<u64>(i.o[0]);
    const u64 *a = w.reg<u64>(i.o[1]);
    LANES(m, d[l] = a[l] & ~SPACE_MASK)
}
void isspace(Warp &w, const Ins &i, u32 m) {
    const u64 *a = w.reg<u64>(i.o[1]);
    u32 r = 0;
    LANES(m, u64 top = a[l] & SPACE_MASK; bool own = (a[l] & ~SPACE_MASK) >> RANK_SHIFT == 0;
          bool yes = i.a == GLOBAL   ? top == 0
                     : i.a == SHARED ? top == SHARED_BASE && (own || i.b)
                     : i.a == LOCAL  ? top == LOCAL_BASE
                                     : top == PARAM_BASE;
          r |= u32(yes) << l)
    w.pred(i.o[0]) = (w.pred(i.o[0]) & ~m) | (r & m);
}

// -- conversions

template <class D, class A>
void cvt_int(Warp &w, const Ins &i, u32 m) {
    op1<Same, D, A>(w, i, m);
}
template <class D, class A>
void cvt_sat(Warp &w, const Ins &i, u32 m) {
    auto *d = w.reg<Slot<D>>(i.o[0]);
    const auto *a = w.reg<Slot<A>>(i.o[1]);
    constexpr __int128 lo = std::numeric_limits<D>::min(), hi = std::numeric_limits<D>::max();
    LANES(m, __int128 v = get<A>(a[l]); d[l] = put<D>(D(v < lo ? lo : v > hi ? hi : v)))
}
template <class D>
void cvt_pack(Warp &w, const Ins &i, u32 m) {  // d = {sat(b), sat(a)} from the low end, c above them
    constexpr u32 size = 8 * sizeof(D);
    constexpr s64 lo = std::numeric_limits<D>::min(), hi = std::numeric_limits<D>::max();
    constexpr u32 mask = (1u << size) - 1;
    u32 *d = w.reg<u32>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]), *b = w.reg<u32>(i.o[2]), *c = size < 16 ? w.reg<u32>(i.o[3]) : nullptr;
    auto sat = [&](u32 v) {
        s64 x = i.a ? s64(s32(v)) : s64(v);  // i.a: the sources are signed
        return u32(x < lo ? lo : x > hi ? hi : x) & mask;
    };
    LANES(m, u32 r = sat(a[l]) << size | sat(b[l]); if (c) r |= c[l] << (2 * size % 32); d[l] = r)
}
template <class F>
inline F integral(F x, u32 mode) {
    return mode == 0 ? std::nearbyint(x) : mode == 1 ? std::trunc(x) : mode == 2 ? std::floor(x) : std::ceil(x);
}
template <class D, class A>
void cvt_f2i(Warp &w, const Ins &i, u32 m) {  // i.a: rni rzi rmi rpi
    auto *d = w.reg<Slot<D>>(i.o[0]);
    const auto *a = w.reg<Slot<A>>(i.o[1]);
    u32 lim = i.flags & FTZ ? 0x00800000 : 0;
    constexpr A lo = A(std::numeric_limits<D>::min()), hi = A(std::numeric_limits<D>::max());
    LANES(m, A x = get<A>(a[l]); if constexpr (sizeof(A) == 4) x = flush(x, lim); x = integral(x, i.a);
          d[l] = put<D>(x != x    ? (sizeof(D) == 8 ? D(1ull << 63) : D(0))
                        : x <= lo ? std::numeric_limits<D>::min()
                        : x >= hi ? std::numeric_limits<D>::max()
                                  : D(x)))
}
template <class D, class A>
void cvt_i2f(Warp &w, const Ins &i, u32 m) {
    Rounding r(i.flags);
    op1<Same, D, A>(w, i, m);
}
void cvt_f32_f32(Warp &w, const Ins &i, u32 m) {
    u32 lim = i.flags & FTZ ? 0x00800000 : 0;
    u32 *d = w.reg<u32>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]);
    u32 mode = i.a;
    LANES(m, f32 x = flush(as_f32(a[l]), lim); if (mode != 9) x = integral(x, mode);
          d[l] = out32(x, lim, i.flags & SAT))
}
void cvt_f64_f64(Warp &w, const Ins &i, u32 m) {
    u64 *d = w.reg<u64>(i.o[0]);
    const u64 *a = w.reg<u64>(i.o[1]);
    u32 mode = i.a;
    LANES(m, f64 x = as_f64(a[l]); if (mode != 9) x = integral(x, mode); d[l] = as_u64(x))
}
void cvt_f64_f32(Warp &w, const Ins &i, u32 m) {
    u32 lim = i.flags & FTZ ? 0x00800000 : 0;
    u64 *d = w.reg<u64>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]);
    LANES(m, d[l] = as_u64(f64(flush(as_f32(a[l]), lim))))
}
void cvt_f32_f64(Warp &w, const Ins &i, u32 m) {
    Rounding r(i.flags);
    u32 lim = i.flags & FTZ ? 0x00800000 : 0;
    u32 *d = w.reg<u32>(i.o[0]);
    const u64 *a = w.reg<u64>(i.o[1]);
    LANES(m, d[l] = out32(f32(as_f64(a[l])), lim, i.flags & SAT))
}
template <class H>
void cvt_f32_half(Warp &w, const Ins &i, u32 m) {
    u32 *d = w.reg<u32>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]);
    u32 lim = i.flags & FTZ ? 0x00800000 : 0;
    LANES(m, d[l] = out32(H::widen(u16(a[l])), lim, i.flags & SAT))
}
template <class H>
void cvt_f64_half(Warp &w, const Ins &i, u32 m) {
    u64 *d = w.reg<u64>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]);
    LANES(m, d[l] = as_u64(f64(H::widen(u16(a[l])))))
}
template <class H>
void cvt_half_f32(Warp &w, const Ins &i, u32 m) {
    u32 *d = w.reg<u32>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]);
    u32 f = i.flags;
    if (!(f & (RZ | RM | RP | RELU | SAT))) {
        LANES(m, d[l] = H::narrow(as_f32(a[l])))
    } else {
        LANES(m, d[l] = finish<H>(as_f32(a[l]), f))
    }
}
template <class H>
void cvt_half2_f32(Warp &w, const Ins &i, u32 m) {  // the first source becomes the high half
    u32 *d = w.reg<u32>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]), *b = w.reg<u32>(i.o[2]);
    u32 f = i.flags;
    if (!(f & (RZ | RM | RP | RELU | SAT))) {
        LANES(m, d[l] = u32(H::narrow(as_f32(a[l]))) << 16 | H::narrow(as_f32(b[l])))
    } else {
        LANES(m, d[l] = finish<H>(as_f32(a[l]), f) << 16 | finish<H>(as_f32(b[l]), f))
    }
}
template <class H>
void cvt_half_f64(Warp &w, const Ins &i, u32 m) {
    u32 *d = w.reg<u32>(i.o[0]);
    const u64 *a = w.reg<u64>(i.o[1]);
    LANES(m, d[l] = finish<H>(as_f64(a[l]), i.flags))
}
template <class H, class G>
void cvt_half_half(Warp &w, const Ins &i, u32 m) {  // i.a: rounding to an integral value, 9 for none
    u32 *d = w.reg<u32>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]);
    LANES(m, f64 x = G::widen(u16(a[l])); if (i.a != 9) x = integral(x, i.a); d[l] = finish<H>(x, i.flags))
}
template <class H, class T>
void cvt_half_int(Warp &w, const Ins &i, u32 m) {
    u32 *d = w.reg<u32>(i.o[0]);
    const auto *a = w.reg<Slot<T>>(i.o[1]);
    LANES(m, d[l] = finish<H>(f64(get<T>(a[l])), i.flags))
}
template <class T, class H>
void cvt_int_half(Warp &w, const Ins &i, u32 m) {
    auto *d = w.reg<Slot<T>>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]);
    LANES(m, f64 x = integral(f64(H::widen(u16(a[l]))), i.a); f64 lo = f64(std::numeric_limits<T>::min());
          f64 hi = f64(std::numeric_limits<T>::max()); d[l] = put<T>(x != x    ? T(0)
                                                                     : x <= lo ? std::numeric_limits<T>::min()
                                                                     : x >= hi ? std::numeric_limits<T>::max()
                                                                               : T(x)))
}
template <class E>
void cvt_fp8x2_f32(Warp &w, const Ins &i, u32 m) {
    u32 *d = w.reg<u32>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]), *b = w.reg<u32>(i.o[2]);
    LANES(m, d[l] = u32(E::narrow(as_f32(a[l]), i.flags & RELU)) << 8 | E::narrow(as_f32(b[l]), i.flags & RELU))
}
template <class E>
void cvt_fp8x2_f16x2(Warp &w, const Ins &i, u32 m) {
    u32 *d = w.reg<u32>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]);
    LANES(m, d[l] = u32(E::narrow(F16::widen(u16(a[l] >> 16)), i.flags & RELU)) << 8 |
                    E::narrow(F16::widen(u16(a[l])), i.flags & RELU))
}
template <class E>
void cvt_f16x2_fp8x2(Warp &w, const Ins &i, u32 m) {
    u32 *d = w.reg<u32>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]);
    LANES(m, d[l] = finish<F16>(E::widen(u8(a[l] >> 8)), i.flags) << 16 | finish<F16>(E::widen(u8(a[l])), i.flags))
}
void cvt_tf32(Warp &w, const Ins &i, u32 m) {  // i.a: 0 round to nearest away, 1 to nearest even, 2 to zero
    u32 *d = w.reg<u32>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]);
    LANES(m, u32 v = a[l]; bool special = (v & 0x7f800000) == 0x7f800000; u32 add = i.a == 0   ? 0x1000
                                                                                    : i.a == 1 ? 0xfff + ((v >> 13) & 1)
                                                                                               : 0;
          d[l] = special ? v : (v + add) & 0xffffe000)
}

// -- shuffles, votes and matrices

void shfl(Warp &w, const Ins &i, u32 m) {  // i.a: up down bfly idx
    u32 *d = i.o[0] == NONE ? nullptr : w.reg<u32>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[2]), *b = w.reg<u32>(i.o[3]), *c = w.reg<u32>(i.o[4]);
    u32 src[32], ok = 0;
    memcpy(src, a, sizeof src);
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t), lane = b[l] & 31, clamp = c[l] & 31, seg = (c[l] >> 8) & 31;
        u32 most = (l & seg) | (clamp & ~seg), least = l & seg;
        u32 j;
        bool in;
        switch (i.a) {
            case 0:
                j = l - lane;
                in = s32(j) >= s32(most);
                break;
            case 1:
                j = l + lane;
                in = j <= most;
                break;
            case 2:
                j = l ^ lane;
                in = j <= most;
                break;
            default: j = least | (lane & ~seg); in = j <= most;
        }
        if (!in) j = l;
        if (!((m >> j) & 1)) report(w, K_DIVERGENT_WARP, l, 0, "a shuffle reads lane %u, which does not take part", j);
        if (d) d[l] = src[j];
        ok |= u32(in) << l;
    }
    if (i.o[1] != NONE) w.pred(i.o[1]) = (w.pred(i.o[1]) & ~m) | ok;
}
void vote(Warp &w, const Ins &i, u32 m) {  // i.a: all any uni ballot
    u32 p = w.pred(i.o[1]);
    if (i.flags & NOT_C) p = ~p;
    p &= m;
    if (i.a == 3) {
        u32 *d = w.reg<u32>(i.o[0]);
        LANES(m, d[l] = p)
    } else {
        bool yes = i.a == 0 ? p == m : i.a == 1 ? p != 0 : p == m || p == 0;
        w.pred(i.o[0]) = (w.pred(i.o[0]) & ~m) | (yes ? m : 0);
    }
}
template <class S>
void match(Warp &w, const Ins &i, u32 m) {  // i.a: 0 any, 1 all
    const S *a = w.reg<S>(i.o[2]);
    u32 *d = w.reg<u32>(i.o[0]), out[32];
    bool all = true;
    for (u32 t = m; t; t &= t - 1) {
        u32 l = first(t), same = 0;
        for (u32 s = m; s; s &= s - 1) same |= u32(a[first(s)] == a[l]) << first(s);
        out[l] = same;
        all = all && same == m;
    }
    LANES(m, d[l] = i.a ? (all ? m : 0) : out[l])
    if (i.o[1] != NONE) w.pred(i.o[1]) = (w.pred(i.o[1]) & ~m) | (all ? m : 0);
}
void redux(Warp &w, const Ins &i, u32 m) {  // i.a: add min max and or xor; i.b: signed
    u32 *d = w.reg<u32>(i.o[0]);
    const u32 *a = w.reg<u32>(i.o[1]);
    u32 r = a[first(m)];
    for (u32 t = m & (m - 1); t; t &= t - 1) {
        u32 v = a[first(t)];
        switch (i.a) {
            case 0: r += v; break;
            case 1: r = i.b ? u32(std::min(s32(r), s32(v))) : std::min(r, v); break;
            case 2: r = i.b ? u32(std::max(s32(r), s32(v))) : std::max(r, v); break;
            case 3: r &= v; break;
            case 4: r |= v; break;
            default: r ^= v;
        }
    }
    LANES(m, d[l] = r)
}
void movmatrix(Warp &w, const Ins &i, u32) {  // 8x8 of 16 bits, transposed
    const u32 *a = w.reg<u32>(i.o[1]);
    u32 *d = w.reg<u32>(i.o[0]), in[32];
    memcpy(in, a, sizeof in);
    auto at = [&](u32 row, u32 col) { return (in[row * 4 + col / 2] >> (16 * (col & 1))) & 0xffff; };
    for (u32 l = 0; l < 32; l++) d[l] = at(2 * (l & 3), l >> 2) | at(2 * (l & 3) + 1, l >> 2) << 16;
}

// mma m16n8kK, row.col. E elements of a 32-bit register; g = lane / 4, t = lane % 4:
//   A register r, element e: row g + 8 (r & 1), column (r >> 1) 4 E + t E + e
//   B register r, element e: row (k) r 4 E + t E + e, column g
//   C register r: row g + 8 (r >> 1), column 2 t + (r & 1)
struct ElemF16 {
    static constexpr u32 E = 2;
    static f32 at(u32 v, u32 e) { return F16::widen(u16(v >> (16 * e))); }
};
struct ElemBf16 {
    static constexpr u32 E = 2;
    static f32 at(u32 v, u32 e) { return Bf16::widen(u16(v >> (16 * e))); }
};
struct ElemTf32 {
    static constexpr u32 E = 1;
    static f32 at(u32 v, u32) { return as_f32(v & 0xffffe000); }
};
struct ElemE4m3 {
    static constexpr u32 E = 4;
    static f32 at(u32 v, u32 e) { return E4m3::widen(u8(v >> (8 * e))); }
};
struct ElemE5m2 {
    static constexpr u32 E = 4;
    static f32 at(u32 v, u32 e) { return E5m2::widen(u8(v >> (8 * e))); }
};
struct ElemS8 {
    static constexpr u32 E = 4;
    static s32 at(u32 v, u32 e) { return s8(v >> (8 * e)); }
};
struct ElemU8 {
    static constexpr u32 E = 4;
    static s32 at(u32 v, u32 e) { return u8(v >> (8 * e)); }
};

template <class X, class Y, u32 K, class Acc, bool HALF>
void mma(Warp &w, const Ins &i, u32) {
    constexpr u32 E = X::E, NA = 16 * K / 32 / E, NB = 8 * K / 32 / E;
    alignas(64) Acc a[16][K], b[K][8], c[16][8];
    for (u32 r = 0; r < NA; r++) {
        const u32 *s = w.reg<u32>(i.o[4 + r]);
        for (u32 l = 0; l < 32; l++)
            for (u32 e = 0; e < E; e++) a[l / 4 + 8 * (r & 1)][(r >> 1) * 4 * E + (l & 3) * E + e] = X::at(s[l], e);
    }
    for (u32 r = 0; r < NB; r++) {
        const u32 *s = w.reg<u32>(i.o[8 + r]);
        for (u32 l = 0; l < 32; l++)
            for (u32 e = 0; e < E; e++) b[r * 4 * E + (l & 3) * E + e][l / 4] = Y::at(s[l], e);
    }
    for (u32 r = 0; r < 4; r++) {
        const u32 *s = w.reg<u32>(i.o[12 + (HALF ? r >> 1 : r)]);
        for (u32 l = 0; l < 32; l++) {
            Acc v;
            if constexpr (HALF) v = F16::widen(u16(s[l] >> (16 * (r & 1))));
            else memcpy(&v, &s[l], 4);
            c[l / 4 + 8 * (r >> 1)][2 * (l & 3) + (r & 1)] = v;
        }
    }
    for (u32 row = 0; row < 16; row++) {
        Acc sum[8];
        for (u32 n = 0; n < 8; n++) sum[n] = c[row][n];
        for (u32 k = 0; k < K; k++) {
            Acc x = a[row][k];
            for (u32 n = 0; n < 8; n++) {
                if constexpr (std::is_same_v<Acc, f32>) sum[n] = fma_once(x, b[k][n], sum[n]);
                else sum[n] = s32(u32(sum[n]) + u32(x * b[k][n]));
            }
        }
        for (u32 n = 0; n < 8; n++) c[row][n] = sum[n];
    }
    for (u32 r = 0; r < (HALF ? 2 : 4); r++) {
        u32 *d = w.reg<u32>(i.o[r]);
        for (u32 l = 0; l < 32; l++) {
            if constexpr (HALF) {
                d[l] = u32(F16::narrow(c[l / 4 + 8 * r][2 * (l & 3) + 1])) << 16 |
                       F16::narrow(c[l / 4 + 8 * r][2 * (l & 3)]);
            } else {
                Acc v = c[l / 4 + 8 * (r >> 1)][2 * (l & 3) + (r & 1)];
                if constexpr (std::is_same_v<Acc, f32>) {
                    if (v != v) v = as_f32(0x7fffffff);
                }
                memcpy(&d[l], &v, 4);
            }
        }
    }
}

// -- special registers

void special(Warp &w, const Ins &i, u32 m) {  // i.a: which; i.b: the register has 64 bits
    const Launch &L = *w.launch;
    const Block &B = *w.block;
    u64 v[32];
    for (u32 l = 0; l < 32; l++) {
        u32 t = w.thread(l);
        u64 x = 0;
        switch (i.a) {
            case 0: x = t % L.block[0]; break;
            case 1: x = t / L.block[0] % L.block[1]; break;
            case 2: x = t / (L.block[0] * L.block[1]); break;
            case 3:
            case 4:
            case 5: x = L.block[i.a - 3]; break;
            case 6:
            case 7:
            case 8: x = B.id[i.a - 6]; break;
            case 9:
            case 10:
            case 11: x = L.grid[i.a - 9]; break;
            case 12: x = l; break;
            case 13: x = w.index; break;
            case 14: x = L.warps; break;
            case 15: x = B.linear % L.multiprocessors; break;
            case 16: x = L.multiprocessors; break;
            case 17: x = 1ull << l; break;
            case 18: x = (1ull << l) - 1; break;
            case 19: x = (2ull << l) - 1; break;
            case 20: x = FULL & ~((2ull << l) - 1); break;
            case 21: x = FULL & ~((1ull << l) - 1); break;
            case 22: x = L.clock(); break;
            case 23: x = L.clock() >> 32; break;
            case 24: x = L.dynamic_shared; break;
            case 25: x = L.shared_size - L.system_shared; break;
            case 26:
            case 27:
            case 28: x = B.id[i.a - 26] / L.cluster[i.a - 26]; break;
            case 29:
            case 30:
            case 31: x = B.id[i.a - 29] % L.cluster[i.a - 29]; break;
            case 32:
            case 33:
            case 34: x = L.cluster[i.a - 32]; break;
            case 35:
            case 36:
            case 37: x = L.grid[i.a - 35] / L.cluster[i.a - 35]; break;
            case 38: x = B.rank; break;
            case 39: x = L.cluster_size; break;
            default: x = 0;  // gridid and the like
        }
        v[l] = x;
    }
    if (i.b) {
        u64 *d = w.reg<u64>(i.o[0]);
        LANES(m, d[l] = v[l])
    } else {
        u32 *d = w.reg<u32>(i.o[0]);
        LANES(m, d[l] = u32(v[l]))
    }
}
void activemask(Warp &w, const Ins &i, u32 m) {
    u32 *d = w.reg<u32>(i.o[0]);
    LANES(m, d[l] = m)
}
void elect(Warp &w, const Ins &i, u32 m) {  // the lowest lane
    if (i.o[0] != NONE) {
        u32 *d = w.reg<u32>(i.o[0]);
        LANES(m, d[l] = first(m))
    }
    if (i.o[1] != NONE) w.pred(i.o[1]) = (w.pred(i.o[1]) & ~m) | (m & (0u - m));
}
void nothing(Warp &, const Ins &, u32) {}
void yield(Warp &w, const Ins &, u32) { w.yield = true; }

// -- the table

#define INT_TYPES(X) X(u16) X(s16) X(u32) X(s32) X(u64) X(s64)
#define WIDE_TYPES(X) X(u32) X(s32) X(u64) X(s64)
#define ALL_INT(X) X(u8) X(s8) INT_TYPES(X)

OP("nop", nothing)
OP("cvt.pack.s8", cvt_pack<s8>)
OP("cvt.pack.u8", cvt_pack<u8>)
OP("cvt.pack.s16", cvt_pack<s16>)
OP("cvt.pack.u16", cvt_pack<u16>)
OP("special", special)
OP("activemask", activemask)
OP("elect", elect)
OP("yield", yield)

#define BITS(T)                                                                                        \
    OP("add." #T, op2<Add, T, T, T>)                                                                   \
    OP("sub." #T, op2<Sub, T, T, T>) OP("and." #T, op2<And, T, T, T>) OP("or." #T, op2<Or, T, T, T>)   \
        OP("xor." #T, op2<Xor, T, T, T>) OP("not." #T, op1<NotOf, T, T>) OP("neg." #T, op1<Neg, T, T>) \
            OP("shl." #T, op2<Shl, T, T, u32>) OP("cnot." #T, op1<CNot, T, T>) OP("mov." #T, op1<Same, T, T>)
BITS(u16)
BITS(u32) BITS(u64) OP("mul.u16", op2<MulLo16, u16, u16, u16>) OP("mul.u32", op2<Mul, u32, u32, u32>)
    OP("mul.u64", op2<Mul, u64, u64, u64>) OP("mad.u16", op3<Mad, u16, u16, u16, u16>) OP(
        "mad.u32", op3<Mad, u32, u32, u32, u32>) OP("mad.u64", op3<Mad, u64, u64, u64, u64>)
#define SIGNS(T)                                                                                       \
    OP("min." #T, op2<Min, T, T, T>)                                                                   \
    OP("max." #T, op2<Max, T, T, T>) OP("div." #T, op2<Div, T, T, T>) OP("rem." #T, op2<Rem, T, T, T>) \
        OP("shr." #T, op2<Shr, T, T, u32>) OP("mulhi." #T, op2<MulHi, T, T, T>)                        \
            OP("madhi." #T, op3<MadHi, T, T, T, T>) OP("setp." #T, setp<T>) OP("set." #T, set<T>)      \
                OP("sad." #T, op3<Sad, T, T, T, T>)
        INT_TYPES(SIGNS) OP("min.relu.s32", op2<MinRelu, s32, s32, s32>)
            OP("max.relu.s32", op2<MaxRelu, s32, s32, s32>) OP("abs.s16", op1<Abs, s16, s16>) OP("abs.s32", op1<Abs, s32, s32>)
            OP("abs.s64", op1<Abs, s64, s64>) OP("mulwide.u16", op2<MulWide, u32, u16, u16>) OP(
                "mulwide.s16", op2<MulWide, s32, s16, s16>) OP("mulwide.u32", op2<MulWide, u64, u32, u32>)
                OP("mulwide.s32", op2<MulWide, s64, s32, s32>) OP("madwide.u16", op3<MadWide, u32, u16, u16, u32>) OP(
                    "madwide.s16",
                    op3<MadWide, s32, s16, s16, s32>) OP("madwide.u32", op3<MadWide, u64, u32, u32, u64>)
                    OP("madwide.s32",
                       op3<MadWide, s64, s32, s32, s64>) OP("mul24.u32", op2<Mul24, u32, u32, u32>)
                        OP("mul24.s32", op2<Mul24, s32, s32, s32>) OP("mad24.u32", op3<Mad24, u32, u32, u32, u32>) OP(
                            "mad24.s32", op3<Mad24, s32, s32, s32, s32>) OP("popc.b32", op1<Popc, u32, u32>)
                            OP("popc.b64",
                               op1<Popc, u32, u64>) OP("clz.b32", op1<Clz, u32, u32>) OP("clz.b64", op1<Clz, u32, u64>)
                                OP("brev.b32",
                                   op1<Brev, u32, u32>) OP("brev.b64", op1<Brev, u64, u64>)
#define FINDS(T) OP("bfind." #T, op2<Bfind, u32, T, u32>) OP("bfe." #T, op3<Bfe, T, T, u32, u32>)
                                    WIDE_TYPES(FINDS) OP("bfi.b32", bfi<u32>) OP("bfi.b64", bfi<u64>) OP(
                                        "prmt",
                                        prmt) OP("lop3",
                                                 lop3) OP("shf.l.wrap", op3<ShfLWrap, u32, u32, u32, u32>)
                                        OP("shf.r.wrap", op3<ShfRWrap, u32, u32, u32, u32>) OP(
                                            "shf.l.clamp",
                                            op3<ShfLClamp, u32, u32, u32,
                                                u32>) OP("shf.r.clamp", op3<ShfRClamp, u32, u32, u32, u32>)
                                            OP("dp4a.u32.u32", op3<Dp4<u8, u8>, u32, u32, u32, u32>) OP(
                                                "dp4a.s32.s32",
                                                op3<Dp4<s8, s8>, u32, u32, u32,
                                                    u32>) OP("dp4a.u32.s32", op3<Dp4<u8, s8>, u32, u32, u32, u32>)
                                                OP("dp4a.s32.u32", op3<Dp4<s8, u8>, u32, u32, u32, u32>) OP(
                                                    "addc",
                                                    carry<false>) OP("subc",
                                                                     carry<true>) OP("madc", mad_carry)

                                                    OP("add.f32", f2<Add>) OP("sub.f32", f2<Sub>) OP("mul.f32", f2<Mul>)
                                                        OP("fma.f32", f3<Fma>) OP("div.f32", f2<FDiv>) OP(
                                                            "div.approx.f32",
                                                            approx2<FDiv>) OP("min.f32",
                                                                              f2<FMin>) OP("max.f32", f2<FMax>)
                                                            OP("min.NaN.f32", f2<FMinNan>) OP(
                                                                "max.NaN.f32",
                                                                f2<FMaxNan>) OP("min3.f32", f3<FMin3>)
                                                                OP("max3.f32", f3<FMax3>) OP("neg.f32", f1<FNeg>) OP(
                                                                    "abs.f32",
                                                                    f1<FAbs>) OP("sqrt.f32",
                                                                                 f1<Sqrt>) OP("rcp.f32", f1<Rcp>)
                                                                    OP("copysign.f32", op2<CopySign, f32, f32, f32>) OP(
                                                                        "sqrt.approx.f32",
                                                                        approx1<Sqrt>) OP("rcp.approx.f32",
                                                                                          approx1<Rcp>)
                                                                        OP("rsqrt.approx.f32", approx1<Rsqrt>) OP(
                                                                            "ex2.approx.f32",
                                                                            approx1<Ex2>) OP("lg2.approx.f32",
                                                                                             approx1<Lg2>)
                                                                            OP("sin.approx.f32", approx1<Sin>) OP(
                                                                                "cos.approx.f32",
                                                                                approx1<Cos>) OP("tanh.approx.f32",
                                                                                                 approx1<Tanh>)
                                                                                OP("setp.f32", setp<f32>) OP(
                                                                                    "setp.f64",
                                                                                    setp<
                                                                                        f64>) OP("set.f32",
                                                                                                 set<f32>) OP("set.f64",
                                                                                                              set<f64>)
                                                                                    OP("add.f64", r2<Add, f64>) OP(
                                                                                        "sub.f64",
                                                                                        r2<Sub, f64>) OP("mul.f64",
                                                                                                         r2<Mul, f64>)
                                                                                        OP("div.f64", r2<FDiv, f64>) OP(
                                                                                            "fma.f64",
                                                                                            r3<Fma, f64>)
                                                                                            OP("min.f64", r2<FMin, f64>)
                                                                                                OP("max.f64",
                                                                                                   r2<FMax, f64>)
                                                                                                    OP("neg.f64",
                                                                                                       op1<FNeg, f64,
                                                                                                           f64>)
                                                                                                        OP("abs.f64",
                                                                                                           op1<FAbs,
                                                                                                               f64,
                                                                                                               f64>)
                                                                                                            OP(
                                                                                                                "sqrt."
                                                                                                                "f64",
                                                                                                                r1<Sqrt,
                                                                                                                   f64, f64>)
                                                                                                                OP(
                                                                                                                    "rc"
                                                                                                                    "p."
                                                                                                                    "f6"
                                                                                                                    "4",
                                                                                                                    r1<Rcp, f64, f64>)
                                                                                                                    OP("rsqrt.approx.f64",
                                                                                                                       op1<Rsqrt, f64, f64>)
                                                                                                                        OP(
                                                                                                                            "rcp.approx.f64",
                                                                                                                            op1<Rcp,
                                                                                                                                f64, f64>)
                                                                                                                            OP(
                                                                                                                                "copysign.f64",
                                                                                                                                op2<CopySign,
                                                                                                                                    f64,
                                                                                                                                    f64, f64>)

#define HALVES(H, N)                                                                                         \
    OP("add." N, h2<H, Add>)                                                                                 \
    OP("sub." N, h2<H, Sub>) OP("mul." N, h2<H, Mul>) OP("fma." N, h3<H, HalfFma>) OP("min." N, h2<H, FMin>) \
        OP("max." N, h2<H, FMax>) OP("min.NaN." N, h2<H, FMinNan>) OP("max.NaN." N, h2<H, FMaxNan>)          \
            OP("ex2.approx." N, h1<H, HEx2>) OP("tanh.approx." N, h1<H, Tanh>) OP("setp." N, setp_half<H>)   \
                OP("setp2." N, setp_half2<H>) OP("set." N, set_half2<H>) OP("cvt.f32." N, cvt_f32_half<H>)   \
                    OP("cvt.f64." N, cvt_f64_half<H>) OP("cvt." N ".f32", cvt_half_f32<H>)                   \
                        OP("cvt." N "x2.f32", cvt_half2_f32<H>) OP("cvt." N ".f64", cvt_half_f64<H>)         \
                            OP("cvt." N ".f16", cvt_half_half<H, F16>) OP("cvt." N ".bf16", cvt_half_half<H, Bf16>)
                                                                                                                                HALVES(
                                                                                                                                    F16,
                                                                                                                                    "f16") HALVES(Bf16,
                                                                                                                                                  "bf16")
                                                                                                                                    OP("neg.half", hbits<0x80008000, FULL>) OP(
                                                                                                                                        "abs.half", hbits<
                                                                                                                                                        0,
                                                                                                                                                        0x7fff7fff>)
#define HALF_INT(T)                                                                      \
    OP("cvt.f16." #T, cvt_half_int<F16, T>)                                              \
    OP("cvt.bf16." #T, cvt_half_int<Bf16, T>) OP("cvt." #T ".f16", cvt_int_half<T, F16>) \
        OP("cvt." #T ".bf16", cvt_int_half<T, Bf16>)
                                                                                                                                        ALL_INT(
                                                                                                                                            HALF_INT)
                                                                                                                                            OP("cvt.e4m3x2.f32",
                                                                                                                                               cvt_fp8x2_f32<
                                                                                                                                                   E4m3>)
                                                                                                                                                OP("cvt.e5m2x2.f32",
                                                                                                                                                   cvt_fp8x2_f32<
                                                                                                                                                       E5m2>)
                                                                                                                                                    OP("cvt.e4m3x2.f16x2",
                                                                                                                                                       cvt_fp8x2_f16x2<E4m3>)
                                                                                                                                                        OP("cvt.e5m2x2.f16x2",
                                                                                                                                                           cvt_fp8x2_f16x2<E5m2>)
                                                                                                                                                            OP("cvt.f16x2.e4m3x2",
                                                                                                                                                               cvt_f16x2_fp8x2<E4m3>)
                                                                                                                                                                OP(
                                                                                                                                                                    "cvt.f16x2.e5m2x2", cvt_f16x2_fp8x2<E5m2>)
                                                                                                                                                                    OP("cvt.tf32.f32",
                                                                                                                                                                       cvt_tf32)
                                                                                                                                                                        OP(
                                                                                                                                                                            "cvt.f32.f32",
                                                                                                                                                                            cvt_f32_f32)
                                                                                                                                                                            OP(
                                                                                                                                                                                "cvt.f64.f64",
                                                                                                                                                                                cvt_f64_f64)
                                                                                                                                                                                OP(
                                                                                                                                                                                    "cvt.f64.f32",
                                                                                                                                                                                    cvt_f64_f32)
                                                                                                                                                                                    OP(
                                                                                                                                                                                        "cvt.f32.f64",
                                                                                                                                                                                        cvt_f32_f64)
#define CVT_ROW(D)                                                                                                  \
    OP("cvt." #D ".u8", cvt_int<D, u8>)                                                                             \
    OP("cvt." #D ".s8", cvt_int<D, s8>) OP("cvt." #D ".u16", cvt_int<D, u16>) OP("cvt." #D ".s16", cvt_int<D, s16>) \
        OP("cvt." #D ".u32", cvt_int<D, u32>) OP("cvt." #D ".s32", cvt_int<D, s32>)                                 \
            OP("cvt." #D ".u64", cvt_int<D, u64>) OP("cvt." #D ".s64", cvt_int<D, s64>)                             \
                OP("cvt.sat." #D ".u32", cvt_sat<D, u32>) OP("cvt.sat." #D ".s32", cvt_sat<D, s32>)                 \
                    OP("cvt.sat." #D ".u64", cvt_sat<D, u64>) OP("cvt.sat." #D ".s64", cvt_sat<D, s64>)             \
                        OP("cvt.sat." #D ".u16", cvt_sat<D, u16>) OP("cvt.sat." #D ".s16", cvt_sat<D, s16>)         \
                            OP("cvt." #D ".f32", cvt_f2i<D, f32>) OP("cvt." #D ".f64", cvt_f2i<D, f64>)             \
                                OP("cvt.f32." #D, cvt_i2f<f32, D>) OP("cvt.f64." #D, cvt_i2f<f64, D>)
                                                                                                                                                                                        ALL_INT(
                                                                                                                                                                                            CVT_ROW)

                                                                                                                                                                                            OP("and.pred",
                                                                                                                                                                                               pred2<
                                                                                                                                                                                                   0>)
                                                                                                                                                                                                OP(
                                                                                                                                                                                                    "or.pred",
                                                                                                                                                                                                    pred2<
                                                                                                                                                                                                        1>)
                                                                                                                                                                                                    OP("xor.pred",
                                                                                                                                                                                                       pred2<2>)
                                                                                                                                                                                                        OP("not.pred",
                                                                                                                                                                                                           pred_not)
                                                                                                                                                                                                            OP("mov.pred",
                                                                                                                                                                                                               pred_mov)
                                                                                                                                                                                                                OP("selp.b32",
                                                                                                                                                                                                                   selp<
                                                                                                                                                                                                                       u32>)
                                                                                                                                                                                                                    OP("selp.b64",
                                                                                                                                                                                                                       selp<
                                                                                                                                                                                                                           u64>)
                                                                                                                                                                                                                        OP("slct.b32", slct<u32>) OP(
                                                                                                                                                                                                                            "slct.b64",
                                                                                                                                                                                                                            slct<
                                                                                                                                                                                                                                u64>)
                                                                                                                                                                                                                            OP("testp",
                                                                                                                                                                                                                               testp)
                                                                                                                                                                                                                                OP("pack32x2",
                                                                                                                                                                                                                                   pack32x2)
                                                                                                                                                                                                                                    OP("unpack32x2",
                                                                                                                                                                                                                                       unpack32x2)
                                                                                                                                                                                                                                        OP("pack16x2",
                                                                                                                                                                                                                                           pack16x2)
                                                                                                                                                                                                                                            OP("unpack16x2", unpack16x2)
                                                                                                                                                                                                                                                OP("pack",
                                                                                                                                                                                                                                                   pack_any)
                                                                                                                                                                                                                                                    OP("unpack",
                                                                                                                                                                                                                                                       unpack_any)
                                                                                                                                                                                                                                                        OP("address",
                                                                                                                                                                                                                                                           address)
                                                                                                                                                                                                                                                            OP("to_shared",
                                                                                                                                                                                                                                                               to_shared)
                                                                                                                                                                                                                                                                OP("isspacep", isspace) OP(
                                                                                                                                                                                                                                                                    "shfl",
                                                                                                                                                                                                                                                                    shfl)
                                                                                                                                                                                                                                                                    OP("vote", vote) OP(
                                                                                                                                                                                                                                                                        "match.b32",
                                                                                                                                                                                                                                                                        match<
                                                                                                                                                                                                                                                                            u32>)
                                                                                                                                                                                                                                                                        OP("match.b64", match<u64>) OP(
                                                                                                                                                                                                                                                                            "redux",
                                                                                                                                                                                                                                                                            redux)
                                                                                                                                                                                                                                                                            OP("movmatrix", movmatrix) OP(
                                                                                                                                                                                                                                                                                "mma.16.f32.bf16", mma<ElemBf16, ElemBf16, 16,
                                                                                                                                                                                                                                                                                                       f32,
                                                                                                                                                                                                                                                                                                       false>)
                                                                                                                                                                                                                                                                                OP("mma.16.f32.f16", mma<ElemF16, ElemF16, 16, f32, false>) OP(
                                                                                                                                                                                                                                                                                    "mma.16.f16.f16",
                                                                                                                                                                                                                                                                                    mma<ElemF16,
                                                                                                                                                                                                                                                                                        ElemF16,
                                                                                                                                                                                                                                                                                        16,
                                                                                                                                                                                                                                                                                        f32,
                                                                                                                                                                                                                                                                                        true>)
                                                                                                                                                                                                                                                                                    OP("mma.8.f16.f16", mma<ElemF16, ElemF16, 8, f32, true>) OP(
                                                                                                                                                                                                                                                                                        "mma.8.f32.bf16", mma<ElemBf16,
                                                                                                                                                                                                                                                                                                              ElemBf16,
                                                                                                                                                                                                                                                                                                              8,
                                                                                                                                                                                                                                                                                                              f32,
                                                                                                                                                                                                                                                                                                              false>)
                                                                                                                                                                                                                                                                                        OP("mma.8.f32.f16", mma<ElemF16, ElemF16, 8, f32, false>) OP(
                                                                                                                                                                                                                                                                                            "mma.8.f32.tf32",
                                                                                                                                                                                                                                                                                            mma<ElemTf32,
                                                                                                                                                                                                                                                                                                ElemTf32,
                                                                                                                                                                                                                                                                                                8,
                                                                                                                                                                                                                                                                                                f32,
                                                                                                                                                                                                                                                                                                false>)
                                                                                                                                                                                                                                                                                            OP("mma.4.f32.tf32", mma<ElemTf32, ElemTf32, 4, f32, false>) OP(
                                                                                                                                                                                                                                                                                                "mma.32.f32.e4m3", mma<ElemE4m3,
                                                                                                                                                                                                                                                                                                                       ElemE4m3,
                                                                                                                                                                                                                                                                                                                       32,
                                                                                                                                                                                                                                                                                                                       f32,
                                                                                                                                                                                                                                                                                                                       false>)
                                                                                                                                                                                                                                                                                                OP("mma.32.f32.e5m2", mma<ElemE5m2, ElemE5m2, 32, f32, false>) OP(
                                                                                                                                                                                                                                                                                                    "mma.32.s32.s8",
                                                                                                                                                                                                                                                                                                    mma<ElemS8,
                                                                                                                                                                                                                                                                                                        ElemS8,
                                                                                                                                                                                                                                                                                                        32,
                                                                                                                                                                                                                                                                                                        s32,
                                                                                                                                                                                                                                                                                                        false>)
                                                                                                                                                                                                                                                                                                    OP("mma.32.s32.u8",
                                                                                                                                                                                                                                                                                                       mma<ElemU8,
                                                                                                                                                                                                                                                                                                           ElemU8,
                                                                                                                                                                                                                                                                                                           32,
                                                                                                                                                                                                                                                                                                           s32,
                                                                                                                                                                                                                                                                                                           false>)
                                                                                                                                                                                                                                                                                                        OP("mma.16.s32.s8",
                                                                                                                                                                                                                                                                                                           mma<ElemS8,
                                                                                                                                                                                                                                                                                                               ElemS8, 16,
                                                                                                                                                                                                                                                                                                               s32,
                                                                                                                                                                                                                                                                                                               false>)
                                                                                                                                                                                                                                                                                                            OP(
                                                                                                                                                                                                                                                                                                                "mma.16.s32.u8",
                                                                                                                                                                                                                                                                                                                mma<ElemU8,
                                                                                                                                                                                                                                                                                                                    ElemU8, 16, s32, false>)

}  // namespace
