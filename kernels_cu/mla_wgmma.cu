// mla.cu for sm_90a: products of whole warpgroups on row blocks of 64, and a warpgroup that does nothing but copy.
//
// Two warpgroups have the same 64 rows and half of the value columns each. They take turns at scoring tiles of 64 keys: one
// scores a tile and tells its weights, and both multiply them with their own columns (latent_turns.cuh). The ring has two slots,
// whose parts are filled and freed one by one, for a tile is a third of all shared memory: whoever has read a part frees it
// before doing anything that may wait. But where the tensor cores are what everything waits for, the second of two tiles is
// scored before the weights of the first are heard, and weighed while their products run.
#define USES_WGMMA 1
#define STAGES_ANSWERS 1
#include "params.cuh"
#include "ptx/barriers.cuh"
#include "ptx/cluster.cuh"
#include "ptx/copies.cuh"
#include "latent_ring.cuh"
#include "latent_turns.cuh"
#include "latent_wgmma.cuh"
#include "rows_combine.cuh"
#include "rows_queries.cuh"
#include "rows_reach.cuh"
#include "rows_scatter.cuh"
#include "rows_softmax.cuh"
#include "rows_together.cuh"
#include "segment.cuh"
#include "stream.cuh"
#if KV_ELEMENT_BYTES == 1
#include "latent_queries.cuh"
#endif
using Math = LatentWgmma<TileElement>;

constexpr int kBlockThreads = kThreads + kLoaderWarps * 32;
constexpr u32 kToldBytes = kRows * kTileKeys * kWeightBytes;  // of the weights that are told, a line for each row
constexpr bool kScoresAhead = kSharesTiles && !kSharesNumbers;  // codes are waited for: 264 us without, 307 with (H200)
static_assert(ReduceScatter::kSharedBytes <= kRingBytes, "pieces lie where tiles were");
static_assert(!kHasSplitSize || kRowParts == 1, "slots of splits are counted by blocks");
static_assert(!kConvertsTiles || kHasKeyScales == kHasValueScales, "keys and values of a joint row have one scale");
static_assert(kPaddedHeadDim == kPaddedHeadDimV + 64 && kTileKeys == 64 && kRows == 64, "weights are a line");

// What the threads of a block have in common beside the tiles.
struct BlockState {
    RingState ring;
    Share share;
    Segment segment;
    TurnState turns;
    MergeState merge;
    Cut item_end;  // of the segment's item
    int rows_begin, rows_end;  // of ragged queries: the rows that belong to sequences
};
constexpr int kFactorBytes = kConvertsTiles ? kRows * 4 : 0;  // of the rows' factors, behind the block's state and the scales
static_assert(sizeof(BlockState) + kScalesBytes + kFactorBytes <= BLOCK_STATE_BYTES,
              "the host sets this much shared memory aside");

// A block stays until the other one of its cluster copies nothing to it any more.
__device__ __forceinline__ void leave_cluster() {
    if constexpr (!kSharesTiles) return;
    __syncwarp();
    cluster_arrive();
    cluster_wait();
}

#if SHARES_TILES
#define CLUSTER_DIMS __cluster_dims__(2, 1, 1)
#else
#define CLUSTER_DIMS
#endif

