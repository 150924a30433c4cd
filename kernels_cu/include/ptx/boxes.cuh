// Copies of boxes of a tensor by the tensor memory accelerator (cp.async.bulk.tensor, sm_90): one thread asks for a box, and its
// bytes count themselves at an mbarrier. They arrive as wgmma wants them, so no fence stands between.
#pragma once
#include "ptx/registers.cuh"

// A tensor in memory and the box that is copied of it, as the driver encodes them (CUtensorMap).
struct __align__(64) TensorMap {
    unsigned char bytes[128];
};

// Whether this is the one lane of the warp that was chosen to do something; all lanes ask.
__device__ __forceinline__ bool elect_lane() {
    u32 is_elected;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(is_elected));
    return is_elected;
}

// Lets a phase of the barrier wait for so many bytes more; comes before the copies that bring them.
__device__ __forceinline__ void expect_bytes(u64& barrier, u32 bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
                 : "memory");
}

// Copies the box that begins at these coordinates, the contiguous one first; what of it is beyond the tensor becomes zeros.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap& map, int column, int row, int head, int page, u64& barrier,
                                         u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, %4, "
        "%5}], [%6], %7;" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(head), "r"(page), "r"(shared_address(&barrier)), "l"(policy)
        : "memory");
}

// The same for several blocks of the cluster, a bit each: their bytes come to the same place, and count at the same barrier, of each.
__device__ __forceinline__ void copy_box_to_blocks(u32 to, const TensorMap& map, int column, int row, int head, int page,
                                                   u64& barrier, unsigned short blocks, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], "
        "[%1, {%2, %3, %4, %5}], [%6], %7, %8;" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(head), "r"(page), "r"(shared_address(&barrier)), "h"(blocks), "l"(policy)
        : "memory");
}

// Brings the map near, so that the first copy does not wait for it.
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
