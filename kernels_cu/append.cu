// Writes the step's new keys and values into the cache and applies the rotary embedding to them and to the queries.
//
// Runs before decode.cu, which then finds every key in the cache: no part of an item has to know whether a key is new. One
// warp takes one row (token, head): first all rows of q, if they are rotated, then those of k, then those of v.
// Rotation is computed in float32 without fused multiply-adds, so that its bits do not depend on the compiler. A quantised
// cache gets codes of what that gives, nothing is rounded in between: by the scales that there are, or where every key and
// head has its own, by the one that the row asks for.
#include "append_params.cuh"
#include "codes.cuh"
#include "elements.cuh"
#include "stream.cuh"

using Element = OUT_ELEMENT;      // of new keys and values, of rotary tables and rotated queries
using QueryElement = ELEMENT;     // of queries: the same, or Float8E4M3
using CacheElement = KV_ELEMENT;  // the same, or one of codes.cuh
using Bits = Element::Bits;

constexpr int kWarps = WARPS;

// The sequence and the position in it of a token of a ragged or padded batch; the sequence is negative for a token of none.
struct Token {
    int sequence, position;

    __device__ __forceinline__ Token(int token, const int* cu_seqlens, int seqlen, int batch_size) {
        if (!cu_seqlens) {
            sequence = token / seqlen;
            position = token - sequence * seqlen;
            return;
        }
        int low = 0, high = batch_size;  // the last sequence that begins at or before the token
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (cu_seqlens[middle] <= token) low = middle;
            else high = middle;
        }
        sequence = cu_seqlens[0] <= token && token < cu_seqlens[batch_size] ? low : -1;
        position = token - cu_seqlens[low];
    }
};

// A row of new elements, to be rotated to `position`: lane l has the pairs l, l + 32 .. of it.
template <typename From>
struct Row {
    const AppendParams& p;
    const typename From::Bits* from;  // (dim,)
    int dim, rotary_dim, position;

    // Hands put(first, second, a, b) the elements `first` and `second` of each pair, as bits of To.
    template <typename To, typename Put>
    __device__ __forceinline__ void for_each_pair(Put put) const {
        const int half = rotary_dim / 2;
        const Bits* cosines = static_cast<const Bits*>(p.rotary_cos) + static_cast<long long>(position) * half;
        const Bits* sines = static_cast<const Bits*>(p.rotary_sin) + static_cast<long long>(position) * half;
        for (int pair = threadIdx.x % 32; pair < dim / 2; pair += 32) {
            const int angle = pair - p.rotary_first / 2;
            const bool turns = angle >= 0 && angle < half, adjacent = p.rotary_interleaved || !turns;
            const int first = adjacent ? 2 * pair : p.rotary_first + angle, second = adjacent ? first + 1 : first + half;
            typename To::Bits a, b;
            if (turns) {
                const float x = From::to_float(from[first]), y = From::to_float(from[second]);
                const float c = Element::to_float(cosines[angle]), s = Element::to_float(sines[angle]);
                a = To::from_float(subtract(multiply(x, c), multiply(y, s)));
                b = To::from_float(add(multiply(x, s), multiply(y, c)));
            } else {
                a = converted<From, To>(from[first]);
                b = converted<From, To>(from[second]);
            }
            put(first, second, a, b);
        }
    }

private:
    // One type to itself is a copy, whatever the bits mean.
    template <typename A, typename B>
    struct Same {
        static constexpr bool kValue = false;
    };
    template <typename A>
    struct Same<A, A> {
        static constexpr bool kValue = true;
    };
    template <typename A, typename B>
    static __device__ __forceinline__ typename B::Bits converted(typename A::Bits bits) {
        if constexpr (Same<A, B>::kValue) return bits;
        else return B::from_float(A::to_float(bits));
    }
};

// Writes a row as it is.
template <typename To, typename From>
__device__ __forceinline__ void write_row(const Row<From>& row, typename To::Bits* to) {
    row.template for_each_pair<To>([&](int first, int second, typename To::Bits a, typename To::Bits b) {
        to[first] = a;
        to[second] = b;
    });
}

// Writes a row as codes: by a scale, or by one that is found and written to `found`, if that is not null.
template <typename Code>
__device__ __forceinline__ void quantise_row(const Row<Element>& row, typename Code::Bits* to, float scale, float* found) {
    if (found) {
        u32 largest = 0;  // |x| as bits, whose order is that of numbers; as floats, -ftz would make zeros of the smallest
        row.for_each_pair<Float32>([&](int, int, u32 a, u32 b) {
            largest = max(largest, max(a & 0x7fffffff, b & 0x7fffffff));
        });
#pragma unroll
        for (int lanes = 16; lanes > 0; lanes /= 2) largest = max(largest, __shfl_xor_sync(kFullWarp, largest, lanes));
        const float least = __uint_as_float(1 << 23);  // 2^-126
        scale = largest == 0 ? 1.0f : fmaxf(divide(__uint_as_float(largest), Code::kLargest), least);
        if (threadIdx.x % 32 == 0) *found = scale;
    }
    row.for_each_pair<Float32>([&](int first, int second, u32 a, u32 b) {
        to[first] = Code::code(divide(__uint_as_float(a), scale));
        to[second] = Code::code(divide(__uint_as_float(b), scale));
    });
}

