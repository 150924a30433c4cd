// The variant: macros from cuflash/kernels.py, turned at once into names that the templates take.
#pragma once
#include "types.cuh"

using Element = ELEMENT;                       // of queries, cache and output: Float16, BFloat16 or Float32
constexpr int kHeadDim = HEAD_DIM;             // of queries and keys, a multiple of 8
constexpr int kHeadDimV = HEAD_DIM_V;          // of values
constexpr int kPaddedHeadDim = PADDED_HEAD_DIM;  // as a row lies in shared memory
constexpr int kPaddedHeadDimV = PADDED_HEAD_DIM_V;
constexpr int kRows = ROWS;                    // packed query rows of a row block: 8, 16 or 32
constexpr int kWarps = WARPS;
constexpr int kQueryBuffers = QUERY_BUFFERS;   // 2: the next item's queries come while this one's keys are read
constexpr int kStages = STAGES;                // half-stages of a warp's ring, odd
constexpr int kCluster = CLUSTER;              // blocks that share an item and their shared memory, or 1
constexpr bool kHasSoftcap = HAS_SOFTCAP;
constexpr bool kHasChunk = HAS_CHUNK;          // attention_chunk
constexpr bool kHasSplitSize = HAS_SPLIT_SIZE;  // items are cut at multiples of split_size keys

constexpr int kThreads = kWarps * 32;
constexpr int kTileKeys = TILE_KEYS;           // keys of one warp's tile: 16 or 32
constexpr int kKeyGroups = kTileKeys / 16;     // MMA row blocks of 16 keys
constexpr int kRowGroups = kRows / 8;          // MMA column blocks of 8 query rows
constexpr int kKeyBytes = kPaddedHeadDim * Element::kBytes;     // of a key row in shared memory
constexpr int kValueBytes = kPaddedHeadDimV * Element::kBytes;  // of a value row
constexpr int kSlotBytes = kTileKeys * (kKeyBytes > kValueBytes ? kKeyBytes : kValueBytes);
constexpr int kRingBytes = kStages * kSlotBytes;  // of one warp
constexpr float kLowest = -3.0e38f;  // a maximum before any key: finite, so that differences are never NaN

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
