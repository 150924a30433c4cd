// Merges the results of several GPUs of one host, which each attended to some of the keys: every GPU writes what the others
// need of its results into their memory, and merges what arrives as merge.cu does. One warp a row (batch, query, head).
//
// No flag follows the data, which would have to wait for it: of every 8 bytes written, 4 are the number of the call (as in
// NCCL's protocol LL), and whoever waits looks at those. What arrives lies in one of two halves of an inbox, which calls take
// in turns. A half can be written again two calls later: a GPU whose results of the call in between have come has ended the
// one before, and has read it. All blocks are resident, so that nobody waits for a block that waits for room.
#include "elements.cuh"
#include "ptx/volatile.cuh"
#include "stream.cuh"

using Bits = ELEMENT::Bits;

constexpr u32 kPatience = 256;                  // looks at an inbox before one at `stop`, which is far away
constexpr int kAtOnce = 8;                      // bytes of a lane; twice as many in an inbox
constexpr int kElements = kAtOnce / ELEMENT_BYTES;
constexpr long long kTurnsBytes = 4 * BLOCKS;   // ahead of the halves: the calls that each block has seen

struct ExchangeParams {
    const unsigned char* partial;       // (ranks, block) or (block): this rank's results, packed, for each or for all
    unsigned char* inbox;               // of this rank
    const unsigned long long* inboxes;  // (ranks,) where they are for this rank
    const unsigned int* stop;           // in host memory: not 0 ends all waiting
    void* out;                          // (batch, queries, heads, headdim)
    float* softmax_lse;                 // (batch, heads, queries)
    long long half_bytes;               // of an inbox
    long long partial_stride;           // bytes between what is for neighbouring ranks, 0 if it is the same
    long long head_bytes;               // of a head in a block: its outputs, its LSE
    int ranks;                          // at most 32
    int rank;
    int batch_size;
    int queries;
    int heads;
    int headdim;
};

// A row: where its outputs and its LSE lie in a block, and which one it is of the results.
struct Row {
    long long out;
    long long lse;
    long long token;
    int head;
};

__device__ __forceinline__ Row row_at(const ExchangeParams& p, int row) {
    const int tokens = p.batch_size * p.queries, head = row / tokens, token = row % tokens;
    const long long begin = head * p.head_bytes, row_bytes = static_cast<long long>(p.headdim) * ELEMENT_BYTES;
    return {begin + token * row_bytes, begin + tokens * row_bytes + token * 4LL, token, head};
}

__device__ __forceinline__ void send(unsigned char* to, uint2 words, u32 turn) {
    const u64 high = static_cast<u64>(turn) << 32;
    store_volatile(reinterpret_cast<ulonglong2*>(to), {high | words.x, high | words.y});
}

// Waits for what was sent; false if the waiting was ended.
__device__ __forceinline__ bool receive(const unsigned char* from, u32 turn, const u32* stop, uint2& words) {
    for (u32 look = 1;; ++look) {
        const ulonglong2 v = load_volatile(reinterpret_cast<const ulonglong2*>(from));
        words = {static_cast<u32>(v.x), static_cast<u32>(v.y)};
        if (v.x >> 32 == turn && v.y >> 32 == turn) return true;
        if (look % kPatience == 0 && load_volatile(stop) != 0) return false;
    }
}

__device__ __forceinline__ float element(uint2 words, int k) {
    const u32 word = k * ELEMENT_BYTES / 4 ? words.y : words.x;
    return ELEMENT::to_float(static_cast<Bits>(word >> 8 * (k * ELEMENT_BYTES % 4)));
}

