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

// Bits of keys: bit 2 n + c of a lane's word is that of its key 8 n + c, counted from its first one.
static_assert(kKeyTiles <= 16, "a bit for each key");

// The bits of a lane's keys before `end`.
__device__ __forceinline__ u32 keys_before(int end) {
    const int inside = max(0, min(end, kKeyTiles * 8)), count = inside / 8 * 2 + min(inside % 8, 2);
    return count == 32 ? ~0u : (1u << count) - 1;
}

// The same of 32 keys, of which bit k is that of key k.
__device__ __forceinline__ u32 keys_of_lane(u32 word, int lane) {
    word = word >> lane % 4 * 2 & 0x03030303;
    word |= word >> 6;
    return (word | word >> 12) & 0xff;
}

// Which keys from `first_key` on the tree mask hides from queries, those of two rows of a lane. The warp looks at all keys of one
// query together, and votes: `first_query` to `last_query` are those of its rows.
__device__ __forceinline__ void hidden_by_tree(const DecodeParams& p, const Segment& segment, int first_query, int last_query,
                                               const int (&query)[2], u32 first_key, int lane, u32 (&hidden)[2]) {
    constexpr int kAtOnce = 4;  // loads under way
    // Of each lane: else ptxas works in the uniform registers that hold descriptors of wgmma, in all tiles.
    const unsigned char* const first_row = tree_row(p, segment, first_query) + zero_of_each_lane();
    hidden[0] = hidden[1] = 0;
#pragma unroll 1
    for (int word = (kKeyTiles - 1) / 4; word >= 0; --word) {
        const u32 key = first_key + word * 32;
        u32 hides[2] = {0, 0};
        if (tree_column(p, segment, key + 31) >= 0) {
            const unsigned char* row = first_row;
#pragma unroll 1
            for (int first = first_query; first <= last_query; first += kAtOnce) {
                bool is_hidden[kAtOnce];
                for_each<kAtOnce>([&](int i) {
                    is_hidden[i] = tree_hides(p, segment, row, key + lane);
                    if (first + i < last_query) row += p.tree.row_stride;
                });
                for_each<kAtOnce>([&](int i) {
                    const u32 votes = __ballot_sync(kFullWarp, is_hidden[i]);
                    for_each<2>([&](int half) {
                        if (query[half] == first + i) hides[half] = votes;
                    });
                });
            }
        }
        for_each<2>([&](int half) { hidden[half] = hidden[half] << 8 | keys_of_lane(hides[half], lane); });
    }
}

// For each of a lane's rows: visit(row tile, half, bits of the keys that it does not see), for the tiles in which those differ from
// row to row. Scores begin at `first_key`, and at packed row `first_row`.
template <typename Visit>
__device__ __forceinline__ void for_hidden_keys(const DecodeParams& p, const Segment& segment, int first_row, u32 first_key,
                                                int lane, Visit visit) {
    for_each<kRowTiles>([&](int t) {
        const int row = first_row + t * 16, last_row = segment.first_row + segment.valid_rows - 1;
        const int query[2] = {query_of(p, row + lane / 4), query_of(p, row + 8 + lane / 4)};
        u32 hidden[2] = {0, 0};
        if constexpr (kHasTree) {
            const int last_query = query_of(p, min(row + 15, last_row));
            hidden_by_tree(p, segment, query_of(p, row), last_query, query, first_key, lane, hidden);
        }
        for_each<2>([&](int half) {
            // Relative to the lane's first key, which may be near 2^31.
            const u32 lane_key = first_key + lane % 4 * 2;
            const int begin = mask_of(p).first_visible(segment.lengths, query[half]) - lane_key;
            const int end = min(segment.keys.end, mask_of(p).last_visible(segment.lengths, query[half])) - lane_key;
            hidden[half] |= keys_before(begin) | ~keys_before(end);
            if (kHasTree && row + half * 8 + lane / 4 > last_row) hidden[half] = ~0u;  // has no row of the tree mask
            visit(t, half, hidden[half]);
        });
    });
}

// Hides keys from a row.
__device__ __forceinline__ void hide_keys(int t, int half, u32 hidden, Scores& s) {
    for_each<kKeyTiles, 2>([&](int n, int column) {
        if (hidden >> (2 * n + column) & 1) s[t][n][half * 2 + column] = -infinity();
    });
}

// Hides from each row the keys that it does not see.
__device__ __forceinline__ void mask_scores(const DecodeParams& p, const Segment& segment, int first_row, u32 first_key,
                                            int lane, Scores& s) {
    for_hidden_keys(p, segment, first_row, first_key, lane, [&](int t, int half, u32 hidden) { hide_keys(t, half, hidden, s); });
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
            const float largest = lanes_maximum<4>(top[t][half]), sum = lanes_maximum<4>(sums[t][half]);
            // A huge row's sum says nothing: its scores were weighed before its maximum was subtracted.
            return sum > kMostSum || is_huge(t, half) ? largest : -infinity();
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
    static constexpr float kMostSum = kScalesScores ? 0x1p15f : 0x1p12f;

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
        if constexpr (kScalesScores) {
            for_each<kRowTiles, 2>([&](int t, int half) { top[t][half] = fmaf(slack_, -7.0f / kSlack, top[t][half]); });
        }
    }

    float scale_, slack_;
    float maximum_[kRowTiles][2];  // -inf before any key
    float offset_[kRowTiles][2];   // maximum * scale; 0 for a huge one, kLowest before any key
    float sum_[kRowTiles][2];      // of this lane's keys
    bool some_huge_;
};
