// The variant of an attention kernel: macros from cuflash/kernels, turned at once into names that templates take.
//
// What every family of kernels has in common: schedule, segments and merging need no more. How a family cuts its keys into
// tiles stands in a header of its own; decode.cu's is tiles.cuh.
#pragma once
#include "codes.cuh"
#include "elements.cuh"

using Element = ELEMENT;                         // of queries: Float16, BFloat16, Float32 or Float8E4M3
using CacheElement = KV_ELEMENT;                 // of keys and values in the cache: the same, or one of codes.cuh
using OutElement = OUT_ELEMENT;                  // of the output: that of queries, BFloat16 for those of 8 bits
constexpr bool kIsQuantised = CacheElement::kBytes == 1;
#ifdef KEEPS_CODES  // codes of a quantised cache lie in shared memory as they do in the cache, for the arithmetic to read
constexpr bool kKeepsCodes = kIsQuantised;
#else
constexpr bool kKeepsCodes = false;
#endif
constexpr bool kScalesTiles = kKeepsCodes && Element::kBytes == 4;  // elements are multiplied by their scales there
constexpr bool kHasKeyScales = KEY_SCALES & 1;   // a scale per key and head of the keys ..
constexpr bool kHasValueScales = KEY_SCALES & 2;  // .. and of the values
constexpr int kHeadDim = HEAD_DIM;               // of queries and keys, a multiple of 8
constexpr int kHeadDimV = HEAD_DIM_V;            // of values
constexpr int kPaddedHeadDim = PADDED_HEAD_DIM;  // as a row lies in shared memory
constexpr int kPaddedHeadDimV = PADDED_HEAD_DIM_V;
constexpr int kRows = ROWS;                      // packed query rows of a row block
#ifdef ROW_PARTS
constexpr int kRowParts = ROW_PARTS;             // blocks that read the same share: of the rows of its row blocks each has kRows
#else
constexpr int kRowParts = 1;
#endif
constexpr int kWarps = WARPS;
constexpr int kThreads = kWarps * 32;
constexpr int kCluster = CLUSTER;                // blocks that share an item and their shared memory, or 1
constexpr bool kHasSoftcap = HAS_SOFTCAP;
constexpr bool kHasChunk = HAS_CHUNK;            // attention_chunk
constexpr bool kHasShard = HAS_SHARD;            // context parallelism: the cache holds some positions only
constexpr bool kHasTree = HAS_TREE;              // a tree mask
constexpr bool kHasSplitSize = HAS_SPLIT_SIZE;   // items are cut at multiples of split_size keys
constexpr bool kMerges = MERGES;                 // results over other keys are merged in (merge_with)

constexpr int kGrain = 16;           // a cluster cuts its item at multiples of this many keys, like a plan of this family
constexpr float kSlack = 8.0f;       // a maximum may be exceeded by this much, in log2 units, before it moves
constexpr float kLowest = -3.4028235e38f;  // a maximum before any key: finite, so that differences are never NaN
