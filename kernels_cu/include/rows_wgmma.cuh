// The arithmetic of one warpgroup: wgmma with 64 packed query rows as M and keys, then value columns, as N.
//
//   S[64 rows x keys]     = Q K^T   K from shared memory, Q, too, or from registers
//   O[64 rows x columns] += P V     P, packed scores, from registers, V from shared memory as it lies
//
// Products run on while the warpgroup does other things. Two groups of them at most are under way: the scores of a tile and the
// values of the one before it.
#pragma once
#include "elements.cuh"
#include "ptx/matrices.cuh"
#include "ptx/wgmma.cuh"
#include "rows_tiles.cuh"

template <typename T>
class WgmmaMath {
    static constexpr int kSteps = (kHeadDim + 15) / 16;  // of 16 elements of a query
    // Of codes, which pass through shared memory three times on their way, the queries lie in registers while an item is read: from
    // shared memory they would be as many bytes for each tile as its keys.
    static constexpr bool kKeepsQueries = kConvertsTiles && kRows == 64 && kSteps <= 8;
    static_assert(kRowTiles == 1 && kColumnWarps == 1, "a warp has 16 rows and all columns");
    static_assert(kColumnTiles % 8 == 0, "values are whole lines of 64 columns");

public:
    // Begins with an item's queries, 64 rows in shared memory.
    __device__ __forceinline__ void begin_item(u32 query) {
        query_ = query;
        if constexpr (kKeepsQueries) {
            const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
            for_each<kSteps>([&](int step) { ldmatrix_x4(kept_[step], query + QueryRows::offset(row, step * 2 + lane / 16)); });
        }
        fill(output_, 0.0f);
    }

    // Starts S = Q K^T of the tile in the slot.
    __device__ __forceinline__ void start_scores(u32 slot, Scores& s) const {
        wgmma_fence();
        for_each<kSteps>([&](int step) {
            const u64 keys = wgmma_descriptor(step_address<kTileKeys>(slot, step));
            if constexpr (kKeepsQueries) {
                Wgmma<T, kKeyTiles>::scores(s[0], kept_[step], keys, step > 0);
            } else {
                Wgmma<T, kKeyTiles>::scores(s[0], wgmma_descriptor(step_address<64>(query_, step)), keys, step > 0);
            }
        });
        wgmma_commit();
    }

    // Starts O += P V of the tile in the slot.
    __device__ __forceinline__ void start_values(u32 slot, const Weights& weights) {
        wgmma_fence();
        for_each<kTileKeys / 16>([&](int k) {
            for_each<kColumnTiles / 16>([&](int pair) { add<16>(slot, k, pair * 16, weights[0][k]); });
            if constexpr (kColumnTiles % 16 == 8) add<8>(slot, k, kColumnTiles - 8, weights[0][k]);
        });
        wgmma_commit();
    }

    // Waits for the scores, which were started before the values that may still be under way.
    __device__ __forceinline__ void wait_for_scores(Scores& s, bool values_follow) const {
        if (values_follow) {
            wgmma_wait<1>();
        } else {
            wgmma_wait<0>();
        }
        pin(s[0]);
    }

    __device__ __forceinline__ void wait_for_values() {
        wgmma_wait<0>();
        pin(output_[0]);
    }

    __device__ __forceinline__ void rescale(const float (&alpha)[kRowTiles][2]) {
        wait_for_values();
        for_each<kColumnTiles, 4>([&](int n, int i) { output_[0][n][i] *= alpha[0][i / 2]; });
    }

    // What has been accumulated, not yet divided by the sums.
    __device__ __forceinline__ Outputs& output() { return output_; }

private:
    // O += P V of 16 keys and kTiles column tiles from `first` on.
    template <int kTiles>
    __device__ __forceinline__ void add(u32 slot, int k, int first, const u32 (&weights)[4]) {
        constexpr int kLineBytes = kTileKeys * 128;
        Wgmma<T, kTiles>::add(reinterpret_cast<float(&)[kTiles][4]>(output_[0][first]), weights,
                              wgmma_descriptor(slot + first / 8 * kLineBytes + k * 2048, kLineBytes));
    }

    // 16 elements further in rows of which kCount lie together: 32 bytes in a line, then the next line.
    template <int kCount>
    static __device__ __forceinline__ u32 step_address(u32 begin, int step) {
        return begin + step / 4 * (kCount * 128) + step % 4 * 32;
    }

    u32 query_;
    [[maybe_unused]] u32 kept_[kSteps][4];  // A, 16 rows x 16 elements of a step
    Outputs output_;
};
