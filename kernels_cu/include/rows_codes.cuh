// Tiles of a quantised cache in extend.cu and extend_wgmma.cu: codes land in a ring of their own and become float16 in the ring
// that the arithmetic reads, so that all behind it is as with 16 bits.
//
// Each thread converts what it has copied itself: it waits for its own copies, and for nobody else before or after. A piece of 16
// codes is two chunks of numbers. Which of them a lane takes first differs from lane to lane, so that both reading and writing
// meet every bank once.
#pragma once
#include "ptx/memory.cuh"
#include "rows_tiles.cuh"

#ifdef CODE_STAGES
constexpr int kCodeStages = CODE_STAGES;  // half-stages of codes that are on their way
#else
constexpr int kCodeStages = 0;
#endif

// Rows of codes, kDim bytes each: how many lanes copy one together, and the room that it takes for that.
constexpr int landed_lanes(int dim) { return dim > 64 || kPartKeys < 8 ? 8 : 4; }
constexpr int landed_bytes(int dim) {
    const int at_once = landed_lanes(dim) * 16;
    return (dim + at_once - 1) / at_once * at_once;
}
constexpr int kCodeRowBytes =
    landed_bytes(kHeadDim) > landed_bytes(kHeadDimV) ? landed_bytes(kHeadDim) : landed_bytes(kHeadDimV);

// They lie as one warp after another copies its part of them, and what an instruction brings lies together. A warp's part begins
// at the same place of a slot whether it holds keys or values, and each lane's pieces lie there where they always do.
template <int kDim>
struct LandedRows {
    static constexpr int kChunks = kDim / 16;  // pieces of 16 bytes of a row
    static constexpr int kLanes = landed_lanes(kDim);
    static constexpr int kRuns = (kChunks + kLanes - 1) / kLanes;
    static constexpr int kRowsAtOnce = 32 / kLanes;
    static constexpr int kRowStride = landed_bytes(kDim);
    static constexpr int kLaneStride = 512;  // from a run of pieces of a row to the next
    static constexpr int kFourRows = 0;

    static __device__ __forceinline__ int offset(int row, int chunk) {
        return row / kPartKeys * (kPartKeys * kCodeRowBytes) + row % kPartKeys / kRowsAtOnce * (kRuns * 512) +
               (row % kRowsAtOnce * kLanes + chunk) * 16;
    }

    // Whether a lane takes the second half of a piece first.
    static __device__ __forceinline__ int first_half(int lane) { return (lane / 8 + lane % kLanes / 4) & 1; }
};

// The scales of a tile's keys and values: as they land behind a half-stage of keys, and as the softmax reads them, one such place
// for each slot of the ring.
struct ScaleTile {
    static constexpr int kValues = kTileKeys * 4;
    static constexpr int kBonuses = kTileKeys * 8;  // see Scaling in rows_scales.cuh
    static constexpr int kBytes = kTileKeys * 12;
};
// What is added to a score where the largest weight times scale is looked for: log2 of the value's scale, in units of scores.
// Bounded, so that sums of weights stay finite: a scale of zero allows weights that float16 does not hold.
__device__ __forceinline__ float bonus_of(float value_scale, float slack) {
    return fminf(fmaxf(log2_approx(fabsf(value_scale)), -100.0f), 100.0f) * (slack / kSlack);
}

// Stores the scales of a key and its value where the softmax finds them: `to` is the key's place in a ScaleTile.
__device__ __forceinline__ void store_scales(u32 to, float2 scales, float slack) {
    if constexpr (kHasKeyScales) store_shared(to, scales.x);
    if constexpr (kHasValueScales) {
        store_shared(to + ScaleTile::kValues, scales.y);
        store_shared(to + ScaleTile::kBonuses, bonus_of(scales.y, slack));
    }
}

constexpr int kScalesBytes = kConvertsTiles ? kStages * ScaleTile::kBytes : 0;

constexpr int kCodesBytes = kReadsCodes ? kTileBytes : kTileKeys * kCodeRowBytes;  // of a half-stage or tile, without its scales
constexpr int kCodeSlotBytes = kCodesBytes + 8 * kTileKeys;
constexpr int kCodeRingBytes = kCodeStages * kCodeSlotBytes;

// Makes numbers of the codes of the rows that begin at row `part` and that this warp has copied, chunks of them up to kFilled:
// behind the row's last one those are zeros, as is a code of zero.
template <typename Code, int kDim, int kFilled, typename Rows>
__device__ __forceinline__ void convert_rows(u32 codes, u32 numbers, int part, int lane) {
    if constexpr (kConvertsTiles && Code::kBytes == 1) {
        using Landed = LandedRows<kDim>;
        constexpr int kLanes = Landed::kLanes, kRuns = Landed::kRuns;
        constexpr int kPieces = kPartKeys / Landed::kRowsAtOnce * kRuns;  // of a lane
        constexpr int kAtOnce = kPieces < 2 ? kPieces : 2;
        static_assert(Rows::kLanes == 8, "rows of numbers are whole lines of 128 bytes");
        const int half = Landed::first_half(lane), row = part + lane / kLanes, chunk = lane % kLanes;
        const u32 from = codes + Landed::offset(row, chunk) + half * 8, to = numbers + Rows::offset(row, chunk * 2 + half);
        const u32 magic = Code::kMagic + (Code::kMagic ? zero_of_each_lane() : 0);
#pragma unroll
        for (int first = 0; first < kPieces; first += kAtOnce) {
            uint2 eight[kAtOnce][2];  // all that is read before the first is written
            for_each<kAtOnce, 2>([&](int n, int other) {
                const int piece = first + n, run = piece % kRuns;
                const bool exists = run * kLanes + kLanes <= Landed::kChunks || run * kLanes + chunk < Landed::kChunks;
                eight[n][other] = make_uint2(0, 0);
                if (piece < kPieces && exists) eight[n][other] = load_shared_u32x2((from ^ other * 8) + piece * 512);
            });
            for_each<kAtOnce, 2>([&](int n, int other) {
                const int piece = first + n, run = piece % kRuns, rows = piece / kRuns * Landed::kRowsAtOnce;
                const int chunk_of_row = run * kLanes + chunk;
                if (piece >= kPieces || (run * kLanes + kLanes > kFilled / 2 && chunk_of_row >= kFilled / 2)) return;
                uint4 x;
                Code::in_order(eight[n][other].x, magic, x.x, x.y);
                Code::in_order(eight[n][other].y, magic, x.z, x.w);
                const u32 at = (rows % 8 ? to ^ Rows::kFourRows : to) + rows * Rows::kRowStride + 2 * run * Rows::kLaneStride;
                store_shared(at ^ other * 16, x);
            });
        }
    }
}
