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

#if KV_ELEMENT_BYTES == 1
// Fills the ring with all tiles of the share: whoever has converted a tile has asked for the next one. There is a ScaleTile for
// each slot at `scales`.
__device__ __forceinline__ void load_share(const LoaderParams& p, RingState& state, const Share& share, u32 ring, u32 scales) {
    const int warp = threadIdx.x / 32 - kWarps, lane = threadIdx.x % 32, part_key = warp * (kTileKeys / kLoaderWarps);
    Loader loader(p, share, warp, lane);
    loader.start();
    constexpr int kQuarter = kPaddedHeadDimV / 4;
    Landing<kPaddedHeadDim - kPaddedHeadDimV> rest;
    Landing<kQuarter> quarters[3];  // the last one lands where the first one was
    float scale;
    bool is_tile;
    // Asks for what there is room for, if there is another tile: for all at once, since who waits for a load waits for all before it.
    const auto fetch = [&] {
        is_tile = loader.has_tile();
        loader.begin_fetch(scale);
        loader.fetch_rest(rest);
        loader.fetch_columns<0>(quarters[0]);
        loader.fetch_columns<kQuarter>(quarters[1]);
        loader.fetch_columns<2 * kQuarter>(quarters[2]);
    };
    fetch();
#pragma unroll 1
    for (Place place; is_tile; place.advance()) {
        const u32 slot = ring + place.slot * kSlotBytes;
        const auto convert = [&](int column, const auto& landing) {
            landing.template convert<CacheElement>(slot + column / 64 * KeyRows::kLaneStride, part_key, lane);
        };
        u64(&full)[kParts] = state.full[place.slot];
        for (u64& empty : state.empty[place.slot]) sleep_until_phase(empty, place.parity ^ 1);
        convert(kPaddedHeadDimV, rest);
        if (lane < kTileKeys / kLoaderWarps) {
            const u32 to = scales + place.slot * ScaleTile::kBytes + (part_key + lane) * 4;
            store_scales(to, make_float2(scale, scale), p.attention.score_slack);
        }
        convert(0, quarters[0]);
        loader.fetch_columns<3 * kQuarter>(quarters[0]);
        convert(kQuarter, quarters[1]);
        fence_for_wgmma();
        arrive(full[kRestPart]);
        arrive(full[0]);
        convert(2 * kQuarter, quarters[2]);
        convert(3 * kQuarter, quarters[0]);
        fence_for_wgmma();
        arrive(full[1]);
        fetch();
    }
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
    // A block of a cluster stays until the other one has arrived at its barriers for the last time.
    if constexpr (kSharesTiles) {
        for (int i = 0; i < kStages; ++i, place.advance()) {
            for (u64& empty : state.empty[place.slot]) sleep_until_phase(empty, place.parity ^ 1);
        }
    }
}
#endif
