// Queries of an item of many rows in shared memory.
#pragma once
#include "queries.cuh"
#include "rows_tiles.cuh"

constexpr int kChunksThere = (kHeadDim * Element::kBytes + 15) / 16;  // of a row of q, in memory

// Starts the copy of kCount chunks of each packed row to its chunks from kFirst on; behind the first kThere, and of rows that do
// not exist, they are zero. `from` is where those of query 0, head 0 of the first sequence begin, in q or qv; strides are the
// array's. The copies belong to the group that is committed next.
//
// Warps divide the rows and lanes a row's chunks. Where a row begins takes twenty instructions: one lane finds it for all.
template <int kFirst, int kCount, int kThere>
__device__ __forceinline__ void load_query_chunks(const DecodeParams& p, const Segment& s, u32 query, const void* from,
                                                  long long batch_stride, long long row_stride, long long head_stride) {
    constexpr int kLanes = kCount % 32 == 0 ? 32 : kCount % 16 == 0 ? 16 : kCount % 8 == 0 ? 8 : 4;  // side by side on a row
    constexpr int kRowsAtOnce = 32 / kLanes, kRowsOfWarp = kRows / kWarps;
    static_assert(kCount % kLanes == 0 && kRowsOfWarp <= 32 && kRowsOfWarp % kRowsAtOnce == 0, "whole passes of rows");
    const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * kRowsOfWarp;
    const int* const cu_seqlens = p.lengths.cu_seqlens_q;
    const int packed = s.first_row + first_row + lane % kRowsOfWarp, position = query_of(p, packed);
    const int head = s.kv_head * p.group + packed - position * p.group;
    const long long token = (cu_seqlens ? cu_seqlens[s.sequence] : 0) + position;
    const u64 begin = (s.sequence * batch_stride + token * row_stride + head * head_stride) * Element::kBytes;
#pragma unroll 1
    for (int i = 0; i < kRowsOfWarp; i += kRowsAtOnce) {
        const int row = i + lane / kLanes;
        const u64 byte = __shfl_sync(kFullWarp, begin, row) + lane % kLanes * 16;
        const bool exists = first_row + row < s.valid_rows;
        for_each<kCount / kLanes>([&](int run) {
            const int chunk = run * kLanes + lane % kLanes;
            const bool is_there = exists && (run * kLanes + kLanes <= kThere || chunk < kThere);
            cp_async_16_or_zero(is_there, query + QueryRows::offset(first_row + row, kFirst + chunk),
                                static_cast<const char*>(is_there ? from : p.q) + (is_there ? byte + run * kLanes * 16 : 0));
        });
    }
}

// The same of whole rows of q.
__device__ __forceinline__ void load_query_rows(const DecodeParams& p, const Segment& s, u32 query) {
    load_query_chunks<0, kChunks, kChunksThere>(p, s, query, p.q, p.q_batch_stride, p.q_row_stride, p.q_head_stride);
}

// The same of latent attention: what meets the values, or zeros without qv, then what meets the rest of the keys.
__device__ __forceinline__ void load_latent_queries(const DecodeParams& p, const Segment& s, u32 query) {
    constexpr int kValueChunks = kPaddedHeadDimV * Element::kBytes / 16;
    constexpr int kThereV = (kHeadDimV * Element::kBytes + 15) / 16;
    if (p.qv) {
        load_query_chunks<0, kValueChunks, kThereV>(p, s, query, p.qv, p.qv_batch_stride, p.qv_row_stride, p.qv_head_stride);
    } else {
        load_query_chunks<0, kValueChunks, 0>(p, s, query, p.q, p.q_batch_stride, p.q_row_stride, p.q_head_stride);
    }
    const void* const rest = static_cast<const char*>(p.q) + p.key_column * Element::kBytes;
    load_query_chunks<kValueChunks, kChunks - kValueChunks, kChunksThere>(p, s, query, rest, p.q_batch_stride, p.q_row_stride,
                                                                          p.q_head_stride);
}

// Turns the signs of queries that have landed, as flip_queries() does, where softmax_scale is not positive. Those are others' who
// copied them: all meet before, and must meet behind.
__device__ __forceinline__ void flip_query_rows(const DecodeParams& p, unsigned char* query) {
    if (!p.query_flip) return;
    worker_barrier();
    flip_queries<QueryRows>(p.query_keep, p.query_flip, query);
}
