// Loads, stores and atomics of global and shared memory.
#pragma once
#include "ptx/registers.cuh"

// Counts to `last` and wraps to 0; orders what this thread has seen and written before with what it reads after.
__device__ __forceinline__ u32 atomic_inc_acq_rel(u32* counter, u32 last) {
    u32 old;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(last) : "memory");
    return old;
}

// Adds to a counter and returns what it was, the first one in the same order.
__device__ __forceinline__ u32 atomic_add_acq_rel(u32* counter, u32 number) {
    u32 old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(number) : "memory");
    return old;
}
__device__ __forceinline__ u32 atomic_add_relaxed(u32* counter, u32 number) {
    u32 old;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(number) : "memory");
    return old;
}

// What other blocks write meanwhile: in any order, or after all that the writer of the word has seen and written.
__device__ __forceinline__ u32 load_relaxed(const u32* from) {
    u32 word;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
    return word;
}
__device__ __forceinline__ u32 load_acquire(const u32* from) {
    u32 word;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
    return word;
}
__device__ __forceinline__ void store_relaxed(u32* to, u32 word) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}

// A page number, and its neighbours to L2: the next tiles ask for those.
__device__ __forceinline__ u32 load_page(const int* from) {
    u32 page;
    asm("ld.global.nc.L2::128B.u32 %0, [%1];" : "=r"(page) : "l"(from));
    return page;
}

// 16 bytes that are read once, hence without a place in L1; or zeros. Not by ld.global.nc: the kernel ahead, which may append to
// what is read, has not ended when this one begins. Nor with a cache policy: with one ptxas emits illegal copies where it adds
// addresses in uniform registers (extend.cu).
__device__ __forceinline__ uint4 load_once(const void* from) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}
__device__ __forceinline__ uint4 load_once_or_zero(bool exists, const void* from) {
    uint4 v = {0, 0, 0, 0};
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
                 : "l"(from), "r"(static_cast<u32>(exists)));
    return v;
}

// Loads that stand before this begin before those behind it: ptxas moves no load across it, and else those last that are wanted
// first. All lanes of a warp come here.
__device__ __forceinline__ void hold_loads() { __syncwarp(); }

// Reads past L1, which may hold a line from before another block wrote it.
__device__ __forceinline__ float4 load_cg_if(bool exists, const float4* from) {
    float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4]; }"
                 : "+f"(v.x), "+f"(v.y), "+f"(v.z), "+f"(v.w)
                 : "l"(from), "r"(static_cast<u32>(exists))
                 : "memory");
    return v;
}

// The same, or from an address of shared memory, or neither.
__device__ __forceinline__ float4 load_either(bool is_global, const float4* from, bool is_shared, u32 address) {
    float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
    asm volatile(
        "{ .reg .pred p, q; setp.ne.u32 p, %6, 0; setp.ne.u32 q, %7, 0; @p ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4]; "
        "@q ld.shared.v4.f32 {%0, %1, %2, %3}, [%5]; }"
        : "+f"(v.x), "+f"(v.y), "+f"(v.z), "+f"(v.w)
        : "l"(from), "r"(address), "r"(static_cast<u32>(is_global)), "r"(static_cast<u32>(is_shared))
        : "memory");
    return v;
}

__device__ __forceinline__ float2 load_cg_if(bool exists, const float2* from) {
    float2 v = {0.0f, 0.0f};
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %3, 0; @p ld.global.cg.v2.f32 {%0, %1}, [%2]; }"
                 : "+f"(v.x), "+f"(v.y)
                 : "l"(from), "r"(static_cast<u32>(exists))
                 : "memory");
    return v;
}

__device__ __forceinline__ float2 load_cg(const float2* from) {
    float2 v;
    asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(from) : "memory");
    return v;
}

// Plain stores of vectors may compile to scalar ones, which ask for each sector several times.
__device__ __forceinline__ void store_global(uint2* to, uint2 v) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(v.x), "r"(v.y) : "memory");
}

__device__ __forceinline__ void store_global(float2* to, float2 v) {
    asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(v.x), "f"(v.y) : "memory");
}

__device__ __forceinline__ void store_global(float4* to, float4 v) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
}

__device__ __forceinline__ float4 load_shared(u32 address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ float load_shared_float(u32 address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
    return v;
}

__device__ __forceinline__ u32 load_shared_u32(u32 address) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}

__device__ __forceinline__ uint2 load_shared_u32x2(u32 address) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
    return v;
}

__device__ __forceinline__ void store_shared(u32 address, u32 value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared(u32 address, float2 v) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(v.x), "f"(v.y) : "memory");
}

__device__ __forceinline__ float2 load_shared_pair(u32 address) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
    return v;
}

__device__ __forceinline__ void store_shared(u32 address, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ void store_shared(u32 address, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ void store_shared(u32 address, float4 v) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
}
