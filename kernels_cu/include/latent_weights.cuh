// The weights of a tile in shared memory, where the warps that share their rows tell them each other: 8 keys a piece, what a lane
// of the warp that scored them holds side by side.
#pragma once
#include "rows_partners.cuh"

class TileWeights {
public:
    // Two 16-bit weights a register, row l / 4 and row l / 4 + 8 of lane l: half of an A fragment. Or the floats of a C fragment.
    struct __align__(4 * kWeightBytes) Piece {
        u32 w[kWeightBytes];
    };

    __device__ __forceinline__ TileWeights(Meeting& meeting, int row_warp, int column_warp)
        : pieces_(reinterpret_cast<Piece*>(meeting.weights[row_warp])), first_(column_warp * kKeyTiles) {}

    // Tells this warp's weights; its partners must meet before they are heard.
    template <typename T = WeightElement>
    __device__ __forceinline__ void tell(const Scores& s, int lane) const {
        for_each<kRowTiles, kKeyTiles>([&](int t, int n) {
            Piece piece;
            if constexpr (kWeightBytes == 2) {
                for_each<2>([&](int half) { piece.w[half] = T::pack(s[t][n][half * 2], s[t][n][half * 2 + 1]); });
            } else {
                for_each<4>([&](int i) { piece.w[i] = __float_as_uint(s[t][n][i]); });
            }
            pieces_[(t * (kTileKeys / 8) + first_ + n) * 32 + lane] = piece;
        });
    }

    // What a lane holds of the keys 8 n .. 8 n + 7.
    __device__ __forceinline__ Piece hear(int t, int n, int lane) const {
        return pieces_[(t * (kTileKeys / 8) + n) * 32 + lane];
    }

    // The A fragment of 16 keys from 16 k on, of 16-bit weights.
    __device__ __forceinline__ void hear_step(int t, int k, int lane, u32 (&a)[4]) const {
        for_each<2>([&](int i) {
            const Piece piece = hear(t, 2 * k + i, lane);
            a[2 * i] = piece.w[0], a[2 * i + 1] = piece.w[1];
        });
    }

private:
    Piece* pieces_;  // (kRowTiles, kTileKeys / 8, 32)
    int first_;      // piece that this warp scores
};
