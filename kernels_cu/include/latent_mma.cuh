// The arithmetic of one warp of latent attention on tensor cores, m16n8k16 as in rows_mma.cuh, on tiles whose rows are values
// and then the rest of the keys:
//
//   S[16 rows x 8 keys]     = Qv[16 x Dv] V^T[Dv x 8] + Q[16 x D] K^T[D x 8]
//   O[16 rows x 8 columns] += P[16 x 16 keys] V[16 x 8]
//
// The same bytes are B of both: rows of V by ldmatrix, columns of V by ldmatrix.trans.
#pragma once
#include "latent_weights.cuh"
#include "ptx/matrices.cuh"
#include "rows_scales.cuh"

template <typename T>
class LatentMma {
    // Scores are sums in several accumulators of which each waits for itself alone; fewer where outputs take 128 registers,
    // and splits before this one some more.
    static constexpr int kMostChains = kRowTiles * kColumnTiles < 32 ? 4 : kHasSplitSize ? 1 : 2;
    static constexpr int kChains = kRowTiles * kKeyTiles >= kMostChains ? 1 : kMostChains / (kRowTiles * kKeyTiles);
    static_assert(kKeyTiles == 1 || kKeyTiles % 2 == 0, "an ldmatrix brings 16 keys of 16 columns, or 8 of 32");
    static_assert(kKeyBytes % 128 == 0, "rows are whole lines");

public:
    __device__ __forceinline__ LatentMma(int column_warp, int lane) : lane_(lane) {
        // Of 16 keys lane l addresses key l % 8 + 8 (l / 16), chunk l / 8 % 2; of 8 keys key l % 8, chunk l / 8.
        const int key = kKeyTiles == 1 ? lane % 8 : lane % 8 + lane / 16 * 8;
        const int chunk = kKeyTiles == 1 ? lane / 8 : lane / 8 % 2;
        key_lane_ = KeyRows::offset(key, chunk) + column_warp * kWarpKeys * kKeyBytes;
        value_lane_ = KeyRows::offset(lane % 16, lane / 16) + column_warp * kColumnPairs * 32;
    }

    __device__ __forceinline__ void begin_item(u32 query) {
        query_lane_ = query + QueryRows::offset(lane_ % 16, lane_ / 16);
        fill(output_, 0.0f);
    }

    // The scores of this warp's keys of the tile in the slot; of the rest of the keys alone if nothing meets the values.
    __device__ __forceinline__ void scores(u32 slot, bool meets_values, const Scaling&, Scores& s) const {
        float parts[kChains][kRowTiles][kKeyTiles][4];
        fill(parts, 0.0f);
        if (meets_values) add_columns<0, (kHeadDimV + 31) / 32>(slot, parts);
        add_columns<kPaddedHeadDimV, (kHeadDim + 31) / 32>(slot, parts);
        for_each<kRowTiles, kKeyTiles, 4>([&](int t, int n, int i) {
            s[t][n][i] = parts[0][t][n][i];
            if constexpr (kChains > 1) s[t][n][i] += parts[1][t][n][i];
            if constexpr (kChains > 2) s[t][n][i] += parts[2][t][n][i] + parts[3][t][n][i];
        });
    }

    // O += P V of the tile in the slot.
    __device__ __forceinline__ void accumulate(u32 slot, const TileWeights& weights) {
        for_each<kTileKeys / 16>([&](int k) {
            u32 a[kRowTiles][4];
            for_each<kRowTiles>([&](int t) { weights.hear_step(t, k, lane_, a[t]); });
            for_each<kColumnPairs>([&](int pair) {
                u32 b[4];
                ldmatrix_x4_trans(b, step_address(slot + value_lane_, pair) + k * 16 * kKeyBytes);
                for_each<kRowTiles>([&](int t) {
                    T::mma(output_[t][2 * pair], a[t], b[0], b[1]);
                    T::mma(output_[t][2 * pair + 1], a[t], b[2], b[3]);
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
    // Adds the products of kCount times 32 columns of a row.
    template <int kFirstColumn, int kCount>
    __device__ __forceinline__ void add_columns(u32 slot, float (&parts)[kChains][kRowTiles][kKeyTiles][4]) const {
        for_each<kCount>([&](int i) {
            constexpr int kFirstStep = kFirstColumn / 16;
            u32 both[4];  // with 8 keys: B of two steps
            if constexpr (kKeyTiles == 1) ldmatrix_x4(both, step_address(slot + key_lane_, kFirstStep + 2 * i));
            for_each<2>([&](int j) {
                const int step = kFirstStep + 2 * i + j, chain = (2 * i + j) % kChains;
                u32 a[kRowTiles][4];
                for_each<kRowTiles>([&](int t) { ldmatrix_x4(a[t], step_address(query_lane_, step) + t * 16 * kKeyBytes); });
                if constexpr (kKeyTiles == 1) {
                    for_each<kRowTiles>([&](int t) { T::mma(parts[chain][t][0], a[t], both[2 * j], both[2 * j + 1]); });
                } else {
                    for_each<kKeyTiles / 2>([&](int pair) {
                        u32 b[4];
                        ldmatrix_x4(b, step_address(slot + key_lane_, step) + pair * 16 * kKeyBytes);
                        for_each<kRowTiles>([&](int t) {
                            T::mma(parts[chain][t][2 * pair], a[t], b[0], b[1]);
                            T::mma(parts[chain][t][2 * pair + 1], a[t], b[2], b[3]);
                        });
                    });
                }
            });
        });
    }

    // A step is two chunks on: an exclusive or within a line, an offset beyond it.
    static __device__ __forceinline__ u32 step_address(u32 lane_address, int step) {
        return (lane_address ^ (step % 4 * 32)) + step / 4 * 128;
    }

    u32 key_lane_, value_lane_, query_lane_;
    int lane_;
    Outputs output_;
};
