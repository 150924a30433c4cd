// mla_wgmma.cu's ring: two slots of a tile each, in parts, of which those that multiply and those that load know by mbarriers.
//
// Beside it there is no room for codes: those of a quantised cache become numbers on their way there (latent_landing.cuh).
#pragma once
#include "ptx/barriers.cuh"
#include "ptx/copies.cuh"
#include "ptx/wgmma.cuh"
#include "rows_loader.cuh"

constexpr int kGroupColumns = kPaddedHeadDimV / 2;

// Parts of a tile: the value columns of each warpgroup, and the rest of the keys, which has been read when these are.
constexpr int kGroups = 2, kRestPart = kGroups, kParts = kGroups + 1;

// mbarriers of the slots' parts.
struct RingState {
    u64 full[kStages][kParts], empty[kStages][kGroups];

    // Sets them up; all threads call it.
    __device__ __forceinline__ void init() {
        if (threadIdx.x >= kStages * kParts) return;
        init_barrier((&full[0][0])[threadIdx.x], kLoaderWarps * 32);
        // One warpgroup frees a part, of each block that it is copied for.
        constexpr int kFreeing = kSharesTiles ? 2 * kRowWarps : kRowWarps;
        if (threadIdx.x < kStages * kGroups) init_barrier((&empty[0][0])[threadIdx.x], kFreeing);
        fence_barrier_init();
    }
};

// A slot of the ring, one after another, and the parity of its barriers' phases.
struct Place {
    int slot = 0;
    u32 parity = 0;

    __device__ __forceinline__ void advance() {
        if (++slot == kStages) slot = 0, parity ^= 1;
    }
};

// Whether the warps that copy wait for what they copy row by row, and fence it for wgmma: with boxes that is little, and numbers
// made of codes are theirs. Else those that score fence what they have waited for.
__device__ __forceinline__ bool loader_fences(const TiledParams& p) { return kConvertsTiles || p.box_rows; }

// Blocks that share their tiles stay until the other one has arrived at their barriers for the last time. `place` is behind the
// share's last tile.
__device__ __forceinline__ void wait_for_other_block(RingState& state, Place place) {
    if constexpr (!kSharesTiles) return;
    for (int i = 0; i < kStages; ++i, place.advance()) {
        for (u64& empty : state.empty[place.slot]) sleep_until_phase(empty, place.parity ^ 1);
    }
}

#if KV_ELEMENT_BYTES == 1
// Tells those that multiply of numbers that a warp has made of its keys; where two blocks share them, those of both: they are copied
// to the other block as they lie, the warp's rows of a line by one instruction, and count at the barrier of their part there.
class Messenger {
public:
    // For a warp whose keys are those from `part_key` on; `address` is any of this block's shared memory.
    __device__ __forceinline__ Messenger(int part_key, u32 address) : part_key_(part_key) {
        if constexpr (kSharesNumbers) to_other_ = shared_of_block(address, row_part() ^ 1) - address;
    }

    // Arrives at the barrier of a part: of kLines lines from the one that begins at `lines` on, and of the scales at `scales`, a
    // ScaleTile, if the part has them. All lanes have stored them, and fenced them for wgmma.
    template <int kLines, bool kScales = false>
    __device__ __forceinline__ void tell(u64& full, u32 lines, u32 scales = 0) const {
        if constexpr (!kSharesNumbers) {
            arrive(full);
            return;
        }
        constexpr int kKinds = kScales && kHasKeyScales ? ScaleTile::kBytes / ScaleTile::kValues : 0;
        constexpr u32 kLineBytes = kPartKeys * 128, kKindBytes = kPartKeys * 4;
        __syncwarp();
        if (elect_lane()) {  // ptxas knows that it is one: else copies are a loop over lanes, 282 us instead of 262
            const auto copy = [&](u32 from, u32 bytes) {
                copy_to_block(from + to_other_, from, bytes, shared_address(&full) + to_other_);
            };
            for_each<kLines>([&](int i) {
                copy(lines + part_key_ * KeyRows::kRowStride + i * KeyRows::kLaneStride, kLineBytes);
            });
            for_each<kKinds>([&](int i) { copy(scales + part_key_ * 4 + i * ScaleTile::kValues, kKindBytes); });
            // The other block's warp of this number brings as much.
            arrive_for_bytes(full, kLines * kLineBytes + kKinds * kKindBytes);
        } else {
            arrive(full);
        }
    }

private:
    int part_key_;
    [[maybe_unused]] u32 to_other_;  // how far it is to the same place there: the upper bits of an address are a block's number
};

