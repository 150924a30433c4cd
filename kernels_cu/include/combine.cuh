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
    long long token;  // query position, of ragged queries among all
    int sequence, head;
    float unit;  // what 1 in an output stands for

    __device__ __forceinline__ RowOutput(const DecodeParams& p, const Segment& s, int row) {
        const int packed = s.first_row + row, query = query_of(p, packed);
        head = s.kv_head * p.group + packed - query * p.group;
        const long long start = p.lengths.cu_seqlens_q ? p.lengths.cu_seqlens_q[s.sequence] : 0;
        sequence = s.sequence, token = start + query;
        out = sequence * p.out_batch_stride + token * p.out_row_stride + head * p.out_head_stride;
        lse = sequence * p.lse_batch_stride + head * p.lse_head_stride + token;
        unit = 1.0f;
        if constexpr (kIsQuantised && !kScalesTiles) {
            unit = p.value_scale * (Element::kBytes == 4 ? 1.0f : unit_of<CacheElement>());
            if (!kHasValueScales) unit *= descale_of(p.v_descale, p.v_descale_strides, s.sequence, s.kv_head);
        }
    }

    __device__ __forceinline__ long long merge_out(const MergeWith& m, int column) const {
        return sequence * m.batch_stride + token * m.row_stride + head * m.head_stride + column * m.column_stride;
    }
    __device__ __forceinline__ long long merge_lse(const MergeWith& m) const {
        return sequence * m.lse_batch_stride + head * m.lse_head_stride + token * m.lse_row_stride;
    }
};

// How a row's merged output becomes its answer: output * own + merge_out * other, which is not read where `other` is 0.
struct Answer {
    float own, other;
};

// Merges a row that is finished, of which `factor` and `lse` are known, with the results over other keys, if there are some.
// Where softmax_lse is merge_lse, no thread may write it before all threads of the row have been here.
__device__ __forceinline__ Answer merge_other(const DecodeParams& p, const RowOutput& at, float factor, float& lse) {
    if constexpr (!kMerges) return {factor, 0.0f};
    const float other = p.merge.merge_lse[at.merge_lse(p.merge)];
    if (other == -infinity()) return {factor, 0.0f};
    const float top = fmaxf(lse, other);
    const float own_weight = exp2_approx((lse - top) * kLog2e), other_weight = exp2_approx((other - top) * kLog2e);
    const float sum = own_weight + other_weight, inverse = reciprocal_approx(sum);
    lse = fmaf(log2_approx(sum), kLn2, top);
    return {factor * (own_weight * inverse), other_weight * inverse};
}

// The factor that turns a row's merged output into what it sees of these keys, and its LSE in natural units. A sink is one more
// key with a value of zero; it enters here, once, however the item was split.
__device__ __forceinline__ float finish_row(const DecodeParams& p, const RowOutput& at, RowState state, float& lse) {
    float factor = 1.0f, top = state.maximum * p.lse_scale;
    if (p.sinks) {
        const float sink = p.sinks[at.head];
        const float above = fmaxf(state.maximum * p.score_scale, kLowest) - sink * kLog2e;  // in log2 units
        if (state.sum != 0.0f && above >= 0.0f) {
            state.sum += exp2_approx(-above);
        } else {
            factor = state.sum != 0.0f ? exp2_approx(above) : 0.0f;
            state.sum = state.sum * factor + (sink > -infinity() ? 1.0f : 0.0f);
            top = sink;
        }
    }
    if (state.sum == 0.0f) {
        lse = -infinity();
        return 0.0f;
    }
    lse = fmaf(log2_approx(state.sum), kLn2, top);
    if (kIsQuantised && factor == 0.0f) return 0.0f;  // no key beside the sink: 0 whatever the scale of the values is
    return factor * at.unit * reciprocal_approx(state.sum);
}

__device__ __forceinline__ void store_answer(const DecodeParams& p, const RowOutput& at, int vector, float4 o, Answer answer) {
    scale(o, answer.own);
    if (kMerges && answer.other != 0.0f) {
        const auto* const other = static_cast<const OutElement::Bits*>(p.merge.merge_out) + at.merge_out(p.merge, vector * 4);
        const auto load = [&](int column) { return OutElement::to_float(other[column * p.merge.column_stride]); };
        add_weighted(o, answer.other, make_float4(load(0), load(1), load(2), load(3)));
    }
    store4<OutElement>(p.out, at.out + vector * 4, o);
}

