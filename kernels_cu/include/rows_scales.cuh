// What makes numbers of the scores and weights of a quantised cache where query rows are the rows of the MMA: a factor of each row
// (query_pass.cuh), and scales of keys and values where every key and head has its own. As in scales.cuh, nothing here touches an
// element.
#pragma once
#include "ptx/memory.cuh"
#include "rows_codes.cuh"

constexpr bool kScalesWeights = kConvertsTiles && kHasValueScales;

class Scaling {
public:
    // Of a warp whose rows have these factors, of one item after another.
    __device__ __forceinline__ Scaling(const float* factors, int lane) : lane_factors_(shared_address(factors + lane / 4)) {}

    // Begins with an item whose factors have been written.
    __device__ __forceinline__ void begin_item() {
        if constexpr (kKeepsFactors) for_each<2>([&](int half) { kept_[half] = load_factor(0, half); });
    }

    // Goes on to a tile of which the scales lie at `scales`, and of which the warp scores the keys from `first_key` on. Lane l has
    // those of the keys 2 (l % 4) and 2 (l % 4) + 1 of each 8.
    __device__ __forceinline__ void begin_tile(u32 scales, int first_key, int lane) {
        lane_scales_ = scales + (first_key + lane % 4 * 2) * 4;
    }

    // Makes products of queries and keys of what came out of the matrices.
    __device__ __forceinline__ void scale_scores(Scores& s) const {
        if constexpr (kConvertsTiles) {
            float factor[kRowTiles][2];
            for_each<kRowTiles, 2>([&](int t, int half) { factor[t][half] = kKeepsFactors ? kept_[half] : load_factor(t, half); });
            for_each<kKeyTiles>([&](int n) {
                const float2 key = kHasKeyScales ? load(0, n) : make_float2(1.0f, 1.0f);
                for_each<kRowTiles, 2>([&](int t, int half) {
                    s[t][n][half * 2] *= factor[t][half], s[t][n][half * 2 + 1] *= factor[t][half];
                    if constexpr (kHasKeyScales) s[t][n][half * 2] *= key.x, s[t][n][half * 2 + 1] *= key.y;
                });
            });
        }
    }

    // What is added to the scores of two keys where the largest weight times scale is looked for: log2 of the values' scales, in
    // units of scores.
    __device__ __forceinline__ float2 bonus(int n) const { return load(ScaleTile::kBonuses, n); }

    // Multiplies weights by the scales of their values. In tiles where rows do not see all keys, what a row does not see stays 0
    // whatever its scale is.
    __device__ __forceinline__ void scale_weights(Scores& s, bool some_hidden) const {
        if constexpr (kScalesWeights) {
            if (some_hidden) {
                scale_weights([&](float& weight, float value) { weight = weight == 0.0f ? 0.0f : weight * value; }, s);
            } else {
                scale_weights([&](float& weight, float value) { weight *= value; }, s);
            }
        }
    }

private:
    // A warp with 32 rows has no registers to spare: its factors stay in shared memory.
    static constexpr bool kKeepsFactors = kConvertsTiles && kRowTiles == 1;

    __device__ __forceinline__ float load_factor(int t, int half) const {
        return load_shared_float(lane_factors_ + (t * 16 + half * 8) * 4);
    }

    template <typename Multiply>
    __device__ __forceinline__ void scale_weights(Multiply multiply, Scores& s) const {
        for_each<kKeyTiles>([&](int n) {
            const float2 value = load(ScaleTile::kValues, n);
            for_each<kRowTiles, 2>([&](int t, int half) {
                multiply(s[t][n][half * 2], value.x), multiply(s[t][n][half * 2 + 1], value.y);
            });
        });
    }

    __device__ __forceinline__ float2 load(int kind, int n) const { return load_shared_pair(lane_scales_ + kind + n * 32); }

    u32 lane_factors_, lane_scales_;
    [[maybe_unused]] float kept_[2];
};