// Fills the ring with all tiles of the share: whoever has converted a tile has asked for the next one. There is a ScaleTile for
// each slot at `scales`.
__device__ __forceinline__ void load_share(const LoaderParams& p, RingState& state, const Share& share, u32 ring, u32 scales) {
    const int warp = threadIdx.x / 32 - kWarps, lane = threadIdx.x % 32;
    const int part = kSharesNumbers ? row_part() * kLoaderWarps + warp : warp, part_key = part * kPartKeys;
    Loader loader(p, share, part, lane);
    loader.start();
    const Messenger messenger(part_key, ring);
    // Half of a tile's keys land at once; of all keys three quarters of the columns, and the last quarter where the first one was.
    constexpr int kColumns = kSharesNumbers ? kGroupColumns : kGroupColumns / 2;
    Landing<kPaddedHeadDim - kPaddedHeadDimV> rest;
    Landing<kColumns> columns[kSharesNumbers ? 2 : 3];
    float scale;
    bool is_tile;
    // Asks for what there is room for, if there is another tile: for all at once, since who waits for a load waits for all before it.
    const auto fetch = [&] {
        is_tile = loader.has_tile();
        loader.begin_fetch(scale);
        loader.fetch_rest(rest);
        loader.fetch_columns<0>(columns[0]);
        loader.fetch_columns<kColumns>(columns[1]);
        if constexpr (!kSharesNumbers) loader.fetch_columns<2 * kColumns>(columns[2]);
    };
    fetch();
    Place place;
#pragma unroll 1
    for (; is_tile; place.advance()) {
        const u32 slot = ring + place.slot * kSlotBytes, slot_scales = scales + place.slot * ScaleTile::kBytes;
        const auto line_of = [&](int column) { return slot + column / 64 * KeyRows::kLaneStride; };
        const auto convert = [&](int column, const auto& landing) {
            landing.template convert<CacheElement>(line_of(column), part_key, lane);
        };
        const auto wait_until_free = [&](int part) { sleep_until_phase(state.empty[place.slot][part], place.parity ^ 1); };
        u64(&full)[kParts] = state.full[place.slot];
        wait_until_free(0);
        convert(0, columns[0]);
        if constexpr (!kSharesNumbers) {
            loader.fetch_columns<3 * kColumns>(columns[0]);
            convert(kColumns, columns[1]);
        }
        fence_for_wgmma();
        messenger.tell<kGroupColumns / 64>(full[0], line_of(0));
        wait_until_free(1);
        if constexpr (kSharesNumbers) {
            convert(kGroupColumns, columns[1]);
        } else {
            convert(kGroupColumns, columns[2]);
            convert(kGroupColumns + kColumns, columns[0]);
        }
        convert(kPaddedHeadDimV, rest);
        if (lane < kPartKeys) {
            store_scales(slot_scales + (part_key + lane) * 4, make_float2(scale, scale), p.attention.score_slack);
        }
        fence_for_wgmma();
        messenger.tell<kGroupColumns / 64>(full[1], line_of(kGroupColumns));
        messenger.tell<1, true>(full[kRestPart], line_of(kPaddedHeadDimV), slot_scales);
        fetch();
    }
    wait_for_other_block(state, place);
}
#else
// Fills the ring with all tiles of the share.
__device__ __forceinline__ void load_share(const LoaderParams& p, RingState& state, const Share& share, u32 ring, u32) {
    const int warp = threadIdx.x / 32 - kWarps, lane = threadIdx.x % 32;
    Loader loader(p, share, warp, lane);
    loader.start();
    Place place;
    for (; loader.has_tile(); place.advance()) {
        const u32 slot = ring + place.slot * kSlotBytes;
        loader.begin_tile_of_rows();
        const auto load = [&](int part, auto copy) {
            u64& full = state.full[place.slot][part];
            // Of a slot never filled it is over.
            if (part != kRestPart) sleep_until_phase(state.empty[place.slot][part], place.parity ^ 1);
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
    wait_for_other_block(state, place);
}
#endif
