// What a launch is told. One struct by value; cuflash/kernels.py reads its NumPy twin from this text.
#pragma once

struct DecodeParams {
    const void* q;                // (batch, seqlen_q, heads_q, headdim) or (total_q, heads_q, headdim)
    const void* k_cache;          // (pages, page_size, heads_kv, headdim); contiguous caches are pages of a whole row
    const void* v_cache;          // (pages, page_size, heads_kv, headdim_v)
    void* out;                    // (batch, seqlen_q, heads_q, headdim_v) or (total_q, heads_q, headdim_v)
    float* softmax_lse;           // (batch, heads_q, seqlen_q) or (heads_q, total_q), or null: nobody asks
    const float* sinks;           // (heads_q,) or null
    const int* cache_seqlens;     // (batch,)
    const int* cache_leftpad;     // (batch,) or null
    const int* cache_batch_idx;   // (batch,) or null: row of the cache or of the page table
    const int* page_table;        // (rows, pages per sequence) or null: contiguous
    const int* cu_seqlens_q;      // (batch + 1,) or null
    const int* cu_seqlens_k_new;  // (batch + 1,) or null
    const int* plan;              // schedule.cuh
    float* partials;              // (slots, ROWS, HEAD_DIM_V) unnormalised outputs, then (slots, ROWS, 2) maxima and sums
    unsigned int* counters;       // (blocks,) zero before and after every launch
    long long q_batch_stride;     // elements, as all strides of q and out
    long long q_row_stride;
    long long q_head_stride;
    long long out_batch_stride;
    long long out_row_stride;
    long long out_head_stride;
    long long lse_batch_stride;
    long long lse_head_stride;
    long long page_table_stride;
    unsigned int k_page_stride;  // 16-byte units, as all strides of the caches: 32 bits reach 64 GiB
    unsigned int k_row_stride;
    unsigned int k_head_stride;
    unsigned int v_page_stride;
    unsigned int v_row_stride;
    unsigned int v_head_stride;
    int max_seqlen_q;
    int max_seqlen_k_new;
    int num_heads_kv;
    int group;  // query heads per KV head
    unsigned int group_magic;  // row / group == row * magic >> shift, see divided()
    int group_shift;
    int row_blocks;
    unsigned int row_blocks_magic;
    int row_blocks_shift;
    unsigned int heads_kv_magic;
    int heads_kv_shift;
    int page_size;
    unsigned int page_size_magic;
    int page_size_shift;
    int window_left;  // -1: unbounded
    int window_right;
    int attention_chunk;  // 0: none
    int split_size;       // with HAS_SPLIT_SIZE
    int max_splits;       // slots per item with split_size
    int num_slots;
    unsigned int query_flip;  // sign bits to turn where softmax_scale is negative: queries are negated instead
    float score_scale;  // weights are exp2(score * score_scale - ..); 1 with softcap, whose scores are in log2 units
    float score_slack;  // 8 / score_scale
    float tanh_scale;   // with softcap: 2 log2(e) softmax_scale / softcap
    float score_cap;    // softcap * log2(e)
};
