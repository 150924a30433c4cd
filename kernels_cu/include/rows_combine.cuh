// From the results of blocks to the answer, where every warp of a block has rows of its own.
//
// Items that lie in several blocks are merged in a tree of fixed shape: a node has kWide children, in the order of the keys. Each
// child is stored in a slot of `partials`; the block that arrives last at a node folds its children and goes on to the node
// above. No block waits for another, results never depend on timing, and no block reads more than kWide results in a row
// (64 rows of 128 values are 33 KB each).
//
// With split_size a result is the left fold of the item's splits, whoever computes them: the block that begins an item folds its
// splits as they come, into its slot; blocks that go on with it keep each split in a slot, and the last to arrive folds them.
#pragma once
#include "combine.cuh"
#include "rows_softmax.cuh"

constexpr int kWide = 4;

// The results of a warp's rows as they lie in registers.
class RowResults {
public:
    __device__ __forceinline__ RowResults(const DecodeParams& p, const Segment& segment, Outputs& output, RowStates& states,
                                          int warp, int lane)
        : p_(p), segment_(segment), output_(output), states_(states),
          first_row_(warp / kColumnWarps * kWarpRows + lane / 4),
          column_(warp % kColumnWarps * (kColumnTiles * 8) + lane % 4 * 2),
          has_state_(warp % kColumnWarps == 0 && lane % 4 == 0) {}

    __device__ __forceinline__ RowStates& states() const { return states_; }

    __device__ __forceinline__ void store(int slot) const {
        for_rows([&](int t, int half, int row) {
            float* const to = outputs_of(slot, row);
            for_columns([&](int n) { store_global(reinterpret_cast<float2*>(to + n * 8), get(t, half, n)); });
            const RowState state = states_[t][half];
            if (has_state_) store_global(partial_states(p_, slot) + row, make_float2(state.maximum, state.sum));
        });
    }

    // Takes the fold of the results in a slot that this block alone uses, of which `before` are the states, and these.
    __device__ __forceinline__ void fold_after(int slot, const RowStates& before) {
        for_rows([&](int t, int half, int row) {
            RowState state = before[t][half];
            const Fold fold = Fold::of(state, states_[t][half], p_.score_scale);
            states_[t][half] = state;
            const float* const from = outputs_of(slot, row);
            for_columns([&](int n) {
                const float2 o = load_cg(reinterpret_cast<const float2*>(from + n * 8)), part = get(t, half, n);
                output_[t][n][half * 2] = fold(o.x, part.x), output_[t][n][half * 2 + 1] = fold(o.y, part.y);
            });
        });
    }

    __device__ __forceinline__ void answer() const {
        for_rows([&](int t, int half, int row) {
            const RowOutput at(p_, segment_, row);
            float lse;
            const float factor = finish_row(p_, at, states_[t][half], lse);
            for_columns([&](int n) {
                const float2 o = get(t, half, n);
                store2<OutElement>(p_.out, at.out + column_ + n * 8, o.x * factor, o.y * factor);
            });
            if (has_state_ && p_.softmax_lse) p_.softmax_lse[at.lse] = lse;
        });
    }

private:
    // For each of this lane's rows that exist: visit(row tile, half, row of the row block).
    template <typename Visit>
    __device__ __forceinline__ void for_rows(Visit visit) const {
        for_each<kRowTiles, 2>([&](int t, int half) {
            const int row = first_row_ + t * 16 + half * 8;
            if (row < segment_.valid_rows) visit(t, half, row);
        });
    }

    // For each column tile that exists: where warps divide the columns, the last one may have more than there are.
    template <typename Visit>
    __device__ __forceinline__ void for_columns(Visit visit) const {
        for_each<kColumnTiles>([&](int n) {
            if (kColumnTiles * kColumnWarps * 8 == kHeadDimV || column_ + n * 8 < kHeadDimV) visit(n);
        });
    }

    // This lane's columns of a row in a slot.
    __device__ __forceinline__ float* outputs_of(int slot, int row) const {
        return reinterpret_cast<float*>(partial_output(p_, slot)) + row * kHeadDimV + column_;
    }

    __device__ __forceinline__ float2 get(int t, int half, int n) const {
        return make_float2(output_[t][n][half * 2], output_[t][n][half * 2 + 1]);
    }

    const DecodeParams& p_;
    const Segment& segment_;
    Outputs& output_;
    RowStates& states_;
    int first_row_, column_;
    bool has_state_;
};

// What the threads of a block have in common when they fold, in shared memory.
struct FoldState {
    float2 steps[kRows][kWide];  // Folds: of each child but the first, in whose place stands the Answer
    u32 is_last;
};

// Whether this block is the last of `others` + 1 to arrive at a counter; what they have stored is then seen.
__device__ __forceinline__ bool arrives_last(unsigned int* counter, u32 others, FoldState& fold) {
    worker_barrier();
    if (threadIdx.x == 0) fold.is_last = atomic_inc_acq_rel(counter, others) == others;
    worker_barrier();
    return fold.is_last;
}

