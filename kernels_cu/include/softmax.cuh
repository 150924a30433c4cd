// Online softmax over keys, transposed: keys are the rows of the score fragment, packed query rows its columns.
//
// Fragment of a key group (16 keys) and a row group (8 query rows), S^T[16 keys x 8 rows]: lane l holds in
//   s[0], s[1]: key l / 4,     rows 2 (l % 4) and 2 (l % 4) + 1
//   s[2], s[3]: key l / 4 + 8, the same rows
// so the eight lanes with equal l % 4 share two rows.
//
// Weights are exp2(score * scale - m * scale) with log2 e in the scale, which the host makes positive. m * scale is rounded to
// a float. Up to kHugeOffset that is off by 1/4 at most, by which all weights of a row differ alike; beyond, it would soon be
// off by more than weights bear: there the maximum is subtracted from the scores instead, which is exact where it matters.
#pragma once
#include "fragment.cuh"
#include "scales.cuh"
#include "segment.cuh"
#include "softcap.cuh"
#include "states.cuh"
#include "tiles.cuh"

// Hides from each row the keys that it does not see; for the tiles in which that differs from row to row.
__device__ __forceinline__ void mask_scores(const DecodeParams& p, const Segment& segment, int first_key, int lane,
                                            Scores& s) {
    for_each<kRowGroups, 2>([&](int g, int column) {
        const int query = query_of(p, segment.first_row + g * 8 + lane % 4 * 2 + column);
        const int begin = mask_of(p).first_visible(segment.lengths, query);
        const int end = min(segment.keys.end, mask_of(p).last_visible(segment.lengths, query));
        const bool exists = g * 8 + lane % 4 * 2 + column < segment.valid_rows;  // has a row of the tree mask
        const unsigned char* const tree = kHasTree ? tree_row(p, segment, query) : nullptr;
        for_each<kTileKeys / 8>([&](int eighth) {
            const int key = first_key + lane / 4 + eighth * 8;
            bool is_hidden = key < begin || key >= end;
            if constexpr (kHasTree) is_hidden |= !exists | tree_hides(p, segment, tree, key);
            if (is_hidden) s[eighth / 2][g][eighth % 2 * 2 + column] = -infinity();
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
        fill(threshold_, -infinity());
        fill(offset_, kLowest);
        fill(sum_, 0.0f);
    }

    // Turns scores into weights; calls math.rescale(alpha) first if a maximum moves. The x of rows[w][r] keep the maxima of warp w:
    // only its lanes 0 .. 3 touch them, and only here.
    template <typename Math>
    __device__ __forceinline__ void update(Scores& s, const TileScales& scales, Math& math, float2 (&rows)[kWarps][kRows]) {
        bool exceeds = false;
        for_each<kRowGroups, 2>([&](int g, int column) {
            exceeds |= lane_maximum(s, scales, g, column) > threshold_[g][column];
        });
        if (__any_sync(kFullWarp, exceeds)) {
            const u32 thread = thread_number();
            float2* const mine = rows[thread / 32] + thread % 4 * 2;  // the first of this lane's rows of a row group
            const bool is_owner = thread % 32 < 4;
            float alpha[kRowGroups][2];  // first the tile's maxima
            bool some_huge = false;
            for_each<kRowGroups, 2>([&](int g, int column) {
                const float top = lanes_maximum<8, 4>(lane_maximum(s, scales, g, column));
                some_huge |= is_huge(g, column) || fabsf(top * scale_) >= kHugeOffset;
                alpha[g][column] = top;
            });
            // Per row: the bits of a row must not depend on the rows beside it.
            if (__any_sync(kFullWarp, some_huge)) {
                move_huge(s, alpha, mine, is_owner);
            } else {
                for_each<kRowGroups, 2>([&](int g, int column) {
                    const float top = alpha[g][column];
                    const bool moves = top > threshold_[g][column];
                    const float offset = moves ? __fmul_rn(top, scale_) : offset_[g][column];
                    if (moves && is_owner) mine[g * 8 + column].x = top;
                    threshold_[g][column] = moves ? top + slack_ : threshold_[g][column];
                    alpha[g][column] = exp2_approx(offset_[g][column] - offset);
                    offset_[g][column] = offset;
                    sum_[g][column] *= alpha[g][column];
                });
            }
            math.rescale(alpha);
        }
        for_each<kKeyGroups, kRowGroups, 4>([&](int k, int g, int i) {
            s[k][g][i] = exp2_approx(fmaf(s[k][g][i], scale_, -offset_[g][i % 2]));
            sum_[g][i % 2] += s[k][g][i];
            if constexpr (kHasValueScales) s[k][g][i] *= scales.value[k * 2 + i / 2];
        });
    }

    // Whether a row has seen a key, and so has a maximum.
    __device__ __forceinline__ bool has_maximum(int g, int column) const { return offset_[g][column] != kLowest; }

    // Sums stay per lane until the item ends.
    __device__ __forceinline__ float row_sum(int g, int column) const {
        return lanes_sum<8, 4>(sum_[g][column]);
    }

private:
    // Whether a row's maximum is subtracted from its scores: then every tile goes the way of one in which maxima move.
    __device__ __forceinline__ bool is_huge(int g, int column) const {
        return threshold_[g][column] == -infinity() && offset_[g][column] == 0.0f;
    }

    // Moves the maxima where some are huge, and subtracts those from the scores. Turns the tile's maxima into the factors of what
    // was summed up before.
    __device__ __forceinline__ void move_huge(Scores& s, float (&alpha)[kRowGroups][2], float2* mine, bool is_owner) {
        for_each<kRowGroups, 2>([&](int g, int column) {
            const float top = alpha[g][column], old_offset = offset_[g][column];
            const bool was_huge = is_huge(g, column), moves = was_huge || top > threshold_[g][column];
            float old = is_owner && was_huge ? mine[g * 8 + column].x : kLowest;
            old = __shfl_sync(kFullWarp, old, thread_number() % 4);
            const float maximum = was_huge ? fmaxf(old, top) : top;
            float offset = __fmul_rn(maximum, scale_);
            const bool huge = moves && !(fabsf(offset) < kHugeOffset);
            float change = 0.0f;
            if (moves) {
                if (huge) offset = 0.0f;
                if (was_huge) change = huge ? (old - maximum) * scale_ : fmaf(old, scale_, -offset);
                else change = huge ? -fmaf(maximum, scale_, -old_offset) : old_offset - offset;
                if (is_owner) mine[g * 8 + column].x = maximum;
                offset_[g][column] = offset;
                threshold_[g][column] = huge ? -infinity() : maximum + slack_;
            }
            alpha[g][column] = exp2_approx(fminf(change, 0.0f));
            sum_[g][column] *= alpha[g][column];
            if (huge) for_each<kKeyGroups>([&](int k) { s[k][g][column] -= maximum, s[k][g][column + 2] -= maximum; });
        });
    }

    // The score that is to have weight 1, of a row and this lane's keys: the largest. With a quantised cache weights become
    // float16: the largest is to have 2^7, so that with the slack they use its range to 2^15, and keys far below keep their
    // share. And where values have scales, it is weight times scale that has to fit.
    __device__ __forceinline__ float lane_maximum(const Scores& s, const TileScales& scales, int g, int column) const {
        const auto score = [&](int k, int half) {
            const float x = s[k][g][column + half * 2];
            return kHasValueScales ? x + scales.bonus[kHasValueScales ? k * 2 + half : 0] : x;
        };
        float top = fmaxf(score(0, 0), score(0, 1));
#pragma unroll
        for (int k = 1; k < kKeyGroups; ++k) top = fmaxf(top, fmaxf(score(k, 0), score(k, 1)));
        return kIsQuantised && Element::kBytes < 4 ? fmaf(slack_, -7.0f / kSlack, top) : top;
    }

    float scale_, slack_;
    float threshold_[kRowGroups][2];  // score above which the maximum moves
    float offset_[kRowGroups][2];     // maximum * scale; 0 for a huge one, kLowest before any key
    float sum_[kRowGroups][2];
};
