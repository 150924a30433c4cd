// Merges partial results over disjoint keys: out = sum_i exp(lse_i - lse) out_i with lse = log sum_i exp(lse_i).
// One warp a row (batch, query, head); a part without keys (LSE -inf, or +inf as FlashAttention-2 has it) and one that the mask
// leaves out count as nothing, whatever their outputs hold. The result may go to where one of the parts is.
#include "elements.cuh"
#include "stream.cuh"

using Bits = ELEMENT::Bits;

// Steps of an array (states, batch, queries, heads), in elements.
struct StateStrides {
    long long state;
    long long batch;
    long long query;
    long long head;
};

struct MergeParams {
    const void* outs;           // (states, batch, queries, heads, headdim)
    const float* lses;          // (states, batch, heads, queries)
    const unsigned char* mask;  // (states, batch, queries) which count, or null: all
    void* out;                  // (batch, queries, heads, headdim)
    float* lse;                 // (batch, heads, queries)
    StateStrides outs_strides;
    StateStrides lses_strides;
    StateStrides mask_strides;
    long long column_stride;    // of outs
    int states;
    int batch_size;
    int queries;
    int heads;
    int headdim;
    float unit;                 // of the LSEs, in natural ones: 1, or ln 2 for those to base 2
};

// The row's place in an array, of state 0.
__device__ __forceinline__ long long place(StateStrides s, long long batch, long long query, int head) {
    return batch * s.batch + query * s.query + head * s.head;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) merge(const __grid_constant__ MergeParams p) {
    wait_for_turn(p);
    launch_next();
    const float kNone = -infinity();
    const long long rows = static_cast<long long>(p.batch_size) * p.queries * p.heads;
    const long long row = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    const int head = row % p.heads;
    const long long batch = row / p.heads / p.queries, query = row / p.heads % p.queries;
    const float* const lses = p.lses + place(p.lses_strides, batch, query, head);
    const unsigned char* const mask = p.mask ? p.mask + place(p.mask_strides, batch, query, head) : nullptr;
    const auto lse_of = [&](int i) {
        const float lse = lses[i * p.lses_strides.state];
        return lse == infinity() || (mask && !mask[i * p.mask_strides.state]) ? kNone : lse;
    };

    float maximum = kNone;
    for (int i = 0; i < p.states; ++i) maximum = fmaxf(maximum, lse_of(i));
    float sum = 0.0f;
    for (int i = 0; i < p.states; ++i) {
        const float part = lse_of(i);
        if (part != kNone) sum += expf((part - maximum) * p.unit);  // NaN, which the maximum does not show, arrives here
    }
    const float lse = sum == 0.0f ? kNone : maximum + logf(sum) / p.unit;
    const float share = 1.0f / sum;  // a large LSE has lost it in rounding

    const Bits* const outs = static_cast<const Bits*>(p.outs) + place(p.outs_strides, batch, query, head);
    for (int column = threadIdx.x % 32; column < p.headdim; column += 32) {
        float value = 0.0f;
        for (int i = 0; i < p.states; ++i) {
            const float part = lse_of(i);
            if (part == kNone) continue;
            const float weight = expf((part - maximum) * p.unit) * share;
            if (weight == 0.0f) continue;  // however large the output is
            const Bits bits = outs[i * p.outs_strides.state + column * p.column_stride];
            value += weight * ELEMENT::to_float(bits);
        }
        static_cast<Bits*>(p.out)[row * p.headdim + column] = ELEMENT::from_float(value);
    }
    __syncwarp();  // all lanes have read the LSEs, one of which may be written now
    if (threadIdx.x % 32 == 0) p.lse[(batch * p.heads + head) * p.queries + query] = lse;
}
