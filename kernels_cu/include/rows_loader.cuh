// The loader of a block: it fills the block's ring with the tiles of the whole share, segment after segment, so that the next
// item's keys are in flight while an item ends.
//
// Warp w copies rows w * kPartKeys and the next ones of every tile: each lane looks one of them up and hands its place to the
// lanes that copy it.
#pragma once
#include "latent_landing.cuh"
#include "paging.cuh"
#include "ptx/copies.cuh"
#include "rows_boxes.cuh"
#include "rows_codes.cuh"
#include "rows_tiles.cuh"
#include "segment.cuh"

#ifndef EVICTS_FIRST
#define EVICTS_FIRST 1
#endif
constexpr bool kEvictsFirst = EVICTS_FIRST;  // rows that were read leave the L2 cache before all others

class Loader {
    static constexpr int kKeyChunks = (kHeadDim + 15) / 16 * 2;  // as far as an MMA reads a key, in 16 bytes ..
    static constexpr int kValueChunks = kColumnPairs * kColumnWarps * 2;  // .. and a value
    static constexpr int kChunkElements = 16 / CacheElement::kBytes;
    static constexpr u32 kAllRows = ~0u >> (32 - kPartKeys);

    // Rows as they are copied: codes that become numbers have a place of their own.
    template <bool kLand, int kDim, typename Rows>
    struct CopiedRows {
        using Type = Rows;
    };
    template <int kDim, typename Rows>
    struct CopiedRows<true, kDim, Rows> {
        using Type = LandedRows<kDim>;
    };
    using CopiedKeys = typename CopiedRows<kConvertsTiles, kHeadDim, KeyRows>::Type;
    using CopiedValues = typename CopiedRows<kConvertsTiles, kHeadDimV, ValueRows>::Type;
    static constexpr bool kRowsAreAlike = kConvertsTiles || kKeyBytes == kValueBytes;  // as to where a lane's first chunk goes

    // How the rows of a part are copied: kLanes lanes side by side on one row, so that an instruction reads whole lines.
    template <typename Rows>
    struct Copy {
        static constexpr int kLanes = Rows::kLanes;
        static constexpr int kRowsAtOnce = 32 / kLanes;
        static_assert(kPartKeys % kRowsAtOnce == 0, "a warp copies whole passes of rows");

        static __device__ __forceinline__ u32 lane_offset(int first_row, int lane) {
            return Rows::offset(first_row + lane / kLanes, lane % kLanes);
        }

        // Four rows on, the exclusive or of 8 chunks changes in one bit; eight rows on it is the same.
        static __device__ __forceinline__ u32 row_address(u32 lane_address, int i) {
            return (kRowsAtOnce == 4 && i % 2 ? lane_address ^ Rows::kFourRows : lane_address) +
                   i * kRowsAtOnce * Rows::kRowStride;
        }
    };

public:
    __device__ __forceinline__ Loader(const LoaderParams& params, const Share& share, int warp, int lane)
        : p_(attention_of(params)), share_(share), walker_(share), boxes_(params, warp), policy_(eviction_policy<kEvictsFirst>()),
          lane_(lane), part_(warp * kPartKeys) {
        const DecodeParams& p = p_;
        using Keys = Copy<CopiedKeys>;
        using Values = Copy<CopiedValues>;
        keys_from_ = static_cast<const char*>(p.k_cache) + lane % Keys::kLanes * 16;
        values_from_ = static_cast<const char*>(p.v_cache) + lane % Values::kLanes * 16;
        keys_to_ = Keys::lane_offset(part_, lane);
        values_to_ = Values::lane_offset(part_, lane);
        if constexpr (!kConvertsTiles) {  // conversions need the registers more
            pin(keys_from_), pin(values_from_), pin(keys_to_), pin(values_to_), pin(lane_);
        }
        key_ = end_ = 0;
        kv_head_ = 0;
    }

    // Starts at the share's first segment ..
    __device__ __forceinline__ void start() { find_tile(); }

    // .. which `walker` has already found.
    __device__ __forceinline__ void start(const Walker& walker, const Segment& segment) {
        walker_ = walker;
        enter(segment);
        find_tile();
    }

