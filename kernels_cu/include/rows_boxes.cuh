// Rows of a tile that are copied as boxes: lines of 64 elements of neighbouring rows of a page, by one instruction of one lane.
// That is where a page has whole boxes, and all of their rows are wanted; else threads copy row by row (rows_loader.cuh).
#pragma once
#include "params.cuh"
#include "rows_tiles.cuh"

#if USES_WGMMA
#include "ptx/boxes.cuh"
#include "segment.cuh"

// What kernels of sm_90a are told.
struct __align__(64) TiledParams {
    TensorMap key_boxes;    // of k_cache as (pages, heads_kv, page_size, headdim): boxes of box_rows rows x 64 columns
    TensorMap value_boxes;  // of v_cache
    DecodeParams attention;
    int box_rows;           // 8, 16 or 32; 0: no boxes
    int box_step;           // a power of two: boxes begin at slots of a sequence that are multiples of it
    int is_packed;          // keys lie on one page, one sequence after another
};
using LoaderParams = TiledParams;

__device__ __forceinline__ const DecodeParams& attention_of(const TiledParams& p) { return p.attention; }

__device__ __forceinline__ void prefetch_maps(const TiledParams& p) {
    if (!p.box_rows) return;
    prefetch_map(p.key_boxes);
    prefetch_map(p.value_boxes);
}

// The boxes of a warp's part of a tile. Blocks that share their tiles, two of a cluster, copy those of every other warp for both.
class Boxes {
public:
    static constexpr bool kExist = !kConvertsTiles;

    __device__ __forceinline__ Boxes(const TiledParams& p, int warp) : p_(p), copies_(!kSharesTiles || warp % 2 == row_part()) {}

    // Whether rows from this slot of a sequence on may be copied as boxes, if all are wanted and lie on pages.
    __device__ __forceinline__ bool fit(u32 slot) const { return kExist && p_.box_rows && !(slot & (p_.box_step - 1)); }

    // Copies kLines lines of kRows rows, the first one at a column of k_cache or v_cache, to where the first row's line goes, of
    // which all lanes must be told: any of them may be elected. `place` is, in each lane, that of row lane % kRows.
    template <bool kOfKeys, int kRows, int kLines, typename Rows>
    __device__ __forceinline__ void copy(const PageCursor& place, int head, int column, u32 to, u64& full, u64 policy) const {
        constexpr int kLineElements = 64, kLineBytes = 128;
        static_assert(kRows % 8 == 0, "boxes begin where the pattern of the swizzle does");
        const TensorMap& map = kOfKeys ? p_.key_boxes : p_.value_boxes;
        const bool is_elected = elect_lane();  // ptxas knows that it is one: else a copy is a loop over lanes
        if (is_elected) expect_bytes(full, kRows * kLines * kLineBytes);
        const int page_of_lane = p_.is_packed ? 0 : place.page();
        const int row_of_lane = p_.is_packed ? place.page() + place.row() : place.row();
        if (!copies_) return;
#pragma unroll 1
        for (int i = 0; i < kRows; i += p_.box_rows) {
            const int page = __shfl_sync(kFullWarp, page_of_lane, i), row = __shfl_sync(kFullWarp, row_of_lane, i);
            if (!is_elected) continue;
#pragma unroll
            for (int line = 0; line < kLines; ++line) {
                const u32 line_to = to + i * kLineBytes + line * Rows::kLaneStride;
                const int first = column + line * kLineElements;
                if constexpr (kSharesTiles) {
                    copy_box_to_blocks(line_to, map, first, row, head, page, full, 3, policy);
                } else {
                    copy_box(line_to, map, first, row, head, page, full, policy);
                }
            }
        }
    }

private:
    const TiledParams& p_;
    bool copies_;
};

#else
using LoaderParams = DecodeParams;

__device__ __forceinline__ const DecodeParams& attention_of(const DecodeParams& p) { return p; }

class Boxes {
public:
    static constexpr bool kExist = false;

    __device__ __forceinline__ Boxes(const DecodeParams&, int) {}
    __device__ __forceinline__ bool fit(u32) const { return false; }
    template <bool, int, int, typename>
    __device__ __forceinline__ void copy(const PageCursor&, int, int, u32, u64&, u64) const {}
};
#endif
