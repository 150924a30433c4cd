// Results of an item's few blocks, merged piece by piece (a reduce-scatter): each block keeps a piece of the columns, stores the
// others, and merges its own of all parts when they are there. Two blocks so store and read half of what they have, eight of them
// seven eighths.
//
// Parts lie in memory as they lie in registers: no lane rearranges what it stores, and 32 of them store 512 bytes side by side. Who
// merges them has the same rows and columns. Chunk n of a thread is the output fragment of its column tile n:
//   x, y: row l / 4 of its warp's 16 rows, columns 8 n + 2 (l % 4) and the next one of its warp's columns
//   z, w: row l / 4 + 8, the same columns
//
// For items of which every block has nothing else to do, so that it waits for the others if they have begun (arrive_at_item). A
// block that may not wait stores its own piece, too, and leaves it to the first one that waits.
#pragma once
#include "ptx/copies.cuh"
#include "rows_combine.cuh"

class ReduceScatter {
    static_assert(kRowTiles == 1 && kWarpRows == 16, "a warp has 16 rows");
    static constexpr int kChunks = kColumnTiles;
    static constexpr int kStride = kRowWarps * 32;        // float4s of a part from a chunk to the next one
    static constexpr int kWarpBytes = kChunks / 2 * 512;  // of shared memory: the largest piece of a warp

public:
    static constexpr int kMostParts = kMerges || kHasSplitSize ? 0 : SCATTERED_PARTS;  // 0: no item is merged so
    static_assert(kMostParts <= 8, "who arrives has as many bits for pieces");
    static constexpr int kSharedBytes = 2 * kWarps * kWarpBytes;

    // Asks for the end of the last share of a segment's item, in shared memory. One thread does; the copy belongs to the group
    // that is committed next.
    static __device__ __forceinline__ void load_end(const DecodeParams& p, const Share& share, const Segment& segment, Cut& end) {
        if constexpr (kMostParts == 0) return;
        cp_async_16_or_zero(true, shared_address(&end), plan_cuts(p.plan) + cut_item(share, segment).last_block + 1);
    }

    // Whether the blocks of a cut item merge it so, when that has come. All of them find the same.
    static __device__ __forceinline__ bool fits(const Share& share, const Segment& segment, const Cut& end) {
        if constexpr (kMostParts == 0) return false;
        return parts_of(cut_item(share, segment)) <= kMostParts && end.item == segment.item + 1 && end.key == 0;
    }

    // `shared` is an address of kSharedBytes that nobody uses.
    __device__ __forceinline__ ReduceScatter(const DecodeParams& p, const Share& share, const Segment& segment, u32 shared)
        : p_(p), segment_(segment), first_block_(cut_item(share, segment).first_block),
          parts_(parts_of(cut_item(share, segment))), mine_(share_number() - first_block_),
          thread_(thread_number()), kept_(shared + warp() * kWarpBytes + lane() * 16),
          staged_(shared + (kWarps + warp()) * kWarpBytes) {}

    // All threads come here with what they have.
    __device__ __forceinline__ void merge(const Outputs& output, const RowStates& states, MergeState& merge) {
        const bool has_rows = first_row() < segment_.valid_rows;
        u32* const words = counters_of(p_, first_block_);
        const u32 started = started_parts(words);
        if (has_rows) store(output, states);
        worker_barrier();
        if (thread_ == 0) merge = started == parts_ ? arrive_at_item(words, parts_, true) : MergeState{0, 0, 0};
        worker_barrier();
        if (merge.mergers == 0 && !leave(has_rows, words, merge)) return;
        const u32 gone = say_gone(words, merge);
        u32 pieces = 1u << mine_;
        if (merge.number == 0) pieces |= (1u << num_pieces()) - (1u << parts_) | merge.left;  // what nobody has, or others left
#pragma unroll 1
        for (int piece = 0; has_rows && piece < kMostParts; ++piece) {
            if (!(pieces >> piece & 1)) continue;
            if (parts_ <= 2) merge_piece<2>(piece);
            else if (parts_ <= 4) merge_piece<4>(piece);
            else merge_piece<8>(piece);
        }
        clear_counters(words, merge, gone);
    }

private:
    __device__ __forceinline__ int warp() const { return thread_ / 32; }
    __device__ __forceinline__ int lane() const { return thread_ % 32; }
    __device__ __forceinline__ int first_row() const { return warp() % kRowWarps * kWarpRows; }
    __device__ __forceinline__ int first_column() const { return warp() / kRowWarps * (kColumnTiles * 8); }
    __device__ __forceinline__ int row(int half) const { return first_row() + half * 8 + lane() / 4; }
    __device__ __forceinline__ bool exists(int row) const { return row < segment_.valid_rows; }
    // Of a row, or of the last one that exists.
    __device__ __forceinline__ RowOutput output_of(int row) const { return {p_, segment_, min(row, segment_.valid_rows - 1)}; }