    // Whether there is another tile.
    __device__ __forceinline__ bool has_tile() const { return key_ < end_; }

    // Comes before the copies of a tile, and before what they wait for: finds out which rows of this warp's part are copied.
    // Zeros stand in place of those behind the segment's end, and on pages of a negative number.
    __device__ __forceinline__ void begin_tile() {
        is_tile_ = has_tile();
        const u32 slot = key_ + part_ + lane_;  // of the cache
        choose(lane_ < kPartKeys && slot < end_ && place_.exists());
        if constexpr (kConvertsTiles) leave_out_hidden();  // scales come beside the keys
    }

    // The same of a tile whose rows are values, too.
    __device__ __forceinline__ void begin_tile_of_rows() {
        begin_tile();
        leave_out_hidden();
    }

    // Starts the copy of the next tile's keys to a slot of the ring, if there is one. With a quantised cache the ring is that of
    // the codes. Boxes count their bytes at the slot's barrier, if it has one.
    __device__ __forceinline__ void load_keys(u32 slot, u64* full = nullptr) {
        value_place_ = place_, value_head_ = kv_head_;
        if (Boxes::kExist && comes_in_boxes_) {
            boxes_.copy<true, kPartKeys, kPaddedHeadDim / 64, KeyRows>(place_, kv_head_, 0, part_to() + slot, *full, policy_);
        } else {
            // Where the row begins that this lane looked up (row lane % kPartKeys of the part), in 16-byte units.
            const u32 units = place_.units(p_.cache.k) + kv_head_ * p_.cache.k.head;
            copy_part<kHeadDim, kConvertsTiles ? kHeadDim / 16 : kKeyChunks, CopiedKeys>(keys_from_, units, keys_to_ + slot);
        }
        if (is_tile_) copy_scales(slot);
    }

    // Between the copies of a tile's keys and of its values: looks up the tile after it.
    __device__ __forceinline__ void look_ahead() {
        if (!is_tile_) return;
        if constexpr (!kConvertsTiles) leave_out_hidden();
        key_ += kTileKeys;
        find_tile();
    }

    // Starts the copy of the next tile if its rows are values and then the rest of the keys, and looks up the tile after it.
    __device__ __forceinline__ void load_rows(u32 slot) {
        load_columns<0, kPaddedHeadDimV>(slot);
        load_rest(slot);
    }

    // The same in parts: kCount value columns from kFirst on ..
    template <int kFirst, int kCount>
    __device__ __forceinline__ void load_columns(u32 slot, u64* full = nullptr) {
        if (Boxes::kExist && comes_in_boxes_) {
            boxes_.copy<false, kPartKeys, kCount / 64, KeyRows>(place_, kv_head_, kFirst, part_to() + slot + column_offset<kFirst>(),
                                                                *full, policy_);
            return;
        }
        constexpr int kThere = kFirst + kCount < kHeadDimV ? kCount : kHeadDimV - kFirst;
        copy_part<kThere, kCount / kChunkElements, KeyRows>(values_from_ + kFirst * CacheElement::kBytes,
                                                            place_.units(p_.cache.v) + kv_head_ * p_.cache.v.head,
                                                            keys_to_ + slot + column_offset<kFirst>());
    }

    // .. and the rest of the keys, which comes last.
    __device__ __forceinline__ void load_rest(u32 slot, u64* full = nullptr) {
        constexpr int kCount = kPaddedHeadDim - kPaddedHeadDimV;
        const u32 rest = slot + column_offset<kPaddedHeadDimV>();
        if (Boxes::kExist && comes_in_boxes_) {
            boxes_.copy<true, kPartKeys, kCount / 64, KeyRows>(place_, kv_head_, p_.key_column, part_to() + rest, *full, policy_);
        } else {
            // Codes as far as an ldmatrix reads them.
            constexpr int kFilled = kReadsCodes ? (kHeadDim + 63) / 64 * 4 : kCount / kChunkElements;
            copy_part<kHeadDim, kFilled, KeyRows>(keys_from_ + p_.key_column * CacheElement::kBytes,
                                                  place_.units(p_.cache.k) + kv_head_ * p_.cache.k.head, keys_to_ + rest);
        }
        if (!is_tile_) return;
        copy_scales(slot);
        key_ += kTileKeys;
        find_tile();
    }

