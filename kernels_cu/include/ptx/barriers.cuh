// Barriers in shared memory (mbarrier), at which threads and copies arrive, and named ones of some warps.
#pragma once
#include "ptx/registers.cuh"

// Sets a barrier up: a phase of it ends with `count` arrivals.
__device__ __forceinline__ void init_barrier(u64& barrier, u32 count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(count) : "memory");
}

// Tells those that arrive there by bytes, and the blocks of a cluster, which barriers this thread has set up: with the next barrier
// of the block or arrival at that of the cluster.
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives as soon as all copies that this thread has started have landed.
__device__ __forceinline__ void arrive_with_copies(u64& barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Arrives now: what this thread has written before is seen by all that wait.
__device__ __forceinline__ void arrive(u64& barrier) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(&barrier)) : "memory");
}

// Arrives now, and lets the phase wait for so many bytes of stores and copies that count themselves.
__device__ __forceinline__ void arrive_for_bytes(u64& barrier, u32 bytes) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(shared_address(&barrier)),
                 "r"(bytes)
                 : "memory");
}

// Asks until the phase of this parity has ended; the first one has parity 0.
#define ASK_UNTIL_OVER(wait) \
    u32 is_over; \
    do { \
        asm volatile("{ .reg .pred p; mbarrier." wait ".parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" \
                     : "=r"(is_over) \
                     : "r"(shared_address(&barrier)), "r"(parity) \
                     : "memory"); \
    } while (!is_over)

// Waits for it. Not by try_wait, which may sleep too long.
__device__ __forceinline__ void wait_for_phase(u64& barrier, u32 parity) { ASK_UNTIL_OVER("test_wait"); }

// The same for those who have time: they sleep, and take neither instructions nor power from others.
__device__ __forceinline__ void sleep_until_phase(u64& barrier, u32 parity) { ASK_UNTIL_OVER("try_wait"); }
#undef ASK_UNTIL_OVER

// A barrier of `threads` threads, whole warps, beside __syncthreads, which is number 0.
__device__ __forceinline__ void named_barrier(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Arrives at such a barrier and goes on: what this thread has written before is seen by the threads that wait there.
__device__ __forceinline__ void named_barrier_arrive(int number, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// A barrier of `threads` threads at which all of them learn whether `value` is true for one of them.
__device__ __forceinline__ bool named_barrier_any(int number, int threads, bool value) {
    u32 any;
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %3, 0; bar.red.or.pred p, %1, %2, p; selp.u32 %0, 1, 0, p; }"
                 : "=r"(any)
                 : "r"(number), "r"(threads), "r"(static_cast<u32>(value))
                 : "memory");
    return any != 0;
}
