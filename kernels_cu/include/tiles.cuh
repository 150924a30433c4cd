// decode.cu's tiles: how many keys a warp reads at a time, and how they lie in shared memory.
#pragma once
#include "queries.cuh"
#include "swizzle.cuh"

constexpr int kTileKeys = TILE_KEYS;          // keys of one warp's tile: 16 or 32
constexpr int kKeyGroups = kTileKeys / 16;    // MMA row blocks of 16 keys
constexpr int kRowGroups = kRows / 8;         // MMA column blocks of 8 query rows
constexpr int kQueryBuffers = QUERY_BUFFERS;  // 2: the next item's queries come while this one's keys are read
constexpr int kStages = STAGES;               // half-stages of a warp's ring, odd

// Rows in shared memory.
constexpr int kKeyBytes = kPaddedHeadDim * CacheElement::kBytes;
constexpr int kValueBytes = kPaddedHeadDimV * CacheElement::kBytes;

constexpr int kSlotBytes = kTileKeys * (kKeyBytes > kValueBytes ? kKeyBytes : kValueBytes);
constexpr int kRingBytes = kStages * kSlotBytes;  // of one warp

static_assert(kStages % 2 == 1 && kStages >= 3, "K and V alternate, so the ring has an odd number of half-stages");

// One row group's outputs of one warp in a slot of its ring: 8 rows of kPaddedHeadDimV floats. Columns are exclusive-or'ed by
// row, so that the store of an MMA fragment (4 row pairs x 8 columns) meets every bank once and float4s stay whole.
struct OutputTile {
    static constexpr int kRowBytes = kPaddedHeadDimV * 4;
    static __device__ __forceinline__ int offset(int row, int column) {
        return row * kRowBytes + ((column ^ (row >> 1 & 3) * 8) << 2);
    }
};
static_assert(8 * OutputTile::kRowBytes <= kSlotBytes, "a row group's outputs go through a slot");
