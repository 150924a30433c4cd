// Element types: what a 16-bit or 32-bit query, key or value is in registers.
#pragma once
#include "ptx.cuh"

struct Float16 {
    static constexpr int kBytes = 2;
    using Bits = unsigned short;
    static __device__ __forceinline__ float to_float(Bits bits) { return low(bits); }
    static __device__ __forceinline__ Bits from_float(float value) { return static_cast<Bits>(pack(value, 0.0f)); }

    // (low, high) -> one register
    static __device__ __forceinline__ u32 pack(float low, float high) {
        u32 packed;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
        return packed;
    }
    static __device__ __forceinline__ float low(u32 packed) {
        float value;
        asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(value) : "r"(packed));
        return value;
    }

    // C[16 x 8] += A[16 x 16] B[16 x 8]; lane layout of the fragments in mma.cuh
    static __device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

struct BFloat16 {
    static constexpr int kBytes = 2;
    using Bits = unsigned short;
    static __device__ __forceinline__ float to_float(Bits bits) { return low(bits); }
    static __device__ __forceinline__ Bits from_float(float value) { return static_cast<Bits>(pack(value, 0.0f)); }

    static __device__ __forceinline__ u32 pack(float low, float high) {
        u32 packed;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
        return packed;
    }
    static __device__ __forceinline__ float low(u32 packed) { return __uint_as_float(packed << 16); }

    static __device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

struct Float32 {
    static constexpr int kBytes = 4;
    using Bits = unsigned int;
    static __device__ __forceinline__ float to_float(Bits bits) { return __uint_as_float(bits); }
    static __device__ __forceinline__ Bits from_float(float value) { return __float_as_uint(value); }
};

// Four consecutive elements, converted from float32 and stored at element `index`.
template <typename T>
__device__ __forceinline__ void store4(void* base, long long index, float4 v) {
    uint2 packed = {T::pack(v.x, v.y), T::pack(v.z, v.w)};
    store_global(reinterpret_cast<uint2*>(static_cast<unsigned short*>(base) + index), packed);
}
template <>
__device__ __forceinline__ void store4<Float32>(void* base, long long index, float4 v) {
    store_global(reinterpret_cast<float4*>(static_cast<float*>(base) + index), v);
}

// Where 16-byte chunk `chunk` of row `row` lies in a tile of rows of kRowBytes: rows are exclusive-or'ed over the banks
// so that eight rows of one chunk (an ldmatrix) and one row's chunks (a copy) both meet every bank once.
template <int kRowBytes>
struct Swizzle {
    static_assert(kRowBytes % 64 == 0, "rows are whole half-lines of 64 bytes");
    // Rows of whole 128-byte lines permute 8 chunks; rows of an odd number of half-lines start on alternating halves
    // already and permute 4.
    static constexpr int kPeriod = kRowBytes % 128 == 0 ? 8 : 4;

    static __device__ __forceinline__ int mask(int row) { return kPeriod == 8 ? row & 7 : (row >> 1) & 3; }
    static __device__ __forceinline__ int offset(int row, int chunk) {
        return row * kRowBytes + ((chunk ^ mask(row)) << 4);
    }
};
