// extend.cu for sm_90a: products of whole warpgroups, and a warpgroup that does nothing but copy.
//
// The first kWarps warps multiply, 64 rows a warpgroup; the last four fill the ring (rows_ring.cuh). Instead of block barriers
// there are two mbarriers for each of its slots. The scores of a tile are multiplied ahead of the values of the one before it, and
// the softmax runs beside those; two warpgroups take turns, so that one multiplies while the other makes weights.
#define USES_WGMMA 1
#include "params.cuh"
#include "rows_combine.cuh"
#include "rows_queries.cuh"
#include "rows_reach.cuh"
#include "rows_ring.cuh"
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

constexpr int kBlockThreads = kThreads + kLoaderThreads;
// Registers of a thread of either kind; 0: all have what the launch gives them.
constexpr int kLoaderRegisters = LOADER_REGISTERS, kMathRegisters = MATH_REGISTERS;

// Named barriers behind that of all that multiply: one for each warpgroup, of what its warps have found out; one for each, of its
// turn to multiply; and one for what is given.
constexpr int kVotes = 2, kTurns = 4, kGiven = 6;
constexpr bool kTakesTurns = kRows > 64;

// A tree mask is looked at before a tile is scored, while the registers of its scores are free; other masks behind that, or all
// tiles would take 3 % longer.
constexpr bool kLooksFirst = kHasTree;

// What softmax asks of partners: all warps of a warpgroup move maxima if one of them has to, since they wait for the products that
// are under way together.
class Warpgroup {
public:
    __device__ __forceinline__ explicit Warpgroup(int number) : number_(number) {}

    __device__ __forceinline__ bool any(bool exceeds) const { return named_barrier_any(kVotes + number_, 128, exceeds); }
    __device__ __forceinline__ bool any(bool exceeds, const float (&)[kRowTiles][2]) const { return any(exceeds); }
    __device__ __forceinline__ float maximum(int, int, float top) const { return lanes_maximum<4>(top); }
    __device__ __forceinline__ float total(int, int, float sum) const { return sum; }

private:
    int number_;
};

// What a warpgroup has found of some tiles, for the other one that has the same rows: 64 rows lie as the threads that hold them do.
class Gift {
public:
    __device__ __forceinline__ explicit Gift(unsigned char* place)
        : outputs_(reinterpret_cast<float4*>(place) + threadIdx.x % 128), states_(outputs_ + kColumnTiles * 128) {}

    __device__ __forceinline__ void give(const Outputs& output, const RowStates& states) {
        for_each<kColumnTiles>([&](int n) {
            outputs_[n * 128] = make_float4(output[0][n][0], output[0][n][1], output[0][n][2], output[0][n][3]);
        });
        *states_ = make_float4(states[0][0].maximum, states[0][0].sum, states[0][1].maximum, states[0][1].sum);
    }

    // Adds it to what this thread has found of the other tiles.
    __device__ __forceinline__ void take(float scale, Outputs& output, RowStates& states) const {
        const float4 given = *states_;
        const Fold folds[2] = {Fold::of(states[0][0], {given.x, given.y}, scale), Fold::of(states[0][1], {given.z, given.w}, scale)};
        for_each<kColumnTiles>([&](int n) {
            const float4 o = outputs_[n * 128];
            output[0][n][0] = folds[0](output[0][n][0], o.x), output[0][n][1] = folds[0](output[0][n][1], o.y);
            output[0][n][2] = folds[1](output[0][n][2], o.z), output[0][n][3] = folds[1](output[0][n][3], o.w);
        });
    }

private:
    float4 *outputs_, *states_;
};
constexpr int kGiftBytes = 128 * 16 * (kColumnTiles + 1);
// The queries have been read when it is given: it takes their place.
constexpr int kQueriesBytes = kKeyGroups > 1 && kGiftBytes > kRows * kQueryBytes ? kGiftBytes : kRows * kQueryBytes;

// What the threads of a block have in common beside the tiles.
struct BlockState {
    RingState ring;
    Share share;
    Segment segment;
    MergeState merge;
    int rows_begin, rows_end;  // of ragged queries: the rows that belong to sequences
};
constexpr int kFactorBytes = kConvertsTiles ? kRows * 4 : 0;  // of the rows' factors, behind the block's state
static_assert(sizeof(BlockState) + kFactorBytes <= BLOCK_STATE_BYTES, "the host sets this much shared memory aside");

