// From the results of blocks to the answer, where every warp of a block has rows of its own.
//
// An item that lies in several blocks is merged by as many of them as are there when the last one arrives: a block whose share
// is at an end waits for the others if all of them have begun with the item, and merges some of its rows. Whoever merges a row,
// its parts come in the order of the keys, so that results never depend on timing.
//
// With split_size a result is the left fold of the item's splits, whoever computes them: the block that begins an item folds its
// splits as they come, into its slot; blocks that go on with it keep each split in a slot, and the last to arrive folds them.
#pragma once
#include "combine.cuh"
#include "ptx/matrices.cuh"
#include "rows_softmax.cuh"

// Whether lanes exchange results before they store them. Others than wgmma's kernels with up to 128 columns a warp lack the
// registers: they would keep some of their main loop in local memory.
constexpr bool kExchanges = USES_WGMMA && kColumnTiles <= 16;

// Parts of a row whose loads are under way together: eight KV heads of one sequence lie in 16 to 18 of an H200's blocks each.
// Others than wgmma's kernels have no registers for so many.
constexpr int kMergedAtOnce = USES_WGMMA && !kHasSplitSize ? 20 : 16;

// Whether the rows of an answer pass through shared memory, where a kernel has room for them: else 256 columns of a warp are 64
// stores of 4 bytes a lane, and fill half of each sector.
#ifdef STAGES_ANSWERS
constexpr bool kStagesAnswers = STAGES_ANSWERS;
#else
constexpr bool kStagesAnswers = false;
#endif

// The results of a warp's rows as they lie in registers.
class RowResults {
    static constexpr int kRowChunks = kColumnTiles * kColumnWarps;  // of 16 bytes, as an answer lies in shared memory

public:
    // `staged`, with kStagesAnswers, is an address of kRows rows.
    __device__ __forceinline__ RowResults(const DecodeParams& p, const Segment& segment, Outputs& output, RowStates& states,
                                          int warp, int lane, u32 staged = 0)
        : p_(p), segment_(segment), output_(output), states_(states),
          first_row_(warp / kColumnWarps * kWarpRows + lane / 4),
          column_(warp % kColumnWarps * (kColumnTiles * 8) + lane % 4 * kLaneColumns),
          has_state_(warp % kColumnWarps == 0 && lane % 4 == 0), staged_(staged) {}

    __device__ __forceinline__ RowStates& states() const { return states_; }

    __device__ __forceinline__ void store(int slot) const {
        int first_row = first_row_;
        pin(first_row);  // else what follows from it takes registers in the main loop
        for_each<kRowTiles, 2>([&](int t, int half) {
            const int row = first_row + t * 16 + half * 8;
            const bool exists = row < segment_.valid_rows;
            if (kExchanges ? row / 8 * 8 >= segment_.valid_rows : !exists) return;  // the same in all lanes if they exchange
            store_row(outputs_of(slot, row), t, half, exists);
            const RowState state = states_[t][half];
            if (exists && has_state_) store_global(partial_states(p_, slot) + row, make_float2(state.maximum, state.sum));
        });
        if constexpr (kExchanges) __syncwarp();  // a lane may read what its neighbour has stored
    }

    // Takes the fold of the results in a slot that this block alone uses, of which `before` are the states, and these.
    __device__ __forceinline__ void fold_after(int slot, const RowStates& before) {
        for_rows([&](int t, int half, int row) {
            RowState state = before[t][half];
            const Fold fold = Fold::of(state, states_[t][half], p_.score_scale);
            states_[t][half] = state;
            const float* const from = outputs_of(slot, row);
            for_columns([&](int n) {
                const float2 o = load_cg(reinterpret_cast<const float2*>(from + tile_column(n)));
                for_each<2>([&](int i) { element(t, half, n, i) = fold(i == 0 ? o.x : o.y, element(t, half, n, i)); });
            });
        });
        if constexpr (kExchanges) __syncwarp();  // a lane may store where its neighbour has read
    }

