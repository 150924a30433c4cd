// Codes of a latent cache on their way to shared memory, in the registers of those that copy: a tile of numbers is so large that
// there is no room for codes beside two of them. When they are asked for stands in latent_ring.cuh.
//
// A lane has pieces of 16 codes, two chunks of numbers. Four lanes have neighbours of a row, 64 bytes of it, and the next four lanes
// those of the next row: then eight lanes that store one chunk each meet every bank once.
#pragma once
#include "ptx/memory.cuh"
#include "rows_tiles.cuh"

template <int kCount>
struct Landing {
    static constexpr int kPieces = kCount / 16;                   // of a row
    static constexpr int kLanes = kPieces < 8 ? 4 : 8;            // that have a row at once
    static constexpr int kRowsAtOnce = 32 / kLanes;
    static constexpr int kPasses = kPartKeys / kRowsAtOnce, kRuns = kPieces / kLanes;
    static_assert(kCount % 64 == 0 && kPieces % kLanes == 0 && kPartKeys % kRowsAtOnce == 0, "lanes have whole pieces");

    uint4 codes[kPasses][kRuns];

    // A lane's row among those at once, and its piece of a run.
    static __device__ __forceinline__ int row(int lane) { return kLanes == 4 ? lane / 4 : lane / 16 * 2 + lane / 4 % 2; }
    static __device__ __forceinline__ int piece(int lane) { return kLanes == 4 ? lane % 4 : lane / 8 % 2 * 4 + lane % 4; }

    // Makes numbers of the codes, of the warp's rows from `part` on: `numbers` is where columns begin that begin a line.
    template <typename Code>
    __device__ __forceinline__ void convert(u32 numbers, int part, int lane) const {
        const u32 lane_to = numbers + KeyRows::offset(part + row(lane), piece(lane) * 2);
        const u32 magic = Code::kMagic + (Code::kMagic ? zero_of_each_lane() : 0);
        for_each<kPasses, kRuns>([&](int i, int run) {
            const uint4 c = codes[i][run];
            uint4 low, high;
            Code::in_order(c.x, magic, low.x, low.y), Code::in_order(c.y, magic, low.z, low.w);
            Code::in_order(c.z, magic, high.x, high.y), Code::in_order(c.w, magic, high.z, high.w);
            const int rows = i * kRowsAtOnce;
            const u32 to = (rows % 8 ? lane_to ^ KeyRows::kFourRows : lane_to) + rows * KeyRows::kRowStride +
                           run * (kLanes / 4) * KeyRows::kLaneStride;
            store_shared(to, low), store_shared(to ^ 16, high);
        });
    }
};
