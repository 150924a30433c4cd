// Queries of latent attention for a quantised cache: what of a row meets values, and what meets the rest of a key.
#pragma once
#include "query_pass.cuh"
#include "rows_queries.cuh"

// Prepares the queries of latent attention that lie at `query`, a row per warp, as prepare_queries() does. `factors` (2, kRows,)
// are written: of the scores of the rest of the keys, and of those of values, since either has a scale of its own. Where both are
// added up at once they have one power of two, and the first factor is that of both. Between block barriers.
template <typename T, bool kInOrder, bool kAtOnce>
__device__ __forceinline__ void prepare_latent_queries(const DecodeParams& p, const Segment& s, u32 query, float* factors) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float unit = descale_of(p.q_descale, p.q_descale_strides, s.sequence, s.kv_head);
    if (p.query_flip) unit = p.query_keep ? -unit : 0.0f;
    float rest_unit = unit * p.key_scale, value_unit = unit * p.value_scale;
    if (!kHasKeyScales) rest_unit *= descale_of(p.k_descale, p.k_descale_strides, s.sequence, s.kv_head);
    if (!kHasValueScales) value_unit *= descale_of(p.v_descale, p.v_descale_strides, s.sequence, s.kv_head);
#pragma unroll 1
    for (int row = warp; row < kRows; row += kWarps) {
        QueryPart<T, QueryRows, 0, kHeadDimV> values(query, row, lane);
        QueryPart<T, QueryRows, kPaddedHeadDimV, kHeadDim> rest(query, row, lane);
        const float largest_rest = rest.largest(), largest_value = values.largest(), largest = fmaxf(largest_rest, largest_value);
        const QueryPower rest_power(kAtOnce ? largest : largest_rest), value_power(kAtOnce ? largest : largest_value);
        __syncwarp();  // all have read
        values.template store<kInOrder>(value_power);
        rest.template store<kInOrder>(rest_power);
        if (lane == 0) {
            factors[row] = rest_unit * rest_power.unit();
            if constexpr (!kAtOnce) factors[kRows + row] = value_unit * value_power.unit();
        }
    }
}