    __device__ __forceinline__ void answer() const {
        float factors[kRowTiles][2] = {};
        for_rows([&](int t, int half, int row) {
            const RowOutput at(p_, segment_, row);
            float lse;
            const float factor = factors[t][half] = finish_row(p_, at, states_[t][half], lse);
            if constexpr (!kStagesAnswers) {
                for_columns([&](int n) {
                    const float2 o = get(t, half, n);
                    store2<OutElement>(p_.out, at.out + column_ + tile_column(n), o.x * factor, o.y * factor);
                });
            }
            if (has_state_ && p_.softmax_lse) p_.softmax_lse[at.lse] = lse;
        });
        if constexpr (kStagesAnswers) stage<OutElement>(factors), store_staged();
    }

private:
    // Stores this lane's columns of a row. Lanes side by side may exchange halves of what they have of two column tiles, so that
    // each has 16 bytes of one of them: half as many stores.
    __device__ __forceinline__ void store_row(float* to, int t, int half, bool exists) const {
        if constexpr (kExchanges) {
            const int odd = column_ / 2 % 2;
            to += odd * 6;  // to the next tile, and from its second column to its first
            for_each<kColumnTiles / 2>([&](int pair) {
                const float2 first = get(t, half, pair * 2), second = get(t, half, pair * 2 + 1), given = odd ? first : second;
                const float x = __shfl_xor_sync(kFullWarp, given.x, 1), y = __shfl_xor_sync(kFullWarp, given.y, 1);
                const float4 v = odd ? make_float4(x, y, second.x, second.y) : make_float4(first.x, first.y, x, y);
                if (exists && has_column(pair * 2 + odd)) store_global(reinterpret_cast<float4*>(to + pair * 16), v);
            });
        } else {
            for_columns([&](int n) { store_global(reinterpret_cast<float2*>(to + tile_column(n)), get(t, half, n)); });
        }
    }

    // The address of a chunk of a row on its way to memory. Rows in which lanes store together differ in banks.
    __device__ __forceinline__ u32 staged(int row, int chunk) const {
        return staged_ + (row * kRowChunks + (chunk ^ row % 8)) * 16;
    }

    // Stages the rows of a warp, two column tiles at a time: lane l names row l % 16 of tile l / 16.
    template <typename T>
    __device__ __forceinline__ void stage(const float (&factors)[kRowTiles][2]) const {
        static_assert(!kStagesAnswers || (kRowTiles == 1 && kColumnTiles % 8 == 0), "a warp's chunks begin at the first bank");
        const int lane = thread_number() % 32, row = first_row_ - lane / 4;
        if (row >= segment_.valid_rows) return;  // the same in all lanes
        const u32 to = staged(row + lane % 16, column_ / 8 + lane / 16);
        for_each<kColumnTiles / 2>([&](int pair) {
            const auto pack = [&](int half, int n) {
                const float2 o = get(0, half, n);
                return T::pack(o.x * factors[0][half], o.y * factors[0][half]);
            };
            const int n = pair * 2;
            const u32 packed[4] = {pack(0, n), pack(1, n), pack(0, n + 1), pack(1, n + 1)};
            stmatrix_x4((to ^ n % 8 * 16) + n / 8 * 128, packed);
        });
    }

