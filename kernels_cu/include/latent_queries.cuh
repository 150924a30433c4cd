// Queries of an item of latent attention in shared memory: what meets the values, then what meets the rest of the keys; rows as
// the tiles have them.
#pragma once
#include "queries.cuh"
#include "rows_tiles.cuh"

// Starts the copy of an item's queries; what does not exist is zero. The copies belong to the group that is committed next.
__device__ __forceinline__ void load_latent_queries(const DecodeParams& p, const Segment& s, u32 query) {
    constexpr int kValueChunks = kPaddedHeadDimV * Element::kBytes / 16;
    const long long first = p.lengths.cu_seqlens_q ? p.lengths.cu_seqlens_q[s.sequence] : 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
        const int row = i / kChunks, chunk = i % kChunks;
        const bool meets_values = chunk < kValueChunks;
        const int byte = (meets_values ? chunk : chunk - kValueChunks) * 16;
        const bool exists =
            row < s.valid_rows && (meets_values ? p.qv && byte < kHeadDimV * Element::kBytes : byte < kHeadDim * Element::kBytes);
        const int packed = s.first_row + row, position = query_of(p, packed);
        const int head = s.kv_head * p.group + packed - position * p.group;
        const long long element =
            meets_values
                ? s.sequence * p.qv_batch_stride + (first + position) * p.qv_row_stride + head * p.qv_head_stride
                : s.sequence * p.q_batch_stride + (first + position) * p.q_row_stride + head * p.q_head_stride + p.key_column;
        const char* const from = static_cast<const char*>(meets_values ? p.qv : p.q);
        cp_async_16_or_zero(exists, query + QueryRows::offset(row, chunk),
                            exists ? from + element * Element::kBytes + byte : static_cast<const char*>(p.q));
    }
}
