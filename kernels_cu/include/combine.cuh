// From partial results to the answer: blocks that read parts of one item meet in global memory.
//
// A part of an item is a state and an output per row (states.cuh) in a slot of `partials`. The block that arrives last at an
// item merges its parts, in the order of keys.
#pragma once
#include "config.cuh"
#include "segment.cuh"
#include "states.cuh"

constexpr int kVectors = kHeadDimV / 4;  // float4s of an output row
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLog2e = 1.4426950408889634f;

// Where a row's results go.
struct RowOutput {
    long long out;  // element of `out`
    long long lse;
    int head;

    __device__ __forceinline__ RowOutput(const DecodeParams& p, const Segment& s, int row) {
        const int packed = s.first_row + row, query = query_of(p, packed);
        head = s.kv_head * p.group + packed - query * p.group;
        const long long start = p.lengths.cu_seqlens_q ? p.lengths.cu_seqlens_q[s.sequence] : 0;
        out = s.sequence * p.out_batch_stride + (start + query) * p.out_row_stride + head * p.out_head_stride;
        lse = s.sequence * p.lse_batch_stride + head * p.lse_head_stride + start + query;
    }
};

// The factor that turns a row's merged output into the answer, and its LSE in natural units. A sink is one more key with a
// value of zero; it enters here, once, however the item was split.
__device__ __forceinline__ float finish_row(const DecodeParams& p, int head, RowState state, float& lse) {
    float factor = 1.0f;
    if (p.sinks) {
        const float sink = p.sinks[head] * kLog2e;
        const float maximum = fmaxf(state.maximum, sink);
        factor = exp2_approx(state.maximum - maximum);
        state.sum = state.sum * factor + exp2_approx(sink - maximum);
        state.maximum = maximum;
    }
    if (state.sum == 0.0f) {
        lse = -infinity();
        return 0.0f;
    }
    lse = (state.maximum + log2_approx(state.sum)) * kLn2;
    return factor * reciprocal_approx(state.sum);
}

__device__ __forceinline__ void store_answer(const DecodeParams& p, const RowOutput& at, int vector, float4 o, float factor) {
    scale(o, factor);
    store4<Element>(p.out, at.out + vector * 4, o);
}

__device__ __forceinline__ float4* partial_output(const DecodeParams& p, int slot) {
    return reinterpret_cast<float4*>(p.partials) + static_cast<long long>(slot) * (kRows * kVectors);
}

__device__ __forceinline__ float2* partial_states(const DecodeParams& p, int slot) {
    float* states = p.partials + static_cast<long long>(p.num_slots) * kRows * kHeadDimV;
    return reinterpret_cast<float2*>(states) + static_cast<long long>(slot) * kRows;
}

// Where the parts of an item lie: part 0 in slot `first`, part i in slot `next + i * kStride`.
struct Parts {
    // A block has two slots: for the item that starts in it, and for the one that it goes on with.
    static constexpr int kStride = kHasSplitSize ? 1 : 2;
    int first, next, count;

    __device__ __forceinline__ int slot(int part) const { return part == 0 ? first : next + part * kStride; }
};

