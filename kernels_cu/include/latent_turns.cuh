// Two warpgroups that take turns at scoring tiles: the weights of a tile, and the maxima that moved for it, as they tell them
// each other. Warp w of both has the same 16 rows, and nobody else touches what stands here of them.
#pragma once
#include "ptx/barriers.cuh"
#include "ptx/matrices.cuh"
#include "ptx/wgmma.cuh"
#include "rows_partners.cuh"

struct TurnState {
    float top[kRows];        // the largest score of a row in the tile
    u32 exceeds[kRowWarps];  // whether a row of the warp's has one that exceeds its maximum; only then `top` is set
    float sum[2][kRows];
};

// What softmax asks of partners, where the other warpgroup hears of a tile when it has been weighed.
class Turns {
public:
    __device__ __forceinline__ Turns(TurnState& state, int warp, int lane)
        : state_(state), group_(warp / kRowWarps), row_warp_(warp % kRowWarps), lane_(lane) {}

    __device__ __forceinline__ int group() const { return group_; }
    __device__ __forceinline__ int row_warp() const { return row_warp_; }

    __device__ __forceinline__ bool any(bool exceeds, const float (&)[kRowTiles][2]) const {
        exceeds = __any_sync(kFullWarp, exceeds);
        if (lane_ == 0) state_.exceeds[row_warp_] = exceeds;
        return exceeds;
    }

    __device__ __forceinline__ float maximum(int t, int half, float lane_top) const {
        const float top = lanes_maximum<4>(lane_top);
        if (lane_ % 4 == 0) state_.top[row(t, half)] = top;
        return top;
    }

    // Tells the weights of this warp's rows in this warpgroup's tile, of which there are 64, a line each, at an address of
    // shared memory: when both have read those of the tile before.
    template <int kFirst, int kCount>
    __device__ __forceinline__ void tell(const Weights& weights, u32 to) const {
        pin(to);  // else all addresses are found ahead of the main loop, and wait in local memory
        const u32 row_to = to + KeyRows::offset(row_warp_ * kWarpRows + lane_ % 16, lane_ / 16);
        for_each<kCount / 2>([&](int i) {
            const int step = kFirst / 2 + i;  // of 16 keys, two chunks: what the swizzle permutes, so that they change one bit each
            stmatrix_x4(row_to ^ step * 32, weights[0][step]);
        });
    }

    // All warps of the warpgroup come here when they have told.
    __device__ __forceinline__ void arrive(int part) const {
        fence_for_wgmma();
        named_barrier_arrive(4 + 2 * part + group_, kThreads);
    }

    // Waits until the other one has told its weights; softmax and arithmetic of a warp with rows follow its maxima.
    template <typename Softmax, typename Math>
    __device__ __forceinline__ void hear(bool has_rows, Softmax& softmax, Math& math) const {
        wait_for_other(0);
        if (has_rows && state_.exceeds[row_warp_]) {
            softmax.follow(math, [&](int t, int half) { return state_.top[row(t, half)]; });
        }
    }

    __device__ __forceinline__ void wait_for_other(int part) const { named_barrier(4 + 2 * part + (group_ ^ 1), kThreads); }

    // A row's sum over the keys of both.
    __device__ __forceinline__ float total(int t, int half, float sum) const {
        if (lane_ % 4 == 0) state_.sum[group_][row(t, half)] = sum;
        worker_barrier();
        return state_.sum[0][row(t, half)] + state_.sum[1][row(t, half)];
    }

private:
    __device__ __forceinline__ int row(int t, int half) const { return row_warp_ * kWarpRows + t * 16 + half * 8 + lane_ / 4; }

    TurnState& state_;
    int group_, row_warp_, lane_;
};

// The same while products with values run, which end before anything of them changes. All warps of the warpgroup wait, or none,
// as PTX asks: so all look at their maxima if one has to.
template <typename Math>
struct Running {
    const Turns& turns;
    Math& math;

    __device__ __forceinline__ bool any(bool exceeds, const float (&top)[kRowTiles][2]) const {
        return turns.any(named_barrier_any(2, kThreads / 2, exceeds), top);
    }

    __device__ __forceinline__ float maximum(int t, int half, float lane_top) const { return turns.maximum(t, half, lane_top); }

    __device__ __forceinline__ void rescale(const float (&alpha)[kRowTiles][2]) const {
        math.wait_for_values();
        math.rescale(alpha);
    }
};
