// What kernels of attention are told. One struct by value; cuflash/kernels/source.py reads its NumPy twin from this text.
#pragma once
#include "descale.cuh"
#include "fast_divisor.cuh"
#include "lengths.cuh"
#include "mask.cuh"
#include "paging.cuh"

// Results of the same rows over other keys, to be merged in: merge_with. Kernels that do so are variants, kMerges.
struct MergeWith {
    const void* merge_out;       // as out
    const float* merge_lse;      // as softmax_lse
    long long batch_stride;      // elements, as all strides
    long long row_stride;
    long long head_stride;
    long long column_stride;
    long long lse_batch_stride;
    long long lse_head_stride;
    long long lse_row_stride;
};

// What every block asks for before its first copy lies side by side, at the beginning: parameters come to a multiprocessor by lines
// of 64 bytes, and a launch that reads 2 MB has no time for many of them.
struct DecodeParams {
    const int* plan;           // schedule.cuh
    const void* q;             // (batch, seqlen_q, heads_q, headdim) or (total_q, heads_q, headdim)
    const void* k_cache;       // (pages, page_size, heads_kv, headdim); contiguous caches are pages of a whole row
    const void* v_cache;       // (pages, page_size, heads_kv, headdim_v)
    Lengths lengths;
    Mask mask;
    int batch_size;
    int total_q;               // rows of ragged queries, else 0
    int num_heads_kv;
    int group;                 // query heads per KV head
    int row_blocks;
    FastDivisor by_num_heads_kv;
    FastDivisor by_group;
    FastDivisor by_row_blocks;
    long long q_batch_stride;  // elements, as all strides of q and out
    long long q_row_stride;
    long long q_head_stride;
    KVCache cache;
    unsigned int query_flip;   // sign bits to turn where softmax_scale is negative: queries are negated instead
    unsigned int query_keep;   // with query_flip: bits to keep, none where softmax_scale is 0
    float score_scale;         // weights are exp2(score * score_scale - ..): log2(e) |softmax_scale|; log2(e) for capped scores
    float score_slack;         // 8 / score_scale, at most 2^120
    float lse_scale;           // score_scale / log2(e)
    void* out;                 // (batch, seqlen_q, heads_q, headdim_v) or (total_q, heads_q, headdim_v)
    float* softmax_lse;        // (batch, heads_q, seqlen_q) or (heads_q, total_q), or null: nobody asks
    const float* sinks;        // (heads_q,) or null
    float* partials;           // (slots, ROW_PARTS, ROWS, HEAD_DIM_V) unnormalised outputs, then (.., ROWS, 2) maxima and sums
    unsigned int* counters;    // (blocks, 3) zero before and after every launch; of items that lie in several blocks
    long long out_batch_stride;
    long long out_row_stride;
    long long out_head_stride;
    long long lse_batch_stride;
    long long lse_head_stride;
    MergeWith merge;
    const void* qv;            // as q with headdim_v: what meets the values, or null: mla.cu and mla_wgmma.cu alone
    long long qv_batch_stride;
    long long qv_row_stride;
    long long qv_head_stride;
    const float* q_descale;    // (batch, heads_kv), or one number, or null: 1
    const float* k_descale;    // the same, or with KEY_SCALES (pages, page_size, heads_kv)
    const float* v_descale;    // likewise
    DescaleStrides q_descale_strides;
    DescaleStrides k_descale_strides;
    DescaleStrides v_descale_strides;
    Tree tree;
    int key_column;            // mla.cu, mla_wgmma.cu: where in rows of q and k_cache what is no value's begins
    int split_size;            // with HAS_SPLIT_SIZE
    int max_splits;            // of an item that may be cut: slots for so many splits
    int slots_by_item;         // items have slots of their own, else the blocks in which they begin
    int num_slots;
    float tanh_scale;          // with softcap: 2 log2(e) softmax_scale / softcap
    float score_cap;           // softcap
    float cap_scale;           // softmax_scale
    float cap_inverse;         // 2^64 / softcap
    float key_scale;           // with a quantised cache: factor of the keys in mla.cu; elsewhere it is part of score_scale
    float value_scale;         // with a quantised cache: factor of the output
    int cap_exactly;           // the cap is so large, or the scale so small, that the short way is too coarse
};
