// The arithmetic of one warp in float32, by fused multiply-adds, with the score fragments of mma.cuh.
//
// The codes of a quantised cache become float32 as they are read.
//
// Lane l scores keys l / 4 and l / 4 + 8 for rows 2 (l % 4) and + 1. Of the output it holds the same two rows and the
// columns 4 (l / 4) .. + 3 of every 32.
#pragma once
#include "codes.cuh"
#include "softmax.cuh"
#include "tiles.cuh"

class FmaMath {
    static constexpr int kChunks = kHeadDim / 4;            // of 4 elements of a key
    static constexpr int kColumns = (kHeadDimV + 31) / 32;  // groups of 32 value columns

    using Queries = Swizzle<kQueryBytes>;
    using Keys = Swizzle<kKeyBytes>;
    using Values = Swizzle<kValueBytes>;
    static_assert(Queries::kPeriod == 8, "a float32 row is whole lines");

public:
    __device__ __forceinline__ explicit FmaMath(int lane) : lane_(lane) {}

    __device__ __forceinline__ void begin_item(u32 query, int) {
        query_ = query;
        fill(output_, 0.0f);
    }

    __device__ __forceinline__ void scores(u32 slot, Scores& scores) const {
        for_each<kKeyGroups>([&](int k) { score_group(slot + k * 16 * kKeyBytes, scores[k]); });
    }

    __device__ __forceinline__ void accumulate(u32 slot, const Scores& weights) {
        for_each<kKeyGroups>([&](int k) { add_group(slot + k * 16 * kValueBytes, weights[k]); });
    }

    __device__ __forceinline__ void rescale(const float (&alpha)[kRowGroups][2]) {
        for_each<kRowGroups, 2, kColumns>([&](int g, int row, int t) {
            for_each<4>([&](int i) { output_[g][row][t][i] *= alpha[g][row]; });
        });
    }

    __device__ __forceinline__ void store(int g, u32 slot, int lane) const {
        for_each<2, kColumns>([&](int row, int t) {
            const float (&o)[4] = output_[g][row][t];
            store_shared(slot + OutputTile::offset(lane % 4 * 2 + row, t * 32 + lane / 4 * 4),
                         make_float4(o[0], o[1], o[2], o[3]));
        });
    }

private:
    // Four elements of a key or value row, number `quad` of the row.
    template <typename Rows, typename T>
    static __device__ __forceinline__ float4 load(u32 slot, int row, int quad) {
        if constexpr (T::kBytes == 4) return load_shared(slot + Rows::offset(row, quad));
        else return codes_to_floats<T>(load_shared_u32(slot + Rows::offset(row, quad / 4) + quad % 4 * 4));
    }

    // Scores of 16 keys.
    __device__ __forceinline__ void score_group(u32 slot, float (&s)[kRowGroups][4]) const {
        fill(s, 0.0f);
        const int key = lane_ / 4, row = lane_ % 4 * 2;
#pragma unroll 4
        for (int c = 0; c < kChunks; ++c) {
            float4 k[2];
            k[0] = load<Keys, CacheElement>(slot, key, c);
            k[1] = load<Keys, CacheElement>(slot, key + 8, c);
            for_each<kRowGroups, 2>([&](int g, int column) {
                const float4 q = load_shared(query_ + Queries::offset(g * 8 + row + column, c));
                for_each<2>([&](int half) {
                    float& dot = s[g][half * 2 + column];
                    dot = fmaf(q.x, k[half].x, dot);
                    dot = fmaf(q.y, k[half].y, dot);
                    dot = fmaf(q.z, k[half].z, dot);
                    dot = fmaf(q.w, k[half].w, dot);
                });
            });
        }
    }

    // Adds the values of 16 keys.
    __device__ __forceinline__ void add_group(u32 slot, const float (&weights)[kRowGroups][4]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll 2
            for (int key = 0; key < 8; ++key) {
                float weight[kRowGroups][2];  // of this key, from the lanes that scored it
                for_each<kRowGroups, 2>([&](int g, int row) {
                    weight[g][row] = __shfl_sync(kFullWarp, weights[g][half * 2 + row], key * 4 + lane_ % 4);
                });
                for_each<kColumns>([&](int t) {
                    // Columns past the head dim are never stored; their slot bytes were never written.
                    if (t * 32 + lane_ / 4 * 4 >= kHeadDimV) return;
                    const float4 v = load<Values, CacheElement>(slot, key + half * 8, t * 8 + lane_ / 4);
                    for_each<kRowGroups, 2>([&](int g, int row) {
                        float (&o)[4] = output_[g][row][t];
                        o[0] = fmaf(weight[g][row], v.x, o[0]);
                        o[1] = fmaf(weight[g][row], v.y, o[1]);
                        o[2] = fmaf(weight[g][row], v.z, o[2]);
                        o[3] = fmaf(weight[g][row], v.w, o[3]);
                    });
                });
            }
        }
    }

    u32 query_;
    int lane_;
    float output_[kRowGroups][2][kColumns][4];
};
