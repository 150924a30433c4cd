// From the warps' partial results to the answer: warps meet in shared memory, blocks in global memory.
//
// A partial result of some keys is (maximum m, sum l, output O) per row: O = sum exp2(score - m) V, l = sum exp2(score - m).
// Several are merged as O = sum_i exp2(m_i - m) O_i, likewise l, with m the largest m_i (Milakov and Gimelshein,
// "Online normalizer calculation for softmax"). The order is the order of the keys, so results never depend on timing.
#pragma once
#include "config.cuh"
#include "segment.cuh"

constexpr int kVectors = kHeadDimV / 4;  // float4s of an output row
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLog2e = 1.4426950408889634f;

struct RowState {
    float maximum, sum;
};

// What the warps of a block tell each other when an item ends.
struct WarpStates {
    float2 row[kWarps][kRows];  // (maximum, sum)
    u32 slot[kWarps];           // the free slot of each warp's ring
    u32 is_last;                // whether this block arrived last at an item
};

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
    o = make_float4(o.x * factor, o.y * factor, o.z * factor, o.w * factor);
    store4<Element>(p.out, at.out + vector * 4, o);
}

__device__ __forceinline__ float4* partial_output(const DecodeParams& p, int slot) {
    return reinterpret_cast<float4*>(p.partials) + static_cast<long long>(slot) * (kRows * kVectors);
}

__device__ __forceinline__ float2* partial_states(const DecodeParams& p, int slot) {
    float* states = p.partials + static_cast<long long>(p.num_slots) * kRows * kHeadDimV;
    return reinterpret_cast<float2*>(states) + static_cast<long long>(slot) * kRows;
}

// Merges the warps' results of a segment and hands each float4 of a row to put(row, vector, output, state).
// Each warp passes its outputs through the free slot of its ring, 8 rows at a time: the rest of the ring is filling with the
// next item's keys meanwhile. A block barrier must follow before the slots and states change.
template <typename Math, typename Softmax, typename Put>
__device__ __forceinline__ void merge_warps(const Segment& segment, const Math& math, const Softmax& softmax,
                                            WarpStates& states, u32 free_slot, Put put) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int g = 0; g < kRowGroups; ++g) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
            const float sum = softmax.row_sum(g, column);
            if (lane < 4) states.row[warp][g * 8 + lane * 2 + column] = make_float2(softmax.row_maximum(g, column), sum);
        }
    }
    if (lane == 0) states.slot[warp] = free_slot;
    __syncwarp();  // all lanes have read the values that lay in the slot

#pragma unroll 1
    for (int g = 0; g * 8 < segment.valid_rows; ++g) {
        if (g > 0) __syncthreads();
#pragma unroll
        for (int r = 0; r < kRowGroups; ++r) {
            if (r == g) math.store(r, free_slot, lane);  // registers have no index
        }
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < 8 * kVectors; i += kThreads) {
            const int row = g * 8 + i / kVectors, vector = i % kVectors;
            if (row >= segment.valid_rows) break;
            RowState merged = {kLowest, 0.0f};
#pragma unroll
            for (int w = 0; w < kWarps; ++w) merged.maximum = fmaxf(merged.maximum, states.row[w][row].x);
            float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
            for (int w = 0; w < kWarps; ++w) {
                const float weight = exp2_approx(states.row[w][row].x - merged.maximum);
                merged.sum += weight * states.row[w][row].y;
                const float4 part = load_shared(states.slot[w] + OutputTile::offset(i / kVectors, vector * 4));
                o.x += weight * part.x, o.y += weight * part.y, o.z += weight * part.z, o.w += weight * part.w;
            }
            put(row, vector, o, merged);
        }
    }
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
                float maximum = state.maximum;
#pragma unroll
                for (int lanes = kWide / 2; lanes > 0; lanes /= 2) {
                    maximum = fmaxf(maximum, __shfl_xor_sync(kFullWarp, maximum, lanes));
                }
                maximum = fmaxf(maximum, merged.maximum);
                const float alpha = exp2_approx(merged.maximum - maximum);
                const float weight = exp2_approx(state.maximum - maximum);
                float sum = weight * state.sum;
#pragma unroll
                for (int lanes = kWide / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kFullWarp, sum, lanes);
                merged = {maximum, merged.sum * alpha + sum};
                o.x *= alpha, o.y *= alpha, o.z *= alpha, o.w *= alpha;
#pragma unroll
                for (int i = 0; i < kWide; ++i) {
                    const float factor = __shfl_sync(kFullWarp, weight, i);
                    o.x += factor * part[i].x, o.y += factor * part[i].y;
                    o.z += factor * part[i].z, o.w += factor * part[i].w;
                }
            }
            float lse;
            const float factor = finish_row(p, at.head, merged, lse);
            if (exists) store_answer(p, at, vector, o, factor);
            if (vector == 0 && p.softmax_lse) p.softmax_lse[at.lse] = lse;
        }
    }
}
