// What append.cu is told. One struct by value; cuflash/kernels/source.py reads its NumPy twin from this text.
#pragma once
#include "descale.cuh"
#include "lengths.cuh"
#include "mask.cuh"
#include "paging.cuh"

struct AppendParams {
    const void* q;            // (batch, seqlen_q, heads_q, headdim) or (total_q, heads_q, headdim)
    void* q_rotated;          // the same, contiguous
    const void* k;            // (batch, seqlen_new, heads_kv, headdim) or (total_new, heads_kv, headdim)
    const void* v;            // (batch, seqlen_new, heads_kv, headdim_v) or (total_new, heads_kv, headdim_v), or null: keys bring them
    void* k_cache;            // (pages, page_size, heads_kv, headdim)
    void* v_cache;            // (pages, page_size, heads_kv, headdim_v)
    const void* rotary_cos;   // (positions, rotary_dim / 2)
    const void* rotary_sin;   // (positions, rotary_dim / 2)
    float* k_descale;         // with a quantised cache: (batch, heads_kv), or one number, or null: 1 ..
    float* v_descale;         // .. or (pages, page_size, heads_kv), written
    const int* rotary_seqlens;  // (batch,) or null: cache_seqlens
    Lengths lengths;
    KVCache cache;
    Shard shard;
    long long q_batch_stride;  // elements, as all strides but the cache's
    long long q_row_stride;
    long long q_head_stride;
    long long k_batch_stride;
    long long k_token_stride;
    long long k_new_head_stride;
    long long v_batch_stride;
    long long v_token_stride;
    long long v_new_head_stride;
    DescaleStrides k_descale_strides;
    DescaleStrides v_descale_strides;
    float k_scale;  // factors of the scales that are given
    float v_scale;
    int finds_k_scales;  // one per key and head
    int finds_v_scales;
    int batch_size;
    int query_tokens;  // 0: queries are not rotated
    int new_tokens;
    int num_heads_q;
    int num_heads_kv;
    int headdim;
    int headdim_v;
    int rotary_first;  // the first column of q and k that is rotated
    int rotary_dim;
    int rotary_interleaved;
    int rotary_moves;  // query i stands at base + i, else all queries at base
};
