// Which keys a query sees. Keys are counted from the sequence's leftpad: key 0 is its first valid one.
//
// A mask is data and three functions: first_visible and last_visible bound the keys of one query, visible_keys those of
// several. The planner cuts by them, attention reads by them, and hides by them what single rows do not see. Query i stands at
// position p = i + seqlen_k - seqlen_q, so that the last query stands at the last key.
//
// Positions and lengths are those of whole sequences. In context parallelism a cache holds some of a sequence's positions, and
// keys are numbered as they lie there: what a query sees of them still is an interval, since both are in order.
#pragma once
#include "lengths.cuh"

struct KeyRange {
    int begin, end;  // begin = end = 0 when nothing is visible
};

// The chunk boundary at or before position p: floor division, since chunks also lie at negative positions.
__device__ __forceinline__ int chunk_begin(int p, int chunk) {
    const int past = p % chunk;
    return p - past - (past < 0 ? chunk : 0);
}

// Which positions of a sequence a cache holds: p lives in that of rank (p / interleave) % world_size, in order.
struct Shard {
    int world_size;
    int rank;
    int interleave;

    __device__ __forceinline__ bool holds(int position) const {
        return world_size == 1 || position / interleave % world_size == rank;
    }

    // How many of the positions before this one it holds.
    __device__ __forceinline__ int held(int position) const {
        if (world_size == 1) return position;
        const int round = world_size * interleave, p = max(position, 0), rounds = p / round;
        return rounds * interleave + min(max(p - rounds * round - rank * interleave, 0), interleave);
    }

    // The position of its key number `key`.
    __device__ __forceinline__ int position(int key) const {
        if (world_size == 1) return key;
        const int rounds = key / interleave;
        return (rounds * world_size + rank) * interleave + (key - rounds * interleave);
    }
};

// What each query sees of the last seqlen_q keys of its sequence; of those before it sees all.
struct Tree {
    const void* tree_mask;   // bool (batch, queries, keys) or (total_q, keys), or 32 keys in a word; or null
    long long batch_stride;  // bytes; 0 for ragged queries
    long long row_stride;
    int is_packed;

    // The keys of query `row`, which is counted from the batch's first one where queries are ragged.
    __device__ __forceinline__ const unsigned char* keys_of(int sequence, long long row) const {
        return static_cast<const unsigned char*>(tree_mask) + sequence * batch_stride + row * row_stride;
    }

    // Whether a query with these keys sees one; words are read by bytes, as bools are.
    __device__ __forceinline__ bool sees(const unsigned char* keys, int key) const {
        return keys[is_packed ? key / 8 : key] & (is_packed ? 1u << key % 8 : 0xffu);
    }

    // Whether none of the queries sees a key, `count` of them, of which the first has these keys: eight at a time are on their way.
    __device__ __forceinline__ bool hides_from_all(const unsigned char* keys, int count, int key) const {
        constexpr int kAtOnce = 8;
        bool is_seen = false;
#pragma unroll 1
        for (int i = 0; !is_seen && i < count; i += kAtOnce) {
            unsigned seen = 0;
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) seen |= sees(keys + min(i + j, count - 1) * row_stride, key);
            is_seen = seen != 0;
        }
        return !is_seen;
    }
};

struct Mask {
    int window_left;      // keys before its own position that a query sees, -1: all
    int window_right;     // keys after it, -1: all; 0 is a causal mask
    int attention_chunk;  // a query sees only keys of its own chunk of this many, 0: no chunks
    Shard shard;

    __device__ __forceinline__ bool hides_nothing() const {
        return window_left < 0 && window_right < 0 && attention_chunk == 0;
    }

    // The first key that a query sees.
    __device__ __forceinline__ int first_visible(Sequence lengths, int query) const {
        const int p = query + (lengths.seqlen_k - lengths.seqlen_q);
        int begin = 0;
        if (window_left >= 0 && p > window_left) begin = p - window_left;
        if (attention_chunk > 0) begin = max(begin, chunk_begin(p, attention_chunk));
        return shard.held(begin);
    }

    // The key after the last one that a query sees. Counted from the sequence's end, which is at most seqlen_q away: counted
    // from position p, which may be near 2^31, it would overflow.
    __device__ __forceinline__ int last_visible(Sequence lengths, int query) const {
        const int behind = lengths.seqlen_q - 1 - query;  // keys after position p
        int hidden = 0;                                   // of those
        if (window_right >= 0) hidden = max(hidden, behind - window_right);
        if (attention_chunk > 0) {
            const int p = lengths.seqlen_k - 1 - behind;
            hidden = max(hidden, behind - (attention_chunk - 1 - (p - chunk_begin(p, attention_chunk))));
        }
        return shard.held(lengths.seqlen_k - hidden);
    }

    // Keys that some query first_query .. last_query sees: what a query sees begins and ends no earlier than what the one
    // before it sees, so the two ends decide.
    __device__ __forceinline__ KeyRange visible_keys(Sequence lengths, int first_query, int last_query) const {
        const int begin = first_visible(lengths, first_query);
        const int end = last_visible(lengths, last_query);
        if (first_query > last_query || begin >= end) return {0, 0};
        return {begin, end};
    }
};
