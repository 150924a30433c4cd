// The arithmetic of one warp on tensor cores for caches of 8 bits: as mma.cuh, but codes become float16 between shared memory
// and the MMA. Queries are float16 too, scaled into its range by prepare_queries() (query_pass.cuh), and weights reach 2^15.
//
// Fragments, lane l, t = l % 4, g = l / 4. Of K and V alike, an ldmatrix takes 16 keys x 32 codes:
//   K:         register i is codes 4t .. 4t + 3 of key g + 8 (i % 2), 16 codes a step: two pairs, for a0 and a2 (i even) or
//              a1 and a3. So the MMA's elements 2t, 2t + 1 are codes 4t, 4t + 1 (or 4t, 4t + 2), and its 2t + 8, 2t + 9 the
//              other two: queries lie in that order.
//   V, trans:  register i is columns 2g, 2g + 1 of keys 2t, 2t + 1 (+ 8 for odd i), 16 columns a tile: the pair of the even
//              column is a0 (a2), that of the odd one a1 (a3). So row m < 8 of the MMA is column 2m of the tile, row m + 8
//              column 2m + 1, and a lane's c0 and c2 (c1 and c3) are neighbours in the output.
#pragma once
#include "codes.cuh"
#include "ptx/matrices.cuh"
#include "softmax.cuh"
#include "tiles.cuh"

template <typename Code>
class MmaCodesMath {
    static constexpr int kSteps = kHeadDim / 16;     // of 16 elements of a key
    static constexpr int kColumns = kHeadDimV / 16;  // tiles of 16 value columns
    static constexpr bool kQueryInRegisters = kHeadDim * kRows < 4096;
    static_assert(kHeadDim % 16 == 0 && kHeadDimV % 16 == 0, "a row of codes is whole units of 16 bytes");

    using Queries = Swizzle<kQueryBytes>;
    using Keys = Swizzle<kKeyBytes>;
    using Values = Swizzle<kValueBytes>;

public:
    __device__ __forceinline__ explicit MmaCodesMath(int lane) {
        // Key l % 16, 16-byte chunk l / 16.
        key_lane_ = Keys::offset(lane % 16, lane / 16);
        value_lane_ = Values::offset(lane % 16, lane / 16);
        pin(key_lane_);
        magic_ = Code::kMagic + (Code::kMagic ? zero_of_each_lane() : 0);
        if constexpr (kKeyBytes != kValueBytes) pin(value_lane_);
    }

    // Reads the item's queries, which lie in shared memory as rows of kQueryBytes.
    __device__ __forceinline__ void begin_item(u32 query, int lane) {
        query_lane_ = query + Queries::offset(lane % 8, lane / 8);
        pin(query_lane_);
        fill(output_, 0.0f);
        if constexpr (kQueryInRegisters) {
            for_each<kRowGroups, (kSteps + 1) / 2>([&](int g, int pair) { load_query(g, 2 * pair, &queries_[g][4 * pair]); });
        }
    }

    // S^T = K Q^T of the tile in the slot.
    __device__ __forceinline__ void scores(u32 slot, Scores& s) const {
        fill(s, 0.0f);
        u32 query[kRowGroups][4];
        for_each<(kSteps + 1) / 2>([&](int pair) {
            const int first = 2 * pair;
            if constexpr (!kQueryInRegisters) {
                for_each<kRowGroups>([&](int g) { load_query(g, first, query[g]); });
            }
            for_each<kKeyGroups>([&](int k) {
                u32 codes[4];
                const u32 from = chunk_address<Keys>(slot + key_lane_, first) + k * 16 * kKeyBytes;
                if (first + 1 < kSteps) ldmatrix_x4(codes, from);
                else ldmatrix_x2(codes, from);
                for_each<2>([&](int half) {
                    if (first + half >= kSteps) return;
                    u32 a[4];
                    key_pairs<Code>(codes[2 * half], magic_, a[0], a[2]);
                    key_pairs<Code>(codes[2 * half + 1], magic_, a[1], a[3]);
                    for_each<kRowGroups>([&](int g) {
                        const u32* b = kQueryInRegisters ? &queries_[g][4 * pair + 2 * half] : &query[g][2 * half];
                        Float16::mma(s[k][g], a, b[0], b[1]);
                    });
                });
            });
        });
    }

    // O^T += V^T P^T of the tile in the slot.
    __device__ __forceinline__ void accumulate(u32 slot, const Scores& weights) {
        const u32 lane_address = slot + (kKeyBytes == kValueBytes ? key_lane_ : value_lane_);
        for_each<kKeyGroups>([&](int k) {
            u32 b[kRowGroups][2];
            for_each<kRowGroups, 2>([&](int g, int half) {
                b[g][half] = movmatrix_trans(Float16::pack(weights[k][g][2 * half], weights[k][g][2 * half + 1]));
            });
            for_each<(kColumns + 1) / 2>([&](int pair) {
                const int first = 2 * pair;
                u32 codes[4];
                const u32 from = chunk_address<Values>(lane_address, first) + k * 16 * kValueBytes;
                if (first + 1 < kColumns) ldmatrix_x4_trans(codes, from);
                else ldmatrix_x2_trans(codes, from);
                for_each<2>([&](int half) {
                    if (first + half >= kColumns) return;
                    u32 a[4];
                    Code::spread_pairs(codes[2 * half], magic_, a[0], a[1]);
                    Code::spread_pairs(codes[2 * half + 1], magic_, a[2], a[3]);
                    for_each<kRowGroups>([&](int g) { Float16::mma(output_[g][first + half], a, b[g][0], b[g][1]); });
                });
            });
        });
    }

    __device__ __forceinline__ void rescale(const float (&alpha)[kRowGroups][2]) {
        for_each<kRowGroups, kColumns, 4>([&](int g, int t, int i) { output_[g][t][i] *= alpha[g][i % 2]; });
    }

    // Stores row group g as rows of kPaddedHeadDimV floats, columns exclusive-or'ed by OutputTile.
    __device__ __forceinline__ void store(int g, u32 slot, int lane) const {
        const u32 lane_address = slot + OutputTile::offset(lane % 4 * 2, lane / 4 * 2);
        for_each<kColumns, 2>([&](int t, int i) {
            // Row lane % 4 * 2 + i, columns t * 16 + lane / 4 * 2 and the next.
            const u32 address = (lane_address ^ t % 2 * 64) + t / 2 * 128 + i * OutputTile::kRowBytes;
            store_shared(address, make_float2(output_[g][t][i], output_[g][t][i + 2]));
        });
    }

private:
    // Two steps of row group g: {b0, b1} of both; behind the head dim they are zero.
    __device__ __forceinline__ void load_query(int g, int step, u32* two_steps) const {
        u32 b[4];
        ldmatrix_x4(b, chunk_address<Queries>(query_lane_ + g * 8 * kQueryBytes, step * 2));
        for_each<4>([&](int i) { two_steps[i] = b[i]; });
    }

    // `chunk` (even) chunks on: an exclusive or within a swizzle period, an offset beyond it.
    template <typename Rows>
    static __device__ __forceinline__ u32 chunk_address(u32 lane_address, int chunk) {
        return (lane_address ^ (chunk % Rows::kPeriod * 16)) + chunk / Rows::kPeriod * Rows::kPeriod * 16;
    }

    u32 key_lane_, value_lane_, query_lane_, magic_;
    u32 queries_[kRowGroups][kQueryInRegisters ? (kSteps + 1) / 2 * 4 : 1];
    float output_[kRowGroups][kColumns][4];
};
