// Online softmax where packed query rows are the rows of the score fragment, keys its columns.
//
// Scores of row tile t and key tile n, S[16 rows x 8 keys]: lane l holds in
//   s[t][n][0], s[t][n][1]: row l / 4,     keys 2 (l % 4) and 2 (l % 4) + 1
//   s[t][n][2], s[t][n][3]: row l / 4 + 8, the same keys
// so the four lanes with equal l / 4 share two rows of a row tile.
//
// Weights are exp2(score * scale - m * scale), as in softmax.cuh: a product m * scale up to kHugeOffset is rounded to a float, by
// which all weights of a row differ alike, and what they are off by is made up for when a segment ends; of a larger one the
// maximum is subtracted from the scores instead.
#pragma once
#include "rows_partners.cuh"
#include "rows_scales.cuh"
#include "softcap.cuh"
#include "states.cuh"

using RowStates = RowState[kRowTiles][2];  // of a lane's rows; the four lanes of a row know the same

// Which of a lane's keys of a tile the tree mask hides from a query, a bit each: bit 2 n + c is that of key lane_key + 8 n + c.
__device__ __forceinline__ u32 hidden_by_tree(const DecodeParams& p, const Segment& segment, int query, u32 lane_key) {
    static_assert(kKeyTiles <= 16, "a bit for each key");
    constexpr int kAtOnce = kKeyTiles < 4 ? kKeyTiles : 4;  // more loads under way would take too many registers
    const unsigned char* const row = tree_row(p, segment, query);
    u32 hidden = 0;
#pragma unroll 1
    for (int n = 0; n < kKeyTiles; n += kAtOnce) {
        u32 some = 0;
        for_each<kAtOnce, 2>([&](int i, int column) {
            some |= static_cast<u32>(tree_hides(p, segment, row, lane_key + (n + i) * 8 + column)) << (2 * i + column);
        });
        hidden |= some << 2 * n;
    }
    return hidden;
}

// Hides from each row the keys that it does not see; for the tiles in which that differs from row to row. The scores begin at
// `first_key`, and at packed row `first_row`.
__device__ __forceinline__ void mask_scores(const DecodeParams& p, const Segment& segment, int first_row, u32 first_key,
                                            int lane, Scores& s) {
    for_each<kRowTiles, 2>([&](int t, int half) {
        const int row = first_row + t * 16 + half * 8 + lane / 4, query = query_of(p, row);
        const bool exists = row < segment.first_row + segment.valid_rows;  // has a row of the tree mask
        // Relative to the lane's first key, which may be near 2^31; then its keys are constants.
        const u32 lane_key = first_key + lane % 4 * 2;
        const int begin = mask_of(p).first_visible(segment.lengths, query) - lane_key;
        const int end = min(segment.keys.end, mask_of(p).last_visible(segment.lengths, query)) - lane_key;
        u32 hidden = 0;
        if constexpr (kHasTree) hidden = exists ? hidden_by_tree(p, segment, query, lane_key) : ~0u;
        for_each<kKeyTiles, 2>([&](int n, int column) {
            const int key = n * 8 + column;
            bool is_hidden = key < begin || key >= end;
            if constexpr (kHasTree) is_hidden |= hidden >> (2 * n + column) & 1;
            if (is_hidden) s[t][n][half * 2 + column] = -infinity();
        });
    });
}

// Rounds weights to elements, of kCount tiles of 8 keys from kFirst on: two C fragments side by side are an A fragment.
template <int kFirst = 0, int kCount = kKeyTiles, typename T = TileElement>
__device__ __forceinline__ void pack_weights(const Scores& s, Weights& weights) {
    for_each<kRowTiles, kCount>([&](int t, int i) {
        const int n = kFirst + i;
        weights[t][n / 2][n % 2 * 2] = T::pack(s[t][n][0], s[t][n][1]);
        weights[t][n / 2][n % 2 * 2 + 1] = T::pack(s[t][n][2], s[t][n][3]);
    });
}

// Running maximum and sum of two rows per row tile. The maximum is lazy: it moves only when a score exceeds it by more than a
// factor of 2^8 in weight, so that most tiles need no reduction. Weights then reach 256 instead of 1, which is safe.
class Softmax {
public:
    __device__ __forceinline__ explicit Softmax(const DecodeParams& p) : scale_(p.score_scale), slack_(p.score_slack) {}

