// Online softmax over keys, transposed: keys are the rows of the score fragment, packed query rows its columns.
//
// Fragment of a key group (16 keys) and a row group (8 query rows), S^T[16 keys x 8 rows]: lane l holds in
//   s[0], s[1]: key l / 4,     rows 2 (l % 4) and 2 (l % 4) + 1
//   s[2], s[3]: key l / 4 + 8, the same rows
// so the eight lanes with equal l % 4 share two rows.
//
// Weights are exp2(score * scale - m * scale) with log2 e in the scale, which the host makes positive.
#pragma once
#include "fragment.cuh"
#include "segment.cuh"
#include "tiles.cuh"

using Scores = float[kKeyGroups][kRowGroups][4];

// cap * tanh(x) = cap - 2 cap / (e^2x + 1): tanh.approx is too coarse for the LSE. Capped scores are in log2 units.
__device__ __forceinline__ void cap_scores(const DecodeParams& p, Scores& s) {
    for_each<kKeyGroups, kRowGroups, 4>([&](int k, int g, int i) {
        const float e = exp2_approx(s[k][g][i] * p.tanh_scale);
        s[k][g][i] = p.score_cap - 2.0f * p.score_cap * reciprocal_approx(e + 1.0f);
    });
}

// Hides from each row the keys that it does not see; for the tiles in which that differs from row to row.
__device__ __forceinline__ void mask_scores(const DecodeParams& p, const Segment& segment, int first_key, int lane,
                                            Scores& s) {
    for_each<kRowGroups, 2>([&](int g, int column) {
        const int query = query_of(p, segment.first_row + g * 8 + lane % 4 * 2 + column);
        const int begin = mask_of(p).first_visible(segment.lengths, query);
        const int end = min(segment.keys.end, mask_of(p).last_visible(segment.lengths, query));
        for_each<kTileKeys / 8>([&](int eighth) {
            const int key = first_key + lane / 4 + eighth * 8;
            if (key < begin || key >= end) s[eighth / 2][g][eighth % 2 * 2 + column] = -infinity();
        });
    });
}

// Running maximum and sum of two rows per row group. The maximum is lazy: it moves only when a score exceeds it by more
// than a factor of 2^8 in weight, so that most tiles need no reduction. Weights then reach 256 instead of 1, which is safe in
// float32, and as exact.
class Softmax {
public:
    __device__ __forceinline__ explicit Softmax(const DecodeParams& p) : scale_(p.score_scale), slack_(p.score_slack) {}

    __device__ __forceinline__ void reset() {
        fill(threshold_, kLowest);
        fill(offset_, kLowest);
        fill(sum_, 0.0f);
    }

    // Turns scores into weights; calls math.rescale(alpha) first if a maximum moves.
    template <typename Math>
    __device__ __forceinline__ void update(Scores& s, Math& math) {
        bool exceeds = false;
        for_each<kRowGroups, 2>([&](int g, int column) { exceeds |= lane_maximum(s, g, column) > threshold_[g][column]; });
        if (__any_sync(kFullWarp, exceeds)) {
            float alpha[kRowGroups][2];
            for_each<kRowGroups, 2>([&](int g, int column) {
                const float top = lanes_maximum<8, 4>(lane_maximum(s, g, column));
                // Per row: the bits of a row must not depend on the rows beside it.
                const bool moves = top > threshold_[g][column];
                const float offset = moves ? top * scale_ : offset_[g][column];
                threshold_[g][column] = moves ? top + slack_ : threshold_[g][column];
                alpha[g][column] = exp2_approx(offset_[g][column] - offset);
                offset_[g][column] = offset;
                sum_[g][column] *= alpha[g][column];
            });
            math.rescale(alpha);
        }
        for_each<kKeyGroups, kRowGroups, 4>([&](int k, int g, int i) {
            s[k][g][i] = exp2_approx(fmaf(s[k][g][i], scale_, -offset_[g][i % 2]));
            sum_[g][i % 2] += s[k][g][i];
        });
    }

    // The maximum in log2 units; kLowest where no key was seen.
    __device__ __forceinline__ float row_maximum(int g, int column) const { return offset_[g][column]; }

    // Sums stay per lane until the item ends.
    __device__ __forceinline__ float row_sum(int g, int column) const {
        return lanes_sum<8, 4>(sum_[g][column]);
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