extern "C" __global__ void __launch_bounds__(kBlockThreads, BLOCKS_PER_SM)
    extend_wgmma(const __grid_constant__ TiledParams params) {
    const DecodeParams& p = params.attention;
    extern __shared__ __align__(1024) unsigned char shared[];
    unsigned char* const queries = shared + kRingBytes;  // (kRows, kPaddedHeadDim)
    unsigned char* const codes = queries + kQueriesBytes;
    unsigned char* const state = codes + kCodeRingBytes + kScalesBytes;
    BlockState& block = *reinterpret_cast<BlockState*>(state);
    float* const factors = reinterpret_cast<float*>(state + BLOCK_STATE_BYTES - kFactorBytes);
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const u32 ring = shared_address(shared), code_ring = shared_address(codes), scales = code_ring + kCodeRingBytes;
    block.ring.init();
    if (Boxes::kExist && threadIdx.x == kThreads) prefetch_maps(params);
    wait_for_turn(p);
    if (threadIdx.x < 2) (&block.share.begin)[threadIdx.x] = load_cut(p, blockIdx.x + threadIdx.x);
    const int rows_edge = threadIdx.x - 30;  // two threads beside those that load the share
    if (p.total_q && (rows_edge == 0 || rows_edge == 1)) {
        (&block.rows_begin)[rows_edge] = p.lengths.cu_seqlens_q[rows_edge * p.batch_size];
    }
    __syncthreads();
    if (warp >= kWarps) {
        if constexpr (kLoaderRegisters > 0) keep_registers<kLoaderRegisters>();
        if constexpr (kConvertsTiles) {
            load_share_of_codes(params, block.ring, block.share, ring, code_ring + zero_of_each_lane());
        } else {
            load_share(params, block.ring, block.share, ring + zero_of_each_lane());
        }
        return;
    }
    if constexpr (kMathRegisters > 0) take_registers<kMathRegisters>();
    if (p.total_q) clear_rows_of_none(p, block.rows_begin, block.rows_end);

    Math math;
    Softmax softmax(p);
    const int group = __shfl_sync(kFullWarp, threadIdx.x / 128, 0);  // else descriptors pass through a lane's registers
    const int row_group = kKeyGroups > 1 ? 0 : group, key_group = kKeyGroups > 1 ? group : 0;
    const int warp_row = kKeyGroups > 1 ? warp % kRowWarps * kWarpRows : warp * kWarpRows;
    Scaling scaling(factors + warp_row, lane);
    const Warpgroup warpgroup(group);
    Place keys = {2 * key_group}, values = {2 * key_group + 1};
    [[maybe_unused]] u32 next_tile = key_group;  // of the segment, that is this warpgroup's
    const auto full = [&](const Place& place) {
        sleep_until_phase(block.ring.full[place.slot], place.parity);
        return ring + place.slot * kSlotBytes;
    };
    const auto leave = [&](Place& place) {
        __syncwarp();
        if (lane == 0) arrive(block.ring.empty[place.slot]);
        place.advance(2 * kKeyGroups);
    };
    if (kTakesTurns && warp >= 4) named_barrier_arrive(kTurns, kThreads);  // the first warpgroup begins
    Walker walker(block.share);
    [[maybe_unused]] RowStates folded;  // with split_size: of the item's splits so far
    for (Segment segment; walker.next(p, block.share, segment);) {
        if (threadIdx.x == 0) {
            block.segment = segment;
            start_part(p, block.share, segment);
        }
        load_query_rows(p, segment, shared_address(queries));
        cp_async_commit();
        cp_async_wait<0>();
#if KV_ELEMENT_BYTES == 1
        worker_barrier();
        prepare_queries<Element, QueryRows, true>(p, segment, shared_address(queries), factors);
#else
        flip_query_rows(p, queries);
#endif
        fence_for_wgmma();
        worker_barrier();

        math.begin_item(shared_address(queries) + row_group * 64 * kQueryBytes);
        softmax.reset();
        scaling.begin_item();
        const Reach reach(p, segment, warp_row, kWarpRows);
        const int first_row = segment.first_row + warp_row;
        Scores scores;
        Weights weights;
        // What follows the products of a tile that begins at `key`, and may run beside those of the values before it.
        bool needs_mask;
        [[maybe_unused]] u32 hidden[2];
        const auto score = [&](u32 key) {
            scaling.scale_scores(scores);
            if constexpr (kHasSoftcap) cap_scores(p, scores);
            if constexpr (kLooksFirst) {
                if (needs_mask) for_each<2>([&](int half) { hide_keys(0, half, hidden[half], scores); });
            } else {
                needs_mask = reach.needs_mask(key);
                if (needs_mask) mask_scores(p, block.segment, first_row, key, lane, scores);
            }
        };
        // What comes before them.
        const auto begin_tile = [&](u32 key) {
            if constexpr (kLooksFirst) {
                needs_mask = reach.needs_mask(key);
                if (!needs_mask) return;
                for_hidden_keys(p, block.segment, first_row, key, lane, [&](int, int half, u32 keys) { hidden[half] = keys; });
            }
        };
        // Nearly always maxima stay where they are: then only the sums of the weights are looked at, not all scores. A warpgroup
        // multiplies together, so all of its warps score the tile again if one of them has to. Not in an item's first tile, nor
        // where values have scales: what has to fit float16 is a weight times its scale.
        const auto weigh = [&](u32 key, u32 slot, bool is_first) {
            scaling.begin_tile(scales + keys.slot * ScaleTile::kBytes, 0, lane);
            score(key);
            if (kScalesWeights || is_first) {
                softmax.update(scores, math, warpgroup, scaling);
                scaling.scale_weights(scores, needs_mask);
            } else {
                float sums[kRowTiles][2];
                if (warpgroup.any(softmax.weigh_first(scores, sums))) {
                    math.wait_for_values();
                    math.start_scores(slot, scores);
                    math.wait_for_scores(scores, false);
                    score(key);
                    softmax.weigh_again(scores, sums, math, scaling);
                } else {
                    softmax.accept(sums);
                }
            }
            leave(keys);
        };
        // One warpgroup starts its products while the other makes weights, and so they go on.
        const bool takes_turns = kTakesTurns && segment.valid_rows > 64;
        // Key numbers are unsigned: behind the last tile they may pass 2^31.
        constexpr u32 kStep = kKeyGroups * kTileKeys;
        const u32 end = segment.keys.end;
        u32 begin = segment.keys.begin;
        if constexpr (kKeyGroups > 1) {
            const u32 tiles = (end - begin + kTileKeys - 1) / kTileKeys;
            begin += next_tile * kTileKeys;
            next_tile ^= tiles % 2;  // the first one of the next segment, or the second
        }
        if (row_group * 64 >= segment.valid_rows) {  // this warpgroup has no rows: it lets the tiles pass
            for (u32 key = begin; key < end; key += kStep) {
                full(keys), leave(keys);
                full(values), leave(values);
            }
        } else if (begin < end) {
            const u32 first_slot = full(keys);
            begin_tile(begin);
            fence_for_wgmma();
            math.start_scores(first_slot, scores);
            math.wait_for_scores(scores, false);
            weigh(begin, first_slot, true);
            pack_weights(scores, weights);
            u32 key = begin, values_slot = full(values), keys_slot = 0;
            const auto has_next = [&] { return key + kStep < end; };
            if (has_next()) keys_slot = full(keys);
            fence_for_wgmma();
            while (has_next()) {
                key += kStep;
                begin_tile(key);
                if (takes_turns) named_barrier(kTurns + warp / 4, kThreads);
                math.start_scores(keys_slot, scores);
                math.start_values(values_slot, weights);
                if (takes_turns) named_barrier_arrive(kTurns + (warp / 4 ^ 1), kThreads);
                math.wait_for_scores(scores, true);
                weigh(key, keys_slot, false);
                pin(scores[0]);
                // The next tile is waited for while the values are multiplied. These loops are also what keeps the weights there:
                // ptxas would make them behind the wait for the values, where nothing runs beside them.
                Place next = values;
                next.advance(2 * kKeyGroups);
                values_slot = full(next);
                if (has_next()) keys_slot = full(keys);
                math.wait_for_values();
                leave(values);
                pack_weights(scores, weights);
                fence_for_wgmma();  // not earlier: 3 % slower, for what it waits
            }
            math.start_values(values_slot, weights);
            math.wait_for_values();
            leave(values);
        }

        launch_next();  // not earlier, or the next kernel's blocks fill the free space unevenly
        RowStates states;
        softmax.finish(math, warpgroup, states);
        if constexpr (kKeyGroups > 1) {
            Gift gift(queries);
            worker_barrier();  // all have read the queries
            if (key_group > 0) {
                gift.give(math.output(), states);
                named_barrier_arrive(kGiven, kThreads);
            } else {
                named_barrier(kGiven, kThreads);
                gift.take(p.score_scale, math.output(), states);
            }
        }
        RowResults results(p, block.segment, math.output(), states, warp, lane);  // none of the rows, where they were given
        if constexpr (kHasSplitSize) {
            hand_on_split(p, block.share, block.segment, results, folded, block.merge);
        } else {
            hand_on(p, block.share, block.segment, results, block.merge);
        }
        worker_barrier();  // all have read the queries and the segment, which now change
    }
    if (kTakesTurns && warp < 4) named_barrier(kTurns, kThreads);  // the turn that nobody has taken
}
