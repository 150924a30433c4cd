// extend.cu's tiles: kTileKeys keys that all warps of a block read together, and how the warps divide a row block.
#pragma once
#include "fragment.cuh"
#include "ptx/barriers.cuh"
#include "queries.cuh"

constexpr bool kScalesScores = kIsQuantised && !kScalesTiles;   // scores and weights are multiplied by scales, ..
constexpr bool kConvertsTiles = kScalesScores && !kKeepsCodes;  // .. of keys and values that become float16 in the ring, ..
constexpr bool kReadsCodes = kScalesScores && kKeepsCodes;      // .. or on the way from there to an MMA

constexpr int kTileKeys = TILE_KEYS;                // 16, 32, 64 or 128
constexpr int kStages = STAGES;                     // half-stages of the block's ring
constexpr int kColumnWarps = COLUMN_WARPS;          // warps that share their rows and divide the value columns
#ifdef KEY_GROUPS
constexpr int kKeyGroups = KEY_GROUPS;              // warpgroups that share their rows and take turns at the tiles
#else
constexpr int kKeyGroups = 1;
#endif
constexpr int kRowWarps = kWarps / kColumnWarps / kKeyGroups;
constexpr int kWarpRows = kRows / kRowWarps;        // packed query rows of a warp
constexpr int kWarpKeys = USES_WGMMA ? kTileKeys : kTileKeys / kColumnWarps;  // keys of a tile that a warp scores
constexpr int kRowTiles = kWarpRows / 16;           // MMA row tiles of a warp
constexpr int kKeyTiles = kWarpKeys / 8;            // MMA column tiles of its scores

// Tiles of 8 value columns of a warp, and pairs of them. Warps that divide the columns begin at whole lines of 128 bytes, and
// wgmma has whole lines.
constexpr bool kHasWholeLines = kColumnWarps > 1 || USES_WGMMA;
constexpr int kColumnPairs =
    kReadsCodes      ? kPaddedHeadDimV / (16 * kColumnWarps)
    : kScalesTiles   ? (kHeadDimV + 16 * kColumnWarps - 1) / (16 * kColumnWarps)
    : kHasWholeLines ? (kHeadDimV + 64 * kColumnWarps - 1) / (64 * kColumnWarps) * 4
                     : (kHeadDimV + 15) / 16;
constexpr int kColumnTiles = kHasWholeLines ? 2 * kColumnPairs : kHeadDimV / 8;

// Columns side by side that a lane has of a row: two of each tile, or four of a pair, every other one in either tile.
constexpr int kLaneColumns = kReadsCodes ? 4 : 2;

// Fragments of a warp; what a lane holds stands in ptx/matrices.cuh.
using Scores = float[kRowTiles][kKeyTiles][4];      // C, 16 rows x 8 keys
using Weights = u32[kRowTiles][(kWarpKeys + 15) / 16][4];  // A, 16 rows x 16 keys
using Outputs = float[kRowTiles][kColumnTiles][4];  // C, 16 rows x 8 columns

// Elements of a tile in the ring. Those of a quantised cache become float16 on the way there (rows_codes.cuh), but for mla.cu,
// which reads the codes (latent_mma_codes.cuh), or makes float32 of them in another place (latent_codes.cuh).
#if KV_ELEMENT_BYTES == 1 && !defined(KEEPS_CODES)
using TileElement = Float16;
#else
using TileElement = CacheElement;
#endif

// Weights as they are multiplied, and the bytes of those that warps tell each other.
#if KV_ELEMENT_BYTES == 1
using WeightElement = Float16;
#else
using WeightElement = Element;
#endif
constexpr int kWeightBytes = kScalesTiles ? 4 : WeightElement::kBytes;

// Rows in shared memory.
constexpr int kKeyBytes = kPaddedHeadDim * TileElement::kBytes;
constexpr int kValueBytes = kPaddedHeadDimV * TileElement::kBytes;
constexpr int kTileBytes = kTileKeys * (kKeyBytes > kValueBytes ? kKeyBytes : kValueBytes);
constexpr int kSlotBytes = kTileBytes + (kReadsCodes ? 8 * kTileKeys : 0);  // scales of the keys and values behind a tile of codes
constexpr int kRingBytes = kStages * kSlotBytes;

#if USES_WGMMA
// Rows cut into lines of 128 bytes, each line of all rows side by side, as wgmma's 128-byte swizzle has them.
template <int kCount>
struct LinedRows {
    static constexpr int kLanes = 8;  // chunks of a line
    static constexpr int kRowStride = 128;
    static constexpr int kLaneStride = kCount * 128;  // from a line to the next one of a row
    static constexpr int kFourRows = 64;              // what the exclusive or of chunks changes in four rows on

    static __device__ __forceinline__ int offset(int row, int chunk) {
        return row / kCount * (kCount * kQueryBytes) + chunk / 8 * kLaneStride + Swizzle<128>::offset(row % kCount, chunk % 8);
    }
};
using KeyRows = LinedRows<kTileKeys>;
using ValueRows = LinedRows<kTileKeys>;
using QueryRows = LinedRows<64>;  // those of a warpgroup after those of another
constexpr int kLoaderWarps = 4;   // a warpgroup of its own, after those that multiply
#else
template <int kRowBytes>
struct WholeRows : Swizzle<kRowBytes> {
    static constexpr int kLanes = Swizzle<kRowBytes>::kPeriod;
    static constexpr int kRowStride = kRowBytes;
    static constexpr int kLaneStride = kLanes * 16;
    static constexpr int kFourRows = 64;
};
using KeyRows = WholeRows<kKeyBytes>;
using ValueRows = WholeRows<kValueBytes>;
using QueryRows = Swizzle<kQueryBytes>;
constexpr int kLoaderWarps = kWarps;
#endif

#ifndef SHARES_TILES
#define SHARES_TILES 0
#endif
constexpr bool kSharesTiles = SHARES_TILES;  // blocks side by side are a cluster, and read the same tiles: ..
constexpr bool kSharesNumbers = kSharesTiles && kConvertsTiles;  // .. each makes numbers of half of the codes, for both

constexpr int kPartKeys = kTileKeys / kLoaderWarps / (kSharesNumbers ? 2 : 1);  // keys of a tile that a warp copies

// A barrier of the threads that multiply: kThreads, the first ones of the block.
__device__ __forceinline__ void worker_barrier() {
#if USES_WGMMA
    named_barrier(1, kThreads);
#else
    __syncthreads();
#endif
}

static_assert(kWarps % (kColumnWarps * kKeyGroups) == 0 && kWarpRows % 16 == 0 && kWarpKeys % 8 == 0, "warps have whole MMA tiles");
static_assert(kColumnPairs * kColumnWarps * 16 <= kPaddedHeadDimV, "values are padded to what the warps read");
