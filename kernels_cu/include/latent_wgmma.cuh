// The arithmetic of one warpgroup of latent attention: wgmma with 64 packed query rows as M, on tiles whose rows are values and
// then the rest of the keys.
//
//   S[64 rows x keys]    = Qv V^T + Q K^T  both from shared memory
//   O[64 rows x columns] += P V            P from registers or from shared memory, V as it lies
//
// The same bytes are B of both. A warpgroup has half of the value columns.
#pragma once
#include "elements.cuh"
#include "ptx/wgmma.cuh"
#include "rows_tiles.cuh"

template <typename T>
class LatentWgmma {
    static_assert(kRowTiles == 1 && kRowWarps == 4, "a warpgroup has 64 rows");
    static_assert(kColumnTiles == 32, "and 256 columns of the output, 128 registers of a lane");

public:
    static constexpr int kLineBytes = kTileKeys * 128;  // of a line of 64 columns, of all keys of a tile

    // `group` is the warpgroup's number, `query` an address of 64 rows.
    __device__ __forceinline__ LatentWgmma(int group, u32 query)
        : query_(query), columns_(group * (kColumnTiles / 8) * kLineBytes) {}

    __device__ __forceinline__ void begin_item() { fill(output_, 0.0f); }

    // Adds to the scores the products of kCount columns of a row from kFirst on; the first ones replace what was there. They
    // run on until the wait.
    template <int kFirst, int kCount>
    __device__ __forceinline__ void start_scores(u32 slot, bool are_first, Scores& s) const {
        wgmma_fence();
        const u64 query = wgmma_descriptor(query_), keys = wgmma_descriptor(slot);
        for_each<kCount / 16>([&](int i) {
            const int step = kFirst / 16 + i;
            Wgmma<T, kKeyTiles>::scores(s[0], advanced(query, step / 4 * (64 * 128) + step % 4 * 32),
                                        advanced(keys, step / 4 * kLineBytes + step % 4 * 32), !are_first || i > 0);
        });
        wgmma_commit();
    }

    __device__ __forceinline__ void wait_for_scores(Scores& s) const {
        wgmma_wait<0>();
        pin(s[0]);
    }

    // Starts O += P V of kCount steps of 16 keys of the tile in the slot, from kFirst on; P of this warpgroup.
    template <int kFirst, int kCount>
    __device__ __forceinline__ void start_values(u32 slot, const Weights& weights) {
        add<kFirst, kCount>(slot, [&](int k, u64 values) { Wgmma<T, kColumnTiles>::add(output_[0], weights[0][k], values); });
    }

    // The same, P in shared memory: 64 rows of a line.
    template <int kFirst, int kCount>
    __device__ __forceinline__ void start_values(u32 slot, u32 weights) {
        add<kFirst, kCount>(slot, [&](int k, u64 values) {
            Wgmma<T, kColumnTiles>::add(output_[0], wgmma_descriptor(weights + k * 32), values);
        });
    }

    __device__ __forceinline__ void wait_for_values() {
        wgmma_wait<0>();
        pin(output_[0]);
    }

    __device__ __forceinline__ void rescale(const float (&alpha)[kRowTiles][2]) {
        for_each<kColumnTiles, 4>([&](int n, int i) { output_[0][n][i] *= alpha[0][i / 2]; });
    }

    // What has been accumulated, not yet divided by the sums.
    __device__ __forceinline__ Outputs& output() { return output_; }

private:
    // For each step of 16 keys: product(step, descriptor of their values).
    template <int kFirst, int kCount, typename Product>
    __device__ __forceinline__ void add(u32 slot, Product product) {
        wgmma_fence();
        const u64 values = wgmma_descriptor(slot + columns_, kLineBytes);
        for_each<kCount>([&](int i) { product(kFirst + i, advanced(values, (kFirst + i) * 2048)); });
        wgmma_commit();
    }

    u32 query_, columns_;
    Outputs output_;
};
