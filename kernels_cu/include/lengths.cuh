// How long the sequences of a step are.
#pragma once

// Lengths of one sequence; every field is >= 0 whatever the arrays on the device hold.
struct Sequence {
    int leftpad;   // first valid slot of the cache
    int seqlen_k;  // valid keys of the whole sequence, appended ones included
    int seqlen_q;  // query positions
};

// end - begin, or 0 where that is negative; unsigned, for it may need 32 bits.
__device__ __forceinline__ unsigned difference(int begin, int end) {
    return end > begin ? (unsigned)end - (unsigned)begin : 0u;
}

struct Lengths {
    const int* cache_seqlens;     // (batch,) before the append, leftpad included
    const int* cache_leftpad;     // (batch,) or null: 0 each
    const int* cu_seqlens_q;      // (batch + 1,) or null: max_seqlen_q each
    const int* cu_seqlens_k_new;  // (batch + 1,) or null: seqlen_k_new each
    int max_seqlen_q;
    int seqlen_k_new;

    __device__ __forceinline__ Sequence of(int s) const {
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
};