    __device__ __forceinline__ void reset() {
        fill(maximum_, -infinity());
        fill(offset_, kLowest);
        fill(sum_, 0.0f);
        some_huge_ = false;
    }

    // Turns scores into weights; calls math.rescale(alpha) first if a maximum moves.
    template <typename Math, typename Partners>
    __device__ __forceinline__ void update(Scores& s, Math& math, Partners& partners, const Scaling& scaling) {
        move_maxima(s, math, partners, scaling);
        weigh<0, kKeyTiles>(s);
    }

    // The same without looking for maxima: none moves, and the weights' sums show whether one should have. True if so; then the
    // scores are gone, and `sums`, of this lane's weights of the tile, says for which rows.
    __device__ __forceinline__ bool weigh_first(Scores& s, float (&sums)[kRowTiles][2]) {
        bool exceeds = some_huge_;
        fill(sums, 0.0f);
        weigh<0, kKeyTiles>(s, sums);
        for_each<kRowTiles, 2>([&](int t, int half) { exceeds |= !(sums[t][half] <= kMostSum); });
        return exceeds;
    }

    // After weigh_first(): these weights count, ..
    __device__ __forceinline__ void accept(const float (&sums)[kRowTiles][2]) {
        for_each<kRowTiles, 2>([&](int t, int half) { sum_[t][half] += sums[t][half]; });
    }

    // .. or the same scores once more become weights, after maxima have moved. A row of which none moves keeps its bits.
    template <typename Math>
    __device__ __forceinline__ void weigh_again(Scores& s, float (&sums)[kRowTiles][2], Math& math, const Scaling& scaling) {
        float top[kRowTiles][2];
        lane_maxima(s, scaling, top);
        const auto top_of = [&](int t, int half) {
            const float largest = lanes_maximum<4>(top[t][half]);
            return lanes_maximum<4>(sums[t][half]) > kMostSum ? largest : -infinity();
        };
        follow(math, top_of, 0.0f);
        subtract_huge(s);
        fill(sums, 0.0f);
        weigh<0, kKeyTiles>(s, sums);
        accept(sums);
    }

    // The same as update() in two steps: what all scores have to be known for ..
    template <typename Math, typename Partners>
    __device__ __forceinline__ void move_maxima(Scores& s, Math& math, Partners& partners, const Scaling& scaling) {
        bool exceeds = some_huge_;
        float top[kRowTiles][2];
        lane_maxima(s, scaling, top);
        for_each<kRowTiles, 2>([&](int t, int half) { exceeds |= top[t][half] > maximum_[t][half] + slack_; });
        if (partners.any(exceeds, top)) {
            follow(math, [&](int t, int half) { return partners.maximum(t, half, top[t][half]); });
            subtract_huge(s);
        }
    }

    // .. and the weights of kCount tiles of 8 keys from kFirst on.
    template <int kFirst, int kCount>
    __device__ __forceinline__ void weigh(Scores& s) {
        weigh<kFirst, kCount>(s, sum_);
    }

    // Lets the maxima follow the largest scores of a tile, top_of(row tile, half): of one whose weights others compute, too.
    template <typename Math, typename TopOf>
    __device__ __forceinline__ void follow(Math& math, TopOf top_of) {
        follow(math, top_of, slack_);
    }

    // Ends a segment: writes what is known of the rows, and makes up for the rounding of their offsets. All lanes and partners
    // call it.
    template <typename Math, typename Partners>
    __device__ __forceinline__ void finish(Math& math, Partners& partners, RowStates& states) const {
        float factor[kRowTiles][2];
        for_each<kRowTiles, 2>([&](int t, int half) {
            factor[t][half] = exp2_approx(rounded_up(maximum_[t][half], scale_));
            const float sum = partners.total(t, half, lanes_sum<4>(sum_[t][half]));
            states[t][half] = {fmaxf(maximum_[t][half], kLowest), sum * factor[t][half]};
        });
        math.rescale(factor);
    }

private:
    // A lane's weights of a row and tile sum up to this at most, or the maximum moves: then the largest is 2^7 above its weight.
    // Any of them fits float16.
    static constexpr float kMostSum = kConvertsTiles ? 0x1p15f : 0x1p12f;