__device__ __forceinline__ uint2 packed(const float (&values)[kElements]) {
    u32 words[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
        words[k * ELEMENT_BYTES / 4] |= static_cast<u32>(ELEMENT::from_float(values[k])) << 8 * (k * ELEMENT_BYTES % 4);
    }
    return {words[0], words[1]};
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) exchange(const __grid_constant__ ExchangeParams p) {
    wait_for_turn(p);
    launch_next();
    const int lane = threadIdx.x % 32, first = blockIdx.x * WARPS + threadIdx.x / 32, step = BLOCKS * WARPS;
    const int rows = p.batch_size * p.queries * p.heads, row_bytes = p.headdim * ELEMENT_BYTES;
    u32* const turns = reinterpret_cast<u32*>(p.inbox) + blockIdx.x;
    const u32 turn = *turns + 1;
    __syncthreads();
    if (threadIdx.x == 0) *turns = turn;
    // What a rank sends of a row, in an inbox: its outputs, its LSE.
    const auto place = [&](unsigned char* inbox, int rank, int row) {
        const long long number = static_cast<long long>(rank) * rows + row;
        return inbox + kTurnsBytes + (turn & 1) * p.half_bytes + number * (2 * row_bytes + 2 * kAtOnce);
    };

    for (int r = first; r < rows; r += step) {
        const Row row = row_at(p, r);
        for (int i = 1; i < p.ranks; ++i) {  // not all to the same at once
            const int peer = (p.rank + i) % p.ranks;
            const unsigned char* const from = p.partial + peer * p.partial_stride;
            unsigned char* const to = place(reinterpret_cast<unsigned char*>(p.inboxes[peer]), p.rank, r);
            for (int byte = kAtOnce * lane; byte < row_bytes; byte += 32 * kAtOnce) {
                send(to + 2 * byte, *reinterpret_cast<const uint2*>(from + row.out + byte), turn);
            }
            if (lane == 0) send(to + 2 * row_bytes, {*reinterpret_cast<const u32*>(from + row.lse), 0}, turn);
        }
    }

    const float kNone = -infinity();
    const unsigned char* const mine = p.partial + p.rank * p.partial_stride;
    for (int r = first; r < rows; r += step) {
        const Row row = row_at(p, r);
        bool goes_on = true;
        float part = kNone;  // a lane has the LSE of one rank
        if (lane == p.rank) {
            part = *reinterpret_cast<const float*>(mine + row.lse);
        } else if (lane < p.ranks) {
            uint2 words;
            goes_on = receive(place(p.inbox, lane, r) + 2 * row_bytes, turn, p.stop, words);
            part = __uint_as_float(words.x);
        }
        if (!__all_sync(kFullWarp, goes_on)) return;  // nobody looks at the results any more
        float maximum = kNone;
        for (int i = 0; i < p.ranks; ++i) maximum = fmaxf(maximum, __shfl_sync(kFullWarp, part, i));
        float sum = 0.0f;
        for (int i = 0; i < p.ranks; ++i) {
            const float part_i = __shfl_sync(kFullWarp, part, i);
            if (part_i != kNone) sum += expf(part_i - maximum);  // NaN, which the maximum does not show, arrives here
        }
        const float lse = sum == 0.0f ? kNone : maximum + logf(sum);
        const float weight = part == kNone ? 0.0f : expf(part - maximum) * (1.0f / sum);  // as in merge.cu

        unsigned char* const to = static_cast<unsigned char*>(p.out) + (row.token * p.heads + row.head) * row_bytes;
        for (int begin = 0; begin < row_bytes; begin += 32 * kAtOnce) {
            const int byte = begin + kAtOnce * lane;
            float values[kElements] = {};
            for (int i = 0; i < p.ranks; ++i) {
                const float weight_i = __shfl_sync(kFullWarp, weight, i);
                if (weight_i == 0.0f || byte >= row_bytes || !goes_on) continue;
                uint2 words;
                if (i == p.rank) {
                    words = *reinterpret_cast<const uint2*>(mine + row.out + byte);
                } else {
                    goes_on = receive(place(p.inbox, i, r) + 2 * byte, turn, p.stop, words);
                }
#pragma unroll
                for (int k = 0; k < kElements; ++k) values[k] += weight_i * element(words, k);
            }
            if (byte < row_bytes) store_global(reinterpret_cast<uint2*>(to + byte), packed(values));
        }
        if (lane == 0) {
            const long long batch = row.token / p.queries, query = row.token % p.queries;
            p.softmax_lse[(batch * p.heads + row.head) * p.queries + query] = lse;
        }
    }
}
