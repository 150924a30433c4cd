// Results of an item's blocks, merged by all of them together: where an item lies in many blocks, or its results are large, one
// block at a time would read for longer than all of them have multiplied.
//
// Every block stores its part and arrives. When all have, those that waited for it (arrive_at_item) share out the units of the
// answer, a few rows or pieces of rows each. Who merges what changes no bit of it.
#pragma once
#include "rows_combine.cuh"

// What the warps of a block tell each other, in shared memory.
struct TogetherState {
    float4 output[kWarps][32];
    float2 state[kWarps];
};

class Together {
    static constexpr int kAtOnce = MERGE_LOADS;  // float4s of a lane whose loads are in flight together
    static constexpr int kFewest = 4;            // of them of one cell
    // A piece of a row is a cell, kCellVectors float4s: as many lanes load a part of it, other lanes others of its parts.
    static constexpr int kCellVectors = MERGE_VECTORS, kGroups = 32 / kCellVectors;
    static constexpr int kPieces = (kVectors + kCellVectors - 1) / kCellVectors;
    static constexpr int kPartsAtOnce = kAtOnce * kGroups, kFewestParts = kFewest * kGroups;  // the same of a warp
    static constexpr u32 kPartVectors = Parts::kStride * kSlotVectors;                        // from a part to the next one
    static constexpr int kLogLanes = 5, kLogWarps = 3;
    static_assert(kAtOnce % kFewest == 0 && kPartsAtOnce <= 1 << kLogLanes, "a lane weighs a part");
    static_assert(kWarps == 1 << kLogWarps, "warps share cells by powers of 2");

public:
    __device__ __forceinline__ Together(const DecodeParams& p, const Segment& segment, Cut cut, TogetherState& state)
        : p_(p), segment_(segment), state_(state), first_block_(cut.first_block), parts_(parts_of(cut)),
          cells_(segment.valid_rows * kPieces), warp_(threadIdx.x / 32), lane_(threadIdx.x % 32) {
        pin(parts_);  // else what follows from it takes registers in the main loop
        // A warp loads kPartsAtOnce parts of a cell, or those of several cells if there are enough for the warps of all blocks.
        log_warps_ = min(kLogWarps, log2_above((parts_ + kPartsAtOnce - 1) / kPartsAtOnce));
        warp_parts_ = shifted_up(parts_, log_warps_);
        log_width_ = shares_cells() ? kLogLanes  // warps that share one all see its row
                                    : log2_above(max(kFewestParts, warp_parts_));
        const int most_cells = max(1, kPartsAtOnce >> log_width_);
        log_cells_ = max(0, min(log2_below(most_cells), log2_above(cells_) - log2_above(parts_ * kWarps)));
        log_unit_ = kLogWarps - log_warps_ + log_cells_;
    }

    // All threads of a block that merges come here.
    __device__ __forceinline__ void merge(const MergeState& merge) {
        u32* const words = counters_of(p_, first_block_);
        const u32 first = merge.number << log_unit_;
        const u32 gone = say_gone(words, merge);
#pragma unroll 1
        for (u32 cell = first; cell < cells_; cell += merge.mergers << log_unit_) {
            if (cell != first) worker_barrier();  // all have read what the warps of a cell had found
            merge_unit(cell);
        }
        clear_counters(words, merge, gone);
    }

private:
    // The logarithm of the least power of 2 that is no less.
    static __device__ __forceinline__ int log2_above(int number) { return 32 - __clz(number - 1); }
    static __device__ __forceinline__ int log2_below(int number) { return 31 - __clz(number); }
    // number / 2^log, no less.
    static __device__ __forceinline__ int shifted_up(int number, int log) { return (number + (1 << log) - 1) >> log; }

