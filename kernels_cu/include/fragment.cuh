// Fragments are arrays in registers, which have no index: every loop over them is unrolled. The loops stand here.
#pragma once
#include "ptx/registers.cuh"

// f(0), f(1), .. f(kCount - 1)
template <int kCount, typename F>
__device__ __forceinline__ void for_each(F f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) f(i);
}

// f(i, j) of every pair, the last number fastest.
template <int kFirst, int kSecond, typename F>
__device__ __forceinline__ void for_each(F f) {
#pragma unroll
    for (int i = 0; i < kFirst; ++i) {
#pragma unroll
        for (int j = 0; j < kSecond; ++j) f(i, j);
    }
}

template <int kFirst, int kSecond, int kThird, typename F>
__device__ __forceinline__ void for_each(F f) {
#pragma unroll
    for (int i = 0; i < kFirst; ++i) {
#pragma unroll
        for (int j = 0; j < kSecond; ++j) {
#pragma unroll
            for (int k = 0; k < kThird; ++k) f(i, j, k);
        }
    }
}

// Sets every element of a fragment.
__device__ __forceinline__ void fill(float& element, float value) { element = value; }
template <typename T, int kCount>
__device__ __forceinline__ void fill(T (&fragment)[kCount], float value) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) fill(fragment[i], value);
}

__device__ __forceinline__ void scale(float4& v, float factor) {
    v.x *= factor, v.y *= factor, v.z *= factor, v.w *= factor;
}

// o += weight * part
__device__ __forceinline__ void add_weighted(float4& o, float weight, float4 part) {
    o.x += weight * part.x, o.y += weight * part.y, o.z += weight * part.z, o.w += weight * part.w;
}

// Reductions over kLanes lanes that are kStride apart: all of them receive the result.
template <int kLanes, int kStride = 1>
__device__ __forceinline__ float lanes_maximum(float value) {
#pragma unroll
    for (int lanes = kStride; lanes < kLanes * kStride; lanes *= 2) {
        value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, lanes));
    }
    return value;
}

template <int kLanes, int kStride = 1>
__device__ __forceinline__ float lanes_sum(float value) {
#pragma unroll
    for (int lanes = kStride; lanes < kLanes * kStride; lanes *= 2) value += __shfl_xor_sync(kFullWarp, value, lanes);
    return value;
}
