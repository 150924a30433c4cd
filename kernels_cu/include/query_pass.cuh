// Queries for a quantised cache: one pass over those of an item, in shared memory, before its keys are read.
//
// Each row is multiplied by a power of two that takes its largest element into [2^14, 2^15), so that float16 holds it whatever
// its exponents were: exactly down to 2^-28 of the largest element, and to within 2^-40 of it below. That, the scales of
// queries and keys, and the sign of softmax_scale become one factor of the row's scores.
//
// The chunks of a row lie where Rows::offset(row, chunk) says.
#pragma once
#include "codes.cuh"
#include "fragment.cuh"
#include "queries.cuh"
#include "segment.cuh"

// Four neighbours of a query row in shared memory, number `quad` of the row.
template <typename T, typename Rows>
__device__ __forceinline__ float4 load_query(u32 query, int row, int quad) {
    constexpr int kQuads = 16 / (4 * T::kBytes);  // of a 16-byte chunk
    const u32 from = query + Rows::offset(row, quad / kQuads) + quad % kQuads * 4 * T::kBytes;
    if constexpr (T::kBytes == 1) {
        return codes_to_floats<T>(load_shared_u32(from));
    } else {
        const uint2 packed = load_shared_u32x2(from);
        const auto number = [](u32 bits) { return T::to_float(static_cast<typename T::Bits>(bits)); };
        return make_float4(number(packed.x), number(packed.x >> 16), number(packed.y), number(packed.y >> 16));
    }
}

// Stores them as float16: in their order, or in that in which an MMA meets the codes of a key, of each 16 elements two chunks of
// four pairs.
template <typename Rows, bool kInOrder>
__device__ __forceinline__ void store_query(u32 query, int row, int quad, float4 x) {
    if constexpr (kInOrder) {
        const float2 four = {__uint_as_float(Float16::pack(x.x, x.y)), __uint_as_float(Float16::pack(x.z, x.w))};
        store_shared(query + Rows::offset(row, quad / 2) + quad % 2 * 8, four);
        return;
    }
    constexpr bool kNeighbours = CacheElement::kPairsNeighbours;
    for_each<2>([&](int half) {
        const float low = kNeighbours ? (half ? x.z : x.x) : (half ? x.y : x.x);
        const float high = kNeighbours ? (half ? x.w : x.y) : (half ? x.w : x.z);
        store_shared(query + Rows::offset(row, quad / 4 * 2 + half) + quad % 4 * 4, Float16::pack(low, high));
    });
}

// A power of two that takes a size into [2^14, 2^15), as far as float32 has the power and its inverse.
class QueryPower {
public:
    __device__ __forceinline__ explicit QueryPower(float largest) : power_(min(14 + 127 - (__float_as_int(largest) >> 23), 126)) {}

    __device__ __forceinline__ float factor() const { return __int_as_float((127 + power_) << 23); }

    // What 1 in a product with codes stands for.
    __device__ __forceinline__ float unit() const { return __int_as_float((127 - power_) << 23) * CacheElement::kUnit; }

private:
    int power_;
};

// kCount elements of a row from kFirst on, which the lanes of a warp have in registers on their way.
template <typename T, typename Rows, int kFirst, int kCount>
class QueryPart {
    static constexpr int kQuads = (kCount / 4 + 31) / 32;

public:
    __device__ __forceinline__ QueryPart(u32 query, int row, int lane) : query_(query), row_(row), lane_(lane) {
        for_each<kQuads>([&](int i) {
            x_[i] = has(i) ? load_query<T, Rows>(query, row, kFirst / 4 + lane + i * 32) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        });
    }

    // The largest size, which all lanes learn.
    __device__ __forceinline__ float largest() const {
        float largest = 0.0f;
        for_each<kQuads>([&](int i) {
            const float4 x = x_[i];
            largest = fmaxf(fmaxf(largest, fmaxf(fabsf(x.x), fabsf(x.y))), fmaxf(fabsf(x.z), fabsf(x.w)));
        });
        return lanes_maximum<32>(largest);
    }

    // Stores them, times a power, when all lanes have read what lies there.
    template <bool kInOrder>
    __device__ __forceinline__ void store(QueryPower power) {
        for_each<kQuads>([&](int i) {
            if (!has(i)) return;
            scale(x_[i], power.factor());
            store_query<Rows, kInOrder>(query_, row_, kFirst / 4 + lane_ + i * 32, x_[i]);
        });
    }

private:
    __device__ __forceinline__ bool has(int i) const { return lane_ + i * 32 < kCount / 4; }

    u32 query_;
    int row_, lane_;
    float4 x_[kQuads];
};

// Prepares the queries that lie at `query`, and writes the factor of each row: a row per warp. Between block barriers.
template <typename T, typename Rows, bool kInOrder>
__device__ __forceinline__ void prepare_queries(const DecodeParams& p, const Segment& s, u32 query, float* factors) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float unit = descale_of(p.q_descale, p.q_descale_strides, s.sequence, s.kv_head);
    if (!kHasKeyScales) unit *= descale_of(p.k_descale, p.k_descale_strides, s.sequence, s.kv_head);
    if (p.query_flip) unit = p.query_keep ? -unit : 0.0f;
    if constexpr (T::kBytes == 4) {  // float32 queries stay as they are
        for (int row = threadIdx.x; row < kRows; row += kThreads) factors[row] = unit;
    } else {
#pragma unroll 1
        for (int row = warp; row < kRows; row += kWarps) {
            QueryPart<T, Rows, 0, kHeadDim> part(query, row, lane);
            const QueryPower power(part.largest());
            __syncwarp();  // all have read
            part.template store<kInOrder>(power);
            if (lane == 0) factors[row] = unit * power.unit();
        }
    }
}
