// Sums, extremes and searches of plan.cu over the lanes of a warp and the slices of a block.
#pragma once
#include "ptx/registers.cuh"

constexpr int kWarpSize = 32;

template <typename T>
__device__ T inclusive_scan(T value, int lane) {  // over the lanes of a warp
    for (int step = 1; step < kWarpSize; step *= 2) {
        T other = __shfl_up_sync(kFullWarp, value, step);
        if (lane >= step) value += other;
    }
    return value;
}

__device__ int warp_min(int value) {
    for (int step = 1; step < kWarpSize; step *= 2) value = min(value, __shfl_xor_sync(kFullWarp, value, step));
    return value;
}

template <typename T>
__device__ T warp_max(T value) {
    for (int step = 1; step < kWarpSize; step *= 2) value = max(value, __shfl_xor_sync(kFullWarp, value, step));
    return value;
}

// The i in [low, high) with before[i] <= target < before[i + 1].
__device__ int slice_of(const long long* before, int low, int high, long long target) {
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (before[middle] <= target) low = middle;
        else high = middle;
    }
    return low;
}
