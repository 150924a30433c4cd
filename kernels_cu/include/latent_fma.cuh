// The arithmetic of one warp of latent attention in float32, by fused multiply-adds, with the fragments of latent_mma.cuh: lane l
// has rows l / 4 and l / 4 + 8 of a row tile, and of 8 keys or columns 2 (l % 4) and the next one.
#pragma once
#include "latent_codes.cuh"
#include "latent_weights.cuh"
#include "rows_scales.cuh"

class LatentFma {
public:
    __device__ __forceinline__ LatentFma(int column_warp, int lane) : lane_(lane), column_warp_(column_warp) {}

    __device__ __forceinline__ void begin_item(u32 query) {
        query_ = query;
        fill(output_, 0.0f);
    }

    __device__ __forceinline__ void scores(u32 slot, bool meets_values, const Scaling&, Scores& s) const {
        fill(s, 0.0f);
        if (meets_values) add_columns<0, kHeadDimV / 4>(slot, s);
        add_columns<kNumberColumnsV, kHeadDim / 4>(slot, s);
    }

    __device__ __forceinline__ void accumulate(u32 slot, const TileWeights& weights) {
#pragma unroll 1
        for (int key = 0; key < kTileKeys; ++key) {
            float weight[kRowTiles][2];  // from the lane that holds this key in its registers
            for_each<kRowTiles>([&](int t) {
                const TileWeights::Piece piece = weights.hear(t, key / 8, lane_ / 4 * 4 + key % 8 / 2);
                for_each<2>([&](int half) {
                    weight[t][half] = __uint_as_float(key % 2 ? piece.w[half * 2 + 1] : piece.w[half * 2]);
                });
            });
            for_each<kColumnTiles>([&](int n) {
                const int column = (column_warp_ * kColumnTiles + n) * 8 + lane_ % 4 * 2;
                const float2 v = load_shared_pair(slot + NumberRows::offset(key, column / 4) + column % 4 * 4);
                for_each<kRowTiles, 2>([&](int t, int half) {
                    float(&o)[4] = output_[t][n];
                    o[half * 2] = fmaf(weight[t][half], v.x, o[half * 2]);
                    o[half * 2 + 1] = fmaf(weight[t][half], v.y, o[half * 2 + 1]);
                });
            });
        }
    }

    __device__ __forceinline__ void rescale(const float (&alpha)[kRowTiles][2]) {
        for_each<kRowTiles, kColumnTiles, 4>([&](int t, int n, int i) { output_[t][n][i] *= alpha[t][i / 2]; });
    }

    __device__ __forceinline__ Outputs& output() { return output_; }

private:
    // Adds the products of kCount chunks of 4 columns.
    template <int kFirstColumn, int kCount>
    __device__ __forceinline__ void add_columns(u32 slot, Scores& s) const {
        const int first_key = column_warp_ * kWarpKeys + lane_ % 4 * 2;
#pragma unroll 2
        for (int c = kFirstColumn / 4; c < kFirstColumn / 4 + kCount; ++c) {
            float4 q[kRowTiles][2];
            for_each<kRowTiles, 2>([&](int t, int half) {
                q[t][half] = load_shared(query_ + NumberRows::offset(t * 16 + half * 8 + lane_ / 4, c));
            });
            for_each<kKeyTiles, 2>([&](int n, int column) {
                const float4 k = load_shared(slot + NumberRows::offset(first_key + n * 8 + column, c));
                for_each<kRowTiles, 2>([&](int t, int half) {
                    float& dot = s[t][n][half * 2 + column];
                    dot = fmaf(q[t][half].x, k.x, dot);
                    dot = fmaf(q[t][half].y, k.y, dot);
                    dot = fmaf(q[t][half].z, k.z, dot);
                    dot = fmaf(q[t][half].w, k.w, dot);
                });
            });
        }
    }

    u32 query_;
    int lane_, column_warp_;
    Outputs output_;
};