// Merges the parts of an item and writes the answer: a row per warp, kWide parts at a time, all of their loads in flight.
__device__ __forceinline__ void merge_parts(const DecodeParams& p, const Segment& segment, const Parts& parts) {
    constexpr int kWide = 16;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int row = warp; row < segment.valid_rows; row += kWarps) {
        const RowOutput at(p, segment, row);
#pragma unroll 1
        for (int vector = lane; vector < (kVectors + 31) / 32 * 32; vector += 32) {
            const bool exists = vector < kVectors;
            RowState merged = {kLowest, 0.0f};
            float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
            for (int begin = 0; begin < parts.count; begin += kWide) {
                const int number = exists ? parts.count - begin : 0;
                const float4* const from = partial_output(p, parts.next + begin * Parts::kStride) + row * kVectors + vector;
                float4 part[kWide];
                part[0] = load_cg_if(number > 0, partial_output(p, parts.slot(begin)) + row * kVectors + vector);
#pragma unroll
                for (int i = 1; i < kWide; ++i) {
                    part[i] = load_cg_if(i < number, from + i * Parts::kStride * kRows * kVectors);
                }
                // Lane i % kWide weighs part begin + i.
                const int mine = begin + lane % kWide;
                RowState state = {kLowest, 0.0f};
                if (mine < parts.count) {
                    const float2 loaded = load_cg(partial_states(p, parts.slot(mine)) + row);
                    state = {loaded.x, loaded.y};
                }
                float before;
                const float weight = merge_lanes<kWide>(state, merged, before);
                scale(o, before);
                for_each<kWide>([&](int i) { add_weighted(o, __shfl_sync(kFullWarp, weight, i), part[i]); });
            }
            float lse;
            const float factor = finish_row(p, at.head, merged, lse);
            if (exists) store_answer(p, at, vector, o, factor);
            if (vector == 0 && p.softmax_lse) p.softmax_lse[at.lse] = lse;
        }
    }
}

// The cut that says which blocks hold the parts of a segment's item.
__device__ __forceinline__ Cut cut_item(const Share& share, const Segment& segment) {
    return segment.starts ? share.end : share.begin;
}

// Hands the result of a segment on: to its output, or as a partial result to the block that arrives last at its item, which
// merges all of them.
//
// merge_block(put) brings together what the warps of the block found and gives each float4 of a row to
// put(row, vector, output, state). is_last lies in shared memory.
template <typename MergeBlock>
__device__ __forceinline__ void finish_segment(const DecodeParams& p, const Share& share, const Segment& segment,
                                               u32& is_last, MergeBlock merge_block) {
    const bool whole = segment.starts && segment.ends;
    Parts parts;
    int slot;
    if constexpr (kHasSplitSize) {
        const int first_split = clamped_split(p, segment.visible.begin);
        parts.count = segment.visible.end > segment.visible.begin
                          ? clamped_split(p, segment.visible.end - 1) - first_split + 1
                          : 0;
        const int item_slot = segment.item * p.max_splits;
        slot = item_slot + segment.split;
        parts.first = item_slot + first_split;
        parts.next = parts.first;
    } else {
        // Of all items in its share, block b can have begun but not finished only the last one, slot 2 b + 1, and continue
        // only the first one, slot 2 b.
        const Cut cut = cut_item(share, segment);
        slot = 2 * blockIdx.x + segment.starts;
        parts.count = cut.last_block - cut.first_block + 1;
        parts.first = 2 * cut.first_block + 1;
        parts.next = 2 * cut.first_block;
    }
    const bool is_answer = whole && (!kHasSplitSize || parts.count <= 1);
    // With split_size, an empty part has no slot. Without, every block of first_block .. last_block has one, which the merge
    // reads even if the part is empty.
    if (is_answer || !kHasSplitSize || segment.keys.end > segment.keys.begin) {
        merge_block([&](int row, int vector, float4 output, RowState state) {
            if (is_answer) {
                const RowOutput at(p, segment, row);
                float lse;
                const float factor = finish_row(p, at.head, state, lse);
                store_answer(p, at, vector, output, factor);
                if (vector == 0 && p.softmax_lse) p.softmax_lse[at.lse] = lse;
            } else {
                store_global(partial_output(p, slot) + row * kVectors + vector, output);
                if (vector == 0) partial_states(p, slot)[row] = make_float2(state.maximum, state.sum);
            }
        });
    }
    if (is_answer || !segment.last) return;
    __syncthreads();
    if (!whole) {
        const Cut cut = cut_item(share, segment);
        if (threadIdx.x == 0) {
            const u32 others = cut.last_block - cut.first_block;
            is_last = atomic_inc_acq_rel(p.counters + cut.first_block, others) == others;
        }
        __syncthreads();
        if (!is_last) return;
    }
    merge_parts(p, segment, parts);
}
