// Which tiles of a segment a warp can leave out, and which it need not mask.
#pragma once
#include "rows_tiles.cuh"
#include "segment.cuh"

// What some rows see of a segment: those of a warp, or of the block.
struct Reach {
    int begin, end;            // keys that some row sees
    int full_begin, full_end;  // a tile that begins in full_begin .. full_end, both included, needs no mask

    __device__ __forceinline__ Reach(const DecodeParams& p, const Segment& s, int first_row, int most_rows) {
        const int rows = min(s.valid_rows - first_row, most_rows);
        if (rows <= 0) {
            begin = end = full_begin = full_end = 0;
            return;
        }
        const int first_query = query_of(p, s.first_row + first_row);
        const int last_query = query_of(p, s.first_row + first_row + rows - 1);
        const KeyRange seen = mask_of(p).visible_keys(s.lengths, first_query, last_query);
        begin = max(seen.begin, s.keys.begin), end = min(seen.end, s.keys.end);
        full_begin = mask_of(p).first_visible(s.lengths, last_query);
        full_end = min(s.keys.end, mask_of(p).last_visible(s.lengths, first_query)) - kTileKeys;
        if constexpr (kHasTree) full_end = min(full_end, keys_before_tree(p, s.lengths) - kTileKeys);
        pin(full_begin), pin(full_end);
    }

    __device__ __forceinline__ bool needs_mask(int first_key) const { return first_key < full_begin || first_key > full_end; }
};
