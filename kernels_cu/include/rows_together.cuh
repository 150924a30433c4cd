// Results of an item's blocks, merged by all of them together: where an item lies in many blocks, or its results are large, one
// block at a time would read for longer than all of them have multiplied.
//
// Every block stores its part and arrives. When all have arrived, the item's answer is handed out in units, a few rows or
// pieces of rows each, to whoever is there: the block that came last, and those whose share ends here and that have waited for
// it. They do not wait for long, so nobody depends on anybody: if need be, the last one merges all. Who merges what changes no
// bit of it.
#pragma once
#include "rows_combine.cuh"

// What the warps of a block tell each other, in shared memory.
struct TogetherState {
    float4 output[kWarps][32];
    float2 state[kWarps];
    u32 unit[2];
};

class Together {
    // An item's counter counts three things: blocks that have arrived, those that have left before all had, and units that have
    // been asked for. Every block asks until there is none, or leaves: so the last of all is known. It may be one that leaves:
    // others can have merged all between its last look and its departure.
    static constexpr u32 kArrival = 1, kLeft = 1 << 10, kUnit = 1 << 20, kPartsMask = kLeft - 1;
    static constexpr int kLogAtOnce = 5, kAtOnce = 1 << kLogAtOnce;  // float4s of a lane whose loads are in flight together
    static constexpr int kFewest = 4;                               // of them of one cell
    static constexpr int kPieces = (kVectors + 31) / 32;  // of a row; a piece of one row is a cell

public:
    static constexpr int kMostParts = kWarps * kAtOnce;

    __device__ __forceinline__ Together(const DecodeParams& p, const Segment& segment, Cut cut, TogetherState& state)
        : p_(p), segment_(segment), state_(state), first_block_(cut.first_block),
          parts_(cut.last_block - cut.first_block + 1), cells_(segment.valid_rows * kPieces),
          warp_(threadIdx.x / 32), lane_(threadIdx.x % 32) {
        // A lane loads kAtOnce parts of a cell, or the parts of several cells.
        cell_warps_ = parts_ <= kAtOnce ? 1 : parts_ <= 2 * kAtOnce ? 2 : parts_ <= 4 * kAtOnce ? 4 : 8;
        warp_parts_ = (parts_ + cell_warps_ - 1) / cell_warps_;
        log_width_ = max(2, 32 - __clz(warp_parts_ - 1));
        const int even = (cells_ + parts_ * kWarps - 1) / (parts_ * kWarps);
        warp_cells_ = max(1, min(kAtOnce >> log_width_, even));
        unit_cells_ = kWarps / cell_warps_ * warp_cells_;
    }

    __device__ __forceinline__ int slot_of(int part) const { return slot_of_part(first_block_, part); }

    // All threads come here when the block has stored its part.
    __device__ __forceinline__ void merge(bool may_wait) {
        u32* const counter = counters_of(p_, first_block_);
        const u32 units = (cells_ + unit_cells_ - 1) / unit_cells_;
        worker_barrier();
        if (threadIdx.x == 0) {
            u32 arrived = (atomic_add_acq_rel(counter, kArrival) & kPartsMask) + 1;
#pragma unroll 1
            for (int i = 0; may_wait && i < kPatience && arrived < parts_; ++i) arrived = load_acquire(counter) & kPartsMask;
            const u32 unit = count(counter, arrived == parts_ ? kUnit : kLeft, units);
            state_.unit[0] = arrived == parts_ ? unit : units;
        }
        worker_barrier();
#pragma unroll 1
        for (int turn = 0;; turn ^= 1) {
            const u32 unit = state_.unit[turn];
            if (unit >= units) break;
            u32 next;
            if (threadIdx.x == 0) next = count(counter, kUnit, units);
            merge_unit(unit);
            if (threadIdx.x == 0) state_.unit[turn ^ 1] = next;
            worker_barrier();
        }
    }

private:
    // Asks for a unit and returns it, there is none from `units` on, or leaves. The last of all to ask in vain or to leave leaves
    // the counter as it was found.
    __device__ __forceinline__ u32 count(u32* counter, u32 what, u32 units) const {
        const u32 before = atomic_add_relaxed(counter, what), after = before + what, asked = after / kUnit;
        const bool is_last = asked >= units && asked - units + (after / kLeft & kPartsMask) == parts_;
        if (is_last) atomic_add_relaxed(counter, 0u - after);  // back to zero
        return before / kUnit;
    }

