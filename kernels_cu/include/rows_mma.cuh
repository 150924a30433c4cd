// The arithmetic of one warp on tensor cores: mma.m16n8k16 with packed query rows as M and keys, then value columns, as N.
//
//   S[16 rows x 8 keys]     = Q[16 x D] K^T[D x 8]      A: Q by ldmatrix, B: K by ldmatrix (rows of K are columns of B)
//   O[16 rows x 8 columns] += P[16 x 16 keys] V[16 x 8]  A: P, packed scores, B: V by ldmatrix.trans
//
// What lane l holds of A, B and C stands in ptx/matrices.cuh. One ldmatrix brings the B of two tiles of 8 keys or columns.
#pragma once
#include "ptx/matrices.cuh"
#include "rows_partners.cuh"

template <typename T>
class RowsMath {
    static constexpr int kSteps = (kHeadDim + 15) / 16;  // of 16 elements of a query
    static constexpr bool kQueryInRegisters = kRowTiles * kSteps <= 8;

    using Queries = Swizzle<kQueryBytes>;
    using Keys = Swizzle<kKeyBytes>;
    using Values = Swizzle<kValueBytes>;

    // Keys that an ldmatrix brings, and so many steps of their elements: 16 keys and one, or 8 and two.
    static constexpr int kLoadedKeys = kWarpKeys < 16 ? 8 : 16, kLoadedSteps = 16 / kLoadedKeys;
    static_assert(kWarpKeys % kLoadedKeys == 0, "an ldmatrix brings four matrices");

public:
    // `column_warp` is the warp's number among those that share its rows.
    __device__ __forceinline__ RowsMath(int column_warp, int lane) {
        // Lane l addresses key l % 8 + 8 (l / 16) and element half l / 8 % 2 of K, or of 8 keys key l % 8 and half l / 8 of two steps;
        // of V, transposed, key l % 16 and half l / 16.
        const int key = kLoadedKeys == 16 ? lane % 8 + lane / 16 * 8 : lane % 8, half = lane / 8 % (2 * kLoadedSteps);
        key_lane_ = Keys::offset(key, half) + column_warp * kWarpKeys * kKeyBytes;
        value_lane_ = Values::offset(lane % 16, lane / 16) + column_warp * kColumnPairs * 32;
        pin(key_lane_), pin(value_lane_);
    }

    // Reads the warp's queries, which lie in shared memory as rows of kQueryBytes.
    __device__ __forceinline__ void begin_item(u32 query, int lane) {
        query_lane_ = query + Queries::offset(lane % 16, lane / 16);
        pin(query_lane_);
        fill(output_, 0.0f);
        if constexpr (kQueryInRegisters) {
            for_each<kRowTiles, kSteps>([&](int t, int step) { load_query(t, step, queries_[t][step]); });
        }
    }

    // S = Q K^T of this warp's keys of the tile in the slot.
    __device__ __forceinline__ void scores(u32 slot, Scores& s) const {
        fill(s, 0.0f);
        if constexpr (kLoadedKeys == 8) return scores_of_8_keys(slot, s);
        for_each<kSteps>([&](int step) {
            u32 a[kRowTiles][4];
            for_each<kRowTiles>([&](int t) { query(t, step, a[t]); });
            for_each<kWarpKeys / 16>([&](int pair) {
                u32 b[4];
                ldmatrix_x4(b, step_address<Keys>(slot + key_lane_, step) + pair * 16 * kKeyBytes);
                for_each<kRowTiles>([&](int t) {
                    T::mma(s[t][2 * pair], a[t], b[0], b[1]);
                    T::mma(s[t][2 * pair + 1], a[t], b[2], b[3]);
                });
            });
        });
    }

    // O += P V of the tile in the slot.
    __device__ __forceinline__ void accumulate(u32 slot, const Partners& partners, const Weights& weights) {
        for_each<kTileKeys / 16>([&](int k) {
            u32 a[kRowTiles][4];
            for_each<kRowTiles>([&](int t) { partners.hear(weights, t, k, a[t]); });
            for_each<kColumnPairs>([&](int pair) {
                u32 b[4];
                ldmatrix_x4_trans(b, step_address<Values>(slot + value_lane_, pair) + k * 16 * kValueBytes);
                for_each<kRowTiles>([&](int t) {
                    T::mma(output_[t][2 * pair], a[t], b[0], b[1]);
                    if (2 * pair + 1 < kColumnTiles) T::mma(output_[t][2 * pair + 1], a[t], b[2], b[3]);
                });
            });
        });
    }

    __device__ __forceinline__ void rescale(const float (&alpha)[kRowTiles][2]) {
        for_each<kRowTiles, kColumnTiles, 4>([&](int t, int n, int i) { output_[t][n][i] *= alpha[t][i / 2]; });
    }

    // What has been accumulated, not yet divided by the sums.
    __device__ __forceinline__ Outputs& output() { return output_; }

private:
    __device__ __forceinline__ void scores_of_8_keys(u32 slot, Scores& s) const {
        for_each<(kSteps + 1) / 2>([&](int two) {
            u32 b[4];
            const u32 at = step_address<Keys, 2>(slot + key_lane_, two);
            const int count = kSteps - 2 * two;  // an odd last step is alone
            if (count == 1) ldmatrix_x2(b, at);
            else ldmatrix_x4(b, at);
            for_each<2, kRowTiles>([&](int i, int t) {
                if (i >= count) return;
                u32 a[4];
                query(t, 2 * two + i, a);
                T::mma(s[t][0], a, b[2 * i], b[2 * i + 1]);
            });
        });
    }

    __device__ __forceinline__ void query(int t, int step, u32 (&a)[4]) const {
        if constexpr (kQueryInRegisters) {
            for_each<4>([&](int i) { a[i] = queries_[t][step][i]; });
        } else {
            load_query(t, step, a);
        }
    }

    __device__ __forceinline__ void load_query(int t, int step, u32 (&a)[4]) const {
        ldmatrix_x4(a, step_address<Queries>(query_lane_, step) + t * 16 * kQueryBytes);
    }

    // A step is two chunks on: an exclusive or within a swizzle period, an offset beyond it. So are several at once.
    template <typename Rows, int kAtOnce = 1>
    static __device__ __forceinline__ u32 step_address(u32 lane_address, int step) {
        constexpr int kPeriod = Rows::kPeriod / 2 / kAtOnce, kBytes = 32 * kAtOnce;
        return (lane_address ^ (step % kPeriod * kBytes)) + step / kPeriod * kPeriod * kBytes;
    }

    u32 key_lane_, value_lane_, query_lane_;
    u32 queries_[kRowTiles][kQueryInRegisters ? kSteps : 1][4];
    Outputs output_;
};
