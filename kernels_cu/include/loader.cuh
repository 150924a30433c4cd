// The load cursor of one warp: it fills the warp's ring with the tiles of the whole share, item after item, so that the
// next item's keys are in flight while the previous item is merged and stored.
#pragma once
#include "config.cuh"
#include "segment.cuh"

class Loader {
public:
    __device__ __forceinline__ Loader(const DecodeParams& p, const Share& share, u32 ring, int warp, int lane)
        : p_(p), share_(share), walker_(share), policy_(evict_first_policy()), ring_(ring), warp_(warp), lane_(lane) {
        key_ = 0;
        segment_.keys = {0, 0};
        find_tile();
    }

    // Starts the copy of the next tile's keys to a slot of the ring, and looks up the tile after it.
    __device__ __forceinline__ void load_keys(int slot) {
        has_values_ = has_tile_;
        if (has_tile_) {
            // The slot of a page's row in 16-byte units; lane l holds row l % 16.
            const u32 key_units = page_ * p_.k_page_stride + row_in_page_ * p_.k_row_stride + kv_head_ * p_.k_head_stride;
            value_units_ = page_ * p_.v_page_stride + row_in_page_ * p_.v_row_stride + kv_head_ * p_.v_head_stride;
            copy_tile<kHeadDim, kKeyBytes>(static_cast<const char*>(p_.k_cache), key_units, slot);
            key_ += kWarps * kTileKeys;
            find_tile();
        }
        cp_async_commit();
    }

    // Starts the copy of the values that belong to the keys loaded last.
    __device__ __forceinline__ void load_values(int slot) {
        if (has_values_) copy_tile<kHeadDimV, kValueBytes>(static_cast<const char*>(p_.v_cache), value_units_, slot);
        cp_async_commit();
    }

private:
    // Moves to the first tile of this warp at or after `key_`, over segment borders, and starts its page lookup.
    __device__ __forceinline__ void find_tile() {
        has_tile_ = true;
        while (key_ >= segment_.keys.end) {
            if (!walker_.next(p_, share_, segment_)) {
                has_tile_ = false;
                return;
            }
            key_ = segment_.keys.begin + warp_ * kTileKeys;
            kv_head_ = segment_.kv_head;
            batch_row_ = p_.cache_batch_idx ? p_.cache_batch_idx[segment_.sequence] : segment_.sequence;
        }
        // Rows past the end repeat the last key: finite numbers that are masked, and nothing unseen is read.
        const u32 key = min(key_ + lane_ % kTileKeys, segment_.keys.end - 1) + segment_.lengths.leftpad;
        const u32 page = static_cast<u64>(key) * p_.page_size_magic >> p_.page_size_shift;
        row_in_page_ = key - page * p_.page_size;
        page_ = p_.page_table ? __ldg(p_.page_table + batch_row_ * p_.page_table_stride + page) : batch_row_;
    }

    // Copies 16 rows: kLanes lanes side by side on one row, so that an instruction reads whole lines.
    template <int kDim, int kRowBytes>
    __device__ __forceinline__ void copy_tile(const char* base, u32 units, int slot) {
        using Rows = Swizzle<kRowBytes>;
        constexpr int kLanes = Rows::kPeriod;
        constexpr int kRowsAtOnce = 32 / kLanes;
        constexpr int kChunks = kDim * Element::kBytes / 16;
        // An MMA reads whole steps of 16 elements: a last half step is filled with zeros.
        constexpr int kFilled = Element::kBytes == 2 ? (kDim + 15) / 16 * 2 : kChunks;
        const int chunk = lane_ % kLanes;
        const int row = lane_ / kLanes;
        const u32 to = ring_ + slot + row * kRowBytes;
#pragma unroll
        for (int i = 0; i < kTileKeys / kRowsAtOnce; ++i) {
            const u32 row_units = __shfl_sync(kFullWarp, units, row + i * kRowsAtOnce);
            const char* from = offset_units(base, row_units) + chunk * 16;
            const u32 row_to = to + i * kRowsAtOnce * kRowBytes + ((chunk ^ Rows::mask(row + i * kRowsAtOnce)) << 4);
#pragma unroll
            for (int c = 0; c < kFilled; c += kLanes) {
                if (c + kLanes <= kChunks) {
                    cp_async_16(row_to + c * 16, from + c * 16, policy_);
                } else if (chunk + c < kFilled) {
                    const u32 bytes = chunk + c < kChunks ? 16 : 0;
                    cp_async_16_or_zero(row_to + c * 16, bytes ? from + c * 16 : base, bytes, policy_);
                }
            }
        }
    }

    const DecodeParams& p_;
    const Share& share_;
    SegmentWalker walker_;
    Segment segment_;
    u64 policy_;
    u32 ring_;
    int warp_, lane_;
    int key_;  // first key of the next tile
    u32 kv_head_, page_, row_in_page_, value_units_;
    int batch_row_;
    bool has_tile_, has_values_;
};
