// Attention of many query rows per KV head: several queries, prefill, large groups. One launch for a layer, on a plan made
// once for the step.
//
// Packed query rows are the rows of the MMA, keys its columns. A block reads its share of all keys (plan.cu), segment after
// segment; a segment is what it reads of one item. The keys of a segment are tiles of kTileKeys, which all warps copy
// (rows_loader.cuh) and read together: they divide the rows of the item, and the value columns where registers do not hold all
// of them (rows_partners.cuh). Each warp scores its rows (rows_mma.cuh) and keeps their maxima and sums (rows_softmax.cuh). An
// item that lies in several blocks is merged by those of them that arrive last (rows_combine.cuh).
//
// The ring has kStages slots. Half-stage h is the keys (h even) or the values (h odd) of tile h / 2. While half-stage h is read,
// half-stage h + kStages - 1 is copied to the slot of half-stage h - 1, which all warps have read: a block barrier says so.
//
// Of a quantised cache codes land in a ring of their own, kCodeStages half-stages ahead, and become numbers in this one, whose two
// slots take turns: while one is filled, stragglers still read the other (rows_codes.cuh).
#define USES_WGMMA 0
#include "params.cuh"
#include "ptx/copies.cuh"
#include "rows_combine.cuh"
#include "rows_loader.cuh"
#include "rows_mma.cuh"
#include "rows_partners.cuh"
#include "rows_queries.cuh"
#include "rows_reach.cuh"
#include "rows_softmax.cuh"
#include "rows_tiles.cuh"
#include "segment.cuh"
#include "stream.cuh"
#if KV_ELEMENT_BYTES == 1
#include "query_pass.cuh"
#endif
using Math = RowsMath<TileElement>;
static_assert(kStages >= 2, "a half-stage comes while one is read");
static_assert(!kConvertsTiles || (kStages == 2 && kCodeStages >= 2), "keys and values have a slot each");
constexpr int kStagesAhead = kConvertsTiles ? kCodeStages : kStages - 1;  // half-stages that are asked for before one is read

// What the threads of a block have in common beside the tiles. Registers are for the main loop.
struct BlockState {
    Share share;
    Segment segment;
    MergeState merge;
    int rows_begin, rows_end;  // of ragged queries: the rows that belong to sequences
};
// Where warps that divide the columns meet.
constexpr int kMeetingBytes = kColumnWarps > 1 ? (sizeof(Meeting) + 15) / 16 * 16 : 0;
constexpr int kFactorBytes = kConvertsTiles ? kRows * 4 : 0;  // of the rows' factors, behind the block's state
static_assert(sizeof(BlockState) + kMeetingBytes + kFactorBytes <= BLOCK_STATE_BYTES,
              "the host sets this much shared memory aside");

extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS_PER_SM) extend(const __grid_constant__ DecodeParams p) {
    extern __shared__ __align__(128) unsigned char shared[];
    unsigned char* const queries = shared + kRingBytes;  // (kRows, kPaddedHeadDim)
    unsigned char* const state = queries + kRows * kQueryBytes + kCodeRingBytes + kScalesBytes;
    Meeting& meeting = *reinterpret_cast<Meeting*>(state);
    BlockState& block = *reinterpret_cast<BlockState*>(state + kMeetingBytes);
    float* const factors = reinterpret_cast<float*>(state + BLOCK_STATE_BYTES - kFactorBytes);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row_warp = warp / kColumnWarps, column_warp = warp % kColumnWarps;
    wait_for_turn(p);
    if (threadIdx.x < 2) (&block.share.begin)[threadIdx.x] = load_cut(p, blockIdx.x + threadIdx.x);
    const int rows_edge = threadIdx.x + 2 - kThreads;  // the last two threads, beside those that load the share
    if (p.total_q && rows_edge >= 0) (&block.rows_begin)[rows_edge] = p.lengths.cu_seqlens_q[rows_edge * p.batch_size];
    __syncthreads();
    // Shared addresses: `slot` of the half-stage that is read, `free_slot` of the one before it. They are equal in all lanes, yet
    // must lie in registers of each lane: from uniform registers, with a cache policy, ptxas 13.0 and 13.5 emit illegal copies.
    const u32 ring = shared_address(shared) + zero_of_each_lane();
    u32 slot = ring, free_slot = ring + kRingBytes - kSlotBytes;
    const auto advance = [&](bool keys) {
        if constexpr (kConvertsTiles) {
            slot = keys ? ring + kSlotBytes : ring;
        } else {
            free_slot = slot;
            slot += kSlotBytes;
            if (slot == ring + kRingBytes) slot = ring;
        }
    };

    Loader loader(p, block.share, warp, lane);
    Math math(column_warp, lane);
    Softmax softmax(p);
    Scaling scaling(factors + row_warp * kWarpRows, lane);
    Partners partners(meeting, warp, lane);
    // Of codes: what is converted next, and filled again.
    const u32 code_ring = ring + kRingBytes + kRows * kQueryBytes, scales = code_ring + kCodeRingBytes;
    u32 code_slot = code_ring;
    const auto load = [&](bool keys, u32 to) {
        if (keys) {
            loader.load_keys(to);
            loader.look_ahead();
        } else {
            loader.load_values(to);
        }
        cp_async_commit();
    };
    // Waits for this thread's part of the half-stage in `slot`.
    const auto receive = [&](bool keys) {
        if constexpr (kConvertsTiles) {
            cp_async_wait<kCodeStages - 1>();
            if (keys) {
                loader.convert_keys(code_slot, slot, scales);
            } else {
                loader.convert_values(code_slot, slot);
            }
            const bool next = keys == (kCodeStages % 2 == 0);
            if (next) loader.begin_tile();
            load(next, code_slot);
            code_slot += kCodeSlotBytes;
            if (code_slot == scales) code_slot -= kCodeRingBytes;
        } else {
            cp_async_wait<kStages - 2>();
        }
    };
    // Waits for all of it, and for all warps to have read the one in `free_slot`, which is filled again.
    const auto begin_half_stage = [&](bool keys) {
        const bool next = keys == (kStages % 2 == 1);
        if (!kConvertsTiles && next) loader.begin_tile();
        __syncthreads();
        if constexpr (!kConvertsTiles) load(next, free_slot);
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
        load_query_rows(p, segment, shared_address(queries));
        cp_async_commit();
        if (is_first) {  // after the queries, since tiles wait for the page table
            is_first = false;
            loader.start(walker, segment);
#pragma unroll 1
            for (u32 h = 0; h < kStagesAhead; ++h) {
                if (h % 2 == 0) loader.begin_tile();
                load(h % 2 == 0, kConvertsTiles ? code_slot + h * kCodeSlotBytes : ring + h * kSlotBytes);
            }
            cp_async_wait<kStagesAhead>();  // all but the groups of the ring
        } else {
            cp_async_wait<0>();
        }
#if KV_ELEMENT_BYTES == 1
        __syncthreads();
        prepare_queries<Element, QueryRows, true>(p, segment, shared_address(queries), factors);
#else
        flip_query_rows(p, queries);
#endif
        const Reach reach(p, segment, row_warp * kWarpRows, kWarpRows);
        __syncthreads();

        math.begin_item(shared_address(queries) + row_warp * kWarpRows * kQueryBytes, lane);
        softmax.reset();
        scaling.begin_item();
        // Key numbers are unsigned: behind the last tile they may pass 2^31.
        for (u32 key = segment.keys.begin; key < segment.keys.end; key += kTileKeys) {
            const int begin = key;
            const bool is_seen = begin < reach.end && key + kTileKeys > static_cast<u32>(reach.begin);
            Weights weights;
            receive(true);
            begin_half_stage(true);
            if (is_seen) {
                Scores scores;
                math.scores(slot, scores);
                scaling.begin_tile(scales, column_warp * kWarpKeys, lane);
                scaling.scale_scores(scores);
                if constexpr (kHasSoftcap) cap_scores(p, scores);
                const bool needs_mask = reach.needs_mask(begin);
                if (needs_mask) {
                    const int first_row = block.segment.first_row + row_warp * kWarpRows;
                    mask_scores(p, block.segment, first_row, key + column_warp * kWarpKeys, lane, scores);
                }
                softmax.update(scores, math, partners, scaling);
                scaling.scale_weights(scores, needs_mask);
                pack_weights(scores, weights);
                partners.tell(weights);
            }
            advance(true);

            receive(false);
            begin_half_stage(false);
            if (is_seen) math.accumulate(slot, partners, weights);
            advance(false);
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
