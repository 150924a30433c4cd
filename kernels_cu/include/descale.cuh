// Where the scales of quantised queries, keys and values lie.
#pragma once

// Strides in elements of one float32 for all (0, 0, 0), of (batch, heads_kv) or of (pages, page_size, heads_kv).
struct DescaleStrides {
    long long outer;  // from a sequence, or a page, to the next
    long long row;    // from a slot of a page to the next
    long long head;
};

// The scale of a sequence and KV head. Null scales are 1.
__device__ __forceinline__ float descale_of(const float* scales, DescaleStrides strides, int sequence, int kv_head) {
    return scales ? scales[sequence * strides.outer + kv_head * strides.head] : 1.0f;
}