// Rows of ragged queries that belong to no sequence give 0 and LSE -inf; the blocks share them out.
// Those of sequences are begin .. end.
__device__ __forceinline__ void clear_rows_of_none(const DecodeParams& p, int begin, int end) {
    begin = min(max(begin, 0), p.total_q);
    end = min(max(end, begin), p.total_q);
    const int heads = p.num_heads_kv * p.group;
#pragma unroll 1
    for (int number = blockIdx.x; number < p.total_q - (end - begin); number += gridDim.x) {
        const long long row = number < begin ? number : number + (end - begin);
#pragma unroll 1
        for (int i = threadIdx.x; i < heads * kVectors; i += kThreads) {
            const int head = i / kVectors, vector = i % kVectors;
            store4<OutElement>(p.out, row * p.out_row_stride + head * p.out_head_stride + vector * 4, make_float4(0, 0, 0, 0));
            if (vector == 0 && p.softmax_lse) p.softmax_lse[head * p.lse_head_stride + row] = -infinity();
        }
    }
}

constexpr int kSlotVectors = kRowParts * kRows * kVectors;  // float4s from a slot's outputs to the next one's

__device__ __forceinline__ float4* partial_output(const DecodeParams& p, int slot) {
    return reinterpret_cast<float4*>(p.partials) + static_cast<long long>(slot) * kSlotVectors + row_part() * (kRows * kVectors);
}

// The slots of the splits with which blocks go on; before them every block has two. At most one cut item begins in a block, so
// cut items have room by their own numbers or by those of these blocks, whichever are fewer.
__device__ __forceinline__ int split_slots(const DecodeParams& p, int item, int first_block) {
    return 2 * gridDim.x + (p.slots_by_item ? item : first_block) * p.max_splits;
}

__device__ __forceinline__ float2* partial_states(const DecodeParams& p, int slot) {
    float* states = p.partials + static_cast<long long>(p.num_slots) * kRowParts * kRows * kHeadDimV;
    return reinterpret_cast<float2*>(states) + (static_cast<long long>(slot) * kRowParts + row_part()) * kRows;
}

// Where the parts of an item lie: part 0 in slot `first`, part i in slot `next + i * kStride`.
struct Parts {
    // Without split_size a block has two slots: for the item that starts in it, and for the one that it goes on with.
    static constexpr int kStride = kHasSplitSize ? 1 : 2;
    int first, next, count;

    __device__ __forceinline__ int slot(int part) const { return part == 0 ? first : next + part * kStride; }
};

