// Decode attention: one launch for a layer, on a plan made once for the step.
//
// A block reads its share of all keys (plan.cu), segment after segment; a segment is what it reads of one item. The keys of a
// segment are tiles of kTileKeys; warp w reads tiles w, w + kWarps, .. It copies them into its own ring (loader.cuh), scores
// them (mma.cuh or fma.cuh), keeps its own maxima and sums (softmax.cuh), and waits for no other warp until the segment ends
// (merge_warps.cuh). An item that lies in several blocks is merged by the last of them to arrive (combine.cuh).
//
// Between two segments the copies do not stop: the next one's keys follow in the ring while this one's are read, and its
// queries come to a second buffer, where there is one.
//
// The ring has kStages slots. Half-stage h is the keys (h even) or the values (h odd) of the warp's tile h / 2. While
// half-stage h is read, half-stage h + kStages - 1 is copied to the slot of half-stage h - 1, which all lanes have read.
#include "cluster.cuh"
#include "combine.cuh"
#include "loader.cuh"
#include "merge_warps.cuh"
#include "params.cuh"
#include "ptx/barriers.cuh"
#include "ptx/copies.cuh"
#include "queries.cuh"
#include "segment.cuh"
#include "softmax.cuh"
#include "stream.cuh"
#include "tiles.cuh"
#if KV_ELEMENT_BYTES == 1
#include "query_pass.cuh"
#endif
#if ELEMENT_BYTES == 4
#include "fma.cuh"
using Math = FmaMath;
#elif KV_ELEMENT_BYTES == 1
#include "mma_codes.cuh"
using Math = MmaCodesMath<CacheElement>;
#else
#include "mma.cuh"
using Math = MmaMath<Element>;
#endif

// What the threads of a block have in common beside the tiles. Registers are for the main loop.
struct BlockState {
    Share share;
    u64 fetched[kQueryBuffers];  // mbarriers: the queries in a buffer and their segment are there
    Segment segments[kQueryBuffers];
    WarpStates warps;
};
constexpr int kFactorBytes = kIsQuantised ? kRows * 4 : 0;  // of the rows' factors, behind the block's state
static_assert(sizeof(BlockState) + kFactorBytes <= BLOCK_STATE_BYTES, "kernels/tiles.py sets this much shared memory aside");

// What a warp reads of a segment.
struct Reach {
    u32 key, end;              // first key of its next tile, and of no tile; unsigned: behind the last one it may pass 2^31
    int full_begin, full_end;  // a tile that begins in full_begin .. full_end, both included, needs no mask

    __device__ __forceinline__ Reach(const DecodeParams& p, const Segment& s, int warp)
        : key(s.keys.begin + warp * kTileKeys), end(s.keys.end) {
        const int first_query = query_of(p, s.first_row);
        const int last_query = query_of(p, s.first_row + max(s.valid_rows, 1) - 1);
        full_begin = mask_of(p).first_visible(s.lengths, last_query);
        full_end = min(s.keys.end, mask_of(p).last_visible(s.lengths, first_query)) - kTileKeys;
        if constexpr (kHasTree) full_end = min(full_end, keys_before_tree(p, s.lengths) - kTileKeys);
        pin(full_begin), pin(full_end);
    }
};

#if CLUSTER > 1
#define CLUSTER_DIMS __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTER_DIMS
#endif

