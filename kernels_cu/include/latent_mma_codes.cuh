// The arithmetic of one warp of latent attention on tensor cores for caches of 8 bits: as latent_mma.cuh, but codes become float16
// between shared memory and the MMA. Queries are float16, too, and weights reach 2^15 (query_pass.cuh).
//
// Fragments, lane l, t = l % 4, g = l / 4. A register that ldmatrix brings is
//   of rows:          codes 4t .. 4t + 3 of key g, of a step of 16: two pairs, b0 and b1. So the MMA's elements 2t, 2t + 1 are
//                     codes 4t, 4t + 1 (or 4t, 4t + 2), and its 2t + 8, 2t + 9 the other two: queries lie in that order.
//   of rows, trans:   columns 2g, 2g + 1 of keys 2t, 2t + 1, of 16 columns: the pair of the even column is b0 of the first tile
//                     of a pair of them, that of the odd one b0 of the second; 8 keys further they are b1. So a lane has four
//                     columns side by side, 4t .. 4t + 3: c0 of both tiles, then c1 of both.
#pragma once
#include "latent_weights.cuh"
#include "ptx/matrices.cuh"
#include "rows_scales.cuh"

template <typename Code>
class LatentCodesMma {
    static constexpr int kLoadedSteps = kKeyTiles == 1 ? 4 : 2;  // of 16 codes that an ldmatrix brings, of 8 keys or of 16
    static_assert(kKeyTiles == 1 || kKeyTiles % 2 == 0, "an ldmatrix brings 16 keys of 32 codes, or 8 of 64");
    static_assert(kHeadDim % 16 == 0 && kHeadDimV % 16 == 0, "a row of codes is whole units of 16 bytes");
    static_assert(kKeyBytes % 128 == 0, "rows are whole lines");
    static constexpr int kGroupBytes = kPaddedHeadDimV / kColumnWarps;  // of a key's value columns of this warp
    static_assert(kGroupBytes == 64 || kGroupBytes % 128 == 0, "a warp's columns are half of a line, or whole ones");

public:
    __device__ __forceinline__ LatentCodesMma(int column_warp, int lane) : lane_(lane) {
        // Of 16 keys lane l addresses key l % 16, chunk l / 16; of 8 keys key l % 8, chunk l / 8.
        key_lane_ = kKeyTiles == 1 ? KeyRows::offset(lane % 8, lane / 8) : KeyRows::offset(lane % 16, lane / 16);
        key_lane_ += column_warp * kWarpKeys * kKeyBytes;
        const int first = column_warp * (kGroupBytes / 16);  // of the warp's chunks
        value_lane_ = (KeyRows::offset(lane % 16, lane / 16) ^ first % 8 * 16) + first / 8 * 128;
        magic_ = Code::kMagic + (Code::kMagic ? zero_of_each_lane() : 0);
    }

    __device__ __forceinline__ void begin_item(u32 query) {
        query_lane_ = query + QueryRows::offset(lane_ % 16, lane_ / 16);
        fill(output_, 0.0f);
    }

    // The scores of this warp's keys of the tile in the slot; of the rest of the keys alone if nothing meets the values.
    __device__ __forceinline__ void scores(u32 slot, bool meets_values, const Scaling& scaling, Scores& s) const {
        fill(s, 0.0f);
        add_columns<kPaddedHeadDimV, kHeadDim>(slot, s);
        scaling.scale_scores(s);
        if (!meets_values) return;
        Scores of_values;
        fill(of_values, 0.0f);
        add_columns<0, kHeadDimV>(slot, of_values);
        scaling.scale_scores_of_values(of_values);
        for_each<kRowTiles, kKeyTiles, 4>([&](int t, int n, int i) { s[t][n][i] += of_values[t][n][i]; });
    }

    // O += P V of the tile in the slot.
    __device__ __forceinline__ void accumulate(u32 slot, const TileWeights& weights) {
        for_each<kTileKeys / 16>([&](int k) {
            u32 a[kRowTiles][4];
            for_each<kRowTiles>([&](int t) { weights.hear_step(t, k, lane_, a[t]); });
            for_each<kColumnPairs / 2>([&](int two) {
                u32 codes[4];
                ldmatrix_x4_trans(codes, chunk_address(slot + value_lane_, 2 * two) + k * 16 * kKeyBytes);
                for_each<2>([&](int i) {
                    u32 even[2], odd[2];
                    for_each<2>([&](int half) { Code::spread_pairs(codes[2 * i + half], magic_, even[half], odd[half]); });
                    const int n = 4 * two + 2 * i;
                    for_each<kRowTiles>([&](int t) {
                        Float16::mma(output_[t][n], a[t], even[0], even[1]);
                        Float16::mma(output_[t][n + 1], a[t], odd[0], odd[1]);
                    });
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
    // Adds the products of kCount columns of a row from kFirst on.
    template <int kFirst, int kCount>
    __device__ __forceinline__ void add_columns(u32 slot, Scores& s) const {
        constexpr int kSteps = kCount / 16;
        for_each<(kSteps + kLoadedSteps - 1) / kLoadedSteps>([&](int load) {
            const int first = load * kLoadedSteps, chunk = kFirst / 16 + first;
            u32 codes[(kKeyTiles + 1) / 2][4];
            for_each<(kKeyTiles + 1) / 2>([&](int pair) {
                ldmatrix_x4(codes[pair], chunk_address(slot + key_lane_, chunk) + pair * 16 * kKeyBytes);
            });
            for_each<kLoadedSteps>([&](int i) {
                if (first + i >= kSteps) return;
                u32 a[kRowTiles][4];
                for_each<kRowTiles>([&](int t) {
                    ldmatrix_x4(a[t], chunk_address(query_lane_, 2 * (chunk + i)) + t * 16 * kQueryBytes);
                });
                for_each<kKeyTiles>([&](int n) {
                    u32 b[2];
                    key_pairs<Code>(codes[n / 2][kKeyTiles == 1 ? i : 2 * i + n % 2], magic_, b[0], b[1]);
                    for_each<kRowTiles>([&](int t) { Float16::mma(s[t][n], a[t], b[0], b[1]); });
                });
            });
        });
    }

    // `chunk` chunks on, as many as are addressed together or more: an exclusive or within a line, an offset beyond it.
    static __device__ __forceinline__ u32 chunk_address(u32 lane_address, int chunk) {
        return (lane_address ^ chunk % 8 * 16) + chunk / 8 * 128;
    }

    u32 key_lane_, value_lane_, query_lane_, magic_;
    int lane_;
    Outputs output_;
};