    // There are as many pieces as parts, or up to the next power of 2.
    __device__ __forceinline__ int num_pieces() const { return parts_ <= 2 ? 2 : parts_ <= 4 ? 4 : 8; }
    __device__ __forceinline__ int piece_chunks() const { return kChunks / num_pieces(); }

    __device__ __forceinline__ int slot_of(int part) const { return slot_of_part(first_block_, part); }
    __device__ __forceinline__ int place_of_chunk(int chunk) const {
        return (first_column() / 8 + chunk) * kStride + thread_ % kStride;
    }
    __device__ __forceinline__ float4* chunk_of(int part, int chunk) const {
        return partial_output(p_, slot_of(part)) + place_of_chunk(chunk);
    }
    __device__ __forceinline__ bool has_columns(int chunk) const {
        return kColumnTiles * kColumnWarps * 8 == kHeadDimV || first_column() + chunk * 8 < kHeadDimV;
    }
    __device__ __forceinline__ float2* state_of(int part, int half) const {
        return partial_states(p_, slot_of(part)) + row(half);
    }

    __device__ __forceinline__ void store(const Outputs& output, const RowStates& states) const {
        const u32 count = piece_chunks();
        u32 begin = mine_ * count + zero_of_each_lane();  // in a register, or each comparison takes three instructions
        float4* to = chunk_of(mine_, 0);
        pin(begin), pin(to);  // else both are found again for every chunk
        const u32 kept = kept_ - begin * 512;  // of chunk 0, if it were kept
        for_each<kChunks>([&](int n) {
            const float4 v = make_float4(output[0][n][0], output[0][n][1], output[0][n][2], output[0][n][3]);
            if (n - begin < count) store_shared(kept + n * 512, v);
            else if (has_columns(n)) store_global(to + n * kStride, v);
        });
        if (first_column() != 0 || lane() % 4 != 0) return;
        for_each<2>([&](int half) {
            store_global(state_of(mine_, half), make_float2(states[0][half].maximum, states[0][half].sum));
        });
    }

    // Stores what was kept, for those that wait, and arrives. Returns whether nobody waited, and this block merges all.
    __device__ __forceinline__ bool leave(bool has_rows, u32* words, MergeState& merge) {
        const int count = has_rows ? piece_chunks() : 0, begin = mine_ * piece_chunks();
#pragma unroll 1
        for (int i = 0; i < count && has_columns(begin + i); ++i) {
            store_global(chunk_of(mine_, begin + i), load_shared(kept_ + i * 512));
        }
        return joins_merge(words, parts_, false, merge, 1u << mine_);
    }