    // The same of codes of joint rows that come to registers: asks for the scale of the row that this lane looks up, and looks up
    // the tile after it. Not later: whoever waits for a page number waits for all loads before it, ..
    __device__ __forceinline__ void begin_fetch(float& scale) {
        begin_tile_of_rows();
        units_ = place_.units(p_.cache.k) + kv_head_ * p_.cache.k.head;
        scale = 0.0f;
        if (kHasKeyScales && lane_ < kPartKeys && copied_ >> lane_ & 1) scale = *scale_of(p_.k_descale, p_.k_descale_strides);
        if (!is_tile_) return;
        key_ += kTileKeys;
        find_tile();
    }

    // .. then for kCount value columns from kFirst on, ..
    template <int kFirst, int kCount>
    __device__ __forceinline__ void fetch_columns(Landing<kCount>& landing) const {
        fetch<kHeadDimV - kFirst>(static_cast<const char*>(p_.k_cache) + kFirst, landing);
    }

    // .. and for the rest of the keys.
    template <int kCount>
    __device__ __forceinline__ void fetch_rest(Landing<kCount>& landing) const {
        fetch<kHeadDim>(static_cast<const char*>(p_.k_cache) + p_.key_column, landing);
    }

    // Starts the copy of the values that belong to the keys loaded last.
    __device__ __forceinline__ void load_values(u32 slot, u64* full = nullptr) {
        if (Boxes::kExist && comes_in_boxes_) {
            boxes_.copy<false, kPartKeys, kPaddedHeadDimV / 64, ValueRows>(value_place_, value_head_, 0, part_to() + slot, *full,
                                                                           policy_);
            return;
        }
        const u32 to = kRowsAreAlike ? keys_to_ : values_to_;  // one register where they are
        const u32 units = value_place_.units(p_.cache.v) + value_head_ * p_.cache.v.head;
        copy_part<kHeadDimV, kConvertsTiles ? kHeadDimV / 16 : kValueChunks, CopiedValues>(values_from_, units, to + slot);
    }

    // Makes numbers of the codes of keys, and of values, that this lane has copied and waited for. The scales of both go where
    // the softmax finds them.
    __device__ __forceinline__ void convert_keys(u32 codes, u32 slot, u32 scales) const {
        convert_rows<CacheElement, kHeadDim, kKeyChunks, KeyRows>(codes, slot, part_, lane_);
        if (lane_ >= kPartKeys) return;
        const u32 from = codes + kCodesBytes + (part_ + lane_) * 4, to = scales + (part_ + lane_) * 4;
        float2 two = {0.0f, 0.0f};
        if constexpr (kHasKeyScales) two.x = load_shared_float(from);
        if constexpr (kHasValueScales) two.y = load_shared_float(from + ScaleTile::kValues);
        store_scales(to, two, p_.score_slack);
    }
    __device__ __forceinline__ void convert_values(u32 codes, u32 slot) const {
        convert_rows<CacheElement, kHeadDimV, kValueChunks, ValueRows>(codes, slot, part_, lane_);
    }

private:
    // Chooses the rows of this warp's part that are copied, and whether as boxes: whether this lane's is.
    __device__ __forceinline__ void choose(bool is_copied) {
        copied_ = __ballot_sync(kFullWarp, is_copied);
        comes_in_boxes_ = copied_ == kAllRows && boxes_.fit(key_ + part_);
        // Where ptxas knows it to be uniform, all of the loader is: slower, but for codes and trees (see README.md).
        if constexpr (!kConvertsTiles && !kHasTree) copied_ |= zero_of_each_lane();
    }

    // Zeros stand also in place of values that a tree mask hides from all rows: there may be NaN, which weights of 0 do not hide.
    // It takes long to find out, so keys are copied before: whatever their scores are, they are hidden.
    __device__ __forceinline__ void leave_out_hidden() {
        if constexpr (kHasTree) {
            if (key_ + kTileKeys > first_of_tree_) choose((copied_ >> lane_ & 1) && !is_hidden_from_all(key_ + part_ + lane_));
        }
    }

