// What makes numbers of a quantised cache's scores and weights: factors of rows, and scales of keys.
//
// Nothing here ever touches an element. Scores of a row are multiplied by the row's factor (query_pass.cuh) and by the scale of
// their key, weights by the scale of their value; what all values of a sequence and KV head have in common enters when a row
// is finished.
#pragma once
#include "fragment.cuh"
#include "params.cuh"
#include "ptx/memory.cuh"
#include "segment.cuh"
#include "tiles.cuh"

using Scores = float[kKeyGroups][kRowGroups][4];  // lane layout in softmax.cuh

// The factors of the rows of which lane l has scores, 2 (l % 4) and 2 (l % 4) + 1 of each row group.
class RowFactors {
public:
    __device__ __forceinline__ void load(const float* factors, int lane) {
        if constexpr (kIsQuantised) {
            for_each<kRowGroups, 2>([&](int g, int column) { factor_[g][column] = factors[g * 8 + lane % 4 * 2 + column]; });
        }
    }
    __device__ __forceinline__ float of(int g, int column) const { return factor_[kIsQuantised ? g : 0][column]; }

private:
    float factor_[kIsQuantised ? kRowGroups : 1][2];
};

// The scales of the keys of which lane l has scores, l / 4 + 8 i, where every key and head has its own.
struct TileScales {
    float key[kHasKeyScales ? kTileKeys / 8 : 1];
    float value[kHasValueScales ? kTileKeys / 8 : 1];
    // What is added to a score where the largest weight times scale is looked for: log2 of the value's scale, in units of
    // scores. Bounded, so that sums of weights stay finite: a scale of zero allows weights that float16 does not hold.
    float bonus[kHasValueScales ? kTileKeys / 8 : 1];

    __device__ __forceinline__ TileScales(const DecodeParams& p, u32 slot, int lane) {
        if constexpr (kHasKeyScales) load(slot, lane, key);
        if constexpr (kHasValueScales) {
            load(slot + ScaleTile::kValues, lane, value);
            for_each<kTileKeys / 8>([&](int i) {
                const float exponent = fminf(fmaxf(log2_approx(fabsf(value[i])), -100.0f), 100.0f);
                bonus[i] = exponent * (p.score_slack / kSlack);
            });
        }
    }

    // Makes zeros of the scales of values that are cleared (loader.cuh): a weight of 0 does not help against a scale of NaN.
    __device__ __forceinline__ void clear_values(const DecodeParams& p, const Segment& segment, u32 first_key, int lane) {
        for_each<kHasValueScales ? kTileKeys / 8 : 0>([&](int i) {
            if (sees_nothing(p, segment, first_key + lane / 4 + i * 8)) value[i] = 0.0f;
        });
    }

private:
    template <int kCount>
    static __device__ __forceinline__ void load(u32 slot, int lane, float (&to)[kCount]) {
        for_each<kCount / 4>([&](int i) {
            const float4 four = load_shared(slot + ScaleTile::offset(lane / 4, i));
            to[4 * i] = four.x, to[4 * i + 1] = four.y, to[4 * i + 2] = four.z, to[4 * i + 3] = four.w;
        });
    }
};

// Makes products of queries and keys of what came out of the matrices.
__device__ __forceinline__ void scale_scores(const RowFactors& factors, const TileScales& scales, Scores& s) {
    for_each<kKeyGroups, kRowGroups, 4>([&](int k, int g, int i) {
        s[k][g][i] *= factors.of(g, i % 2);
        if constexpr (kHasKeyScales) s[k][g][i] *= scales.key[k * 2 + i / 2];
    });
}
