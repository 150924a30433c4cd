// What makes numbers of the scores and weights of a quantised cache where query rows are the rows of the MMA: a factor of each row
// (query_pass.cuh), and scales of keys and values where every key and head has its own. As in scales.cuh, nothing here touches an
// element.
#pragma once
#include "ptx/memory.cuh"
#include "rows_codes.cuh"

constexpr bool kScalesWeights = kScalesScores && kHasValueScales;

class Scaling {
public:
    // Of a warp whose rows have these factors, of one item after another; kRows further on they are those of scores that meet
    // values. `slack` is that of the scores.
    __device__ __forceinline__ Scaling(const float* factors, int lane, float slack = 0.0f)
        : lane_factors_(shared_address(factors + lane / 4)), slack_(slack) {}

    // Begins with an item whose factors have been written.
    __device__ __forceinline__ void begin_item() {
        if constexpr (kKeepsFactors) for_each<2>([&](int half) { kept_[half] = load_factor(0, half * 8); });
    }

    // Goes on to a tile of which the scales lie at `scales`, and of which the warp scores the keys from `first_key` on. Lane l has
    // those of the keys 2 (l % 4) and 2 (l % 4) + 1 of each 8.
    __device__ __forceinline__ void begin_tile(u32 scales, int first_key, int lane) {
        lane_scales_ = scales + (first_key + lane % 4 * 2) * 4;
    }

    // Makes products of queries and keys of what came out of the matrices.
    __device__ __forceinline__ void scale_scores(Scores& s) const {
        if constexpr (kScalesScores) {
            const auto factor = [&](int t, int half) { return kKeepsFactors ? kept_[half] : load_factor(t, half * 8); };
            scale_scores<kHasKeyScales, 0>(factor, s);
        }
    }

    // The same of latent attention's scores of values, as keys that they are, too.
    __device__ __forceinline__ void scale_scores_of_values(Scores& s) const {
        scale_scores<kHasValueScales, ScaleTile::kValues>([&](int t, int half) { return load_factor(t, kRows + half * 8); }, s);
    }

    // What is added to the scores of two keys where the largest weight times scale is looked for: log2 of the values' scales, in
    // units of scores.
    __device__ __forceinline__ float2 bonus(int n) const {
        if constexpr (!kReadsCodes) return load(ScaleTile::kBonuses, n);
        const float2 value = load(ScaleTile::kValues, n);
        return make_float2(bonus_of(value.x, slack_), bonus_of(value.y, slack_));
    }

    // Multiplies weights by the scales of their values, of kCount tiles of 8 keys from kFirst on. In tiles where rows do not see all
    // keys, what a row does not see stays 0 whatever its scale is.
    template <int kFirst = 0, int kCount = kKeyTiles>
    __device__ __forceinline__ void scale_weights(Scores& s, bool some_hidden) const {
        if constexpr (kScalesWeights) {
            if (some_hidden) {
                const auto unless_0 = [&](float& weight, float value) { weight = weight == 0.0f ? 0.0f : weight * value; };
                scale_weights<kFirst, kCount>(unless_0, s);
            } else {
                scale_weights<kFirst, kCount>([&](float& weight, float value) { weight *= value; }, s);
            }
        }
    }

private:
    // A warp with 32 rows has no registers to spare: its factors stay in shared memory.
    static constexpr bool kKeepsFactors = kConvertsTiles && kRowTiles == 1;

    // Multiplies scores by factor_of(row tile, half), and by the scales of a kind if there are some.
    template <bool kHasScales, int kKind, typename FactorOf>
    __device__ __forceinline__ void scale_scores(FactorOf factor_of, Scores& s) const {
        float factor[kRowTiles][2];
        for_each<kRowTiles, 2>([&](int t, int half) { factor[t][half] = factor_of(t, half); });
        for_each<kKeyTiles>([&](int n) {
            const float2 scale = kHasScales ? load(kKind, n) : make_float2(1.0f, 1.0f);
            for_each<kRowTiles, 2>([&](int t, int half) {
                s[t][n][half * 2] *= factor[t][half], s[t][n][half * 2 + 1] *= factor[t][half];
                if constexpr (kHasScales) s[t][n][half * 2] *= scale.x, s[t][n][half * 2 + 1] *= scale.y;
            });
        });
    }

    __device__ __forceinline__ float load_factor(int t, int row) const {
        return load_shared_float(lane_factors_ + (t * 16 + row) * 4);
    }

    template <int kFirst, int kCount, typename Multiply>
    __device__ __forceinline__ void scale_weights(Multiply multiply, Scores& s) const {
        for_each<kCount>([&](int i) {
            const int n = kFirst + i;
            const float2 value = load(ScaleTile::kValues, n);
            for_each<kRowTiles, 2>([&](int t, int half) {
                multiply(s[t][n][half * 2], value.x), multiply(s[t][n][half * 2 + 1], value.y);
            });
        });
    }

    __device__ __forceinline__ float2 load(int kind, int n) const { return load_shared_pair(lane_scales_ + kind + n * 32); }

    u32 lane_factors_, lane_scales_;
    [[maybe_unused]] float slack_;
    [[maybe_unused]] float kept_[2];
};
