// What is known of a query row after some of its keys, and how several such states become one.
//
// A state is a maximum m, as scores come from the products of queries and keys, and a sum l; its output O is not normalised:
// l = sum exp2((score - m) scale) and O = sum exp2((score - m) scale) V. States of disjoint keys are merged as m = max m_i,
// w_i = exp2((m_i - m) scale), l = sum w_i l_i, O = sum w_i O_i (Milakov and Gimelshein, "Online normalizer calculation for
// softmax"). Always in the order of the keys, so that results never depend on timing.
#pragma once
#include "config.cuh"
#include "fragment.cuh"

struct RowState {
    float maximum, sum;  // maximum kLowest, sum 0: no key yet
};

constexpr float kHugeOffset = 4194304.0f;  // 2^22, in log2 units

// The weight of a state where the merged maximum is `to`. The difference is exact where it matters, the maxima may be anything.
__device__ __forceinline__ float weight_of(float maximum, float to, float scale) {
    return exp2_approx((maximum - to) * scale);
}

// By how much, in log2 units, a warp's weights are too small: it subtracts maximum * scale, rounded, unless that is huge.
__device__ __forceinline__ float rounded_up(float maximum, float scale) {
    const float offset = __fmul_rn(maximum, scale);
    return fabsf(offset) < kHugeOffset ? -fmaf(maximum, scale, -offset) : 0.0f;
}

// A step of the left fold of an item's splits. Its bits follow from its operands alone, whoever computes it.
struct Fold {
    float kept, added;  // weights of the sum so far and of the next split

    __device__ __forceinline__ float operator()(float sum, float next) const {
        return fmaf(sum, kept, __fmul_rn(next, added));
    }
    __device__ __forceinline__ float4 operator()(float4 sum, float4 next) const {
        const Fold& f = *this;
        return make_float4(f(sum.x, next.x), f(sum.y, next.y), f(sum.z, next.z), f(sum.w, next.w));
    }

    // The step to the next split; `state` is the sum's before and after.
    static __device__ __forceinline__ Fold of(RowState& state, RowState next, float scale) {
        const float maximum = fmaxf(state.maximum, next.maximum);
        const Fold fold = {weight_of(state.maximum, maximum, scale), weight_of(next.maximum, maximum, scale)};
        state = {maximum, fold(state.sum, next.sum)};
        return fold;
    }
};

// States that every thread sees, weights and all.
template <int kCount>
struct MergedStates {
    RowState state = {kLowest, 0.0f};
    float weight[kCount];

    // state_of(i) is the float2 (maximum, sum) of part i; rounded: of a warp.
    template <typename StateOf>
    __device__ __forceinline__ MergedStates(float scale, bool rounded, StateOf state_of) {
        for_each<kCount>([&](int i) { state.maximum = fmaxf(state.maximum, state_of(i).x); });
        for_each<kCount>([&](int i) {
            const float maximum = state_of(i).x;
            weight[i] = exp2_approx(fmaf(maximum - state.maximum, scale, rounded ? rounded_up(maximum, scale) : 0.0f));
            state.sum += weight[i] * state_of(i).y;
        });
    }
};

// The same with a state in each of kCount neighbouring lanes, merged into `state` of all that came before. Returns this lane's
// weight; `previous` becomes the weight of what came before.
template <int kCount>
__device__ __forceinline__ float merge_lanes(float scale, RowState mine, RowState& state, float& previous) {
    const float maximum = fmaxf(lanes_maximum<kCount>(mine.maximum), state.maximum);
    previous = weight_of(state.maximum, maximum, scale);
    const float weight = weight_of(mine.maximum, maximum, scale);
    state = {maximum, state.sum * previous + lanes_sum<kCount>(weight * mine.sum)};
    return weight;
}

// The left fold of splits, whose states lie in kCount neighbouring lanes. All factors are found at once: the maximum of the sum
// before and after each split is a maximum of some lanes, with the same bits in any order. Returns those of this lane's split;
// `maximum` is the sum's before and after.
template <int kCount>
__device__ __forceinline__ Fold fold_lanes(float scale, RowState mine, float& maximum) {
    const int lane = threadIdx.x % kCount;
    float after = fmaxf(mine.maximum, maximum);
#pragma unroll
    for (int lanes = 1; lanes < kCount; lanes *= 2) {
        const float other = __shfl_up_sync(kFullWarp, after, lanes, kCount);
        if (lane >= lanes) after = fmaxf(after, other);
    }
    float before = __shfl_up_sync(kFullWarp, after, 1, kCount);
    if (lane == 0) before = maximum;
    maximum = __shfl_sync(kFullWarp, after, kCount - 1, kCount);
    return {weight_of(before, after, scale), weight_of(mine.maximum, after, scale)};
}
