// The loader of one warp: it fills the warp's ring with the tiles of the whole share, segment after segment, so that the next
// item's keys are in flight while an item is merged and stored.
#pragma once
#include "fragment.cuh"
#include "paging.cuh"
#include "ptx/copies.cuh"
#include "segment.cuh"
#include "tiles.cuh"

class Loader {
    static constexpr int kLookups = (kTileKeys + 31) / 32;  // rows of a tile that a lane looks up: l, l + 32 ..

    // How the rows of a tile are copied: kLanes lanes side by side on one row, so that an instruction reads whole lines.
    template <int kRowBytes>
    struct Copy {
        using Rows = Swizzle<kRowBytes>;
        static constexpr int kLanes = Rows::kPeriod;
        static constexpr int kRowsAtOnce = 32 / kLanes;

        static __device__ __forceinline__ u32 lane_offset(int lane) { return Rows::offset(lane / kLanes, lane % kLanes); }

        // Four rows on, the exclusive or of 8 chunks changes in one bit; eight rows on it is the same.
        static __device__ __forceinline__ u32 row_address(u32 lane_address, int i) {
            return (kRowsAtOnce == 4 && i % 2 ? lane_address ^ 64 : lane_address) + i * kRowsAtOnce * kRowBytes;
        }
    };

public:
    __device__ __forceinline__ Loader(const DecodeParams& p, const Share& share, int warp, int lane)
        : p_(p), share_(share), policy_(eviction_policy()), warp_(warp), lane_(lane) {
        using Keys = Copy<kKeyBytes>;
        using Values = Copy<kValueBytes>;
        keys_from_ = static_cast<const char*>(p.k_cache) + lane % Keys::kLanes * 16;
        values_from_ = static_cast<const char*>(p.v_cache) + lane % Values::kLanes * 16;
        keys_to_ = Keys::lane_offset(lane);
        values_to_ = Values::lane_offset(lane);
        pin(keys_from_), pin(values_from_), pin(keys_to_), pin(values_to_), pin(lane_);
        key_ = end_ = 0;
        key_head_ = value_head_ = 0;
    }

    // Starts at a segment that `walker` has already found. The first load_keys then copies nothing: it looks up the pages of
    // the first tile.
    __device__ __forceinline__ void start(const Walker& walker, const Segment& segment) {
        walker_ = walker;
        enter(segment);
        key_ -= kWarps * kTileKeys;
    }

    // Starts the copy of the next tile's keys to a slot of the ring, if there is one, and looks up the tile after it. The page
    // table answers behind the copies that were asked for before. So the look-up comes first while the ring fills, and always
    // where it holds several tiles of short rows; else the copies need not wait for it.
    template <bool kLooksFirst = (kStages > 3 && kKeyBytes <= 128)>
    __device__ __forceinline__ void load_keys(u32 slot, bool is_tile = true) {
        const bool exists = is_tile && key_ < end_;
        u32 units[kLookups];  // where the rows begin that this lane looked up, in 16-byte units
        for_each<kLookups>([&](int i) {
            units[i] = places_[i].units(p_.cache.k) + key_head_;
            value_units_[i] = exists ? places_[i].units(p_.cache.v) + value_head_ : kNoTile;
        });
        copy_scales(slot, exists);
        if constexpr (kLooksFirst) find_next_tile();
        if (is_tile) copy_tile<kHeadDim, kKeyBytes>(keys_from_, units, keys_to_ + slot, exists);
        cp_async_commit();
        if constexpr (!kLooksFirst) find_next_tile();
    }

    // Starts the copy of the values that belong to the keys loaded last.
    __device__ __forceinline__ void load_values(u32 slot) {
        const u32 to = kKeyBytes == kValueBytes ? keys_to_ : values_to_;  // one register where the rows are alike
        copy_tile<kHeadDimV, kValueBytes>(values_from_, value_units_, to + slot, value_units_[0] != kNoTile);
        cp_async_commit();
    }

