// Elements of 8 bits: the codes of a quantised cache (or of queries), and how they become numbers.
//
// A code stands for a number, times a scale that lies elsewhere. For an MMA the four codes of a register, b0 (lowest) to b3,
// become two pairs of float16, exactly, in units of kUnit: (b0, b2) and (b1, b3), or where that is cheaper (b0, b1) and
// (b2, b3), or in_order() always those. `magic` is Code::kMagic in a register: a constant ptxas would make anew for half of the instructions that use it.
#pragma once
#include "ptx/arithmetic.cuh"

// (0, b0, 0, b2) and (0, b1, 0, b3): float16s whose upper bytes are the codes.
__device__ __forceinline__ void spread_codes(u32 codes, u32& even, u32& odd) {
    even = __byte_perm(codes, 0, 0x2404);
    odd = codes & 0xff00ff00;
}

// (0, b0, 0, b1) and (0, b2, 0, b3).
__device__ __forceinline__ void spread_codes_in_order(u32 codes, u32& first, u32& second) {
    first = __byte_perm(codes, 0, 0x1404);
    second = __byte_perm(codes, 0, 0x3424);
}

// x / 2^20 (or 2^21) of a float32's bits, to nearest, ties to even: drops mantissa bits, and carries into the exponent.
template <int kDropped>
__device__ __forceinline__ u32 drop_bits(u32 bits) {
    return (bits + ((1u << (kDropped - 1)) - 1) + (bits >> kDropped & 1)) >> kDropped;
}

// The code of a float8 with kMantissa bits behind the point, of which the least normal number is 2^kLeastExponent.
template <int kMantissa, int kLeastExponent>
__device__ __forceinline__ u32 float8_code(float x, float largest) {
    const u32 sign = __float_as_uint(x) >> 24 & 0x80;
    const float size = fminf(fabsf(x), largest);
    // Below the normal numbers codes count units of 2^(kLeastExponent - kMantissa); the first normal number follows them.
    const float units = __uint_as_float((127 - kLeastExponent + kMantissa) << 23);
    if (size < __uint_as_float((127 + kLeastExponent) << 23)) return sign | __float2uint_rn(size * units);
    return sign | (drop_bits<23 - kMantissa>(__float_as_uint(size)) - ((126 + kLeastExponent) << kMantissa));
}

struct Float8E4M3 {
    static constexpr int kBytes = 1;
    using Bits = unsigned char;
    static constexpr float kLargest = 448.0f;
    static constexpr u32 kMagic = 0;
#if __CUDA_ARCH__ >= 890
    static constexpr bool kPairsNeighbours = true;
    static constexpr float kUnit = 1.0f;

    static __device__ __forceinline__ void spread_pairs(u32 codes, u32, u32& even, u32& odd) {
        unpack_e4m3(__byte_perm(codes, 0, 0x3120), even, odd);
    }
    static __device__ __forceinline__ void in_order(u32 codes, u32, u32& first, u32& second) {
        unpack_e4m3(codes, first, second);
    }
#else
    // By bits: exponent and mantissa in a float16's place are the value times 2^-8, since exponents count from -15, not
    // from -7. That holds for the numbers below the normal ones, too. NaN becomes 480.
    static constexpr bool kPairsNeighbours = false;
    static constexpr float kUnit = 256.0f;

    static __device__ __forceinline__ void spread_pairs(u32 codes, u32, u32& even, u32& odd) {
        spread_codes(codes, even, odd);
        move_exponents(even), move_exponents(odd);
    }
    static __device__ __forceinline__ void in_order(u32 codes, u32, u32& first, u32& second) {
        spread_codes_in_order(codes, first, second);
        move_exponents(first), move_exponents(second);
    }
    static __device__ __forceinline__ void move_exponents(u32& two) {
        two = (two & 0x80008000) | ((two & 0x7f007f00) >> 1);
    }
#endif
    static __device__ __forceinline__ u32 code(float x) { return float8_code<3, -6>(x, kLargest); }
    static __device__ __forceinline__ float to_float(Bits bits) {
        u32 even, odd;
        spread_pairs(bits, kMagic, even, odd);
        return unpack_f16(even).x * kUnit;
    }
};

struct Float8E5M2 {
    static constexpr int kBytes = 1;
    using Bits = unsigned char;
    static constexpr float kLargest = 57344.0f;
    static constexpr u32 kMagic = 0;
    static constexpr bool kPairsNeighbours = false;
    static constexpr float kUnit = 1.0f;

    // A code is the upper byte of a float16.
    static __device__ __forceinline__ void spread_pairs(u32 codes, u32, u32& even, u32& odd) { spread_codes(codes, even, odd); }
    static __device__ __forceinline__ void in_order(u32 codes, u32, u32& first, u32& second) {
        spread_codes_in_order(codes, first, second);
    }
    static __device__ __forceinline__ u32 code(float x) { return float8_code<2, -14>(x, kLargest); }
};

struct Int8 {
    static constexpr int kBytes = 1;
    using Bits = unsigned char;
    static constexpr float kLargest = 127.0f;
    static constexpr bool kPairsNeighbours = false;
    static constexpr float kUnit = 1.0f;

    static constexpr u32 kMagic = 0x64806480;  // two float16s of 1152

    // 0x6400 + n is the float16 1024 + n for n < 1024; the code x with its sign turned is x + 128.
    static __device__ __forceinline__ void spread_pairs(u32 codes, u32 magic, u32& even, u32& odd) {
        even = subtract_f16x2((codes & 0x00ff00ff) ^ magic, magic);
        odd = subtract_f16x2(__byte_perm(codes, 0, 0x4341) ^ magic, magic);
    }
    static __device__ __forceinline__ void in_order(u32 codes, u32 magic, u32& first, u32& second) {
        first = subtract_f16x2(__byte_perm(codes, 0, 0x4140) ^ magic, magic);
        second = subtract_f16x2(__byte_perm(codes, 0, 0x4342) ^ magic, magic);
    }
    static __device__ __forceinline__ u32 code(float x) {
        return __float2int_rn(fminf(fmaxf(x, -kLargest), kLargest)) & 0xff;
    }
};

// The pairs of four neighbours of a key: (b0, b1) and (b2, b3) if Code::kPairsNeighbours, which makes no difference to a sum
// over elements as long as queries lie in the same order.
template <typename Code>
__device__ __forceinline__ void key_pairs(u32 codes, u32 magic, u32& first, u32& second) {
#if __CUDA_ARCH__ >= 890
    if constexpr (Code::kPairsNeighbours) {
        unpack_e4m3(codes, first, second);
        return;
    }
#endif
    Code::spread_pairs(codes, magic, first, second);
}

// What 1 in float16 stands for after the conversion for an MMA, for elements of any size.
template <typename T>
constexpr float unit_of() {
    if constexpr (T::kBytes == 1) return T::kUnit;
    else return 1.0f;
}

// Four codes as numbers, b0 first.
template <typename Code>
__device__ __forceinline__ float4 codes_to_floats(u32 codes) {
    u32 even, odd;
    Code::spread_pairs(codes, Code::kMagic, even, odd);
    const float2 e = unpack_f16(even), o = unpack_f16(odd);
    return make_float4(e.x * Code::kUnit, o.x * Code::kUnit, e.y * Code::kUnit, o.y * Code::kUnit);
}
