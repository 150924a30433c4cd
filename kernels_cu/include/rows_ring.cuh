// extend_wgmma.cu's ring: the warps that multiply and those that load know of its half-stages by mbarriers.
//
// Of a quantised cache codes land in a ring of their own, kCodeStages half-stages ahead; those who copied them make numbers of them
// in the other ring (rows_codes.cuh).
#pragma once
#include "ptx/barriers.cuh"
#include "ptx/copies.cuh"
#include "ptx/wgmma.cuh"
#include "rows_loader.cuh"

constexpr int kLoaderThreads = kLoaderWarps * 32;
static_assert(!kConvertsTiles || kCodeStages >= 2, "codes come while others become numbers");
// A slot is always the same warpgroup's. Else its readers would take turns, too, and one that waits for a phase could miss it.
static_assert(kStages % (2 * kKeyGroups) == 0 || kKeyGroups == 1, "warpgroups that take turns at tiles have slots of their own");

// mbarriers of the slots: `full` when a half-stage has landed, `empty` when all warps that read it have done so.
struct RingState {
    u64 full[kStages], empty[kStages];

    // Sets them up; all threads call it.
    __device__ __forceinline__ void init() {
        if (threadIdx.x < kStages) {
            init_barrier(full[threadIdx.x], kLoaderThreads);
            init_barrier(empty[threadIdx.x], kWarps / kKeyGroups);
            fence_barrier_init();
        }
    }
};

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
__device__ __forceinline__ void load_share(const LoaderParams& p, RingState& state, const Share& share, u32 ring) {
    const int warp = threadIdx.x / 32 - kWarps, lane = threadIdx.x % 32;
    Loader loader(p, share, warp, lane);
    loader.start();
    Place place = {0};
    const auto load = [&](auto copy) {
        sleep_until_phase(state.empty[place.slot], place.parity ^ 1);  // of a slot never filled it is over
        copy(ring + place.slot * kSlotBytes, &state.full[place.slot]);
        arrive_with_copies(state.full[place.slot]);
        place.advance(1);
    };
    while (loader.has_tile()) {
        loader.begin_tile();
        load([&](u32 slot, u64* full) { loader.load_keys(slot, full); });
        loader.look_ahead();
        load([&](u32 slot, u64* full) { loader.load_values(slot, full); });
    }
    cp_async_commit();
    cp_async_wait<0>();
}

// The same of a quantised cache: a half-stage is converted as soon as its codes are there and its slot is free.
__device__ __forceinline__ void load_share_of_codes(const LoaderParams& p, RingState& state, const Share& share, u32 ring,
                                                    u32 code_ring) {
    const int warp = threadIdx.x / 32 - kWarps, lane = threadIdx.x % 32;
    Loader loader(p, share, warp, lane);
    loader.start();
    u32 tiles = 0;  // that have been asked for and are not yet converted
    const auto load = [&](bool keys, u32 to) {
        if (keys) {
            tiles += loader.has_tile();
            loader.begin_tile();
            loader.load_keys(to);
            loader.look_ahead();
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
        sleep_until_phase(state.empty[place.slot], place.parity ^ 1);
        if (keys) {
            loader.convert_keys(code_slot, slot, code_ring + kCodeRingBytes + place.slot * ScaleTile::kBytes);
        } else {
            loader.convert_values(code_slot, slot);
        }
        arrive(state.full[place.slot]);  // the fence for wgmma is its readers', as with 16 bits
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