    __device__ __forceinline__ void merge_unit(u32 unit) {
        const int first_part = warp_ % cell_warps_ * warp_parts_, count = min(warp_parts_, parts_ - first_part);
        const int first_cell = unit * unit_cells_ + warp_ / cell_warps_ * warp_cells_;
        const int width = 1 << log_width_;
        // Of the `number`-th load: its cell, its part, and whether there is such a cell.
        const auto cell_of = [&](int number) { return first_cell + (number >> log_width_); };
        const auto part_of = [&](int number) { return number & (width - 1); };
        const auto has_cell = [&](int number) { return (number >> log_width_) < warp_cells_ && cell_of(number) < cells_; };
        // Lane i weighs load i; lanes of one cell are neighbours. Their states come first: weights are found while the parts are
        // on their way.
        const bool is_part = has_cell(lane_) && part_of(lane_) < count;
        const int row = cell_of(lane_) / kPieces;
        const float2 loaded = load_cg_if(is_part, partial_states(p_, slot_of(first_part + part_of(lane_))) + row);
        // This is done once or twice, from a cold instruction cache, and takes as long as its instructions: neighbouring parts of a
        // cell have an address in common.
        float4 part[kAtOnce];
        for_each<kAtOnce / kFewest>([&](int group) {
            const int number = group * kFewest, cell = cell_of(number), first = first_part + part_of(number);
            const int vector = cell % kPieces * 32 + lane_;
            const int there = has_cell(number) && vector < kVectors ? count - part_of(number) : 0;
            const float4* const from =
                partial_output(p_, (first_block_ + first) * Parts::kStride) + cell / kPieces * kVectors + vector;
            for_each<kFewest>([&](int i) {
                const int slots = i * Parts::kStride + (i == 0 && first == 0 ? place_of_part(0) : 0);
                part[number + i] = load_cg_if(i < there, from + slots * kSlotVectors);
            });
        });
        const RowOutput at(p_, segment_, row);
        const RowState state = {is_part ? loaded.x : kLowest, loaded.y};
        const auto over_lanes = [&](float value, auto joined) {  // over those of a cell
            for_each<kLogAtOnce>([&](int bit) {
                const float other = __shfl_xor_sync(kFullWarp, value, 1 << bit);
                if (bit < log_width_) value = joined(value, other);
            });
            return value;
        };
        RowState merged;
        merged.maximum = over_lanes(state.maximum, [](float a, float b) { return fmaxf(a, b); });
        float weight = weight_of(state.maximum, merged.maximum, p_.score_scale);
        merged.sum = over_lanes(state.sum * weight, [](float a, float b) { return a + b; });
        if (cell_warps_ == 1) weight *= finish(cell_of(lane_), at, merged, is_part && part_of(lane_) == 0);
        float4 sum;
        for_each<kAtOnce / kFewest>([&](int group) {
            const int number = group * kFewest;
            if (part_of(number) == 0) sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            for_each<kFewest>([&](int i) { add_weighted(sum, __shfl_sync(kFullWarp, weight, number + i), part[number + i]); });
            if (cell_warps_ == 1 && part_of(number + kFewest) == 0) {
                const long long begin = __shfl_sync(kFullWarp, at.out, number);
                if (has_cell(number)) store(cell_of(number), begin, sum);
            }
        });
        // Warps that share a cell have so many parts each that all lanes have that cell.
        if (cell_warps_ > 1) merge_warps(first_cell, at, merged, sum);
    }

    // Brings together what the warps of a cell have found.
    __device__ __forceinline__ void merge_warps(int cell, const RowOutput& at, RowState merged, float4 sum) {
        state_.output[warp_][lane_] = sum;
        if (lane_ == 0) state_.state[warp_] = make_float2(merged.maximum, merged.sum);
        worker_barrier();
        if (warp_ % cell_warps_ != 0 || cell >= cells_) return;
        const auto exists = [&](int i) { return i < cell_warps_; };
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
    __device__ __forceinline__ float finish(int cell, const RowOutput& at, RowState merged, bool may_tell) const {
        float lse;
        const float factor = finish_row(p_, at, merged, lse);
        if (may_tell && cell % kPieces == 0 && p_.softmax_lse) p_.softmax_lse[at.lse] = lse;
        return factor;
    }

    // Stores a cell of the row that begins at this element.
    __device__ __forceinline__ void store(int cell, long long begin, float4 output) const {
        const int vector = cell % kPieces * 32 + lane_;
        if (vector < kVectors) store4<OutElement>(p_.out, begin + vector * 4, output);
    }

    const DecodeParams& p_;
    const Segment& segment_;
    TogetherState& state_;
    int first_block_, parts_, cells_;
    int warp_, lane_;
    int cell_warps_;  // warps that share a cell, each some of its parts
    int warp_parts_;  // parts of a cell that a warp loads ..
    int log_width_;   // .. in so many of its loads, a power of 2
    int warp_cells_;  // cells that a warp merges at once
    int unit_cells_;  // cells of a unit
};