// Merges the parts of rows row_begin .. row_end of an item and writes the answer: kRowsAtOnce rows per warp and kWide parts of each
// at a time, all of their loads in flight. `thread` is the thread's number.
template <int kRowsAtOnce = 1, int kWide = 16>
__device__ __forceinline__ void merge_parts(const DecodeParams& p, const Segment& segment, const Parts& parts, int row_begin,
                                            int row_end, int thread) {
    constexpr int kLanes = kWide <= 4 ? 4 : kWide <= 16 ? 16 : 32;  // that weigh a row's parts
    static_assert(kWide <= kLanes && kRowsAtOnce * kLanes <= 32, "a lane weighs a part of a row");
    const int warp = thread / 32, lane = thread % 32;
    // What lane r * kLanes + i has of row r and part i.
    const auto of_lane = [](float value, int r, int i) { return __shfl_sync(kFullWarp, value, r * kLanes + i); };
#pragma unroll 1
    for (int first = row_begin + warp * kRowsAtOnce; first < row_end; first += kWarps * kRowsAtOnce) {
        const int row = kRowsAtOnce == 1 ? first : min(first + lane / kLanes % kRowsAtOnce, row_end - 1);  // that this lane weighs
        const RowOutput at(p, segment, row);
        float lse;
#pragma unroll 1
        for (int vector = lane; vector < (kVectors + 31) / 32 * 32; vector += 32) {
            const bool exists = vector < kVectors;
            RowState merged = {kLowest, 0.0f};
            float4 o[kRowsAtOnce];
            for_each<kRowsAtOnce>([&](int r) { o[r] = make_float4(0.0f, 0.0f, 0.0f, 0.0f); });
#pragma unroll 1
            for (int begin = 0; begin < parts.count; begin += kWide) {
                // Lane i % kLanes weighs part begin + i, while the parts are on their way.
                const int number_of_lane = begin + lane % kLanes;
                const bool is_part = lane % kLanes < kWide && number_of_lane < parts.count;
                const float2 loaded = load_cg_if(is_part, partial_states(p, parts.slot(number_of_lane)) + row);
                const int number = exists ? parts.count - begin : 0;
                float4 part[kRowsAtOnce][kWide];
                for_each<kRowsAtOnce>([&](int r) {
                    const int offset = (first + r) * kVectors + vector;
                    const bool is_row = kRowsAtOnce == 1 || first + r < row_end;
                    const float4* const from = partial_output(p, parts.next + begin * Parts::kStride) + offset;
                    part[r][0] = load_cg_if(number > 0 && is_row, partial_output(p, parts.slot(begin)) + offset);
#pragma unroll
                    for (int i = 1; i < kWide; ++i) {
                        part[r][i] = load_cg_if(i < number && is_row, from + i * Parts::kStride * kSlotVectors);
                    }
                });
                const RowState state = {is_part ? loaded.x : kLowest, loaded.y};
                if constexpr (kHasSplitSize) {
                    const Fold mine = fold_lanes<kLanes>(p.score_scale, state, merged.maximum);
                    for_each<kWide>([&](int i) {
                        const bool is_first = begin + i == 0, is_next = begin + i < parts.count;
                        Fold fold;
                        for_each<kRowsAtOnce>([&](int r) {
                            fold = {of_lane(mine.kept, r, i), of_lane(mine.added, r, i)};
                            if (is_first) o[r] = part[r][i];
                            else if (is_next) o[r] = fold(o[r], part[r][i]);
                        });
                        const int r = kRowsAtOnce == 1 ? 0 : lane / kLanes % kRowsAtOnce;
                        const float sum = of_lane(state.sum, r, i);
                        if (kRowsAtOnce > 1) fold = {of_lane(mine.kept, r, i), of_lane(mine.added, r, i)};
                        if (is_first) merged.sum = sum;
                        else if (is_next) merged.sum = fold(merged.sum, sum);
                    });
                } else {
                    float before;
                    const float weight = merge_lanes<kLanes>(p.score_scale, state, merged, before);
                    for_each<kRowsAtOnce>([&](int r) {
                        scale(o[r], kRowsAtOnce == 1 ? before : of_lane(before, r, 0));
                        for_each<kWide>([&](int i) { add_weighted(o[r], of_lane(weight, r, i), part[r][i]); });
                    });
                }
            }
            const Answer answer = merge_other(p, at, finish_row(p, at, merged, lse), lse);
            for_each<kRowsAtOnce>([&](int r) {
                const Answer of_row = kRowsAtOnce == 1 ? answer : Answer{of_lane(answer.own, r, 0), of_lane(answer.other, r, 0)};
                if (!exists || (kRowsAtOnce > 1 && first + r >= row_end)) return;
                store_answer(p, kRowsAtOnce == 1 ? at : RowOutput(p, segment, first + r), vector, o[r], of_row);
            });
        }
        __syncwarp();
        const bool is_first_of_row = lane % kLanes == 0 && first + lane / kLanes == row && lane < kRowsAtOnce * kLanes;
        const bool is_rows = kRowsAtOnce == 1 ? lane == 0 : is_first_of_row;
        if (is_rows && p.softmax_lse) p.softmax_lse[at.lse] = lse;
    }
}

// The cut that says which blocks hold the parts of a segment's item.
__device__ __forceinline__ Cut cut_item(const Share& share, const Segment& segment) {
    return segment.starts ? share.end : share.begin;
}

// How many blocks have parts of its item.
__device__ __forceinline__ int parts_of(const Cut& cut) { return cut.last_block - cut.first_block + 1; }