    // This lane's float4 of a cell, among those of a slot, and whether there is one.
    static constexpr bool kIsWhole = kVectors % kCellVectors == 0;
    __device__ __forceinline__ u32 vector() const { return kGroups == 1 ? lane_ : lane_ % kCellVectors; }
    __device__ __forceinline__ u32 group() const { return kGroups == 1 ? 0 : lane_ / kCellVectors; }
    __device__ __forceinline__ u32 place_of(u32 cell) const {
        return (kIsWhole ? cell * kCellVectors : cell / kPieces * kVectors + cell % kPieces * kCellVectors) + vector();
    }
    __device__ __forceinline__ bool has_vector(u32 cell) const {
        return kIsWhole || cell % kPieces * kCellVectors + vector() < kVectors;
    }

    __device__ __forceinline__ bool shares_cells() const { return log_warps_ > 0; }
    __device__ __forceinline__ int number_in_cell() const { return warp_ & (1 << log_warps_) - 1; }

    // Merges the unit that begins with a cell.
    __device__ __forceinline__ void merge_unit(u32 cell_of_unit) {
        u32 first_cell = cell_of_unit + (warp_ >> log_warps_ << log_cells_);
        // Of the `number`-th part that is loaded: its cell, its number there, and whether there is such a cell.
        const auto cell_of = [&](u32 number) { return first_cell + (number >> log_width_); };
        const auto part_of = [&](u32 number) { return number & ((1 << log_width_) - 1); };
        const auto has_cell = [&](u32 number) { return number >> log_width_ + log_cells_ == 0 && cell_of(number) < cells_; };
        RowState merged = {kLowest, 0.0f};
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        // Once, unless there are more parts than all warps can load.
        int first_part = number_in_cell() * warp_parts_, count = min(warp_parts_, parts_ - first_part);
#pragma unroll 1
        for (int done = 0; done < warp_parts_; done += kPartsAtOnce, first_part += kPartsAtOnce, count -= kPartsAtOnce) {
            pin(first_cell), pin(log_width_);  // else what follows from them is found before the first load
            // Lane i weighs the i-th; lanes of one cell are neighbours. Their states come first: weights are found while the parts
            // are on their way.
            const bool is_part = lane_ < kPartsAtOnce && has_cell(lane_) && static_cast<int>(part_of(lane_)) < count;
            const u32 row = cell_of(lane_) / kPieces;
            const int slot = slot_of_part(first_block_, first_part + part_of(lane_));
            const float2 loaded = load_cg_if(is_part, partial_states(p_, slot) + row);
            hold_loads();
            // This is done once or twice, from a cold instruction cache, and takes as long as its instructions: neighbouring parts
            // of a cell have an address in common.
            float4 part[kAtOnce];
            for_each<kAtOnce / kFewest>([&](int quad) {
                const u32 number = quad * kFewestParts + group(), cell = cell_of(number);
                const u32 first = first_part + part_of(number);
                const int there = has_cell(number) && has_vector(cell) ? count - part_of(number) : 0;
                const float4* const from = partial_output(p_, 0) + ((first_block_ + first) * kPartVectors + place_of(cell));
                for_each<kFewest>([&](int i) {
                    const u32 place = i == 0 && first == 0 ? kSlotVectors : i * kGroups * kPartVectors;  // place_of_part
                    part[quad * kFewest + i] = load_cg_if(i * kGroups < there, from + place);
                });
            });
            const RowOutput at(p_, segment_, row);
            const RowState state = {is_part ? loaded.x : kLowest, loaded.y};
            const auto over_lanes = [&](float value, auto joined) {  // over those of a cell
                for_each<kLogLanes>([&](int bit) {
                    const float other = __shfl_xor_sync(kFullWarp, value, 1 << bit);
                    if (bit < log_width_) value = joined(value, other);
                });
                return value;
            };
            const float before = merged.maximum;
            merged.maximum = fmaxf(before, over_lanes(state.maximum, [](float a, float b) { return fmaxf(a, b); }));
            float weight = weight_of(state.maximum, merged.maximum, p_.score_scale);
            const float kept = weight_of(before, merged.maximum, p_.score_scale);
            merged.sum = merged.sum * kept + over_lanes(state.sum * weight, [](float a, float b) { return a + b; });
            scale(sum, kept);
            if (!shares_cells()) weight *= finish(cell_of(lane_), at, merged, is_part && part_of(lane_) == 0);
            for_each<kAtOnce / kFewest>([&](int quad) {
                const int number = quad * kFewestParts, next = number + kFewestParts;
                for_each<kFewest>([&](int i) {
                    const int lane = number + i * kGroups + group();
                    add_weighted(sum, __shfl_sync(kFullWarp, weight, lane), part[quad * kFewest + i]);
                });
                if (!shares_cells() && (part_of(next) == 0 || next == kPartsAtOnce)) {
                    add_groups(sum);
                    const long long begin = __shfl_sync(kFullWarp, at.out, number);
                    if (has_cell(number)) store(cell_of(number), begin, sum);
                    sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                }
            });
            if (shares_cells() && done + kPartsAtOnce >= warp_parts_) {
                add_groups(sum);
                merge_warps(first_cell, at, merged, sum);
            }
        }
    }

