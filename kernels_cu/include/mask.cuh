// Which keys a query sees. Keys are counted from the sequence's leftpad: key 0 is its first valid one.
//
// A mask is data and three functions: first_visible and last_visible bound the keys of one query, visible_keys those of
// several. The planner cuts by them, attention reads by them, and hides by them what single rows do not see. Query i stands at
// position p = i + seqlen_k - seqlen_q, so that the last query stands at the last key.
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

struct Mask {
    int window_left;      // keys before its own position that a query sees, -1: all
    int window_right;     // keys after it, -1: all; 0 is a causal mask
    int attention_chunk;  // a query sees only keys of its own chunk of this many, 0: no chunks

    __device__ __forceinline__ bool hides_nothing() const {
        return window_left < 0 && window_right < 0 && attention_chunk == 0;
    }

    // The first key that a query sees.
    __device__ __forceinline__ int first_visible(Sequence lengths, int query) const {
        const int p = query + (lengths.seqlen_k - lengths.seqlen_q);
        int begin = 0;
        if (window_left >= 0 && p > window_left) begin = p - window_left;
        if (attention_chunk > 0) begin = max(begin, chunk_begin(p, attention_chunk));
        return begin;
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
        return lengths.seqlen_k - hidden;
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