// Hands the result of a segment on: to its output, or as a partial result to the block that arrives last at its item, which
// merges all of them.
//
// merge_block(put) brings together what the warps of the block found and gives each float4 of a row to
// put(row, vector, output, state). is_last lies in shared memory.
template <typename MergeBlock>
__device__ __forceinline__ void finish_segment(const DecodeParams& p, const Share& share, const Segment& segment,
                                               u32& is_last, MergeBlock merge_block) {
    const bool whole = segment.starts && segment.ends;
    const bool is_answer = whole && segment.last;
    Parts parts;
    int slot, before = -1;  // where this result goes, and to what it is added
    if constexpr (kHasSplitSize) {
        if (segment.split < 0) return;
        // A block that begins an item folds its splits as they come, in two slots in turn: nobody writes what others still read.
        // A block that goes on with one keeps each split in a slot of its own, and the last block folds them.
        const Cut cut = cut_item(share, segment);
        const int splits = split_slots(p, segment.item, cut.first_block);
        if (segment.starts) {
            slot = 2 * blockIdx.x + segment.split % 2;
            if (segment.split > 0) before = slot ^ 1;
        } else {
            slot = splits + segment.split;
        }
        if (segment.last && !whole) {
            const int begin = segment.visible.begin, count = split_count(p, segment.visible);
            const int cut_key = load_cut(p, cut.first_block + 1).key;  // where the first block's splits end
            const int folded = min(max(cut_key, begin) / p.split_size - begin / p.split_size, count);
            parts.count = 1 + count - folded;
            parts.first = 2 * cut.first_block + (max(folded, 1) - 1) % 2;
            parts.next = splits + folded - 1;
        }
    } else {
        // Of all items in its share, block b can have begun but not finished only the last one, slot 2 b + 1, and continue
        // only the first one, slot 2 b.
        const Cut cut = cut_item(share, segment);
        slot = 2 * blockIdx.x + segment.starts;
        parts.count = parts_of(cut);
        parts.first = 2 * cut.first_block + 1;
        parts.next = 2 * cut.first_block;
    }
    // With split_size, an empty split has no slot. Else every block of first_block .. last_block has one, as has the beginning of
    // an item, which the merge reads even if it is empty.
    if (!kHasSplitSize || segment.starts || segment.keys.end > segment.keys.begin) {
        merge_block([&](int row, int vector, float4 output, RowState state) {
            if (kHasSplitSize && before >= 0) {
                const float4 sum = load_cg_if(true, partial_output(p, before) + row * kVectors + vector);
                const float2 loaded = load_cg(partial_states(p, before) + row);
                RowState folded = {loaded.x, loaded.y};
                output = Fold::of(folded, state, p.score_scale)(sum, output);
                state = folded;
            }
            if (is_answer) {
                const RowOutput at(p, segment, row);
                float lse;
                const float factor = finish_row(p, at, state, lse);
                store_answer(p, at, vector, output, merge_other(p, at, factor, lse));
                if (vector == 0 && p.softmax_lse) {
                    // Others may not have read merge_lse yet, which may be the same array: the LSE waits in this block's slot.
                    if constexpr (kMerges) partial_states(p, slot)[row] = make_float2(lse, 0.0f);
                    else p.softmax_lse[at.lse] = lse;
                }
            } else {
                store_global(partial_output(p, slot) + row * kVectors + vector, output);
                if (vector == 0) partial_states(p, slot)[row] = make_float2(state.maximum, state.sum);
            }
        });
    }
    if (kMerges && is_answer && p.softmax_lse) {
        __syncthreads();
        if (threadIdx.x < segment.valid_rows) {
            p.softmax_lse[RowOutput(p, segment, threadIdx.x).lse] = load_cg(partial_states(p, slot) + threadIdx.x).x;
        }
    }
    if (is_answer || !segment.last) return;
    __syncthreads();
    if (!whole) {
        const Cut cut = cut_item(share, segment);
        if (threadIdx.x == 0) {
            const u32 others = parts_of(cut) - 1;
            is_last = atomic_inc_acq_rel(p.counters + cut.first_block, others) == others;
        }
        __syncthreads();
        if (!is_last) return;
    }
    merge_parts(p, segment, parts, 0, segment.valid_rows, threadIdx.x);
}