    // Stores the rows that have been staged: every warp some of them, whole ones. One lane finds where a row begins for all.
    __device__ __forceinline__ void store_staged() const {
        constexpr int kAtOnce = 4, kPieces = (kRowChunks + 31) / 32;
        static_assert(!kStagesAnswers || (kRows % (kWarps * kAtOnce) == 0 && kRows / kWarps <= 32), "a lane finds one row");
        worker_barrier();
        const int thread = thread_number(), warp = thread / 32, lane = thread % 32;
        const long long begin = RowOutput(p_, segment_, min(warp + lane * kWarps, segment_.valid_rows - 1)).out;
#pragma unroll 1
        for (int first = 0; warp + first * kWarps < segment_.valid_rows; first += kAtOnce) {
            const auto row = [&](int i) { return warp + (first + i) * kWarps; };
            float4 v[kAtOnce][kPieces];
            for_each<kAtOnce, kPieces>([&](int i, int piece) { v[i][piece] = load_shared(staged(row(i), piece * 32 + lane)); });
            for_each<kAtOnce, kPieces>([&](int i, int piece) {
                const long long to = __shfl_sync(kFullWarp, begin, first + i) + (piece * 32 + lane) * 8;
                if (row(i) >= segment_.valid_rows || (piece * 32 + lane) * 8 >= kHeadDimV) return;
                store_global(reinterpret_cast<float4*>(static_cast<unsigned short*>(p_.out) + to), v[i][piece]);
            });
        }
    }

    // For each of this lane's rows that exist: visit(row tile, half, row of the row block).
    template <typename Visit>
    __device__ __forceinline__ void for_rows(Visit visit) const {
        for_each<kRowTiles, 2>([&](int t, int half) {
            const int row = row_of(t, half);
            if (row < segment_.valid_rows) visit(t, half, row);
        });
    }

    __device__ __forceinline__ int row_of(int t, int half) const { return first_row_ + t * 16 + half * 8; }

    // For each column tile that exists: where warps divide the columns, the last one may have more than there are.
    template <typename Visit>
    __device__ __forceinline__ void for_columns(Visit visit) const {
        for_each<kColumnTiles>([&](int n) {
            if (has_column(n)) visit(n);
        });
    }

    __device__ __forceinline__ bool has_column(int n) const {
        return kColumnTiles * kColumnWarps * 8 == kHeadDimV || column_ + tile_column(n) < kHeadDimV;
    }

    // This lane's columns of a row in a slot.
    __device__ __forceinline__ float* outputs_of(int slot, int row) const {
        return reinterpret_cast<float*>(partial_output(p_, slot)) + row * kHeadDimV + column_;
    }

    // The two columns of a row that count as column tile n: how far behind this lane's first one they are, and what is there.
    static __device__ __forceinline__ int tile_column(int n) { return kLaneColumns == 4 ? n / 2 * 16 + n % 2 * 2 : n * 8; }
    __device__ __forceinline__ float& element(int t, int half, int n, int i) const {
        return kLaneColumns == 4 ? output_[t][n / 2 * 2 + i][half * 2 + n % 2] : output_[t][n][half * 2 + i];
    }
    __device__ __forceinline__ float2 get(int t, int half, int n) const {
        return make_float2(element(t, half, n, 0), element(t, half, n, 1));
    }

    const DecodeParams& p_;
    const Segment& segment_;
    Outputs& output_;
    RowStates& states_;
    int first_row_, column_;
    bool has_state_;
    u32 staged_;
};

// Words of `counters` that the blocks of an item share, at those of its first block; 0 between launches.
enum ItemWord {
    kStarted,  // blocks that have begun with the item
    kArrived,  // blocks whose parts are stored, and what they do next: see arrive_at_item
    kGone,     // of those that merge, blocks that know it
    kItemWords
};

// The counters of an item that begins in this share, for blocks with the same rows.
__device__ __forceinline__ u32* counters_of(const DecodeParams& p, int share) {
    return p.counters + kItemWords * (share * kRowParts + row_part());
}

// What the threads of a block have in common when an item is merged, in shared memory.
struct MergeState {
    u32 mergers;  // blocks that merge the item; 0: this one does not
    u32 number;   // of this one among them
    u32 left;     // the pieces of the item that blocks have left to others, a bit each
};

// Asked for where an item ends, as all that is needed only there: the main loop has no register for it.
__device__ __forceinline__ bool is_first_thread() { return thread_number() == 0; }

