// Attention on latent rows, whose values are scored as well: MLA. One launch for a layer, on a plan made once for the step.
//
// A row of the cache is kHeadDimV values, which meet qv, and kHeadDim more elements of the key, which meet q. Joint rows hold both
// side by side, values first, and so do their queries: then qv and v_cache are the first columns of q and k_cache. A row is read
// from memory once and lies in shared memory once, for it is key and value.
//
// Packed query rows are the rows of the MMA, keys its columns, as in extend.cu, whose headers these mostly are. The output is too
// wide for a warp's registers: kColumnWarps warps share their rows. Each scores a part of a tile's keys and tells its weights
// (latent_weights.cuh), and each multiplies all weights with its own value columns.
//
// Of a quantised cache the tiles are codes: those become numbers on their way to an MMA (latent_mma_codes.cuh), or with float32
// queries in a place of their own, one tile at a time (latent_codes.cuh).
//
// The ring has kStages slots of a tile each. While a tile is read, the one kStages - 1 further on is copied to the slot of the
// tile before, which all warps have read: a block barrier says so. With one slot nothing is copied while it is read.
#define USES_WGMMA 0
#define KEEPS_CODES 1
#include "params.cuh"
#include "ptx/copies.cuh"
#include "latent_codes.cuh"
#include "latent_fma.cuh"
#include "latent_mma.cuh"
#include "rows_combine.cuh"
#include "rows_loader.cuh"
#include "rows_partners.cuh"
#include "rows_queries.cuh"
#include "rows_reach.cuh"
#include "rows_softmax.cuh"
#include "segment.cuh"
#include "stream.cuh"
#if KV_ELEMENT_BYTES == 1
#include "latent_mma_codes.cuh"
#include "latent_queries.cuh"
#endif

// What the threads of a block have in common beside the tiles. Registers are for the main loop.
struct BlockState {
    Share share;
    Segment segment;
    MergeState merge;
    int rows_begin, rows_end;    // of ragged queries: the rows that belong to sequences
    float2 scales[kScalesTiles ? kTileKeys : 1];  // of a tile's keys and values
};
constexpr int kMeetingBytes = (sizeof(Meeting) + 15) / 16 * 16;
constexpr int kFactorBytes = kReadsCodes ? 2 * kRows * 4 : 0;  // of the rows' factors, behind the block's state
static_assert(sizeof(BlockState) + kMeetingBytes + kFactorBytes <= BLOCK_STATE_BYTES, "the host sets this much shared memory aside");
static_assert(kColumnWarps > 1, "warps share their rows");
static_assert(kStages > (kReadsCodes ? 1 : 0), "a tile has a place");

template <typename T, int kBytes, int kCodeBytes>
struct MathOf {
    using Type = LatentMma<T>;
};
template <typename T, int kCodeBytes>
struct MathOf<T, 4, kCodeBytes> {
    using Type = LatentFma;
};
#if KV_ELEMENT_BYTES == 1
template <typename T>
struct MathOf<T, 2, 1> {
    using Type = LatentCodesMma<CacheElement>;
};
#endif
using Math = MathOf<Element, kWeightBytes, CacheElement::kBytes>::Type;

// Rows of queries as the arithmetic reads them, and of tiles that become float32 in a place of their own.
constexpr int kRowBytes = kNumberColumns * kWeightBytes;
constexpr int kNumbersBytes = kScalesTiles ? kTileKeys * kRowBytes : 0;

extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS_PER_SM) mla(const __grid_constant__ DecodeParams p) {
    extern __shared__ __align__(128) unsigned char shared[];
    unsigned char* const queries = shared + kRingBytes;  // (kRows, kPaddedHeadDim)
    unsigned char* const state = queries + kRows * kRowBytes + kNumbersBytes;
    Meeting& meeting = *reinterpret_cast<Meeting*>(state);
    BlockState& block = *reinterpret_cast<BlockState*>(state + kMeetingBytes);
    float* const factors = reinterpret_cast<float*>(state + BLOCK_STATE_BYTES - kFactorBytes);  // see prepare_latent_queries
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row_warp = warp / kColumnWarps, column_warp = warp % kColumnWarps;
    wait_for_turn(p);
    if (threadIdx.x < 2) (&block.share.begin)[threadIdx.x] = load_cut(p, blockIdx.x + threadIdx.x);
    const int rows_edge = threadIdx.x + 2 - kThreads;  // the last two threads, beside those that load the share
    if (p.total_q && rows_edge >= 0) (&block.rows_begin)[rows_edge] = p.lengths.cu_seqlens_q[rows_edge * p.batch_size];
    __syncthreads();
    // Shared addresses of the tile that is read, and of the one before it; in registers of each lane, as in extend.cu.
    const u32 ring = shared_address(shared) + zero_of_each_lane();
    u32 slot = ring, free_slot = ring + kRingBytes - kSlotBytes;
    const u32 numbers = shared_address(queries) + kRows * kRowBytes;

    Loader loader(p, block.share, warp, lane);
    Math math(column_warp, lane);
    Softmax softmax(p);
    Partners partners(meeting, warp, lane);
    const TileWeights weights(meeting, row_warp, column_warp);
    Scaling scaling(factors + row_warp * kWarpRows, lane, p.score_slack);
    const auto load = [&](u32 to) {
        loader.load_rows(to);
        cp_async_commit();
    };
    // Waits for the tile in `slot` and for all warps to have read the one in `free_slot`, which is filled again.
    const auto begin_tile = [&](u32 key) {
        loader.begin_tile_of_rows();
        if constexpr (kStages == 1) {
            __syncthreads();
            load(slot);
        }
        cp_async_wait<kStages == 1 ? 0 : kStages - 2>();
        if constexpr (kScalesTiles) {
            __syncthreads();  // all have read the numbers and the scales of the tile before
            if (threadIdx.x < kTileKeys) {
                block.scales[threadIdx.x] = scales_of_key(p, block.segment, key + threadIdx.x);
            }
            __syncthreads();
            convert_tile<CacheElement>(slot, numbers, block.scales);
        }
        __syncthreads();
        if constexpr (kStages > 1) load(free_slot);
    };

    if (p.total_q) clear_rows_of_none(p, block.rows_begin, block.rows_end);
    Walker walker(block.share);
    bool is_first = true;
    [[maybe_unused]] RowStates folded;  // with split_size: of the item's splits so far
    for (Segment segment; walker.next(p, block.share, segment);) {
        if (threadIdx.x == 0) {
            block.segment = segment;
            start_part(p, block.share, segment);
        }
        if constexpr (kScalesTiles) {
            load_query_numbers(p, segment, shared_address(queries));
        } else {
            load_latent_queries(p, segment, shared_address(queries));
        }
        cp_async_commit();
        if (is_first) {  // after the queries, since tiles wait for the page table
            is_first = false;
            loader.start(walker, segment);
#pragma unroll 1
            for (u32 tile = 0; tile < kStages - 1; ++tile) {
                loader.begin_tile_of_rows();
                load(ring + tile * kSlotBytes);
            }
            cp_async_wait<kStages - 1>();  // all but the groups of the ring
        } else {
            cp_async_wait<0>();
        }
#if KV_ELEMENT_BYTES == 1
        if constexpr (kReadsCodes) {
            __syncthreads();
            prepare_latent_queries<Element, false, false>(p, segment, shared_address(queries), factors);
        }
#else
        flip_query_rows(p, queries);
#endif
        const Reach reach(p, segment, row_warp * kWarpRows, kWarpRows);
        __syncthreads();

        math.begin_item(shared_address(queries) + row_warp * kWarpRows * kRowBytes);
        softmax.reset();
        // Key numbers are unsigned: behind the last tile they may pass 2^31.
        for (u32 key = segment.keys.begin; key < segment.keys.end; key += kTileKeys) {
            const int begin = key;
            begin_tile(begin);
            const u32 tile = kScalesTiles ? numbers : slot;
            if (begin < reach.end && key + kTileKeys > static_cast<u32>(reach.begin)) {
                Scores scores;
                scaling.begin_tile(slot + kTileBytes, column_warp * kWarpKeys, lane);
                math.scores(tile, p.qv != nullptr, scaling, scores);
                if constexpr (kHasSoftcap) cap_scores(p, scores);
                const bool needs_mask = reach.needs_mask(begin);
                if (needs_mask) {
                    const int first_row = block.segment.first_row + row_warp * kWarpRows;
                    mask_scores(p, block.segment, first_row, key + column_warp * kWarpKeys, lane, scores);
                }
                softmax.update(scores, math, partners, scaling);
                scaling.scale_weights(scores, needs_mask);
                weights.tell(scores, lane);
                partners.meet();
                math.accumulate(tile, weights);
            }
            free_slot = slot;
            slot += kSlotBytes;
            if (slot == ring + kRingBytes) slot = ring;
        }

        launch_next();  // not earlier, or the next kernel's blocks fill the free space unevenly
        RowStates states;
        softmax.finish(math, partners, states);
        RowResults results(p, block.segment, math.output(), states, warp, lane);
        if constexpr (kHasSplitSize) {
            hand_on_split(p, block.share, block.segment, results, folded, block.merge);
        } else {
            hand_on(p, block.share, block.segment, results, block.merge);
        }
        __syncthreads();  // all have read the queries and the segment, which now change
    }
}