extern "C" __global__ void CLUSTER_DIMS __launch_bounds__(kThreads, BLOCKS_PER_SM)
    decode(const __grid_constant__ DecodeParams p) {
    extern __shared__ __align__(128) unsigned char shared[];
    constexpr int kBufferBytes = kRows * kQueryBytes;
    unsigned char* const queries = shared + kWarps * kRingBytes;  // (kQueryBuffers, kRows, kPaddedHeadDim)
    unsigned char* const state = queries + kQueryBuffers * kBufferBytes;
    BlockState& block = *reinterpret_cast<BlockState*>(state);
    float* const row_factors = reinterpret_cast<float*>(state + BLOCK_STATE_BYTES - kFactorBytes);  // of the item that is read
    ClusterParts& parts = *reinterpret_cast<ClusterParts*>(state + BLOCK_STATE_BYTES);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Shared addresses: `slot` of the half-stage that is read, `free_slot` of the one before it. They are equal in all lanes, yet
    // must lie in registers of each lane: from uniform registers, with a cache policy, ptxas 13.0 and 13.5 emit illegal copies.
    const u32 ring = shared_address(shared) + warp * kRingBytes + zero_of_each_lane();
    u32 slot = ring, free_slot = ring + kRingBytes - kSlotBytes;
    const auto advance = [&] {
        free_slot = slot;
        slot += kSlotBytes;
        if (slot == ring + kRingBytes) slot = ring;
    };

    Loader loader(p, block.share, warp, lane);
    Math math(lane);
    Softmax softmax(p);
    RowFactors factors;
    if constexpr (kCluster > 1) {
        if (threadIdx.x == 0) init_barrier(parts.arrived, 1);
        fence_barrier_init();
        cluster_arrive();  // this block runs: others may write to its shared memory once they have waited
        wait_for_turn(p);
    } else {
        if (kQueryBuffers == 2 && threadIdx.x < 2) init_barrier(block.fetched[threadIdx.x], kThreads + 1);
        wait_for_turn(p);
        if (threadIdx.x < 2) (&block.share.begin)[threadIdx.x] = load_cut(p, blockIdx.x + threadIdx.x);
        __syncthreads();
    }

    // What follows are the steps of an item; `buffer` is that of its queries and its segment.
    const auto fetch = [&](const Segment& segment, int buffer) {
        if (threadIdx.x == 0) block.segments[buffer] = segment;
        load_queries<Swizzle<kQueryBytes>>(p, segment, shared_address(queries) + buffer * kBufferBytes);
        if constexpr (kQueryBuffers == 2) {
            arrive_with_copies(block.fetched[buffer]);
            if (threadIdx.x == 0) arrive(block.fetched[buffer]);
        }
    };
    // For the first item: its queries are asked for while the page table answers. They belong to the second of kStages + 1 groups.
    const auto fill_ring = [&](const Walker& walker, const Segment& segment) {
        loader.start(walker, segment);
        u32 to = ring - 2 * kSlotBytes;
#pragma unroll 1
        for (int h = -2; h < kStages - 1; h += 2) {
            loader.load_keys<true>(to, h >= 0);  // the first step is the look-up of the first tile
            if (h < 0) fetch(segment, 0);
            if (h >= 0) loader.load_values(to + kSlotBytes);
            else cp_async_commit();
            to += 2 * kSlotBytes;
        }
    };
    // Queries that have come are not yet as they are needed: their signs where softmax_scale is negative, all of them where
    // the cache is quantised.
    const auto prepare = [&](int buffer) {
        unsigned char* const at = queries + buffer * kBufferBytes;
#if KV_ELEMENT_BYTES == 1
        if constexpr (kQueryBuffers == 1) __syncthreads();
        prepare_queries<Element, Swizzle<kQueryBytes>, false>(p, block.segments[buffer], shared_address(at), row_factors);
        __syncthreads();
#else
        if (p.query_flip) {
            flip_queries<Swizzle<kQueryBytes>>(p.query_keep, p.query_flip, at);
            if constexpr (kQueryBuffers == 2) __syncthreads();
        }
#endif
    };
    const auto read = [&](int buffer, Reach reach) {
        math.begin_item(shared_address(queries) + buffer * kBufferBytes, lane);
        softmax.reset();
        factors.load(row_factors, lane);
        for (; reach.key < reach.end; reach.key += kWarps * kTileKeys) {
            Scores scores;
            cp_async_wait<kStages - 2>();
            __syncwarp();
            loader.load_keys(free_slot);
            math.scores(slot, scores);
            TileScales scales(p, slot, lane);
            advance();

            if constexpr (kIsQuantised) scale_scores(factors, scales, scores);
            if constexpr (kHasSoftcap) cap_scores(p, scores);
            const int first_key = reach.key;
            if (first_key < reach.full_begin || first_key > reach.full_end) {
                mask_scores(p, block.segments[buffer], first_key, lane, scores);
                if (may_see_nothing(p, block.segments[buffer])) {
                    cp_async_wait<kStages - 2>();  // this lane's values are there
                    loader.clear_values(slot, block.segments[buffer], first_key);
                    scales.clear_values(p, block.segments[buffer], first_key, lane);
                }
            }
            softmax.update(scores, scales, math, block.warps.row);

            cp_async_wait<kStages - 2>();
            __syncwarp();
            loader.load_values(free_slot);
            math.accumulate(slot, scores);
            advance();
        }
    };

    const auto finish = [&](int buffer) {
        launch_next();  // not earlier, or the next kernel's blocks fill the free space unevenly
        const Segment& segment = block.segments[buffer];
        finish_segment(p, block.share, segment, block.warps.is_last, [&](auto put) {
            merge_warps(p.score_scale, segment, math, softmax, block.warps, free_slot, put);
        });
        __syncthreads();  // all have read the queries, the segment and the free slots, which now change
    };

    Walker walker(block.share);
    if constexpr (kQueryBuffers == 2) {
        bool more = true;
        for (int item = 0; more; ++item) {  // fetches this item of the share, then reads the one before it
            Segment segment;
            more = walker.next(p, block.share, segment);
            if (more) {
                if (item == 0) fill_ring(walker, segment);
                else fetch(segment, item % 2);
            }
            if (item == 0) continue;
            const int buffer = (item - 1) % 2;
            wait_for_phase(block.fetched[buffer], (item - 1) / 2 % 2);
            prepare(buffer);
            read(buffer, Reach(p, block.segments[buffer], warp));
            finish(buffer);
        }
    } else {
        bool is_first = true;
        for (Segment segment; walker.next(p, block.share, segment);) {
            if (is_first) {
                is_first = false;
                fill_ring(walker, segment);
                cp_async_wait<kStages - 1>();  // all but the groups of the ring
            } else {
                fetch(segment, 0);
                cp_async_commit();
                cp_async_wait<0>();
            }
            prepare(0);
            const Reach reach(p, segment, warp);
            __syncthreads();
            read(0, reach);
            if constexpr (kCluster == 1) finish(0);
        }
    }
    if constexpr (kCluster > 1) {
        cluster_wait();
        merge_warps(p.score_scale, block.segments[0], math, softmax, block.warps, free_slot,
                    [&](int row, int vector, float4 o, RowState state) { put_part(parts, row, vector, o, state); });
        launch_next();
        if (cluster_rank() == 0) {
            if (threadIdx.x == 0) expect_parts(parts, block.segments[0]);
            merge_cluster(p, block.segments[0], parts);
        }
    }
    // In the end, so that small problems do not wait for it.
    if (p.total_q) clear_rows_of_none(p, p.lengths.cu_seqlens_q[0], p.lengths.cu_seqlens_q[p.batch_size]);
}
