// Element types of queries, caches and outputs: what one is in memory, and two in a register.
//
// A kernel takes two: ELEMENT of queries and output, KV_ELEMENT of the cache.
#pragma once
#include "ptx/arithmetic.cuh"
#include "ptx/matrices.cuh"
#include "ptx/memory.cuh"

struct Float16 {
    static constexpr int kBytes = 2;
    using Bits = unsigned short;
    static __device__ __forceinline__ float to_float(Bits bits) { return low_f16(bits); }
    static __device__ __forceinline__ Bits from_float(float value) { return static_cast<Bits>(pack(value, 0.0f)); }
    static __device__ __forceinline__ u32 pack(float low, float high) { return pack_f16(low, high); }
    static __device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_f16(c, a, b0, b1); }
};

struct BFloat16 {
    static constexpr int kBytes = 2;
    using Bits = unsigned short;
    static __device__ __forceinline__ float to_float(Bits bits) { return low_bf16(bits); }
    static __device__ __forceinline__ Bits from_float(float value) { return static_cast<Bits>(pack(value, 0.0f)); }
    static __device__ __forceinline__ u32 pack(float low, float high) { return pack_bf16(low, high); }
    static __device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_bf16(c, a, b0, b1); }
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

// Two of them.
template <typename T>
__device__ __forceinline__ void store2(void* base, long long index, float low, float high) {
    *reinterpret_cast<u32*>(static_cast<unsigned short*>(base) + index) = T::pack(low, high);
}
template <>
__device__ __forceinline__ void store2<Float32>(void* base, long long index, float low, float high) {
    *reinterpret_cast<float2*>(static_cast<float*>(base) + index) = make_float2(low, high);
}
