// Writes the step's new keys and values into the cache and applies the rotary embedding to them and to the queries.
//
// Runs before decode.cu, which then finds every key in the cache: no part of an item has to know whether a key is new. One
// warp takes one row (token, head): first all rows of q, if they are rotated, then those of k, then those of v.
// Rotation is computed in float32 without fused multiply-adds, so that its bits do not depend on the compiler.
#include "append_params.cuh"
#include "elements.cuh"
#include "stream.cuh"

using Bits = ELEMENT::Bits;

constexpr int kWarps = WARPS;

// The sequence and the position in it of a token of a ragged or padded batch; the sequence is negative for a token of none.
struct Token {
    int sequence, position;

    __device__ __forceinline__ Token(int token, const int* cu_seqlens, int seqlen, int batch_size) {
        if (!cu_seqlens) {
            sequence = token / seqlen;
            position = token - sequence * seqlen;
            return;
        }
        int low = 0, high = batch_size;  // the last sequence that begins at or before the token
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (cu_seqlens[middle] <= token) low = middle;
            else high = middle;
        }
        sequence = cu_seqlens[0] <= token && token < cu_seqlens[batch_size] ? low : -1;
        position = token - cu_seqlens[low];
    }
};

// Copies a row of `dim` elements, the first `rotary_dim` of them rotated to `position`.
__device__ __forceinline__ void rotate_row(const AppendParams& p, const Bits* from, Bits* to, int dim, int rotary_dim,
                                           int position) {
    const int half = rotary_dim / 2;
    const Bits* cosines = static_cast<const Bits*>(p.rotary_cos) + static_cast<long long>(position) * half;
    const Bits* sines = static_cast<const Bits*>(p.rotary_sin) + static_cast<long long>(position) * half;
    for (int pair = threadIdx.x % 32; pair < dim / 2; pair += 32) {
        const bool adjacent = p.rotary_interleaved || pair >= half;
        const int first = adjacent ? 2 * pair : pair, second = adjacent ? 2 * pair + 1 : pair + half;
        Bits a = from[first], b = from[second];
        if (pair < half) {
            const float x = ELEMENT::to_float(a), y = ELEMENT::to_float(b);
            const float c = ELEMENT::to_float(cosines[pair]), s = ELEMENT::to_float(sines[pair]);
            a = ELEMENT::from_float(__fsub_rn(__fmul_rn(x, c), __fmul_rn(y, s)));
            b = ELEMENT::from_float(__fadd_rn(__fmul_rn(x, s), __fmul_rn(y, c)));
        }
        to[first] = a;
        to[second] = b;
    }
}

// The row of a slot of the cache.
__device__ __forceinline__ Bits* cache_row(void* cache, const PageCursor& place, CacheStrides strides, int head) {
    return reinterpret_cast<Bits*>(static_cast<char*>(cache) + 16ll * (place.units(strides) + head * strides.head));
}

extern "C" __global__ void __launch_bounds__(kWarps * 32) append(const __grid_constant__ AppendParams p) {
    wait_for_turn();
    launch_next();
    long long row = static_cast<long long>(blockIdx.x) * kWarps + threadIdx.x / 32;

    const long long query_rows = static_cast<long long>(p.query_tokens) * p.num_heads_q;
    if (row < query_rows) {
        const int token = row / p.num_heads_q, head = row - static_cast<long long>(token) * p.num_heads_q;
        const Token at(token, p.lengths.cu_seqlens_q, p.lengths.max_seqlen_q, p.batch_size);
        if (at.sequence < 0) return;
        const int base = (p.rotary_seqlens ? p.rotary_seqlens : p.lengths.cache_seqlens)[at.sequence];
        // Ragged queries have no batch stride and count their tokens through.
        const int position = p.lengths.cu_seqlens_q ? token : at.position;
        const long long from = at.sequence * p.q_batch_stride + position * p.q_row_stride + head * p.q_head_stride;
        rotate_row(p, static_cast<const Bits*>(p.q) + from, static_cast<Bits*>(p.q_rotated) + row * p.headdim, p.headdim,
                   p.rotary_dim, p.rotary_moves ? base + at.position : base);
        return;
    }
    row -= query_rows;
    const long long key_rows = static_cast<long long>(p.new_tokens) * p.num_heads_kv;
    const bool is_value = row >= key_rows;
    if (is_value) row -= key_rows;
    if (row >= key_rows) return;

    const int token = row / p.num_heads_kv, head = row - static_cast<long long>(token) * p.num_heads_kv;
    const Token at(token, p.lengths.cu_seqlens_k_new, p.lengths.seqlen_k_new, p.batch_size);
    if (at.sequence < 0) return;
    const int key = p.lengths.cache_seqlens[at.sequence] + at.position;
    if (key < 0 || !p.shard.holds(key)) return;
    const int slot = p.shard.held(key);
    if (!p.cache.has_room(at.sequence, slot)) return;
    PageCursor place;
    place.enter(p.cache, at.sequence);
    place.seek(p.cache, slot);
    if (!place.exists()) return;
    const int position = p.lengths.cu_seqlens_k_new ? token : at.position;
    if (is_value) {
        const long long from = at.sequence * p.v_batch_stride + position * p.v_token_stride + head * p.v_new_head_stride;
        rotate_row(p, static_cast<const Bits*>(p.v) + from, cache_row(p.v_cache, place, p.cache.v, head), p.headdim_v, 0, 0);
    } else {
        const int base = (p.rotary_seqlens ? p.rotary_seqlens : p.lengths.cache_seqlens)[at.sequence];
        const long long from = at.sequence * p.k_batch_stride + position * p.k_token_stride + head * p.k_new_head_stride;
        rotate_row(p, static_cast<const Bits*>(p.k) + from, cache_row(p.k_cache, place, p.cache.k, head), p.headdim,
                   p.rotary_dim, base + at.position);
    }
}