// Folds `count` results in order, 1 to kWide; slot_of(i) is the slot of the i-th. The result goes to the first one's slot, or is
// the answer. A barrier must stand between two calls.
template <typename SlotOf>
__device__ __forceinline__ void fold_slots(const DecodeParams& p, const Segment& segment, FoldState& fold, int count,
                                           bool is_answer, SlotOf slot_of) {
#pragma unroll 1
    for (int row = threadIdx.x; row < segment.valid_rows; row += kThreads) {
        float2 part[kWide];
        for_each<kWide>([&](int i) { part[i] = load_cg(partial_states(p, slot_of(min(i, count - 1))) + row); });
        RowState state = {part[0].x, part[0].y};
#pragma unroll
        for (int i = 1; i < kWide; ++i) {
            if (i >= count) break;
            const Fold step = Fold::of(state, {part[i].x, part[i].y}, p.score_scale);
            fold.steps[row][i] = make_float2(step.kept, step.added);
        }
        if (is_answer) {
            const RowOutput at(p, segment, row);
            float lse;
            const Answer answer = merge_other(p, at, finish_row(p, at, state, lse), lse);
            fold.steps[row][0] = make_float2(answer.own, answer.other);
            if (p.softmax_lse) p.softmax_lse[at.lse] = lse;
        } else {
            store_global(partial_states(p, slot_of(0)) + row, make_float2(state.maximum, state.sum));
        }
    }
    worker_barrier();
    constexpr int kAtOnce = 4;  // float4s of each result whose loads are in flight together
    const int vectors = segment.valid_rows * kVectors;
#pragma unroll 1
    for (int first = threadIdx.x; first < vectors; first += kAtOnce * kThreads) {
        float4 part[kAtOnce][kWide];
        for_each<kAtOnce, kWide>([&](int n, int i) {
            const int vector = first + n * kThreads;
            part[n][i] = load_cg_if(i < count && vector < vectors, partial_output(p, slot_of(min(i, count - 1))) + vector);
        });
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
            const int vector = first + n * kThreads, row = vector / kVectors;
            if (vector >= vectors) break;
            float4 o = part[n][0];
#pragma unroll
            for (int i = 1; i < kWide; ++i) {
                if (i >= count) break;
                const float2 step = fold.steps[row][i];
                o = Fold{step.x, step.y}(o, part[n][i]);
            }
            if (is_answer) {
                const float2 answer = fold.steps[row][0];
                store_answer(p, RowOutput(p, segment, row), vector % kVectors, o, {answer.x, answer.y});
            } else {
                store_global(partial_output(p, slot_of(0)) + vector, o);
            }
        }
    }
}

// Writes the answer of an item that this block has read whole; results to be merged in pass through its slot.
__device__ __forceinline__ void finish_whole(const DecodeParams& p, const Segment& segment, const RowResults& results,
                                             FoldState& fold) {
    if (!p.merge.merge_lse) return results.answer();
    const int slot = 2 * share_number() + 1;
    results.store(slot);
    worker_barrier();
    fold_slots(p, segment, fold, 1, true, [&](int) { return slot; });
}

// Hands a segment's results on: to the output, or to the other blocks of its item.
__device__ __forceinline__ void hand_on(const DecodeParams& p, const Share& share, const Segment& segment,
                                        const RowResults& results, FoldState& fold) {
    if (segment.starts && segment.ends) return finish_whole(p, segment, results, fold);
    const Cut cut = cut_item(share, segment);
    const int parts = cut.last_block - cut.first_block + 1;
    // Of all items in its share, block b can have begun but not finished only the last one, slot 2 b + 1, and continue only the
    // first one, slot 2 b.
    const auto slot_of = [&](int part) { return 2 * (cut.first_block + part) + (part == 0); };
    int node = share_number() - cut.first_block;  // the first part of those whose results this block has
    results.store(slot_of(node));
    // A node of `level` whose first part is i has the counter of part i + level. It has more than 4^level parts, so that part
    // exists and is not the item's last one, whose block may be the first of the next item.
    int level = 0;
#pragma unroll 1
    for (int size = 1; size < parts; size *= kWide, ++level) {  // size: parts of a child
        const int parent = node - node % (size * kWide);
        const int children = min(kWide, (parts - parent + size - 1) / size);
        if (children > 1) {
            if (!arrives_last(counter_of(p, cut.first_block + parent + level), children - 1, fold)) return;
            const bool is_root = parts <= size * kWide;
            fold_slots(p, segment, fold, children, is_root, [&](int i) { return slot_of(parent + i * size); });
        }
        node = parent;
    }
}

// The same with split_size, whose segments are splits. `folded` are the states of the item's splits before this one, where they
// are this block's.
__device__ __forceinline__ void hand_on_split(const DecodeParams& p, const Share& share, const Segment& segment,
                                              RowResults& results, RowStates& folded, FoldState& fold) {
    if (segment.split < 0) return;
    const Cut cut = cut_item(share, segment);
    const int slots = split_slots(p, segment.item, cut.first_block);
    if (segment.starts) {
        const int slot = 2 * share_number() + 1;
        if (segment.split > 0) results.fold_after(slot, folded);
        if (segment.last && segment.ends) return finish_whole(p, segment, results, fold);
        results.store(slot);
        for_each<kRowTiles, 2>([&](int t, int half) { folded[t][half] = results.states()[t][half]; });
    } else if (segment.keys.end > segment.keys.begin) {  // an empty split has no slot
        results.store(slots + segment.split);
    }
    if (!segment.last || !arrives_last(counter_of(p, cut.first_block), cut.last_block - cut.first_block, fold)) return;
    const int begin = segment.visible.begin, splits = split_count(p, segment.visible);
    const int cut_key = load_cut(p, cut.first_block + 1).key;  // where the first block's splits end
    const int first = min(max(cut_key, begin) / p.split_size - begin / p.split_size, splits);
    int done = first;  // splits that lie folded in the first block's slot
#pragma unroll 1
    do {
        const int count = min(kWide, 1 + splits - done);
        if (done > first) worker_barrier();
        fold_slots(p, segment, fold, count, done + count - 1 == splits,
                   [&](int i) { return i == 0 ? 2 * cut.first_block + 1 : slots + done - 1 + i; });
        done += count - 1;
    } while (done < splits);
}
