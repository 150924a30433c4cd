// What the planner and the attention kernels must agree on: lengths, visible keys, and the layout of a plan.
//
// An item is (sequence, KV head, row block), number (sequence * num_heads_kv + kv_head) * row_blocks + row_block. A row block
// holds `rows` packed query rows (query position major, head of the group minor). Keys are counted from the sequence's
// leftpad: j = 0 is its first valid key.
#pragma once

struct Mask {
    int left;   // keys before a row's own position that it sees, -1: all
    int right;  // keys after it, -1: all
    int chunk;  // a row sees its own chunk of this many keys, 0: no chunks
};

struct KeyRange {
    int begin, end;  // begin = end = 0 when nothing is visible
};

// Lengths of one sequence; every field is >= 0 whatever the arrays on the device hold.
struct Sequence {
    int leftpad;   // first valid slot of the cache
    int seqlen_k;  // valid keys, appended ones included
    int seqlen_q;  // query positions
};

// Block u reads from cut u to cut u + 1. key == 0: the share begins with the item, at its real first visible key. key > 0: the
// item is cut here, and blocks first_block .. last_block hold its parts.
struct __align__(16) Cut {
    int item, key, first_block, last_block;
};

// A plan is int32: [0] blocks with work, [1..7] 0, then the cuts (one more than the GPU's largest grid; those after the last
// block repeat the end), then leftpad, seqlen_k, seqlen_q: 3 rows of batch_size.
constexpr int kPlanCuts = 8;

__device__ __forceinline__ const Cut* plan_cuts(const int* plan) { return reinterpret_cast<const Cut*>(plan + kPlanCuts); }

// end - begin, or 0 where that is negative; unsigned, for it may need 32 bits.
__device__ __forceinline__ unsigned difference(int begin, int end) {
    return end > begin ? (unsigned)end - (unsigned)begin : 0u;
}

// The lengths of sequence s. Arrays that may be null are absent arguments.
__device__ __forceinline__ Sequence sequence_lengths(
    int s,
    const int* cache_seqlens,     // (batch,)
    const int* cache_leftpad,     // (batch,) or null
    const int* cu_seqlens_q,      // (batch + 1,) or null: max_seqlen_q each
    const int* cu_seqlens_k_new,  // (batch + 1,) or null: seqlen_k_new each
    int max_seqlen_q, int seqlen_k_new) {
    Sequence sequence;
    sequence.leftpad = cache_leftpad ? max(cache_leftpad[s], 0) : 0;
    const unsigned most = 2147483647;
    const unsigned keys = difference(sequence.leftpad, cache_seqlens[s]);
    const unsigned new_keys = cu_seqlens_k_new ? difference(cu_seqlens_k_new[s], cu_seqlens_k_new[s + 1]) : seqlen_k_new;
    sequence.seqlen_k = (int)(keys + min(new_keys, most - keys));
    const unsigned queries = cu_seqlens_q ? difference(cu_seqlens_q[s], cu_seqlens_q[s + 1]) : max_seqlen_q;
    sequence.seqlen_q = (int)min(queries, (unsigned)max_seqlen_q);
    return sequence;
}

// The chunk boundary at or before position p: floor division, since chunks also lie at negative positions.
__device__ __forceinline__ int chunk_begin(int p, int chunk) {
    const int past = p % chunk;
    return p - past - (past < 0 ? chunk : 0);
}

// The first key that query i sees, position p = i + seqlen_k - seqlen_q (bottom right aligned).
__device__ __forceinline__ int first_visible(Mask mask, int seqlen_k, int seqlen_q, int query) {
    const int p = query + (seqlen_k - seqlen_q);
    int begin = 0;
    if (mask.left >= 0 && p > mask.left) begin = p - mask.left;
    if (mask.chunk > 0) begin = max(begin, chunk_begin(p, mask.chunk));
    return begin;
}

// The end of the keys that query i sees. What lies behind a row is a small number, position p itself is not: no sum overflows.
__device__ __forceinline__ int last_visible(Mask mask, int seqlen_k, int seqlen_q, int query) {
    const int behind = seqlen_q - 1 - query;  // keys after position p
    int hidden = 0;                           // of those
    if (mask.right >= 0) hidden = max(hidden, behind - mask.right);
    if (mask.chunk > 0) {
        const int p = seqlen_k - 1 - behind;
        hidden = max(hidden, behind - (mask.chunk - 1 - (p - chunk_begin(p, mask.chunk))));
    }
    return seqlen_k - hidden;
}

// Keys that some query first_query .. last_query sees: what a row sees begins and ends no earlier than what the row before it
// sees, so the two ends decide.
__device__ __forceinline__ KeyRange visible_keys(Mask mask, int seqlen_k, int seqlen_q, int first_query, int last_query) {
    const int begin = first_visible(mask, seqlen_k, seqlen_q, first_query);
    const int end = last_visible(mask, seqlen_k, seqlen_q, last_query);
    if (first_query > last_query || begin >= end) return {0, 0};
    return {begin, end};
}

// Keys that the rows row_block * rows .. of one (sequence, KV head) see; none if the sequence has fewer rows.
__device__ __forceinline__ KeyRange row_block_keys(Mask mask, Sequence sequence, int group, int rows, int row_block) {
    int first_row = row_block * rows, num_rows = sequence.seqlen_q * group;
    if (first_row >= num_rows) return {0, 0};
    if (mask.left < 0 && mask.right < 0 && mask.chunk == 0) return {0, sequence.seqlen_k};
    int last_row = min(first_row + rows, num_rows) - 1;
    return visible_keys(mask, sequence.seqlen_k, sequence.seqlen_q, first_row / group, last_row / group);
}

// Where part `part` of an item begins that a cluster cuts into `parts` equal ones, at multiples of 16 keys.
__device__ __forceinline__ Cut cluster_cut(KeyRange keys, int item, int part, int parts) {
    // Unsigned, since 2^31 - 1 keys rounded up are more than an int holds.
    const unsigned key = ((unsigned)(keys.begin + (long long)(keys.end - keys.begin) * part / parts) + 8) / 16 * 16;
    if (part == 0) return {item, 0, 0, 0};
    if (key >= (unsigned)keys.end) return {item + 1, 0, 0, 0};
    return {item, key <= (unsigned)keys.begin ? 0 : (int)key, 0, 0};
}
