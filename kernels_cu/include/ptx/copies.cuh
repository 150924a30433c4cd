// Asynchronous copies from global to shared memory (cp.async).
#pragma once
#include "ptx/registers.cuh"

// The KV cache is read once per launch: let it leave L2 first, unless told otherwise. Before sm_90 the policy would have to be
// moved to uniform registers for every copy, so copies go without.
template <bool kFirst = true>
__device__ __forceinline__ u64 eviction_policy() {
    u64 policy = 0;
#if __CUDA_ARCH__ >= 900
    if constexpr (kFirst) {
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
    } else {
        asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0;" : "=l"(policy));
    }
#endif
    return policy;
}

// Predicated rather than branched around: a branch between warp-wide instructions costs more than the instruction. A row that
// is less than a line of 128 bytes brings the line to L2, for whoever reads the rest of it.
template <int kRowBytes = 128>
__device__ __forceinline__ void cp_async_16_if(bool exists, u32 to, const void* from, u64 policy) {
    const u32 wanted = exists;
#if __CUDA_ARCH__ >= 900
    if constexpr (kRowBytes < 128) {
        asm volatile(
            "{ .reg .pred p; setp.ne.u32 p, %0, 0; "
            "@p cp.async.cg.shared.global.L2::cache_hint.L2::128B [%1], [%2], 16, %3; }" ::"r"(wanted),
            "r"(to), "l"(from), "l"(policy)
            : "memory");
    } else {
        asm volatile(
            "{ .reg .pred p; setp.ne.u32 p, %0, 0; @p cp.async.cg.shared.global.L2::cache_hint [%1], [%2], 16, %3; }" ::"r"(
                wanted),
            "r"(to), "l"(from), "l"(policy)
            : "memory");
    }
#else
    if constexpr (kRowBytes < 128) {
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p cp.async.cg.shared.global.L2::128B [%1], [%2], 16; }" ::"r"(
                         wanted),
                     "r"(to), "l"(from)
                     : "memory");
    } else {
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p cp.async.cg.shared.global [%1], [%2], 16; }" ::"r"(wanted),
                     "r"(to), "l"(from)
                     : "memory");
    }
#endif
}

// Fills 16 bytes with zeros; `from` is any valid address, of which nothing is read.
__device__ __forceinline__ void cp_async_zero_if(bool exists, u32 to, const void* from) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p cp.async.cg.shared.global [%1], [%2], 16, 0; }" ::"r"(
                     static_cast<u32>(exists)),
                 "r"(to), "l"(from)
                 : "memory");
}

// Copies 16 bytes, or fills them with zeros; `from` is a valid address either way.
__device__ __forceinline__ void cp_async_16_or_zero(bool exists, u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0) : "memory");
}

// Copies 4 bytes.
__device__ __forceinline__ void cp_async_4_if(bool exists, u32 to, const void* from) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p cp.async.ca.shared.global [%1], [%2], 4; }" ::"r"(
                     static_cast<u32>(exists)),
                 "r"(to), "l"(from)
                 : "memory");
}

// Copies 4 bytes, or fills them with zeros; `from` is a valid address either way.
__device__ __forceinline__ void cp_async_4_or_zero(bool exists, u32 to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(exists ? 4 : 0) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
