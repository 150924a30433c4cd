// Online softmax over keys, transposed: keys are the rows of the score fragment, packed query rows its columns.
//
// Fragment of a key group (16 keys) and a row group (8 query rows), S^T[16 keys x 8 rows]: lane l holds in
//   s[0], s[1]: key l / 4,     rows 2 (l % 4) and 2 (l % 4) + 1
//   s[2], s[3]: key l / 4 + 8, the same rows
// so the eight lanes with equal l % 4 share two rows.
//
// Weights are exp2(score * scale - m * scale) with log2 e in the scale, which the host makes positive.
#pragma once
#include "segment.cuh"
#include "tiles.cuh"

using Scores = float[kKeyGroups][kRowGroups][4];

// cap * tanh(x) = cap - 2 cap / (e^2x + 1): tanh.approx is too coarse for the LSE. Capped scores are in log2 units.
__device__ __forceinline__ void cap_scores(const DecodeParams& p, Scores& s) {
#pragma unroll
    for (int k = 0; k < kKeyGroups; ++k) {
#pragma unroll
        for (int g = 0; g < kRowGroups; ++g) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float e = exp2_approx(s[k][g][i] * p.tanh_scale);
                s[k][g][i] = p.score_cap - 2.0f * p.score_cap * reciprocal_approx(e + 1.0f);
            }
        }
    }
}

// Hides from each row the keys that it does not see; for the tiles in which that differs from row to row.
__device__ __forceinline__ void mask_scores(const DecodeParams& p, const Segment& segment, int first_key, int lane,
                                            Scores& s) {
#pragma unroll
    for (int g = 0; g < kRowGroups; ++g) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
            const int query = query_of(p, segment.first_row + g * 8 + lane % 4 * 2 + column);
            const int begin = mask_of(p).first_visible(segment.lengths, query);
            const int end = min(segment.keys.end, mask_of(p).last_visible(segment.lengths, query));
#pragma unroll
            for (int eighth = 0; eighth < kTileKeys / 8; ++eighth) {
                const int key = first_key + lane / 4 + eighth * 8;
                if (key < begin || key >= end) s[eighth / 2][g][eighth % 2 * 2 + column] = -infinity();
            }
        }
    }
}

// Running maximum and sum of two rows per row group. The maximum is lazy: it moves only when a score exceeds it by more
// than a factor of 2^8 in weight, so that most tiles need no reduction; weights then reach 256 instead of 1, which floats
// bear.
class Softmax {
public:
    __device__ __forceinline__ explicit Softmax(const DecodeParams& p) : scale_(p.score_scale), slack_(p.score_slack) {}

    __device__ __forceinline__ void reset() {
#pragma unroll
        for (int g = 0; g < kRowGroups; ++g) {
#pragma unroll
            for (int column = 0; column < 2; ++column) {
                threshold_[g][column] = offset_[g][column] = kLowest;
                sum_[g][column] = 0.0f;
            }
        }
    }

    // Turns scores into weights; calls math.rescale(alpha) first if a maximum moves.
    template <typename Math>
    __device__ __forceinline__ void update(Scores& s, Math& math) {
        bool exceeds = false;
#pragma unroll
        for (int g = 0; g < kRowGroups; ++g) {
            exceeds |= lane_maximum(s, g, 0) > threshold_[g][0];
            exceeds |= lane_maximum(s, g, 1) > threshold_[g][1];
        }
        if (__any_sync(kFullWarp, exceeds)) {
            float alpha[kRowGroups][2];
#pragma unroll
            for (int g = 0; g < kRowGroups; ++g) {
#pragma unroll
                for (int column = 0; column < 2; ++column) {
                    float top = lane_maximum(s, g, column);
#pragma unroll
                    for (int lanes = 4; lanes < 32; lanes *= 2) top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, lanes));
                    // Each row moves for its own sake alone: its result must not depend on the rows beside it.
                    const bool moves = top > threshold_[g][column];
                    const float offset = moves ? top * scale_ : offset_[g][column];
                    threshold_[g][column] = moves ? top + slack_ : threshold_[g][column];
                    alpha[g][column] = exp2_approx(offset_[g][column] - offset);
                    offset_[g][column] = offset;
                    sum_[g][column] *= alpha[g][column];
                }
            }
            math.rescale(alpha);
        }
#pragma unroll
        for (int k = 0; k < kKeyGroups; ++k) {
#pragma unroll
            for (int g = 0; g < kRowGroups; ++g) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    s[k][g][i] = exp2_approx(fmaf(s[k][g][i], scale_, -offset_[g][i % 2]));
                    sum_[g][i % 2] += s[k][g][i];
                }
            }
        }
    }

    // The maximum in log2 units; kLowest where no key was seen.
    __device__ __forceinline__ float row_maximum(int g, int column) const { return offset_[g][column]; }

    // Sums stay per lane until the item ends.
    __device__ __forceinline__ float row_sum(int g, int column) const {
        float total = sum_[g][column];
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) total += __shfl_xor_sync(kFullWarp, total, lanes);
        return total;
    }

private:
    // The largest score of a row among this lane's keys.
    static __device__ __forceinline__ float lane_maximum(const Scores& s, int g, int column) {
        float top = fmaxf(s[0][g][column], s[0][g][column + 2]);
#pragma unroll
        for (int k = 1; k < kKeyGroups; ++k) top = fmaxf(top, fmaxf(s[k][g][column], s[k][g][column + 2]));
        return top;
    }

    float scale_, slack_;
    float threshold_[kRowGroups][2];  // score above which the maximum moves
    float offset_[kRowGroups][2];     // maximum * scale
    float sum_[kRowGroups][2];
};
