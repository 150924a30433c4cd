// Warps that share their rows and divide the value columns: each scores its own part of a tile's keys, then tells the others
// its weights, so that no score is computed twice.
#pragma once
#include "ptx/arithmetic.cuh"
#include "ptx/barriers.cuh"
#include "rows_tiles.cuh"

// Where they meet, in shared memory.
struct Meeting {
    // A fragments of 16 keys, a lane's registers side by side; of 4 bytes, C fragments.
    uint4 weights[kRowWarps][kRowTiles][kTileKeys * kWeightBytes / 32][32];
    float top[kWarps][kWarpRows];                             // the largest score of a row among a warp's keys
    float sum[kWarps][kWarpRows];
    u32 exceeds[kWarps];  // whether a score of the warp's exceeds its row's threshold; only then `top` is set
};

class Partners {
public:
    __device__ __forceinline__ Partners(Meeting& meeting, int warp, int lane)
        : meeting_(meeting), warp_(warp), lane_(lane) {}

    // A barrier of the warps that share their rows; number 0 is the block's.
    __device__ __forceinline__ void meet() const { named_barrier(1 + warp_ / kColumnWarps, kColumnWarps * 32); }

    // Whether a score of any of them exceeds.
    __device__ __forceinline__ bool any(bool exceeds, const float (&lane_top)[kRowTiles][2]) {
        exceeds = __any_sync(kFullWarp, exceeds);
        if constexpr (kColumnWarps > 1) {
            if (exceeds) {
                for_each<kRowTiles, 2>([&](int t, int half) {
                    const float top = lanes_maximum<4>(lane_top[t][half]);
                    if (lane_ % 4 == 0) meeting_.top[warp_][row(t, half)] = top;
                });
            }
            if (lane_ == 0) meeting_.exceeds[warp_] = exceeds;
            meet();
            exceeds = false;
            for_each<kColumnWarps>([&](int i) { exceeds |= meeting_.exceeds[first_warp() + i] != 0; });
        }
        return exceeds;
    }

    // After any() was true: a row's largest score among the keys of all that exceed.
    __device__ __forceinline__ float maximum(int t, int half, float lane_top) const {
        if constexpr (kColumnWarps == 1) return lanes_maximum<4>(lane_top);
        float top = -infinity();
        for_each<kColumnWarps>([&](int i) {
            if (meeting_.exceeds[first_warp() + i]) top = fmaxf(top, meeting_.top[first_warp() + i][row(t, half)]);
        });
        return top;
    }

    // A row's sum over the keys of all; each of them calls it when a segment ends.
    __device__ __forceinline__ float total(int t, int half, float sum) {
        if constexpr (kColumnWarps == 1) return sum;
        if (lane_ % 4 == 0) meeting_.sum[warp_][row(t, half)] = sum;
        meet();
        float total = 0.0f;
        for_each<kColumnWarps>([&](int i) { total += meeting_.sum[first_warp() + i][row(t, half)]; });
        return total;
    }

    // Tells the weights of this warp's keys; a block barrier must follow before they are heard.
    __device__ __forceinline__ void tell(const Weights& weights) {
        if constexpr (kColumnWarps == 1) return;
        if constexpr (kWarpKeys == 8) return tell_half(weights);
        for_each<kRowTiles, kWarpKeys / 16>([&](int t, int k) {
            const u32(&w)[4] = weights[t][k];
            const int step = warp_ % kColumnWarps * (kWarpKeys / 16) + k;
            meeting_.weights[warp_ / kColumnWarps][t][step][lane_] = make_uint4(w[0], w[1], w[2], w[3]);
        });
    }

    // The weights of 16 keys of the tile.
    __device__ __forceinline__ void hear(const Weights& weights, int t, int step, u32 (&a)[4]) const {
        if constexpr (kColumnWarps == 1) {
            for_each<4>([&](int i) { a[i] = weights[t][step][i]; });
        } else {
            const uint4 w = meeting_.weights[warp_ / kColumnWarps][t][step][lane_];
            a[0] = w.x, a[1] = w.y, a[2] = w.z, a[3] = w.w;
        }
    }

private:
    // Of 8 keys a warp has half of a fragment.
    __device__ __forceinline__ void tell_half(const Weights& weights) {
        for_each<kRowTiles>([&](int t) {
            uint4& place = meeting_.weights[warp_ / kColumnWarps][t][0][lane_];
            (&reinterpret_cast<uint2&>(place))[warp_ % kColumnWarps] = make_uint2(weights[t][0][0], weights[t][0][1]);
        });
    }

    __device__ __forceinline__ int first_warp() const { return warp_ - warp_ % kColumnWarps; }
    __device__ __forceinline__ int row(int t, int half) const { return t * 16 + half * 8 + lane_ / 4; }

    Meeting& meeting_;
    int warp_, lane_;
};
