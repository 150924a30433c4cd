// mla.cu for sm_90a: products of whole warpgroups on row blocks of 64, and a warpgroup that does nothing but copy.
//
// Two warpgroups have the same 64 rows and half of the value columns each. They take turns at scoring tiles of 64 keys: one
// scores a tile and tells its weights, and both multiply them with their own columns (latent_turns.cuh). Weights go to where the
// rest of the tile's keys was, once that is scored. The ring has two slots, whose parts are filled and freed one by one, for a
// tile is a third of all shared memory: whoever has read a part frees it before doing anything that may wait.
#define USES_WGMMA 1
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
#include "rows_softmax.cuh"
#include "rows_together.cuh"
#include "segment.cuh"
#include "stream.cuh"
using Math = LatentWgmma<Element>;

constexpr int kBlockThreads = kThreads + kLoaderWarps * 32;
constexpr int kGroupColumns = kPaddedHeadDimV / 2;
constexpr u32 kRest = kPaddedHeadDimV / 64 * Math::kLineBytes;  // in a slot
static_assert(!kHasSplitSize || kRowParts == 1, "slots of splits are counted by blocks");
static_assert(kPaddedHeadDim == kPaddedHeadDimV + 64 && kTileKeys == 64 && kRows == 64, "weights fit the place of the rest");

// Parts of a tile: the value columns of each warpgroup, and the rest of the keys.
constexpr int kParts = 3, kRestPart = 2;

// What the threads of a block have in common beside the tiles.
struct BlockState {
    u64 full[kStages][kParts], empty[kStages][kParts];  // mbarriers
    Share share;
    Segment segment;
    TurnState turns;
    MergeState merge;
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

// Fills the ring with all tiles of the share.
__device__ __forceinline__ void load_share(const LoaderParams& p, BlockState& block, u32 ring) {
    const int warp = threadIdx.x / 32 - kWarps, lane = threadIdx.x % 32;
    Loader loader(p, block.share, warp, lane);
    loader.start();
    for (Place place; loader.has_tile(); place.advance()) {
        const u32 slot = ring + place.slot * kSlotBytes;
        loader.begin_tile();
        const auto load = [&](int part, auto copy) {
            sleep_until_phase(block.empty[place.slot][part], place.parity ^ 1);  // of a slot never filled it is over
            copy(&block.full[place.slot][part]);
            arrive_with_copies(block.full[place.slot][part]);
        };
        load(0, [&](u64* full) { loader.load_columns<0, kGroupColumns>(slot, full); });
        load(1, [&](u64* full) { loader.load_columns<kGroupColumns, kGroupColumns>(slot, full); });
        load(kRestPart, [&](u64* full) { loader.load_rest(slot, full); });
    }
    cp_async_commit();
    cp_async_wait<0>();
}

// A block stays until the other one of its cluster copies nothing to it any more, nor arrives at its barriers.
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
    BlockState& block = *reinterpret_cast<BlockState*>(queries + kRows * kQueryBytes);
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const u32 ring = shared_address(shared);
    if (threadIdx.x < kStages * kParts) {
        init_barrier((&block.full[0][0])[threadIdx.x], kLoaderWarps * 32);
        // One warpgroup frees a part, of each block that it is copied for.
        init_barrier((&block.empty[0][0])[threadIdx.x], kSharesTiles ? 2 * kRowWarps : kRowWarps);
        if constexpr (kSharesTiles) fence_barrier_init();
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
    const auto wait_for = [&](int part) { wait_for_phase(block.full[place.slot][part], place.parity); };
    const auto leave = [&](int part) {
        if (lane != 0) return;
        u64& empty = block.empty[place.slot][part];
        arrive(empty);
        if constexpr (kSharesTiles) arrive_at_block(shared_of_block(shared_address(&empty), row_part() ^ 1));
    };
    Walker walker(block.share);
    [[maybe_unused]] RowStates folded;  // with split_size: of the item's splits so far
    for (Segment segment; walker.next(p, block.share, segment);) {
        if (threadIdx.x == 0) block.segment = segment;
        load_latent_queries(p, segment, shared_address(queries));
        cp_async_commit();
        cp_async_wait<0>();
        flip_query_rows(p, queries);
        fence_for_wgmma();
        worker_barrier();

        math.begin_item();
        softmax.reset();
        const Reach reach(p, segment, row_warp * kWarpRows, kWarpRows);
        const bool has_rows = row_warp * kWarpRows < segment.valid_rows;
        const int first_row = segment.first_row + row_warp * kWarpRows;
        // Reads a tile that this warpgroup scores.
        const auto weigh = [&](u32 key, u32 slot) {
            Scores scores;
            wait_for(0);
            if (p.qv) math.start_scores<0, kGroupColumns>(slot, true, scores);
            wait_for(1);
            if (p.qv) math.start_scores<kGroupColumns, kGroupColumns>(slot, false, scores);
            wait_for(kRestPart);
            math.start_scores<kPaddedHeadDimV, 64>(slot, !p.qv, scores);
            math.wait_for_scores(scores);
            turns.meet();  // all have read the rest of the keys
            Weights weights = {};
            if (has_rows) {  // what weights of rows that do not exist are, nobody asks
                if constexpr (kHasSoftcap) cap_scores(p, scores);
                if (reach.needs_mask(key)) mask_scores(p, block.segment, first_row, key, lane, scores);
                softmax.move_maxima(scores, math, turns, Scaling(nullptr, lane));
                softmax.weigh<0, 4>(scores);
                pack_weights<0, 4>(scores, weights);
                turns.tell<0, 4>(weights, slot + kRest);
            }
            turns.arrive(0);  // half of the products run while the other weights are found
            math.start_values<0, 2>(slot, weights);
            if (has_rows) {
                softmax.weigh<4, 4>(scores);
                pack_weights<4, 4>(scores, weights);
                turns.tell<4, 4>(weights, slot + kRest);
            }
            turns.arrive(1);
            math.start_values<2, 2>(slot, weights);
            math.wait_for_values();
            __syncwarp();
            leave(group);
        };
        // Reads a tile that the other one scores.
        const auto follow = [&](u32 slot) {
            turns.hear(has_rows, softmax, math);
            math.start_values<0, 2>(slot, slot + kRest);
            turns.wait_for_other(1);
            math.start_values<2, 2>(slot, slot + kRest);
            math.wait_for_values();
            __syncwarp();
            leave(group), leave(kRestPart);
        };
        const u32 keys = segment.keys.end - segment.keys.begin;
        const int tiles = (keys + kTileKeys - 1) / kTileKeys;
        for (int tile = 0; tile < tiles; ++tile, place.advance()) {
            const u32 slot = ring + place.slot * kSlotBytes;
            if (tile % 2 == group) {
                weigh(segment.keys.begin + tile * kTileKeys, slot);
            } else {
                follow(slot);
            }
        }

        launch_next();  // not earlier, or the next kernel's blocks fill the free space unevenly
        RowStates states;
        softmax.finish(math, turns, states);
        const u32 thread = thread_number();  // asked for here, or addresses that follow from it take registers in the main loop
        const u32 result_warp = thread / 32 % kRowWarps * kColumnWarps + thread / 32 / kRowWarps;
        RowResults results(p, block.segment, math.output(), states, result_warp, thread % 32);
        if constexpr (kHasSplitSize) {
            hand_on_split(p, block.share, block.segment, results, folded, block.merge);
        } else {
            hand_on_together(p, block.share, block.segment, results, block.merge, *reinterpret_cast<TogetherState*>(queries));
        }
        worker_barrier();  // all have read the queries and the segment, which now change
    }
    leave_cluster();
}
