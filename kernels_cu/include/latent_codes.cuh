// Latent attention on quantised caches: queries and tiles become float32 in shared memory, elements times scales.
#pragma once
#include "codes.cuh"
#include "descale.cuh"
#include "rows_tiles.cuh"
#include "segment.cuh"

// Rows of numbers are shorter than those of codes: the columns that warps multiply, then the rest of a key, up to a whole line.
constexpr int kNumberColumnsV = kScalesTiles ? kColumnPairs * kColumnWarps * 16 : kPaddedHeadDimV;
constexpr int kNumberColumns = kScalesTiles ? (kNumberColumnsV + kHeadDim + 31) / 32 * 32 : kPaddedHeadDim;
using NumberRows = Swizzle<kNumberColumns * kWeightBytes>;

// Loads an item's queries as float32, times their scale; with the sign of softmax_scale. What does not exist is zero.
__device__ __forceinline__ void load_query_numbers(const DecodeParams& p, const Segment& s, u32 query) {
    const long long first = p.lengths.cu_seqlens_q ? p.lengths.cu_seqlens_q[s.sequence] : 0;
    float unit = descale_of(p.q_descale, p.q_descale_strides, s.sequence, s.kv_head);
    if (p.query_flip) unit = p.query_keep ? -unit : 0.0f;
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * kNumberColumns / 4; i += kThreads) {
        const int row = i / (kNumberColumns / 4), chunk = i % (kNumberColumns / 4);
        const bool meets_values = chunk * 4 < kNumberColumnsV;
        const int column = meets_values ? chunk * 4 : chunk * 4 - kNumberColumnsV;
        const int packed = s.first_row + row, position = query_of(p, packed);
        const int head = s.kv_head * p.group + packed - position * p.group;
        float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
        if (row < s.valid_rows && (meets_values ? p.qv && column < kHeadDimV : column < kHeadDim)) {
            const long long element =
                meets_values
                    ? s.sequence * p.qv_batch_stride + (first + position) * p.qv_row_stride + head * p.qv_head_stride
                    : s.sequence * p.q_batch_stride + (first + position) * p.q_row_stride + head * p.q_head_stride + p.key_column;
            const auto* const from = static_cast<const Element::Bits*>(meets_values ? p.qv : p.q) + element + column;
            x = make_float4(Element::to_float(from[0]), Element::to_float(from[1]), Element::to_float(from[2]),
                            Element::to_float(from[3]));
            scale(x, unit);
        }
        store_shared(query + NumberRows::offset(row, chunk), x);
    }
}

// The scales of a key, which may lie behind the last one, and its value; negative infinity for a key of which nothing was copied.
__device__ __forceinline__ float2 scales_of_key(const DecodeParams& p, const Segment& s, u32 key) {
    if (key >= static_cast<u32>(s.keys.end) || (kHasTree && hidden_from_all(p, s, key))) return make_float2(-infinity(), 0.0f);
    float2 scales = {p.key_scale, p.value_scale};
    PageCursor place;
    if constexpr (kHasKeyScales || kHasValueScales) {
        place.enter(p.cache, s.sequence);
        place.seek(p.cache, s.lengths.leftpad + key);
        if (!place.exists()) return make_float2(-infinity(), 0.0f);
    }
    if constexpr (kHasKeyScales) {
        scales.x *= p.k_descale[place.scale(p.k_descale_strides) + s.kv_head * p.k_descale_strides.head];
    } else {
        scales.x *= descale_of(p.k_descale, p.k_descale_strides, s.sequence, s.kv_head);
    }
    if constexpr (kHasValueScales) {
        scales.y *= p.v_descale[place.scale(p.v_descale_strides) + s.kv_head * p.v_descale_strides.head];
    } else {
        scales.y *= descale_of(p.v_descale, p.v_descale_strides, s.sequence, s.kv_head);
    }
    return scales;
}

// Makes numbers of a tile of codes; `scales` (kTileKeys,) are those of its keys.
template <typename Code>
__device__ __forceinline__ void convert_tile(u32 codes, u32 numbers, const float2* scales) {
#pragma unroll 2
    for (int i = threadIdx.x; i < kTileKeys * kNumberColumns / 4; i += kThreads) {
        const int row = i / (kNumberColumns / 4), chunk = i % (kNumberColumns / 4);
        const bool is_value = chunk * 4 < kNumberColumnsV;
        const int code = is_value ? chunk * 4 : chunk * 4 - kNumberColumnsV + kPaddedHeadDimV;
        const u32 four = load_shared_u32(codes + KeyRows::offset(row, code / 16) + code % 16);
        float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
        if (scales[row].x != -infinity()) {
            if constexpr (Code::kBytes == 1) x = codes_to_floats<Code>(four);
            scale(x, is_value ? scales[row].y : scales[row].x);
        }
        store_shared(numbers + NumberRows::offset(row, chunk), x);
    }
}
