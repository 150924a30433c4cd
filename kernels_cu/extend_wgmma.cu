// extend.cu for sm_90a: products of whole warpgroups, and a warpgroup that does nothing but copy.
//
// The first kWarps warps multiply, 64 rows a warpgroup; the last four fill the ring (rows_loader.cuh). Instead of block barriers
// there are two mbarriers for each of its slots: `full` when the copies have landed, `empty` when all warps have read them. The
// scores of a tile are multiplied ahead of the values of the one before it, and the softmax runs beside those.
//
// Of a quantised cache codes land in a ring of their own, kCodeStages half-stages ahead; those who copied them make numbers of them
// in the other ring (rows_codes.cuh).
#define USES_WGMMA 1
#include "params.cuh"
#include "ptx/barriers.cuh"
#include "ptx/copies.cuh"
#include "queries.cuh"
#include "rows_combine.cuh"
#include "rows_loader.cuh"
#include "rows_partners.cuh"
#include "rows_reach.cuh"
#include "rows_softmax.cuh"
#include "rows_tiles.cuh"
#include "rows_wgmma.cuh"
#include "segment.cuh"
#include "stream.cuh"
#if KV_ELEMENT_BYTES == 1
#include "query_pass.cuh"
#endif
using Math = WgmmaMath<TileElement>;
static_assert(kStages >= 4, "keys are waited for while the values of two tiles before them are read");

constexpr int kLoaderThreads = kLoaderWarps * 32;
constexpr int kBlockThreads = kThreads + kLoaderThreads;
// Registers of a thread of either kind; 0: all have what the launch gives them.
constexpr int kLoaderRegisters = LOADER_REGISTERS, kMathRegisters = MATH_REGISTERS;

// Named barriers, one for each warpgroup, behind that of all that multiply: what its warps have found out, and its turn.
constexpr int kVotes = 2, kTurns = 4;

// What the threads of a block have in common beside the tiles.
struct BlockState {
    u64 full[kStages], empty[kStages];  // mbarriers of the slots
    Share share;
    Segment segment;
    MergeState merge;
    int rows_begin, rows_end;  // of ragged queries: the rows that belong to sequences
};
constexpr int kFactorBytes = kConvertsTiles ? kRows * 4 : 0;  // of the rows' factors, behind the block's state
static_assert(sizeof(BlockState) + kFactorBytes <= BLOCK_STATE_BYTES, "the host sets this much shared memory aside");
static_assert(!kConvertsTiles || kCodeStages >= 2, "codes come while others become numbers");

// A place in the ring that moves on by half-stages, and the parity of its barriers' phases.
struct Place {
    int slot;
    u32 parity = 0;

    __device__ __forceinline__ void advance(int half_stages) {
        slot += half_stages;
        if (slot >= kStages) slot -= kStages, parity ^= 1;
    }
};

// Fills the ring with all tiles of the share.
__device__ __forceinline__ void load_share(const DecodeParams& p, BlockState& block, u32 ring) {
    const int warp = threadIdx.x / 32 - kWarps, lane = threadIdx.x % 32;
    Loader loader(p, block.share, warp, lane);
    loader.start();
    Place place = {0};
    const auto load = [&](auto copy) {
        wait_for_phase(block.empty[place.slot], place.parity ^ 1);  // of a slot never filled it is over
        copy(ring + place.slot * kSlotBytes);
        arrive_with_copies(block.full[place.slot]);
        place.advance(1);
    };
    while (loader.has_tile()) {
        load([&](u32 slot) { loader.load_keys(slot); });
        load([&](u32 slot) { loader.load_values(slot); });
    }
    cp_async_commit();
    cp_async_wait<0>();
}

// The same of a quantised cache: a half-stage is converted as soon as its codes are there and its slot is free.
__device__ __forceinline__ void load_share_of_codes(const DecodeParams& p, BlockState& block, u32 ring, u32 code_ring) {
    const int warp = threadIdx.x / 32 - kWarps, lane = threadIdx.x % 32;
    Loader loader(p, block.share, warp, lane);
    loader.start();
    u32 tiles = 0;  // that have been asked for and are not yet converted
    const auto load = [&](bool keys, u32 to) {
        if (keys) {
            tiles += loader.has_tile();
            loader.load_keys(to);
        } else {
            loader.load_values(to);
        }
        cp_async_commit();
    };
#pragma unroll 1
    for (u32 h = 0; h < kCodeStages; ++h) load(h % 2 == 0, code_ring + h * kCodeSlotBytes);
    Place place = {0};
    u32 code_slot = code_ring;
    const auto convert = [&](bool keys) {
        const u32 slot = ring + place.slot * kSlotBytes;
        cp_async_wait<kCodeStages - 1>();
        wait_for_phase(block.empty[place.slot], place.parity ^ 1);
        if (keys) {
            loader.convert_keys(code_slot, slot, code_ring + kCodeRingBytes + place.slot * ScaleTile::kBytes);
        } else {
            loader.convert_values(code_slot, slot);
        }
        fence_for_wgmma();
        arrive(block.full[place.slot]);
        place.advance(1);
        load(keys == (kCodeStages % 2 == 0), code_slot);
        code_slot += kCodeSlotBytes;
        if (code_slot == code_ring + kCodeRingBytes) code_slot = code_ring;
    };
#pragma unroll 1
    for (; tiles > 0; --tiles) {
        convert(true);
        convert(false);
    }
    cp_async_wait<0>();
}

