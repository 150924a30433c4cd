// decode.cu's tiles: how many keys a warp reads at a time, and how they lie in shared memory.
#pragma once
#include "queries.cuh"
#include "swizzle.cuh"

constexpr int kTileKeys = TILE_KEYS;          // keys of one warp's tile: 16, 32 or 64
constexpr int kKeyGroups = kTileKeys / 16;    // MMA row blocks of 16 keys
constexpr int kRowGroups = kRows / 8;         // MMA column blocks of 8 query rows
constexpr int kQueryBuffers = QUERY_BUFFERS;  // 2: the next item's queries come while this one's keys are read
constexpr int kStages = STAGES;               // half-stages of a warp's ring, odd

// Rows in shared memory.
constexpr int kKeyBytes = kPaddedHeadDim * CacheElement::kBytes;
constexpr int kValueBytes = kPaddedHeadDimV * CacheElement::kBytes;

// A slot holds a tile, and with a quantised cache behind the tile's keys room for the scales of its keys and values.
constexpr int kTileBytes = kTileKeys * (kKeyBytes > kValueBytes ? kKeyBytes : kValueBytes);
constexpr int kSlotBytes = kTileBytes + (kIsQuantised ? 8 * kTileKeys : 0);
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

// The scales of a tile's keys in a slot, behind the keys: fours of keys that are eight apart, so that a lane reads those that
// it holds scores of as float4s. Of two fours the second half of the keys swaps places: 32 copies meet every bank once.
struct ScaleTile {
    static constexpr int kFours = (kTileKeys + 31) / 32;
    static constexpr int kValues = kTileKeys * 4;  // where those of the values begin

    // Of key % 8 and key / 32.
    static __device__ __forceinline__ int offset(int key, int four) {
        return kTileBytes + (key * kFours + (kFours == 2 ? four ^ (key >> 2) : four)) * 16;
    }
};
