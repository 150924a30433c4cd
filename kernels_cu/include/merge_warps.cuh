// From the warps of a decode.cu block to one result: they meet in shared memory when an item ends.
#pragma once
#include "combine.cuh"
#include "tiles.cuh"

// What the warps of a block tell each other when an item ends.
struct WarpStates {
    float2 row[kWarps][kRows];  // (maximum, sum); the maxima also before that, each warp's own
    u32 slot[kWarps];           // the free slot of each warp's ring
    u32 is_last;                // whether this block arrived last at an item
};

// Merges the warps' results of a segment and hands each float4 of a row to put(row, vector, output, state).
// Each warp passes its outputs through the free slot of its ring, 8 rows at a time: the rest of the ring is filling with the
// next item's keys meanwhile. A block barrier must follow before the slots and states change.
template <typename Math, typename Softmax, typename Put>
__device__ __forceinline__ void merge_warps(float scale, const Segment& segment, const Math& math, const Softmax& softmax,
                                            WarpStates& states, u32 free_slot, Put put) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for_each<kRowGroups, 2>([&](int g, int column) {
        const float sum = softmax.row_sum(g, column);
        if (lane < 4) {
            float2& row = states.row[warp][g * 8 + lane * 2 + column];
            row = make_float2(softmax.has_maximum(g, column) ? row.x : kLowest, sum);
        }
    });
    if (lane == 0) states.slot[warp] = free_slot;
    __syncwarp();  // all lanes have read the values that lay in the slot

#pragma unroll 1
    for (int g = 0; g * 8 < segment.valid_rows; ++g) {
        if (g > 0) __syncthreads();
        // Registers have no index. No for_each: a compiler that sees r == g before it unrolls stores row group g by its index.
#pragma unroll
        for (int r = 0; r < kRowGroups; ++r) {
            if (r == g) math.store(r, free_slot, lane);
        }
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < 8 * kVectors; i += kThreads) {
            const int row = g * 8 + i / kVectors, vector = i % kVectors;
            if (row >= segment.valid_rows) break;
            const MergedStates<kWarps> merged(scale, true, [&](int w) { return states.row[w][row]; });
            float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            for_each<kWarps>([&](int w) {
                const u32 part = states.slot[w] + OutputTile::offset(i / kVectors, vector * 4);
                add_weighted(o, merged.weight[w], load_shared(part));
            });
            put(row, vector, o, merged.state);
        }
    }
}
