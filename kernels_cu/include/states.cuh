// What is known of a query row after some of its keys, and how several such states become one.
//
// A state is a maximum m and a sum l, in log2 units; its output O is not normalised: l = sum exp2(score - m) and
// O = sum exp2(score - m) V. States of disjoint keys are merged as m = max m_i, w_i = exp2(m_i - m), l = sum w_i l_i,
// O = sum w_i O_i (Milakov and Gimelshein, "Online normalizer calculation for softmax"). Always in the order of the keys, so
// that results never depend on timing.
#pragma once
#include "config.cuh"
#include "fragment.cuh"

struct RowState {
    float maximum, sum;  // maximum kLowest, sum 0: no key yet
};

// States that every thread sees, weights and all.
template <int kCount>
struct MergedStates {
    RowState state = {kLowest, 0.0f};
    float weight[kCount];

    // state_of(i) is the float2 (maximum, sum) of part i.
    template <typename StateOf>
    __device__ __forceinline__ explicit MergedStates(StateOf state_of) {
        for_each<kCount>([&](int i) { state.maximum = fmaxf(state.maximum, state_of(i).x); });
        for_each<kCount>([&](int i) {
            weight[i] = exp2_approx(state_of(i).x - state.maximum);
            state.sum += weight[i] * state_of(i).y;
        });
    }
};

// The same with a state in each of kCount neighbouring lanes, merged into `state` of all that came before. Returns this lane's
// weight; `previous` becomes the weight of what came before.
template <int kCount>
__device__ __forceinline__ float merge_lanes(RowState mine, RowState& state, float& previous) {
    const float maximum = fmaxf(lanes_maximum<kCount>(mine.maximum), state.maximum);
    previous = exp2_approx(state.maximum - maximum);
    const float weight = exp2_approx(mine.maximum - maximum);
    state = {maximum, state.sum * previous + lanes_sum<kCount>(weight * mine.sum)};
    return weight;
}