    // Where the first row of this warp's part begins in a slot: what boxes are told, since any lane may be the one that asks.
    __device__ __forceinline__ u32 part_to() const { return part_ * KeyRows::kRowStride; }

    // Where a column that begins a line lies in a row of a slot.
    template <int kColumn>
    static constexpr u32 column_offset() {
        return kColumn / (KeyRows::kLanes * kChunkElements) * KeyRows::kLaneStride;
    }

    // Where the scale of the row lies that this lane has looked up.
    __device__ __forceinline__ const float* scale_of(const float* scales, DescaleStrides strides) const {
        return scales + place_.scale(strides) + kv_head_ * strides.head;
    }

    // Starts the copies of the scales of a tile's keys and values, those of the row that this lane has looked up.
    __device__ __forceinline__ void copy_scales(u32 slot) {
        if constexpr (kScalesScores && (kHasKeyScales || kHasValueScales)) {
            if (lane_ >= kPartKeys) return;
            const bool exists = copied_ >> lane_ & 1;
            const u32 to = slot + kCodesBytes + (part_ + lane_) * 4;
            if constexpr (kHasKeyScales) cp_async_4_or_zero(exists, to, scale_of(p_.k_descale, p_.k_descale_strides));
            if constexpr (kHasValueScales) {
                cp_async_4_or_zero(exists, to + ScaleTile::kValues, scale_of(p_.v_descale, p_.v_descale_strides));
            }
        }
    }

    __device__ __forceinline__ void enter(const Segment& segment) {
        const u32 first_slot = segment.lengths.leftpad;
        key_ = first_slot + segment.keys.begin;
        end_ = first_slot + segment.keys.end;
        kv_head_ = segment.kv_head;
        place_.enter(p_.cache, segment.sequence);
        if constexpr (kHasTree) {
            sequence_ = segment.sequence, first_row_ = segment.first_row, valid_rows_ = segment.valid_rows;
            first_of_tree_ = first_slot + max(0, keys_before_tree(p_, segment.lengths));
        }
    }

    // Whether a tree hides a slot from all rows. Lengths are asked for again: they would take registers in all tiles.
    __device__ __forceinline__ bool is_hidden_from_all(u32 slot) const {
        Segment segment;
        segment.sequence = sequence_, segment.first_row = first_row_, segment.valid_rows = valid_rows_;
        segment.lengths = p_.lengths.of(sequence_);
        return hidden_from_all(p_, segment, slot - segment.lengths.leftpad);
    }

    // Moves to the tile at key_, or to the first one of the next segments, and starts its page lookup. At the end of the share
    // key_ >= end_ stays true.
    __device__ __forceinline__ void find_tile() {
        while (key_ >= end_) {
            Segment segment;
            if (!walker_.next(p_, share_, segment)) return;
            enter(segment);
        }
        place_.seek(p_.cache, min(key_ + part_ + lane_ % kPartKeys, end_ - 1));
    }

    // Asks for the codes of each row that is copied, of which there are kThere from `first` on; others are zeros.
    template <int kThere, int kCount>
    __device__ __forceinline__ void fetch(const char* first, Landing<kCount>& landing) const {
        using L = Landing<kCount>;
        const char* const lane_from = first + L::piece(lane_) * 16;
        // load(where a piece comes from, which it is of the row, the row of the warp's)
        const auto for_pieces = [&](auto load) {
            const char* from[L::kPasses];
            for_each<L::kPasses>([&](int i) {
                from[i] = offset_by<16>(lane_from, __shfl_sync(kFullWarp, units_, L::row(lane_) + i * L::kRowsAtOnce));
            });
            for_each<L::kPasses, L::kRuns>([&](int i, int run) {
                landing.codes[i][run] = load(from[i] + run * L::kLanes * 16, run * L::kLanes, i * L::kRowsAtOnce);
            });
        };
        if (copied_ == kAllRows && kThere >= kCount) {
            for_pieces([](const char* from, int, int) { return load_once(from); });
        } else {
            int lane_row = L::row(lane_);
            pin(lane_row);  // else what follows from it takes registers in all tiles
            for_pieces([&](const char* from, int piece, int row) {
                const bool is_there = copied_ >> (lane_row + row) & 1 && (piece + L::piece(lane_)) * 16 < kThere;
                return load_once_or_zero(is_there, from);
            });
        }
    }

