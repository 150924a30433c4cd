// Which tiles of a segment a warp can leave out, and which it need not mask.
#pragma once
#include "rows_tiles.cuh"
#include "segment.cuh"

// What a warp's rows see of a segment.
struct Reach {
    int begin, end;            // keys that some row sees
    int full_begin, full_end;  // a tile that begins in full_begin .. full_end, both included, needs no mask

    __device__ __forceinline__ Reach(const DecodeParams& p, const Segment& s, int warp_row) {
        const int rows = min(s.valid_rows - warp_row, kWarpRows);
        if (rows <= 0) {
            begin = end = full_begin = full_end = 0;
            return;
        }
        const int first_query = query_of(p, s.first_row + warp_row);
        const int last_query = query_of(p, s.first_row + warp_row + rows - 1);
        const KeyRange seen = mask_of(p).visible_keys(s.lengths, first_query, last_query);
        begin = max(seen.begin, s.keys.begin), end = min(seen.end, s.keys.end);
        full_begin = mask_of(p).first_visible(s.lengths, last_query);
        full_end = min(s.keys.end, mask_of(p).last_visible(s.lengths, first_query)) - kTileKeys;
        pin(full_begin), pin(full_end);
    }
};