extern "C" __global__ void CLUSTER_DIMS __launch_bounds__(kBlockThreads, BLOCKS_PER_SM)
    mla_wgmma(const __grid_constant__ TiledParams params) {
    const DecodeParams& p = params.attention;
    extern __shared__ __align__(1024) unsigned char shared[];
    unsigned char* const queries = shared + kRingBytes;  // (kRows, kPaddedHeadDim)
    unsigned char* const weights_told = queries + kRows * kQueryBytes;  // (kRows, kTileKeys)
    BlockState& block = *reinterpret_cast<BlockState*>(weights_told + kToldBytes);
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const u32 ring = shared_address(shared), told = shared_address(weights_told);
    float* const factors = reinterpret_cast<float*>(weights_told + kToldBytes + BLOCK_STATE_BYTES - kFactorBytes);
    const u32 scales = shared_address(factors) - kScalesBytes;  // a ScaleTile for each slot
    if (warp < kWarps) {  // weights of rows that do not exist are never told
        for (u32 i = threadIdx.x * 16; i < kToldBytes; i += kThreads * 16) store_shared(told + i, make_uint4(0, 0, 0, 0));
    }
    block.ring.init();
    if constexpr (kSharesTiles) cluster_arrive();
    if (threadIdx.x == kThreads) prefetch_maps(params);
    wait_for_turn(p);
    if (threadIdx.x < 2) (&block.share.begin)[threadIdx.x] = load_cut(p, share_number() + threadIdx.x);
    const int rows_edge = threadIdx.x - 30;  // two threads beside those that load the share
    if (p.total_q && (rows_edge == 0 || rows_edge == 1)) {
        (&block.rows_begin)[rows_edge] = p.lengths.cu_seqlens_q[rows_edge * p.batch_size];
    }
    __syncthreads();
    if constexpr (kSharesTiles) cluster_wait();  // all have set up their barriers
    if (warp >= kWarps) {
        keep_registers<LOADER_REGISTERS>();
        load_share(params, block.ring, block.share, ring + zero_of_each_lane(), scales);
        leave_cluster();
        return;
    }
    take_registers<MATH_REGISTERS>();
    if (p.total_q) clear_rows_of_none(p, block.rows_begin, block.rows_end);

    const Turns turns(block.turns, warp, lane);
    const int group = turns.group(), row_warp = turns.row_warp();
    Math math(group, shared_address(queries));
    Softmax softmax(p);
    Scaling scaling(factors + row_warp * kWarpRows, lane);
    Place place;
    const auto leave = [&](const Place& at) {
        if (lane != 0) return;
        u64& empty = block.ring.empty[at.slot][group];
        arrive(empty);
        if constexpr (kSharesTiles) arrive_at_block(shared_of_block(shared_address(&empty), row_part() ^ 1));
    };
    const auto slot_of = [&](const Place& at) { return ring + at.slot * kSlotBytes; };
    Walker walker(block.share);
    [[maybe_unused]] RowStates folded;  // with split_size: of the item's splits so far
    for (Segment segment; walker.next(p, block.share, segment);) {
        if (threadIdx.x == 0) {
            block.segment = segment;
            start_part(p, block.share, segment);
            ReduceScatter::load_end(p, block.share, segment, block.item_end);
        }
        load_latent_queries(p, segment, shared_address(queries));
        cp_async_commit();
        cp_async_wait<0>();
#if KV_ELEMENT_BYTES == 1
        worker_barrier();
        prepare_latent_queries<Element, true, true>(p, segment, shared_address(queries), factors);
#else
        flip_query_rows(p, queries);
#endif
        fence_for_wgmma();
        worker_barrier();

        math.begin_item();
        softmax.reset();
        scaling.begin_item();
        const Reach reach(p, segment, row_warp * kWarpRows, kWarpRows);
        const bool has_rows = kSharesTiles || row_warp * kWarpRows < segment.valid_rows;  // those that share tiles have all rows
        const int first_row = segment.first_row + row_warp * kWarpRows;
        // Scores a tile.
        const auto score = [&](const Place& at, Scores& scores) {
            const auto wait_for = [&](int part) {
                sleep_until_phase(block.ring.full[at.slot][part], at.parity);
                if (!loader_fences(params)) fence_for_wgmma();
            };
            wait_for(0);
            if (p.qv) math.start_scores<0, kGroupColumns>(slot_of(at), true, scores);
            wait_for(1);
            if (p.qv) math.start_scores<kGroupColumns, kGroupColumns>(slot_of(at), false, scores);
            wait_for(kRestPart);
            math.start_scores<kPaddedHeadDimV, 64>(slot_of(at), !p.qv, scores);
            math.wait_for_scores(scores);
        };
        const auto end_values = [&](const Place& at) {
            math.wait_for_values();
            __syncwarp();
            leave(at);
        };
        // Finds the weights of half of a tile's keys ..
        bool needs_mask = false;  // the tile of these
        const auto weigh = [&](const Place& at, u32 key, Scores& scores, Weights& weights, auto& rescaled, const auto& partners) {
            if (!has_rows) return;  // what weights of rows that do not exist are, nobody asks
            scaling.begin_tile(scales + at.slot * ScaleTile::kBytes, 0, lane);
            scaling.scale_scores(scores);
            if constexpr (kHasSoftcap) cap_scores(p, scores);
            needs_mask = reach.needs_mask(key);
            if (needs_mask) mask_scores(p, block.segment, first_row, key, lane, scores);
            softmax.move_maxima(scores, rescaled, partners, scaling);
            softmax.weigh<0, 4>(scores);
            scaling.scale_weights<0, 4>(scores, needs_mask);
            pack_weights<0, 4>(scores, weights);
        };
        // .. and tells them, so that their products run while the other weights are found.
        const auto multiply = [&](const Place& at, Scores& scores, Weights& weights) {
            if (has_rows) turns.tell<0, 4>(weights, told);
            turns.arrive(0);
            math.start_values<0, 2>(slot_of(at), weights);
            if (has_rows) {
                softmax.weigh<4, 4>(scores);
                scaling.scale_weights<4, 4>(scores, needs_mask);
                pack_weights<4, 4>(scores, weights);
                turns.tell<4, 4>(weights, told);
            }
            turns.arrive(1);
            math.start_values<2, 2>(slot_of(at), weights);
            end_values(at);
        };
        // Starts the products of a tile that the other one scores.
        const auto follow = [&](const Place& at) {
            turns.hear(has_rows, softmax, math);
            math.start_values<0, 2>(slot_of(at), told);
            turns.wait_for_other(1);
            math.start_values<2, 2>(slot_of(at), told);
        };
        const u32 keys = segment.keys.end - segment.keys.begin;
        const int tiles = (keys + kTileKeys - 1) / kTileKeys;
        if constexpr (kScoresAhead) {
            for (int tile = 0; tile < tiles; tile += 2) {
                const bool has_second = tile + 1 < tiles, has_own = group == 0 || has_second;
                const Place first = place;
                place.advance();
                const Place second = place, own = group == 0 ? first : second;
                if (has_second) place.advance();
                const u32 key = segment.keys.begin + (tile + group) * kTileKeys;  // of its own tile
                Scores scores;
                Weights weights = {};
                if (has_own) score(own, scores);
                if (group == 0) {
                    weigh(own, key, scores, weights, math, turns);
                } else {
                    follow(first);
                    const Running<Math> running{turns, math};
                    if (has_own) weigh(own, key, scores, weights, running, running);
                    end_values(first);
                }
                if (has_own) multiply(own, scores, weights);
                if (group == 0 && has_second) {
                    follow(second);
                    end_values(second);
                }
            }
        } else {
            for (int tile = 0; tile < tiles; ++tile, place.advance()) {
                if (tile % 2 == group) {
                    Scores scores;
                    Weights weights = {};
                    score(place, scores);
                    weigh(place, segment.keys.begin + tile * kTileKeys, scores, weights, math, turns);
                    multiply(place, scores, weights);
                } else {
                    follow(place);
                    end_values(place);
                }
            }
        }

        launch_next();  // not earlier, or the next kernel's blocks fill the free space unevenly
        RowStates states;
        softmax.finish(math, turns, states);
        const u32 thread = thread_number();  // asked for here, or addresses that follow from it take registers in the main loop
        const u32 result_warp = thread / 32 % kRowWarps * kColumnWarps + thread / 32 / kRowWarps;
        const u32 staged = shared_address(queries);  // which nobody reads any more
        RowResults results(p, block.segment, math.output(), states, result_warp, thread % 32, staged);
        if constexpr (kHasSplitSize) {
            hand_on_split(p, block.share, block.segment, results, folded, block.merge);
        } else if constexpr (kMerges) {
            hand_on(p, block.share, block.segment, results, block.merge);
        } else if (block.segment.starts && block.segment.ends) {
            results.answer();
        } else if (ReduceScatter::fits(block.share, block.segment, block.item_end)) {
            ReduceScatter(p, block.share, block.segment, ring).merge(math.output(), states, block.merge);
        } else if (store_part(p, block.share, block.segment, results, block.merge)) {
            TogetherState& together = *reinterpret_cast<TogetherState*>(queries);
            Together(p, block.segment, cut_item(block.share, block.segment), together).merge(block.merge);
        }
        worker_barrier();  // all have read the queries and the segment, which now change
    }
    leave_cluster();
}