    // Merges a piece of the columns of all parts, in the order of keys, and stores the answer. It is done once, and takes as long
    // as what waits for one another: so weights are found while the first chunks are on their way.
    template <int kPieces>
    __device__ __forceinline__ void merge_piece(int piece) {
        // Else what the pieces have in common is found ahead of the loop over them, and waits in local memory.
        pin(thread_), pin(first_block_), pin(piece);
        constexpr int kCount = kChunks / kPieces, kAtOnce = (kPieces == 8 ? 8 : 16) / kPieces;  // with as many loads under way
        constexpr int kSlotStates = kRowParts * kRows;
        const int first_slot = Parts::kStride * first_block_;
        const float2* const states = partial_states(p_, first_slot) + row(0);
        const float4* const chunks = partial_output(p_, first_slot) + place_of_chunk(piece * kCount);
        float2 loaded[2][kPieces];
        for_each<2, kPieces>([&](int half, int i) {
            loaded[half][i] = load_cg_if(i < parts_, states + place_of_part(i) * kSlotStates + half * 8);
        });
        float4 part[kAtOnce][kPieces];
        const auto load = [&](int first) {
            for_each<kPieces>([&](int i) {
                const float4* const from = chunks + place_of_part(i) * kSlotVectors + first * kStride;
                const u32 kept = kept_ + first * 512;
                const bool is_kept = i == mine_ && piece == mine_, is_stored = i < parts_ && !is_kept;
                for_each<kAtOnce>([&](int c) {
                    const bool is_there = has_columns(piece * kCount + first + c);
                    part[c][i] = load_either(is_stored && is_there, from + c * kStride, is_kept && is_there, kept + c * 512);
                });
            });
        };
        load(0);
        float weight[2][kPieces];
        for_each<2>([&](int half) {
            RowState merged = {kLowest, 0.0f};
            for_each<kPieces>([&](int i) {
                if (i < parts_) merged.maximum = fmaxf(merged.maximum, loaded[half][i].x);
            });
            for_each<kPieces>([&](int i) {
                weight[half][i] = i < parts_ ? weight_of(loaded[half][i].x, merged.maximum, p_.score_scale) : 0.0f;
                merged.sum += weight[half][i] * loaded[half][i].y;
            });
            const RowOutput at = output_of(row(half));
            float lse;
            const float factor = finish_row(p_, at, merged, lse);
            for_each<kPieces>([&](int i) { weight[half][i] *= factor; });
            const bool tells = piece == 0 && first_column() == 0 && lane() % 4 == 0 && exists(row(half));
            if (tells && p_.softmax_lse) p_.softmax_lse[at.lse] = lse;
        });
        constexpr int kRowBytes = (kCount + 1) * 16;  // so that rows side by side differ in banks
#pragma unroll 1
        for (int first = 0;;) {
            for_each<kAtOnce>([&](int c) {
                float sum[4] = {};
                for_each<kPieces>([&](int i) {
                    sum[0] += weight[0][i] * part[c][i].x, sum[1] += weight[0][i] * part[c][i].y;
                    sum[2] += weight[1][i] * part[c][i].z, sum[3] += weight[1][i] * part[c][i].w;
                });
                for_each<2>([&](int half) {
                    const u32 to = staged_ + (half * 8 + lane() / 4) * kRowBytes + (first + c) * 16 + lane() % 4 * 4;
                    store_shared(to, OutElement::pack(sum[half * 2], sum[half * 2 + 1]));
                });
            });
            first += kAtOnce;
            if (first >= kCount) break;
            load(first);
        }
        __syncwarp();
        // Whole runs of rows; one lane finds where a row begins for all.
        const long long begin = output_of(first_row() + lane() % kWarpRows).out;
        const int chunk = lane() % kCount, column = first_column() + (piece * kCount + chunk) * 8;
        for_each<kWarpRows * kCount / 32>([&](int i) {
            const int row = i * (32 / kCount) + lane() / kCount;
            const long long to = __shfl_sync(kFullWarp, begin, row) + column;
            if (!exists(first_row() + row) || column >= kHeadDimV) return;
            const float4 v = load_shared(staged_ + row * kRowBytes + chunk * 16);
            store_global(reinterpret_cast<float4*>(static_cast<unsigned short*>(p_.out) + to), v);
        });
        __syncwarp();  // what was staged has been read
    }

    const DecodeParams& p_;
    const Segment& segment_;
    int first_block_, parts_;
    int mine_;  // this block's part, and the number of its piece
    int thread_;
    u32 kept_;    // addresses of shared memory: of this lane's chunks of the piece ..
    u32 staged_;  // .. and of an answer of this warp
};
