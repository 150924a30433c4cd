// A cluster of blocks shares one item: each reads an equal part of it, the first block merges them in its shared memory.
//
// For problems whose fixed cost of a launch exceeds that of reading the cache: no partial results in global memory, no counter,
// and cuts that follow from the real lengths, so that nothing waits for the plan.
#pragma once
#include "combine.cuh"
#include "ptx/barriers.cuh"
#include "ptx/cluster.cuh"

// The parts of the item, in the shared memory of the cluster's first block.
struct ClusterParts {
    float4 output[kCluster][kRows][kVectors];  // unnormalised; of no use where the sum is 0
    float2 state[kCluster][kRows];             // (maximum, sum)
    u64 arrived;                               // mbarrier: all of them are there
};

static_assert(kCluster == 1 || BLOCK_STATE_BYTES % 16 == 0, "the parts follow the block's state");

__device__ __forceinline__ int cluster_rank() { return blockIdx.x % kCluster; }

// Stores a float4 of this block's part where the first block finds it.
__device__ __forceinline__ void put_part(ClusterParts& parts, int row, int vector, float4 output, RowState state) {
    const int rank = cluster_rank();
    const u32 arrived = shared_of_block(shared_address(&parts.arrived), 0);
    store_async(shared_of_block(shared_address(&parts.output[rank][row][vector]), 0), arrived, output);
    if (vector == 0) {
        store_async(shared_of_block(shared_address(&parts.state[rank][row]), 0), arrived, make_float2(state.maximum, state.sum));
    }
}

// Lets the first block of a cluster know how much of its item's parts will come. The barrier counts one arrival.
__device__ __forceinline__ void expect_parts(ClusterParts& parts, const Segment& segment) {
    arrive_for_bytes(parts.arrived, kCluster * segment.valid_rows * static_cast<u32>(kVectors * sizeof(float4) + sizeof(float2)));
}

// Merges the parts and writes the answer: a row per warp.
__device__ __forceinline__ void merge_cluster(const DecodeParams& p, const Segment& segment, ClusterParts& parts) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int row = warp; row < segment.valid_rows; row += kWarps) {
        const RowOutput at(p, segment, row);  // while the parts come
        wait_for_phase(parts.arrived, 0);
        const MergedStates<kCluster> merged(p.score_scale, false, [&](int i) { return parts.state[i][row]; });
        float lse;
        const Answer answer = merge_other(p, at, finish_row(p, at, merged.state, lse), lse);
        for (int vector = lane; vector < kVectors; vector += 32) {
            float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            for_each<kCluster>([&](int i) {
                if (parts.state[i][row].y != 0.0f) add_weighted(o, merged.weight[i], parts.output[i][row][vector]);
            });
            store_answer(p, at, vector, o, answer);
        }
        __syncwarp();
        if (lane == 0 && p.softmax_lse) p.softmax_lse[at.lse] = lse;
    }
}
