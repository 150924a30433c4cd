// Attention of 64 rows a warpgroup over tiles of KEYS keys, for tests: a warpgroup fills rings of K and V tiles by
// cp.async; GROUPS others issue the scores of tile j + 1 ahead of the values of tile j, whose run the softmax overlaps.
// wgmma_attention.py puts D, KEYS, GROUPS and two products ahead of it: qk(s, a, b, add) of m64nKEYSk16, both
// operands K-major, and pv(o, p, b, add) of m64nDk16, P from registers and V MN-major.
#define ASM(...) asm volatile(__VA_ARGS__ : "memory")
#define FENCE ASM("wgmma.fence.sync.aligned;" ::)
#define COMMIT ASM("wgmma.commit_group.sync.aligned;" ::)
#define WAIT(n) ASM("wgmma.wait_group.sync.aligned %0;" ::"n"(n))
#define PROXY ASM("fence.proxy.async.shared::cta;" ::)

__device__ __forceinline__ void wait_for(u32 bar, u32 parity) {
    ASM("{.reg .pred p; L: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra X; bra L; X:}" ::"r"(bar),
        "r"(parity));
}
__device__ __forceinline__ void start(u32 bar, u32 count) {
    ASM("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(count));
}
__device__ __forceinline__ void arrive(u32 bar) { ASM("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(bar)); }
__device__ __forceinline__ void arrive_with_copies(u32 bar) {
    ASM("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(bar));
}
__device__ __forceinline__ void copy16(u32 to, const void* from) {
    ASM("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
}
__device__ __forceinline__ u32 pack(float lo, float hi) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
template <int N>
__device__ __forceinline__ void pin(float (&c)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(c[i])::"memory");
}
// Blocks of 64 columns, [rows][128 bytes] in the 128-byte swizzle.
__device__ __forceinline__ u32 place(int row, int chunk, int rows) {
    return chunk / 8 * rows * 128 + row * 128 + (chunk % 8 ^ row % 8) * 16;
}
__device__ __forceinline__ u64 descriptor(u32 at, u32 leading) {
    return (u64)(at >> 4) | (u64)(leading >> 4) << 16 | (u64)64 << 32 | (u64)1 << 62;
}

constexpr int STAGES = 2, TILE = KEYS * D * 2, ROWS = 64 * D * 2;  // bytes of a tile, of a warpgroup's queries

// q: [64 GROUPS][D], k and v: [tiles KEYS][D], bf16; out: [64 GROUPS][D]
extern "C" __global__ void __launch_bounds__(128 + 128 * GROUPS, 3 - GROUPS)
attention(const uint4* q, const uint4* k, const uint4* v, float* out, int tiles, float scale) {
    extern __shared__ __align__(1024) unsigned char smem[];
    __shared__ u64 bars[4 * STAGES];
    const u32 queries = (u32)__cvta_generic_to_shared(smem), bar = (u32)__cvta_generic_to_shared(bars);
    const u32 k_ring = queries + ROWS * GROUPS, v_ring = k_ring + STAGES * TILE;
    const u32 full_k = bar, empty_k = bar + 8 * STAGES, full_v = bar + 16 * STAGES, empty_v = bar + 24 * STAGES;
    const int t = threadIdx.x, group = __shfl_sync(~0u, t / 128, 0);
    if (t == 0)
        for (int i = 0; i < STAGES; ++i) {
            start(full_k + 8 * i, 128);
            start(full_v + 8 * i, 128);
            start(empty_k + 8 * i, 4 * GROUPS);
            start(empty_v + 8 * i, 4 * GROUPS);
        }
    for (int i = t; i < 64 * GROUPS * D / 8; i += blockDim.x) {
        const int row = i / (D / 8), chunk = i % (D / 8);
        *(uint4*)(smem + row / 64 * ROWS + place(row % 64, chunk, 64)) = q[i];
    }
    __syncthreads();
    if (group == 0) {
        ASM("setmaxnreg.dec.sync.aligned.u32 40;" ::);
        auto fill = [&](u32 ring, u32 full, u32 empty, const uint4* from, int j) {
            const int s = j % STAGES, round = j / STAGES;
            if (round) wait_for(empty + 8 * s, (round - 1) & 1);
            for (int i = t; i < KEYS * D / 8; i += 128)
                copy16(ring + s * TILE + place(i / (D / 8), i % (D / 8), KEYS), from + j * KEYS * D / 8 + i);
            arrive_with_copies(full + 8 * s);
        };
        for (int j = 0; j < tiles; ++j) {
            fill(k_ring, full_k, empty_k, k, j);
            fill(v_ring, full_v, empty_v, v, j);
        }
        ASM("cp.async.wait_all;" ::);
        return;
    }
    ASM("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(GROUPS == 1 ? 216 : 232));
    const u32 mine = queries + (group - 1) * ROWS;
    float o[D / 2], s[KEYS / 2], factor[2], m[2] = {-1e30f, -1e30f}, l[2] = {0, 0};
    u32 p[KEYS / 4];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] = 0;
    auto scores = [&](int j) {
        wait_for(full_k + 8 * (j % STAGES), j / STAGES & 1);
        PROXY;  // scores
        FENCE;  // scores
#pragma unroll
        for (int i = 0; i < D / 16; ++i)
            qk(s, descriptor(mine + i / 4 * 64 * 128 + i % 4 * 32, 16),
               descriptor(k_ring + j % STAGES * TILE + i / 4 * KEYS * 128 + i % 4 * 32, 16), i > 0);
        COMMIT;
    };
    auto values = [&](int j) {
        wait_for(full_v + 8 * (j % STAGES), j / STAGES & 1);
        PROXY;  // values
        FENCE;  // values
#pragma unroll
        for (int i = 0; i < KEYS / 16; ++i)
            pv(o, p + 4 * i, descriptor(v_ring + j % STAGES * TILE + i * 2048, KEYS * 128), 1);
        COMMIT;
    };
    auto softmax = [&]() {  // register i: row lane / 4 + 8 (i >> 1 & 1)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float top = m[h];
#pragma unroll
            for (int i = 0; i < KEYS / 2; ++i)
                if ((i >> 1 & 1) == h) top = fmaxf(top, s[i]);
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            factor[h] = exp2f((m[h] - top) * scale);
            m[h] = top;
            l[h] *= factor[h];
#pragma unroll
            for (int i = 0; i < KEYS / 2; ++i)
                if ((i >> 1 & 1) == h) l[h] += s[i] = exp2f((s[i] - top) * scale);
        }
    };
    auto packed = [&]() {  // accumulators are the fragments of A as they lie
#pragma unroll
        for (int i = 0; i < KEYS / 4; ++i) p[i] = pack(s[2 * i], s[2 * i + 1]);
    };
    auto give_back = [&](u32 empty, int j) {
        if (t % 32 == 0) arrive(empty + 8 * (j % STAGES));
    };
    scores(0);
    WAIT(0);
    pin(s);
    give_back(empty_k, 0);
    softmax();
    packed();
    for (int j = 0; j < tiles - 1; ++j) {
        scores(j + 1);
        values(j);
        WAIT(1);  // for the scores
        pin(s);
        give_back(empty_k, j + 1);
        softmax();
        WAIT(0);  // for the values
        pin(o);
        give_back(empty_v, j);
        if (__any_sync(~0u, factor[0] != 1 || factor[1] != 1)) {
#pragma unroll
            for (int i = 0; i < D / 2; ++i) o[i] *= factor[i >> 1 & 1];
        }
        packed();
    }
    values(tiles - 1);
    WAIT(0);
    pin(o);
    give_back(empty_v, tiles - 1);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        l[h] += __shfl_xor_sync(~0u, l[h], 1);
        l[h] += __shfl_xor_sync(~0u, l[h], 2);
    }
    const int row = (group - 1) * 64 + t % 128 / 32 * 16 + t % 32 / 4;
#pragma unroll
    for (int i = 0; i < D / 2; ++i)
        out[(row + 8 * (i >> 1 & 1)) * D + 8 * (i >> 2) + 2 * (t % 4) + (i & 1)] = o[i] / l[i >> 1 & 1];
}