    // Makes zeros of the values of a tile whose weights of 0 do not help, since 0 x NaN is NaN (sees_nothing). Every lane
    // clears what it has copied itself, so that none waits for others: a vote in a branch would cost every tile.
    __device__ __forceinline__ void clear_values(u32 slot, const Segment& segment, u32 first_key) const {
        using C = Copy<kValueBytes>;
        const u32 to = (kKeyBytes == kValueBytes ? keys_to_ : values_to_) + slot;
#pragma unroll 1
        for (int i = 0; i < kTileKeys / C::kRowsAtOnce; ++i) {
            if (!sees_nothing(p_, segment, first_key + lane_ / C::kLanes + i * C::kRowsAtOnce)) continue;
#pragma unroll 1
            for (int c = 0; c < kValueBytes / 16; c += C::kLanes) {
                store_shared(C::row_address(to, i) + c * 16, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
            }
        }
    }

private:
    __device__ __forceinline__ void enter(const Segment& segment) {
        const u32 first_slot = segment.lengths.leftpad;
        key_ = first_slot + segment.keys.begin + warp_ * kTileKeys;
        end_ = first_slot + segment.keys.end;
        key_head_ = segment.kv_head * p_.cache.k.head;
        value_head_ = segment.kv_head * p_.cache.v.head;
        places_[0].enter(p_.cache, segment.sequence);
        for_each<kLookups - 1>([&](int i) { places_[i + 1] = places_[0]; });
        if constexpr (kHasKeyScales) key_scales_ = p_.k_descale + segment.kv_head * p_.k_descale_strides.head;
        if constexpr (kHasValueScales) value_scales_ = p_.v_descale + segment.kv_head * p_.v_descale_strides.head;
    }

    __device__ __forceinline__ void find_next_tile() {
        key_ += kWarps * kTileKeys;
        find_tile();
    }

    // Moves to the first tile of this warp at or after `key_`, in the next segments if need be, and starts its page lookup.
    // At the end of the share key_ >= end_ stays true.
    __device__ __forceinline__ void find_tile() {
        while (key_ >= end_) {
            Segment segment;
            if (!walker_.next(p_, share_, segment)) return;
            enter(segment);
        }
        // Rows past the end repeat the last key, which is masked there: nothing that no row sees is read.
        for_each<kLookups>([&](int i) { places_[i].seek(p_.cache, min(key_ + lane_ % kTileKeys + i * 32, end_ - 1)); });
    }

    // Starts the copies of the scales of a tile's keys and values, to where TileScales finds them: both behind the keys,
    // since the values' are needed before the values.
    __device__ __forceinline__ void copy_scales(u32 slot, bool exists) {
        for_each<kLookups>([&](int i) {
            const u32 to = slot + ScaleTile::offset(lane_ % 8, i) + lane_ / 8 * 4;
            if constexpr (kHasKeyScales) cp_async_4_if(exists, to, key_scales_ + places_[i].scale(p_.k_descale_strides));
            if constexpr (kHasValueScales) {
                cp_async_4_if(exists, to + ScaleTile::kValues, value_scales_ + places_[i].scale(p_.v_descale_strides));
            }
        });
    }

    template <int kDim, int kRowBytes>
    __device__ __forceinline__ void copy_tile(const char* lane_from, const u32 (&units)[kLookups], u32 lane_to, bool exists) {
        using C = Copy<kRowBytes>;
        constexpr int kChunks = kDim * CacheElement::kBytes / 16;
        // An MMA reads whole steps of 16 elements: a last half step is filled with zeros.
        constexpr int kFilled = CacheElement::kBytes == 2 ? (kDim + 15) / 16 * 2 : kChunks;
        constexpr int kPasses = kTileKeys / C::kRowsAtOnce;
        const int chunk = lane_ % C::kLanes;
        const char* from[kPasses];  // all addresses before the first copy: ptxas puts a guard around every run of copies
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
            const int row = i * C::kRowsAtOnce;
            from[i] = offset_by<16>(lane_from, __shfl_sync(kFullWarp, units[row / 32], lane_ / C::kLanes + row % 32));
        }
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
            const u32 to = C::row_address(lane_to, i);
#pragma unroll
            for (int c = 0; c < kFilled; c += C::kLanes) {
                const bool wanted = exists && (c + C::kLanes <= kFilled || chunk + c < kFilled);
                if (c + C::kLanes <= kChunks || kChunks == kFilled || chunk + c < kChunks) {
                    cp_async_16_if<kDim * CacheElement::kBytes>(wanted, to + c * 16, from[i] + c * 16, policy_);
                } else {
                    cp_async_zero_if(wanted, to + c * 16, lane_from);
                }
            }
        }
    }

    static constexpr u32 kNoTile = 0xffffffffu;  // the last 16 bytes of the reach: the host refuses caches that span them

    const DecodeParams& p_;
    const Share& share_;
    Walker walker_;
    u64 policy_;
    const char* keys_from_;    // first byte of this lane's chunks in the cache's first row
    const char* values_from_;
    const float* key_scales_;  // the KV head's first one
    const float* value_scales_;
    PageCursor places_[kLookups];  // of the rows of the next tile that this lane looks up
    u32 keys_to_, values_to_;  // the same in a slot
    int warp_, lane_;
    u32 key_, end_;  // slots of the cache: next tile, end of its segment; unsigned, for the first may pass 2^31
    u32 key_head_, value_head_, value_units_[kLookups];
};
