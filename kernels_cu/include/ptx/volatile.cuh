// Loads and stores of memory that other GPUs and the host write and read at the same time.
#pragma once
#include "ptx/registers.cuh"

// Two numbers, each of which is written and read as a whole.
__device__ __forceinline__ void store_volatile(ulonglong2* to, ulonglong2 v) {
    asm volatile("st.volatile.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(v.x), "l"(v.y) : "memory");
}

__device__ __forceinline__ ulonglong2 load_volatile(const ulonglong2* from) {
    ulonglong2 v;
    asm volatile("ld.volatile.global.v2.u64 {%0, %1}, [%2];" : "=l"(v.x), "=l"(v.y) : "l"(from) : "memory");
    return v;
}

__device__ __forceinline__ u32 load_volatile(const u32* from) {
    u32 v;
    asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}
