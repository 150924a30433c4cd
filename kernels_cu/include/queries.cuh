// Queries of an item in shared memory: kRows packed rows, chunk by chunk of 16 bytes where Rows::offset(row, chunk) says.
#pragma once
#include "ptx/copies.cuh"
#include "segment.cuh"
#include "swizzle.cuh"

constexpr int kQueryBytes = kPaddedHeadDim * (Element::kBytes == 4 ? 4 : 2);  // those of 8 bits become float16
constexpr int kChunks = kQueryBytes / 16;  // pieces of 16 bytes of a query

// Starts the copy of an item's queries to shared memory; what does not exist is zero. The copies belong to the group that is
// committed next.
template <typename Rows>
__device__ __forceinline__ void load_queries(const DecodeParams& p, const Segment& s, u32 query) {
    const int* const cu_seqlens = p.lengths.cu_seqlens_q;
    const long long start = s.sequence * p.q_batch_stride + (cu_seqlens ? cu_seqlens[s.sequence] : 0) * p.q_row_stride;
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
        const int row = i / kChunks, chunk = i % kChunks;
        const bool exists = row < s.valid_rows && chunk * 16 < kHeadDim * Element::kBytes;
        const int packed = s.first_row + row, position = query_of(p, packed);
        const int head = s.kv_head * p.group + packed - position * p.group;
        const long long element = start + position * p.q_row_stride + head * p.q_head_stride;
        const char* from = static_cast<const char*>(p.q) + (exists ? element * Element::kBytes + chunk * 16 : 0);
        cp_async_16_or_zero(exists, query + Rows::offset(row, chunk), from);
    }
}

// Turns the signs of the queries that this thread has copied, for a negative softmax_scale, or makes them zero, for one of zero.
template <typename Rows>
__device__ __forceinline__ void flip_queries(u32 keep, u32 flip, unsigned char* query) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
        uint4& elements = *reinterpret_cast<uint4*>(query + Rows::offset(i / kChunks, i % kChunks));
        elements.x = elements.x & keep ^ flip, elements.y = elements.y & keep ^ flip;
        elements.z = elements.z & keep ^ flip, elements.w = elements.w & keep ^ flip;
    }
}