    // Copies kDim elements of each row that is copied; others are zeros, as are further chunks up to kFilled, which steps of
    // an MMA reach. Nothing that no row sees is read.
    template <int kDim, int kFilled, typename Rows>
    __device__ __forceinline__ void copy_part(const char* lane_from, u32 units, u32 lane_to) {
        using C = Copy<Rows>;
        constexpr int kDimChunks = kDim * CacheElement::kBytes / 16;
        constexpr int kPasses = kPartKeys / C::kRowsAtOnce;
        const int chunk = lane_ % C::kLanes;
        // Where this lane's chunk of a pass comes from, and goes to.
        const auto from_of = [&](int i) {
            return offset_by<16>(lane_from, __shfl_sync(kFullWarp, units, lane_ / C::kLanes + i * C::kRowsAtOnce));
        };
        // For each run of chunks of a row that lanes copy together: copy(offsets of its first chunk in the row from where it
        // comes and where it goes, whether this lane has one, whether that is of the row and not beyond it).
        const auto for_runs = [&](auto copy) {
#pragma unroll
            for (int c = 0; c < kFilled; c += C::kLanes) {
                copy(c * 16, c / C::kLanes * Rows::kLaneStride, c + C::kLanes <= kFilled || chunk + c < kFilled,
                     c + C::kLanes <= kDimChunks || (c < kDimChunks && chunk + c < kDimChunks));
            }
        };
        const bool all = copied_ == kAllRows;
        // Addresses before copies: ptxas puts a guard around every run of copies. Conversions leave registers for four.
        constexpr int kAtOnce = (kConvertsTiles || Boxes::kExist) && kPasses > 4 ? 4 : kPasses;
        for_each<kPasses / kAtOnce>([&](int group) {
            const char* from[kAtOnce];
            for_each<kAtOnce>([&](int i) { from[i] = from_of(group * kAtOnce + i); });
            for_each<kAtOnce>([&](int i) {
                const u32 to = C::row_address(lane_to, group * kAtOnce + i);
                for_runs([&](int in_row, int in_slot, bool wanted, bool of_row) {
                    if (of_row) {
                        cp_async_16_if(all && wanted, to + in_slot, from[i] + in_row, policy_);
                    } else {
                        cp_async_zero_if(all && wanted, to + in_slot, lane_from);
                    }
                });
            });
        });
        if (all || !is_tile_) return;  // the same in all lanes
        // Without a cache policy: here ptxas adds addresses in uniform registers, see extend.cu.
#pragma unroll 1
        for (int i = 0; i < kPasses; ++i) {
            const char* const from = from_of(i);
            const u32 to = C::row_address(lane_to, i);
            const bool is_copied = copied_ >> (lane_ / C::kLanes + i * C::kRowsAtOnce) & 1;
            for_runs([&](int in_row, int in_slot, bool wanted, bool of_row) {
                if (wanted) cp_async_16_or_zero(is_copied && of_row, to + in_slot, from + in_row);
            });
        }
    }

    const DecodeParams& p_;
    const Share& share_;
    Walker walker_;
    Boxes boxes_;
    u64 policy_;
    const char* keys_from_;    // first byte of this lane's chunks in the cache's first row
    const char* values_from_;
    PageCursor place_;         // of the row of the next tile that this lane looks up
    u32 keys_to_, values_to_;  // the same in a slot
    int lane_;
    int part_;       // first row of a tile that this warp copies
    u32 key_, end_;  // slots of the cache: next tile, end of its segment; unsigned, for the first may pass 2^31
    int kv_head_;
    u32 units_;                // where the row begins that this lane has looked up, of the tile that is fetched
    PageCursor value_place_;   // of the keys loaded last, to which values belong
    int value_head_;
    bool is_tile_ = false;     // whether there is one, of the tile that was begun last
    bool comes_in_boxes_;      // whether this warp's part of it does
    u32 copied_;               // its rows of this warp's part that are copied, a bit each
    [[maybe_unused]] int sequence_, first_row_, valid_rows_;  // with a tree, of the next tile's segment
    [[maybe_unused]] u32 first_of_tree_;                      // slot of its first key that some rows may not see
};
