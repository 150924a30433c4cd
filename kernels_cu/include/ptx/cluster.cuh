// Thread-block clusters (sm_90 and later).
#pragma once
#include "ptx/registers.cuh"

// The address at which this block reaches `address` of the shared memory of another block of its cluster.
__device__ __forceinline__ u32 shared_of_block(u32 address, u32 rank) {
    u32 mapped;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
}

// Stores to the shared memory of a block of the cluster, and counts the bytes at `barrier` there when they have arrived: whoever
// waits for that barrier sees them, and nobody waits for their way. Both addresses are those of the other block.
__device__ __forceinline__ void store_async(u32 address, u32 barrier, float4 v) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(address),
                 "r"(barrier), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
}

__device__ __forceinline__ void store_async(u32 address, u32 barrier, float2 v) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%2, %3}, [%1];" ::"r"(address),
                 "r"(barrier), "f"(v.x), "f"(v.y)
                 : "memory");
}

// Copies bytes of this block's shared memory, multiples of 16, to another block of the cluster, and counts them at `barrier` there.
// What was stored has been fenced as for wgmma.
__device__ __forceinline__ void copy_to_block(u32 to, u32 from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "r"(from),
                 "r"(bytes), "r"(barrier)
                 : "memory");
}

// Arrives at a barrier of another block of the cluster, whose address this is: what wgmma has read, and been waited for, may be
// written. Not as a release to the cluster, which waits for memory (MEMBAR).
__device__ __forceinline__ void arrive_at_block(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// A barrier of the cluster in two halves. What was written before the first is seen after the second only if it was fenced: an
// arrival that releases waits for memory (MEMBAR).
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
