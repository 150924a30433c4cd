// Merges partial results over disjoint keys: out = sum_i exp(lse_i - lse) out_i with lse = log sum_i exp(lse_i).
// One warp a row (batch, query, head); a part without keys (LSE -inf) counts as nothing, whatever its output holds.
#include "elements.cuh"
#include "stream.cuh"

using Bits = ELEMENT::Bits;

struct MergeParams {
    const void* outs;   // (states, batch, queries, heads, headdim)
    const float* lses;  // (states, batch, heads, queries), each state contiguous
    void* out;          // (batch, queries, heads, headdim)
    float* lse;         // (batch, heads, queries)
    long long outs_stride;  // elements from one state to the next: states of several ranks come packed with their LSE
    long long lses_stride;
    int states;
    int batch_size;
    int queries;
    int heads;
    int headdim;
};

extern "C" __global__ void __launch_bounds__(WARPS * 32) merge(const __grid_constant__ MergeParams p) {
    wait_for_turn();
    launch_next();
    const float kNone = -infinity();
    const long long rows = static_cast<long long>(p.batch_size) * p.queries * p.heads;
    const long long row = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    const int head = row % p.heads;
    const long long batch = row / p.heads / p.queries, query = row / p.heads % p.queries;
    const float* lses = p.lses + (batch * p.heads + head) * p.queries + query;

    float maximum = kNone;
    for (int i = 0; i < p.states; ++i) maximum = fmaxf(maximum, lses[i * p.lses_stride]);
    float sum = 0.0f;
    if (maximum != kNone) {
        for (int i = 0; i < p.states; ++i) sum += expf(lses[i * p.lses_stride] - maximum);
    }
    const float lse = sum == 0.0f ? kNone : maximum + logf(sum);

    const Bits* outs = static_cast<const Bits*>(p.outs) + row * p.headdim;
    for (int column = threadIdx.x % 32; column < p.headdim; column += 32) {
        float value = 0.0f;
        for (int i = 0; i < p.states; ++i) {
            const float part = lses[i * p.lses_stride];
            if (part != kNone) value += expf(part - lse) * ELEMENT::to_float(outs[i * p.outs_stride + column]);
        }
        static_cast<Bits*>(p.out)[row * p.headdim + column] = ELEMENT::from_float(value);
    }
    if (threadIdx.x % 32 == 0) p.lse[(batch * p.heads + head) * p.queries + query] = lse;
}