    // Adds up what lanes have found that have the same float4 of a cell.
    static __device__ __forceinline__ void add_groups(float4& sum) {
#pragma unroll
        for (int lanes = kCellVectors; lanes < 32; lanes *= 2) {
            sum.x += __shfl_xor_sync(kFullWarp, sum.x, lanes), sum.y += __shfl_xor_sync(kFullWarp, sum.y, lanes);
            sum.z += __shfl_xor_sync(kFullWarp, sum.z, lanes), sum.w += __shfl_xor_sync(kFullWarp, sum.w, lanes);
        }
    }

    // Brings together what the warps of a cell have found.
    __device__ __forceinline__ void merge_warps(u32 cell, const RowOutput& at, RowState merged, float4 sum) {
        state_.output[warp_][lane_] = sum;
        if (lane_ == 0) state_.state[warp_] = make_float2(merged.maximum, merged.sum);
        worker_barrier();
        if (number_in_cell() != 0 || cell >= cells_) return;
        const auto exists = [&](int i) { return i >> log_warps_ == 0; };
        float2 states[kWarps];
        for_each<kWarps>([&](int i) { states[i] = exists(i) ? state_.state[warp_ + i] : make_float2(kLowest, 0.0f); });
        merged = {kLowest, 0.0f};
        for_each<kWarps>([&](int i) { merged.maximum = fmaxf(merged.maximum, states[i].x); });
        sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for_each<kWarps>([&](int i) {
            if (!exists(i)) return;
            const float weight = weight_of(states[i].x, merged.maximum, p_.score_scale);
            merged.sum += weight * states[i].y;
            add_weighted(sum, weight, state_.output[warp_ + i][lane_]);
        });
        scale(sum, finish(cell, at, merged, lane_ == 0));
        store(cell, at.out, sum);
    }

    // The factor of a cell's output; tells the LSE of its row if it is the row's first.
    __device__ __forceinline__ float finish(u32 cell, const RowOutput& at, RowState merged, bool may_tell) const {
        float lse;
        const float factor = finish_row(p_, at, merged, lse);
        if (may_tell && cell % kPieces == 0 && p_.softmax_lse) p_.softmax_lse[at.lse] = lse;
        return factor;
    }

    // Stores a cell of the row that begins at this element.
    __device__ __forceinline__ void store(u32 cell, long long begin, float4 output) const {
        const u32 place = cell % kPieces * kCellVectors + lane_;
        if (group() == 0 && has_vector(cell)) store4<OutElement>(p_.out, begin + place * 4, output);
    }

    const DecodeParams& p_;
    const Segment& segment_;
    TogetherState& state_;
    int first_block_, parts_;
    u32 cells_;
    u32 warp_, lane_;
    int log_warps_;   // of the number of warps that share a cell, each some of its parts
    int warp_parts_;  // of a cell that a warp loads ..
    int log_width_;   // .. in place of 2^log_width_
    int log_cells_;   // of the number of cells that a warp merges at once
    int log_unit_;    // of the number of cells that a block does
};