// Whether a segment's item has other parts, and a thread says so when it begins.
__device__ __forceinline__ void start_part(const DecodeParams& p, const Share& share, const Segment& segment) {
    if (kHasSplitSize || (segment.starts && segment.ends)) return;
    atomic_add_relaxed(counters_of(p, cut_item(share, segment).first_block) + kStarted, 1);
}

// Blocks that have begun with an item. One thread asks, ahead of what takes as long as the answer.
__device__ __forceinline__ u32 started_parts(const u32* words) {
    return is_first_thread() ? load_relaxed(words + kStarted) : 0;
}

// Says that this block's part of an item is stored, and waits until all are, or does not. Those that wait merge the item; if
// nobody does, the last one to arrive. All parts are then seen. A block may wait if it has nothing else to do and all blocks of the
// item have begun with it: else those which have not might be waiting for its place. `left` are the bits of pieces that it leaves
// to others. One thread comes here.
__device__ __forceinline__ MergeState arrive_at_item(u32* words, u32 parts, bool waits, u32 left = 0) {
    constexpr u32 kArrival = 1, kWaits = 1 << 12, kLeft = 1 << 24, kCountMask = kWaits - 1;  // no grid has more (tiles.py)
    const u32 mine = kArrival + (waits ? kWaits : 0) + left * kLeft, before = atomic_add_acq_rel(words + kArrived, mine);
    u32 now = before + mine;
    while (waits && (now & kCountMask) < parts) now = load_acquire(words + kArrived);
    const u32 waiting = now / kWaits & kCountMask;
    if (waits) return {waiting, before / kWaits & kCountMask, now / kLeft};
    if ((now & kCountMask) == parts && waiting == 0) return {1, 0, now / kLeft};
    return {0, 0, 0};
}

// The same for a whole block. Returns whether it merges the item.
__device__ __forceinline__ bool joins_merge(u32* words, u32 parts, bool waits, MergeState& merge, u32 left = 0) {
    worker_barrier();
    if (is_first_thread()) merge = arrive_at_item(words, parts, waits, left);
    worker_barrier();
    return merge.mergers > 0;
}

// The last one of those that merge to go on leaves the counters as they were found. Each says so at once, and need not know who
// that is until it has merged.
__device__ __forceinline__ u32 say_gone(u32* words, const MergeState& merge) {
    return is_first_thread() && merge.mergers > 1 ? atomic_add_relaxed(words + kGone, 1) : 0;
}
__device__ __forceinline__ void clear_counters(u32* words, const MergeState& merge, u32 gone) {
    if (!is_first_thread() || gone != merge.mergers - 1) return;
#pragma unroll
    for (int word = 0; word < kItemWords; ++word) store_relaxed(words + word, 0);
}

// Merges this block's share of the rows of an item.
__device__ __forceinline__ void merge_rows(const DecodeParams& p, const Segment& segment, const Parts& parts,
                                           const MergeState& merge) {
    const int begin = merge.number * segment.valid_rows / merge.mergers;
    const int end = (merge.number + 1) * segment.valid_rows / merge.mergers;
    const int thread = thread_number();
    if (parts.count <= 4) {
        merge_parts<4, 4>(p, segment, parts, begin, end, thread);
    } else {
        merge_parts<1, kMergedAtOnce>(p, segment, parts, begin, end, thread);
    }
}

// The same of an item that others have parts of.
__device__ __forceinline__ void merge_with_others(const DecodeParams& p, const Segment& segment, const Parts& parts,
                                                  const MergeState& merge, u32* words) {
    const u32 gone = say_gone(words, merge);
    merge_rows(p, segment, parts, merge);
    clear_counters(words, merge, gone);
}

// Whether a segment is the last one of its share.
__device__ __forceinline__ bool has_nothing_behind(const Share& share, const Segment& segment) {
    return !segment.ends || (share.end.item == segment.item + 1 && share.end.key == 0);
}

