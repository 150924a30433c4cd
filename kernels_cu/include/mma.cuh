// The arithmetic of one warp on tensor cores: mma.m16n8k16 with keys, then value columns, as M and query rows as N.
//
//   S^T[16 keys x 8 rows]    = K[16 x D] Q^T[D x 8]      A: K by ldmatrix, B: Q by ldmatrix (rows of Q are columns of B)
//   O^T[16 columns x 8 rows] += V^T[16 x 16 keys] P^T    A: V by ldmatrix.trans, B: P^T by movmatrix from the scores
//
// What lane l holds of A, B and C stands in ptx/matrices.cuh.
#pragma once
#include "softmax.cuh"
#include "tiles.cuh"

template <typename T>
class MmaMath {
    static constexpr int kSteps = (kHeadDim + 15) / 16;     // of 16 elements of a key
    static constexpr int kColumns = (kHeadDimV + 15) / 16;  // tiles of 16 value columns
    static constexpr bool kQueryInRegisters = kHeadDim * kRows < 4096;

    using Queries = Swizzle<kQueryBytes>;
    using Keys = Swizzle<kKeyBytes>;
    using Values = Swizzle<kValueBytes>;

public:
    __device__ __forceinline__ explicit MmaMath(int lane) {
        // Lane l addresses key l % 16 and element half l / 16 of K; of V, transposed, key l % 8 + 8 (l / 16) and half l / 8 % 2.
        key_lane_ = Keys::offset(lane % 16, lane / 16);
        value_lane_ = Values::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
        pin(key_lane_), pin(value_lane_);
    }

    // Reads the item's queries, which lie in shared memory as rows of kQueryBytes.
    __device__ __forceinline__ void begin_item(u32 query, int lane) {
        // Row l % 8, 8-element column l / 8 of 32 elements.
        query_lane_ = query + Queries::offset(lane % 8, lane / 8);
        pin(query_lane_);
        fill(output_, 0.0f);
        if constexpr (kQueryInRegisters) {
            for_each<kRowGroups, (kSteps + 1) / 2>([&](int g, int pair) { load_query(g, 2 * pair, &queries_[g][4 * pair]); });
        }
    }

    // S^T = K Q^T of the tile in the slot.
    __device__ __forceinline__ void scores(u32 slot, Scores& s) const {
        fill(s, 0.0f);
        u32 query[kRowGroups][4];
        for_each<kSteps>([&](int step) {
            if (!kQueryInRegisters && step % 2 == 0) {
                for_each<kRowGroups>([&](int g) { load_query(g, step, query[g]); });
            }
            for_each<kKeyGroups>([&](int k) {
                u32 a[4];
                ldmatrix_x4(a, step_address<Keys>(slot + key_lane_, step) + k * 16 * kKeyBytes);
                for_each<kRowGroups>([&](int g) {
                    const u32* b = kQueryInRegisters ? &queries_[g][step * 2] : &query[g][step % 2 * 2];
                    T::mma(s[k][g], a, b[0], b[1]);
                });
            });
        });
    }

    // O^T += V^T P^T of the tile in the slot.
    __device__ __forceinline__ void accumulate(u32 slot, const Scores& weights) {
        for_each<kKeyGroups>([&](int k) {
            u32 b[kRowGroups][2];
            for_each<kRowGroups, 2>([&](int g, int half) {
                b[g][half] = movmatrix_trans(T::pack(weights[k][g][2 * half], weights[k][g][2 * half + 1]));
            });
            for_each<kColumns>([&](int t) {
                u32 a[4];
                ldmatrix_x4_trans(a, step_address<Values>(slot + value_lane_, t) + k * 16 * kValueBytes);
                for_each<kRowGroups>([&](int g) { T::mma(output_[g][t], a, b[g][0], b[g][1]); });
            });
        });
    }

    __device__ __forceinline__ void rescale(const float (&alpha)[kRowGroups][2]) {
        for_each<kRowGroups, kColumns, 4>([&](int g, int t, int i) { output_[g][t][i] *= alpha[g][i % 2]; });
    }

    // Stores row group g as rows of kPaddedHeadDimV floats, columns exclusive-or'ed by OutputTile.
    __device__ __forceinline__ void store(int g, u32 slot, int lane) const {
        const u32 lane_address = slot + OutputTile::offset(lane % 4 * 2, lane / 4);
        for_each<kColumns, 4>([&](int t, int i) {
            // Row lane % 4 * 2 + i % 2, column t * 16 + i / 2 * 8 + lane / 4: the exclusive or meets bits 3 and 4 of it.
            const u32 address = lane_address ^ (t % 2 * 16 + i / 2 * 8) * 4;
            store_shared(address + t / 2 * 128 + i % 2 * OutputTile::kRowBytes, output_[g][t][i]);
        });
    }

private:
    // Two steps of row group g: {b0, b1} of both.
    __device__ __forceinline__ void load_query(int g, int step, u32* two_steps) const {
        u32 b[4];
        ldmatrix_x4(b, step_address<Queries>(query_lane_ + g * 8 * kQueryBytes, step));
        for_each<4>([&](int i) { two_steps[i] = b[i]; });
    }

    // A step is two chunks on: an exclusive or within a swizzle period, an offset beyond it.
    template <typename Rows>
    static __device__ __forceinline__ u32 step_address(u32 lane_address, int step) {
        constexpr int kPeriod = Rows::kPeriod / 2;
        return (lane_address ^ (step % kPeriod * 32)) + step / kPeriod * kPeriod * 32;
    }

    u32 key_lane_, value_lane_, query_lane_;
    u32 queries_[kRowGroups][kQueryInRegisters ? (kSteps + 1) / 2 * 4 : 1];
    float output_[kRowGroups][kColumns][4];
};