// Where a tensor of scales says how a row is quantised.
struct Scales {
    float* array;  // null: `number` is all
    DescaleStrides strides;
    float number;
    bool per_key;  // (pages, page_size, heads_kv): to be found and written, else (batch, heads_kv), to be read
};

// Writes a new row to its slot of the cache.
__device__ __forceinline__ void append_row(const Row<Element>& row, void* cache, const PageCursor& place, CacheStrides strides,
                                           int sequence, int head, const Scales& scales) {
    void* const to = static_cast<char*>(cache) + 16ll * (place.units(strides) + head * strides.head);
    if constexpr (CacheElement::kBytes == 1) {
        float scale = scales.number;
        float* found = nullptr;
        if (scales.per_key) found = scales.array + place.scale(scales.strides) + head * scales.strides.head;
        else scale *= descale_of(scales.array, scales.strides, sequence, head);
        quantise_row<CacheElement>(row, static_cast<CacheElement::Bits*>(to), scale, found);
    } else {
        write_row<CacheElement>(row, static_cast<CacheElement::Bits*>(to));
    }
}

extern "C" __global__ void __launch_bounds__(kWarps * 32) append(const __grid_constant__ AppendParams p) {
    wait_for_turn(p);
    launch_next();
    long long row = static_cast<long long>(blockIdx.x) * kWarps + threadIdx.x / 32;

    const long long query_rows = static_cast<long long>(p.query_tokens) * p.num_heads_q;
    if (row < query_rows) {
        const int token = row / p.num_heads_q, head = row - static_cast<long long>(token) * p.num_heads_q;
        const Token at(token, p.lengths.cu_seqlens_q, p.lengths.max_seqlen_q, p.batch_size);
        if (at.sequence < 0) return;
        const int base = (p.rotary_seqlens ? p.rotary_seqlens : p.lengths.cache_seqlens)[at.sequence];
        // Ragged queries have no batch stride and count their tokens through.
        const int position = p.lengths.cu_seqlens_q ? token : at.position;
        const long long from = at.sequence * p.q_batch_stride + position * p.q_row_stride + head * p.q_head_stride;
        const Row<QueryElement> query{p, static_cast<const QueryElement::Bits*>(p.q) + from, p.headdim, p.rotary_dim,
                                      p.rotary_moves ? base + at.position : base};
        write_row<Element>(query, static_cast<Bits*>(p.q_rotated) + row * p.headdim);
        return;
    }
    row -= query_rows;
    const long long key_rows = static_cast<long long>(p.new_tokens) * p.num_heads_kv;
    const bool is_value = row >= key_rows;
    if (is_value) row -= key_rows;
    if (row >= key_rows || (is_value && !p.v)) return;

    const int token = row / p.num_heads_kv, head = row - static_cast<long long>(token) * p.num_heads_kv;
    const Token at(token, p.lengths.cu_seqlens_k_new, p.lengths.seqlen_k_new, p.batch_size);
    if (at.sequence < 0) return;
    const int key = p.lengths.cache_seqlens[at.sequence] + at.position;
    if (key < 0 || !p.shard.holds(key)) return;
    const int slot = p.shard.held(key);
    if (!p.cache.has_room(at.sequence, slot)) return;
    PageCursor place;
    place.enter(p.cache, at.sequence);
    place.seek(p.cache, slot);
    if (!place.exists()) return;
    const int position = p.lengths.cu_seqlens_k_new ? token : at.position;
    if (is_value) {
        const long long from = at.sequence * p.v_batch_stride + position * p.v_token_stride + head * p.v_new_head_stride;
        append_row({p, static_cast<const Bits*>(p.v) + from, p.headdim_v, 0, 0}, p.v_cache, place, p.cache.v, at.sequence, head,
                   {p.v_descale, p.v_descale_strides, p.v_scale, p.finds_v_scales != 0});
    } else {
        const int base = (p.rotary_seqlens ? p.rotary_seqlens : p.lengths.cache_seqlens)[at.sequence];
        const long long from = at.sequence * p.k_batch_stride + position * p.k_token_stride + head * p.k_new_head_stride;
        append_row({p, static_cast<const Bits*>(p.k) + from, p.headdim, p.rotary_dim, base + at.position}, p.k_cache, place,
                   p.cache.k, at.sequence, head, {p.k_descale, p.k_descale_strides, p.k_scale, p.finds_k_scales != 0});
    }
}