// The slot of a segment's result. Of all items in its share, block b can have begun but not finished only the last one, slot
// 2 b + 1, and continue only the first one, slot 2 b.
__device__ __forceinline__ int slot_of_result(const Segment& segment) { return 2 * share_number() + segment.starts; }

// The same of a part of an item that begins in share `first`, counted from that share's first slot on, and from the first of all.
__device__ __forceinline__ constexpr int place_of_part(int part) { return Parts::kStride * part + (part == 0); }
__device__ __forceinline__ int slot_of_part(int first, int part) { return Parts::kStride * first + place_of_part(part); }

// Stores the results of a segment, a part of its item. Returns whether this block merges the item.
__device__ __forceinline__ bool store_part(const DecodeParams& p, const Share& share, const Segment& segment,
                                           const RowResults& results, MergeState& merge) {
    const Cut cut = cut_item(share, segment);
    u32* const words = counters_of(p, cut.first_block);
    const u32 parts = parts_of(cut), started = started_parts(words);
    results.store(slot_of_result(segment));
    return joins_merge(words, parts, has_nothing_behind(share, segment) && started == parts, merge);
}

// Merges other results into those of an item that lies in one slot.
__device__ __forceinline__ void merge_alone(const DecodeParams& p, const Segment& segment, int slot, MergeState& merge) {
    if (is_first_thread()) merge = {1, 0, 0};
    worker_barrier();
    merge_rows(p, segment, {slot, slot, 1}, merge);
}

// Hands a segment's results on: to the output, or to the blocks of its item.
__device__ __forceinline__ void hand_on(const DecodeParams& p, const Share& share, const Segment& segment,
                                        const RowResults& results, MergeState& merge) {
    if (segment.starts && segment.ends) {
        if constexpr (!kMerges) return results.answer();
        const int slot = slot_of_result(segment);
        results.store(slot);
        return merge_alone(p, segment, slot, merge);
    }
    if (!store_part(p, share, segment, results, merge)) return;
    const Cut cut = cut_item(share, segment);
    const Parts parts = {2 * cut.first_block + 1, 2 * cut.first_block, parts_of(cut)};
    merge_with_others(p, segment, parts, merge, counters_of(p, cut.first_block));
}

// The same with split_size, whose segments are splits. `folded` are the states of the item's splits before this one, where they
// are this block's.
__device__ __forceinline__ void hand_on_split(const DecodeParams& p, const Share& share, const Segment& segment,
                                              RowResults& results, RowStates& folded, MergeState& merge) {
    if (segment.split < 0) return;
    const Cut cut = cut_item(share, segment);
    const int slots = split_slots(p, segment.item, cut.first_block);
    if (segment.starts) {
        const int slot = 2 * share_number() + 1;
        if (segment.split > 0) results.fold_after(slot, folded);
        const bool is_whole = segment.last && segment.ends;
        if (is_whole && !kMerges) return results.answer();
        results.store(slot);
        if (is_whole) return merge_alone(p, segment, slot, merge);
        for_each<kRowTiles, 2>([&](int t, int half) { folded[t][half] = results.states()[t][half]; });
    } else if (segment.keys.end > segment.keys.begin) {  // an empty split has no slot
        results.store(slots + segment.split);
    }
    u32* const words = counters_of(p, cut.first_block);
    if (!segment.last || !joins_merge(words, parts_of(cut), false, merge)) return;
    const int begin = segment.visible.begin, splits = split_count(p, segment.visible);
    const int cut_key = load_cut(p, cut.first_block + 1).key;  // where the first block's splits end
    const int done = min(max(cut_key, begin) / p.split_size - begin / p.split_size, splits);  // that its slot has folded
    const Parts parts = {2 * cut.first_block + 1, slots + done - 1, 1 + splits - done};
    merge_with_others(p, segment, parts, merge, words);
}
