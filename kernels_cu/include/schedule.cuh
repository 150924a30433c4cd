// What the planner and the attention kernels must agree on: items, and the layout of a plan.
//
// An item is (sequence, KV head, row block), number (sequence * num_heads_kv + kv_head) * row_blocks + place. A row block holds
// `rows` packed query rows (query position major, head of the group minor). Keys are counted from the sequence's leftpad: j = 0
// is its first valid key.
#pragma once
#include "mask.cuh"

// Block u reads from cut u to cut u + 1. key == 0: the share begins with the item, at its real first visible key. key > 0: the
// item is cut here, and blocks first_block .. last_block hold its parts.
struct __align__(16) Cut {
    int item, key, first_block, last_block;
};

// A plan is int32: [0] blocks with work, [1..7] 0, then the cuts (one more than the GPU's largest grid; those after the last
// block repeat the end), then leftpad, seqlen_k, seqlen_q: 3 rows of batch_size.
constexpr int kPlanCuts = 8;

__device__ __forceinline__ const Cut* plan_cuts(const int* plan) { return reinterpret_cast<const Cut*>(plan + kPlanCuts); }

// The row block at a place among those of one (sequence, KV head): the first, the last, the second, the last but one, .. With a
// causal mask each sees more keys than the one before it, but two places side by side see as many as the next two. Behind those
// that the sequence has, `rows` rows each, come empty ones.
__device__ __forceinline__ int row_block_at(int place, int num_rows, int rows) {
    if (place == 0) return 0;
    const int row_blocks = (num_rows - 1) / rows + 1;
    return place % 2 && place < row_blocks ? row_blocks - 1 - place / 2 : place < row_blocks ? place / 2 : place;
}

// Keys that the rows of one (sequence, KV head) at a place see; none if the sequence has fewer row blocks.
__device__ __forceinline__ KeyRange row_block_keys(Mask mask, Sequence sequence, int group, int rows, int place) {
    int num_rows = sequence.seqlen_q * group, first_row = row_block_at(place, num_rows, rows) * rows;
    if (first_row >= num_rows) return {0, 0};
    if (mask.hides_nothing()) return {0, mask.shard.held(sequence.seqlen_k)};
    int last_row = min(first_row + rows, num_rows) - 1;
    return mask.visible_keys(sequence, first_row / group, last_row / group);
}

// Where part `part` of an item begins that a cluster cuts into `parts` equal ones, at multiples of `grain` keys.
__device__ __forceinline__ Cut cluster_cut(KeyRange keys, int item, int part, int parts, int grain) {
    // Unsigned, since 2^31 - 1 keys rounded up are more than an int holds.
    const unsigned middle = keys.begin + (long long)(keys.end - keys.begin) * part / parts;
    const unsigned key = (middle + grain / 2) / grain * grain;
    if (part == 0) return {item, 0, 0, 0};
    if (key >= (unsigned)keys.end) return {item + 1, 0, 0, 0};
    return {item, key <= (unsigned)keys.begin ? 0 : (int)key, 0, 0};
}
