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
#include "latent_turns.cuh"
#include "latent_wgmma.cuh"
#include "rows_combine.cuh"
#include "rows_loader.cuh"
#include "rows_queries.cuh"
#include "rows_reach.cuh"
#include "rows_scatter.cuh"
#include "rows_softmax.cuh"
#include "rows_together.cuh"
#include "segment.cuh"
#include "stream.cuh"
using Math = LatentWgmma<Element>;

constexpr int kBlockThreads = kThreads + kLoaderWarps * 32;
constexpr int kGroupColumns = kPaddedHeadDimV / 2;
constexpr u32 kToldBytes = kRows * kTileKeys * Element::kBytes;  // of the weights that are told, a line for each row
constexpr bool kScoresAhead = kSharesTiles;
static_assert(ReduceScatter::kSharedBytes <= kRingBytes, "pieces lie where tiles were");
static_assert(!kHasSplitSize || kRowParts == 1, "slots of splits are counted by blocks");
static_assert(kPaddedHeadDim == kPaddedHeadDimV + 64 && kTileKeys == 64 && kRows == 64, "weights are a line");

// Parts of a tile: the value columns of each warpgroup, and the rest of the keys, which has been read when these are.
constexpr int kGroups = 2, kRestPart = kGroups, kParts = kGroups + 1;

// What the threads of a block have in common beside the tiles.
struct BlockState {
    u64 full[kStages][kParts], empty[kStages][kGroups];  // mbarriers
    Share share;
    Segment segment;
    TurnState turns;
    MergeState merge;
    Cut item_end;  // of the segment's item
    int rows_begin, rows_end;  // of ragged queries: the rows that belong to sequences
};
static_assert(sizeof(BlockState) <= BLOCK_STATE_BYTES, "the host sets this much shared memory aside");

// A slot of the ring, one after another, and the parity of its barriers' phases.
struct Place {
    int slot = 0;
    u32 parity = 0;

    __device__ __forceinline__ void advance() {
        if (++slot == kStages) slot = 0, parity ^= 1;
    }
};

// Whether the warps that copy wait for what they copy row by row, and fence it for wgmma: with boxes that is little. Else those
// that score fence what they have waited for.
__device__ __forceinline__ bool loader_fences(const TiledParams& p) { return Boxes::kExist && p.box_rows; }

// Fills the ring with all tiles of the share.
__device__ __forceinline__ void load_share(const LoaderParams& p, BlockState& block, u32 ring) {
    const int warp = threadIdx.x / 32 - kWarps, lane = threadIdx.x % 32;
    Loader loader(p, block.share, warp, lane);
    loader.start();
    Place place;
    for (; loader.has_tile(); place.advance()) {
        const u32 slot = ring + place.slot * kSlotBytes;
        loader.begin_tile_of_rows();
        const auto load = [&](int part, auto copy) {
            u64& full = block.full[place.slot][part];
            // Of a slot never filled it is over.
            if (part != kRestPart) sleep_until_phase(block.empty[place.slot][part], place.parity ^ 1);
            copy(&full);
            if (loader_fences(p)) {
                cp_async_commit();
                cp_async_wait<0>();
                fence_for_wgmma();
                arrive(full);
            } else {
                arrive_with_copies(full);
            }
        };
        load(0, [&](u64* full) { loader.load_columns<0, kGroupColumns>(slot, full); });
        load(1, [&](u64* full) { loader.load_columns<kGroupColumns, kGroupColumns>(slot, full); });
        load(kRestPart, [&](u64* full) { loader.load_rest(slot, full); });
    }
    cp_async_commit();
    cp_async_wait<0>();
    // A block of a cluster stays until the other one has arrived at its barriers for the last time.
    if constexpr (kSharesTiles) {
        for (int i = 0; i < kStages; ++i, place.advance()) {
            for (u64& empty : block.empty[place.slot]) sleep_until_phase(empty, place.parity ^ 1);
        }
    }
}

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
    if (warp < kWarps) {  // weights of rows that do not exist are never told
        for (u32 i = threadIdx.x * 16; i < kToldBytes; i += kThreads * 16) store_shared(told + i, make_uint4(0, 0, 0, 0));
    }
    if (threadIdx.x < kStages * kParts) {
        init_barrier((&block.full[0][0])[threadIdx.x], kLoaderWarps * 32);
        // One warpgroup frees a part, of each block that it is copied for.
        constexpr int kFreeing = kSharesTiles ? 2 * kRowWarps : kRowWarps;
        if (threadIdx.x < kStages * kGroups) init_barrier((&block.empty[0][0])[threadIdx.x], kFreeing);
        fence_barrier_init();
    }
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
        load_share(params, block, ring + zero_of_each_lane());
        leave_cluster();
        return;
    }
    take_registers<MATH_REGISTERS>();
    if (p.total_q) clear_rows_of_none(p, block.rows_begin, block.rows_end);

    const Turns turns(block.turns, warp, lane);
    const int group = turns.group(), row_warp = turns.row_warp();
    Math math(group, shared_address(queries));
    Softmax softmax(p);
    Place place;
    const auto leave = [&](const Place& at) {
        if (lane != 0) return;
        u64& empty = block.empty[at.slot][group];
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
        flip_query_rows(p, queries);
        fence_for_wgmma();
        worker_barrier();

        math.begin_item();
        softmax.reset();
        const Reach reach(p, segment, row_warp * kWarpRows, kWarpRows);
        const bool has_rows = kSharesTiles || row_warp * kWarpRows < segment.valid_rows;  // those that share tiles have all rows
        const int first_row = segment.first_row + row_warp * kWarpRows;
        // Scores a tile.
        const auto score = [&](const Place& at, Scores& scores) {
            const auto wait_for = [&](int part) {
                sleep_until_phase(block.full[at.slot][part], at.parity);
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
        const auto weigh = [&](u32 key, Scores& scores, Weights& weights, auto& rescaled, const auto& partners) {
            if (!has_rows) return;  // what weights of rows that do not exist are, nobody asks
            if constexpr (kHasSoftcap) cap_scores(p, scores);
            if (reach.needs_mask(key)) mask_scores(p, block.segment, first_row, key, lane, scores);
            softmax.move_maxima(scores, rescaled, partners, Scaling(nullptr, lane));
            softmax.weigh<0, 4>(scores);
            pack_weights<0, 4>(scores, weights);
        };
        // .. and tells them, so that their products run while the other weights are found.
        const auto multiply = [&](const Place& at, Scores& scores, Weights& weights) {
            if (has_rows) turns.tell<0, 4>(weights, told);
            turns.arrive(0);
            math.start_values<0, 2>(slot_of(at), weights);
            if (has_rows) {
                softmax.weigh<4, 4>(scores);
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
                    weigh(key, scores, weights, math, turns);
                } else {
                    follow(first);
                    const Running<Math> running{turns, math};
                    if (has_own) weigh(key, scores, weights, running, running);
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
                    weigh(segment.keys.begin + tile * kTileKeys, scores, weights, math, turns);
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