    template <int kFirst, int kCount>
    __device__ __forceinline__ void weigh(Scores& s, float (&sums)[kRowTiles][2]) const {
        for_each<kRowTiles, kCount, 4>([&](int t, int n, int i) {
            float& score = s[t][kFirst + n][i];
            score = exp2_approx(fmaf(score, scale_, -offset_[t][i / 2]));
            sums[t][i / 2] += score;
        });
    }

    // Lets the maxima follow scores that exceed them by more than `slack`.
    template <typename Math, typename TopOf>
    __device__ __forceinline__ void follow(Math& math, TopOf top_of, float slack) {
        float alpha[kRowTiles][2];
        bool some_huge = false;
        // Per row: the bits of a row must not depend on the rows beside it.
        for_each<kRowTiles, 2>([&](int t, int half) {
            alpha[t][half] = move(t, half, slack, top_of(t, half));
            sum_[t][half] *= alpha[t][half];
            some_huge |= is_huge(t, half);
        });
        math.rescale(alpha);
        some_huge_ = __any_sync(kFullWarp, some_huge);
    }

    // Subtracts huge maxima from the scores.
    __device__ __forceinline__ void subtract_huge(Scores& s) const {
        if (!some_huge_) return;
        for_each<kRowTiles, 2>([&](int t, int half) {
            const float base = is_huge(t, half) ? maximum_[t][half] : 0.0f;
            for_each<kKeyTiles, 2>([&](int n, int column) { s[t][n][half * 2 + column] -= base; });
        });
    }

    // Whether a row's maximum is subtracted from its scores.
    __device__ __forceinline__ bool is_huge(int t, int half) const {
        return offset_[t][half] == 0.0f && maximum_[t][half] != 0.0f;
    }

    // Lets a row's maximum follow the largest score of a tile; returns the factor of what was summed up before.
    __device__ __forceinline__ float move(int t, int half, float slack, float top) {
        const float old = maximum_[t][half], old_offset = offset_[t][half];
        const bool was_huge = is_huge(t, half);
        if (!(top > (was_huge ? old : old + slack))) return 1.0f;
        const float offset = __fmul_rn(top, scale_);
        const bool huge = !(fabsf(offset) < kHugeOffset);
        maximum_[t][half] = top;
        offset_[t][half] = huge ? 0.0f : offset;
        float change;
        if (was_huge) change = huge ? (old - top) * scale_ : fmaf(old, scale_, -offset);
        else change = huge ? -fmaf(top, scale_, -old_offset) : old_offset - offset;
        return exp2_approx(fminf(change, 0.0f));
    }

    // The score that is to have weight 1, of each row and this lane's keys: the largest. Of codes, as in softmax.cuh, the largest is
    // to have weight 2^7, and where values have scales, it is weight times scale that has to fit float16.
    __device__ __forceinline__ void lane_maxima(const Scores& s, const Scaling& scaling, float (&top)[kRowTiles][2]) const {
        for_each<kKeyTiles>([&](int n) {
            float2 bonus = {0.0f, 0.0f};
            if constexpr (kScalesWeights) bonus = scaling.bonus(n);
            for_each<kRowTiles, 2>([&](int t, int half) {
                float low = s[t][n][half * 2], high = s[t][n][half * 2 + 1];
                if constexpr (kScalesWeights) low += bonus.x, high += bonus.y;
                top[t][half] = n == 0 ? fmaxf(low, high) : fmaxf(top[t][half], fmaxf(low, high));
            });
        });
        if constexpr (kConvertsTiles) {
            for_each<kRowTiles, 2>([&](int t, int half) { top[t][half] = fmaf(slack_, -7.0f / kSlack, top[t][half]); });
        }
    }

    float scale_, slack_;
    float maximum_[kRowTiles][2];  // -inf before any key
    float offset_[kRowTiles][2];   // maximum * scale; 0 for a huge one, kLowest before any key
    float sum_[kRowTiles][2];      // of this lane's keys
    bool some_huge_;
};