// Makes zeros of the values of a tile that weights of 0 do not hide, see loader.cuh.
__device__ __forceinline__ void clear_values(const DecodeParams& p, const Segment& segment, u32 first_key, u32 slot) {
#pragma unroll 1
    for (int row = threadIdx.x; row < kTileKeys; row += kThreads) {
        if (!sees_nothing(p, segment, first_key + row)) continue;
#pragma unroll 1
        for (int chunk = 0; chunk < 2 * kColumnPairs; ++chunk) {
            store_shared(slot + ValueRows::offset(row, chunk), make_float4(0.0f, 0.0f, 0.0f, 0.0f));
        }
    }
}

extern "C" __global__ void __launch_bounds__(kBlockThreads, BLOCKS_PER_SM)
    extend_wgmma(const __grid_constant__ DecodeParams p) {
    extern __shared__ __align__(1024) unsigned char shared[];
    unsigned char* const queries = shared + kRingBytes;  // (kRows, kPaddedHeadDim)
    unsigned char* const codes = queries + kRows * kQueryBytes;
    unsigned char* const state = codes + kCodeRingBytes + kScalesBytes;
    BlockState& block = *reinterpret_cast<BlockState*>(state);
    float* const factors = reinterpret_cast<float*>(state + BLOCK_STATE_BYTES - kFactorBytes);
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const u32 ring = shared_address(shared), code_ring = shared_address(codes), scales = code_ring + kCodeRingBytes;
    if (threadIdx.x < kStages) {
        init_barrier(block.full[threadIdx.x], kLoaderThreads);
        init_barrier(block.empty[threadIdx.x], kWarps);
    }
    wait_for_turn();
    if (threadIdx.x < 2) (&block.share.begin)[threadIdx.x] = load_cut(p, blockIdx.x + threadIdx.x);
    const int rows_edge = threadIdx.x - 30;  // two threads beside those that load the share
    if (p.total_q && (rows_edge == 0 || rows_edge == 1)) {
        (&block.rows_begin)[rows_edge] = p.lengths.cu_seqlens_q[rows_edge * p.batch_size];
    }
    __syncthreads();
    if (warp >= kWarps) {
        if constexpr (kLoaderRegisters > 0) keep_registers<kLoaderRegisters>();
        if constexpr (kConvertsTiles) {
            load_share_of_codes(p, block, ring, code_ring + zero_of_each_lane());
        } else {
            load_share(p, block, ring + zero_of_each_lane());
        }
        return;
    }
    if constexpr (kMathRegisters > 0) take_registers<kMathRegisters>();
    if (p.total_q) clear_rows_of_none(p, block.rows_begin, block.rows_end);

    Math math;
    Softmax softmax(p);
    Scaling scaling(factors + warp * kWarpRows, lane);
    Partners partners(*reinterpret_cast<Meeting*>(shared), warp, lane);  // every warp has all columns: they never meet
    Place keys = {0}, values = {1};
    const auto full = [&](const Place& place) {
        wait_for_phase(block.full[place.slot], place.parity);
        return ring + place.slot * kSlotBytes;
    };
    const auto leave = [&](Place& place) {
        __syncwarp();
        if (lane == 0) arrive(block.empty[place.slot]);
        place.advance(2);
    };
    const auto any_of_warpgroup = [&](bool value) { return named_barrier_any(kVotes + warp / 4, 128, value); };
    if (kWarps > 4 && warp >= 4) named_barrier_arrive(kTurns, kThreads);  // the first warpgroup begins
    Walker walker(block.share);
    [[maybe_unused]] RowStates folded;  // with split_size: of the item's splits so far
    for (Segment segment; walker.next(p, block.share, segment);) {
        if (threadIdx.x == 0) {
            block.segment = segment;
            start_part(p, block.share, segment);
        }
        load_queries<QueryRows>(p, segment, shared_address(queries));
        cp_async_commit();
        cp_async_wait<0>();
#if KV_ELEMENT_BYTES == 1
        worker_barrier();
        prepare_queries<Element, QueryRows, true>(p, segment, shared_address(queries), factors);
#else
        if (p.query_flip) flip_queries<QueryRows>(p.query_keep, p.query_flip, queries);
#endif
        fence_for_wgmma();
        worker_barrier();

        math.begin_item(shared_address(queries) + warp / 4 * 64 * kQueryBytes);
        softmax.reset();
        const Reach reach(p, segment, warp * kWarpRows, kWarpRows);
        Reach reach_of_all(p, segment, 0, kRows);
        if (!may_see_nothing(p, segment)) reach_of_all.full_begin = 0, reach_of_all.full_end = segment.keys.end;
        const int first_row = segment.first_row + warp * kWarpRows;
        Scores scores;
        Weights weights;
        // What follows the products of a tile that begins at `key`, and may run beside those of the values before it. The tile's
        // keys are left when nobody needs them or their scales any more.
        bool needs_mask;
        const auto score = [&](u32 key) {
            scaling.scale_scores(scores);
            if constexpr (kHasSoftcap) cap_scores(p, scores);
            needs_mask = reach.needs_mask(key);
            if (needs_mask) mask_scores(p, block.segment, first_row, key, lane, scores);
        };
        const auto weigh_after_maxima = [&](u32 key) {
            scaling.begin_tile(scales + keys.slot * ScaleTile::kBytes, 0, lane);
            score(key);
            softmax.update(scores, math, partners, scaling);
            scaling.scale_weights(scores, needs_mask);
            leave(keys);
        };
        // Nearly always maxima stay where they are, and only the weights' sums are looked at, not all scores.
        const auto weigh = [&](u32 key, u32 slot) {
            if constexpr (kScalesWeights) {  // of a weight times its scale, which the sums say nothing about
                weigh_after_maxima(key);
            } else {
                scaling.begin_tile(scales + keys.slot * ScaleTile::kBytes, 0, lane);
                score(key);
                float sums[kRowTiles][2];
                if (any_of_warpgroup(softmax.weigh_first(scores, sums))) {
                    math.wait_for_values();
                    math.start_scores(slot, scores);
                    math.wait_for_scores(scores, false);
                    score(key);
                    softmax.weigh_again(scores, sums, math, scaling);
                } else {
                    softmax.accept(sums);
                }
                leave(keys);
            }
        };
        // The slot of the values of a tile that begins at `key`, ready to be read.
        const auto values_of = [&](const Place& place, u32 key) {
            const u32 slot = full(place);
            if (reach_of_all.needs_mask(key)) {  // the same for all warps
                clear_values(p, block.segment, key, slot);
                fence_for_wgmma();
                worker_barrier();
            }
            return slot;
        };
        // One warpgroup starts its products while the other makes weights, and so they go on.
        const bool takes_turns = kWarps > 4 && segment.valid_rows > 64;
        // Key numbers are unsigned: behind the last tile they may pass 2^31.
        const u32 begin = segment.keys.begin, end = segment.keys.end;
        if (warp / 4 * 64 >= segment.valid_rows) {  // this warpgroup has no rows: it lets the tiles pass
            for (u32 key = begin; key < end; key += kTileKeys) {
                full(keys), leave(keys);
                values_of(values, key), leave(values);
            }
        } else if (begin < end) {
            const u32 first_slot = full(keys);
            fence_for_wgmma();
            math.start_scores(first_slot, scores);
            math.wait_for_scores(scores, false);
            weigh_after_maxima(begin);
            pack_weights(scores, weights);
            u32 key = begin, values_slot = values_of(values, key), keys_slot = 0;
            const auto has_next = [&] { return key + kTileKeys < end; };
            if (has_next()) keys_slot = full(keys);
            fence_for_wgmma();
            while (has_next()) {
                key += kTileKeys;
                if (takes_turns) named_barrier(kTurns + warp / 4, kThreads);
                math.start_scores(keys_slot, scores);
                math.start_values(values_slot, weights);
                if (takes_turns) named_barrier_arrive(kTurns + (warp / 4 ^ 1), kThreads);
                math.wait_for_scores(scores, true);
                weigh(key, keys_slot);
                pin(scores[0]);
                // The next tile is waited for while the values are multiplied. These loops are also what keeps the weights there:
                // ptxas would make them behind the wait for the values, where nothing runs beside them.
                Place next = values;
                next.advance(2);
                values_slot = values_of(next, key);
                if (has_next()) keys_slot = full(keys);
                fence_for_wgmma();
                math.wait_for_values();
                leave(values);
                pack_weights(scores, weights);
            }
            math.start_values(values_slot, weights);
            math.wait_for_values();
            leave(values);
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
        worker_barrier();  // all have read the queries and the segment, which now change
    }
    if (kWarps > 4 && warp < 4) named_barrier(kTurns, kThreads);
}
