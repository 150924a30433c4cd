// Thin names for the PTX that the kernels use. One instruction a function; what each does is in the PTX ISA manual.
#pragma once

using u32 = unsigned int;
using u64 = unsigned long long;

constexpr u32 kFullWarp = 0xffffffffu;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Keeps a value in its register: the compiler would rather compute it again in every iteration.
__device__ __forceinline__ void pin(u32& value) { asm volatile("" : "+r"(value)); }
__device__ __forceinline__ void pin(int& value) { asm volatile("" : "+r"(value)); }
__device__ __forceinline__ void pin(const char*& value) { asm volatile("" : "+l"(value)); }

// Zero, but no compiler knows it, nor that it is the same in all lanes: what it is added to stays in a vector register.
__device__ __forceinline__ u32 zero_of_each_lane() {
    u32 mine, before;
    asm volatile("mov.u32 %0, %%lanemask_eq;" : "=r"(mine));
    asm volatile("mov.u32 %0, %%lanemask_lt;" : "=r"(before));
    return mine & before;
}

// ---- asynchronous copies, global to shared -----------------------------------------------------------------------

// The KV cache is read once per launch: let it leave L2 first. Before sm_90 the policy would have to be moved to uniform
// registers for every copy, so copies go without.
__device__ __forceinline__ u64 evict_first_policy() {
    u64 policy = 0;
#if __CUDA_ARCH__ >= 900
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
#endif
    return policy;
}

// Predicated rather than branched around: a branch between warp-wide instructions costs more than the instruction.
__device__ __forceinline__ void cp_async_16_if(bool exists, u32 to, const void* from, u64 policy) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %0, 0; @p cp.async.cg.shared.global.L2::cache_hint [%1], [%2], 16, %3; }" ::"r"(
            static_cast<u32>(exists)),
        "r"(to), "l"(from), "l"(policy)
        : "memory");
#else
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p cp.async.cg.shared.global [%1], [%2], 16; }" ::"r"(
                     static_cast<u32>(exists)),
                 "r"(to), "l"(from)
                 : "memory");
#endif
}

// Fills 16 bytes with zeros; `from` is any valid address, of which nothing is read.
__device__ __forceinline__ void cp_async_zero_if(bool exists, u32 to, const void* from) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p cp.async.cg.shared.global [%1], [%2], 16, 0; }" ::"r"(
                     static_cast<u32>(exists)),
                 "r"(to), "l"(from)
                 : "memory");
}

// Copies 16 bytes, or fills them with zeros; `from` is a valid address either way.
__device__ __forceinline__ void cp_async_16_or_zero(bool exists, u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- mbarriers ---------------------------------------------------------------------------------------------------

// Sets a barrier up: a phase of it ends with `count` arrivals.
__device__ __forceinline__ void init_barrier(u64& barrier, u32 count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(count) : "memory");
}

// Arrives as soon as all copies that this thread has started have landed.
__device__ __forceinline__ void arrive_with_copies(u64& barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Arrives now: what this thread has written before is seen by all that wait.
__device__ __forceinline__ void arrive(u64& barrier) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(&barrier)) : "memory");
}

// Waits until the phase of this parity has ended; the first one has parity 0. Not by try_wait, which may sleep too long.
__device__ __forceinline__ void wait_for_phase(u64& barrier, u32 parity) {
    u32 is_over;
    do {
        asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(is_over)
                     : "r"(shared_address(&barrier)), "r"(parity)
                     : "memory");
    } while (!is_over);
}

// base + factor * index: the optimiser would re-associate a plain 64-bit sum.
template <int kFactor, typename T>
__device__ __forceinline__ const T* offset_by(const T* base, u32 index) {
    const T* result;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(result) : "r"(index), "n"(kFactor), "l"(base));
    return result;
}

// ---- matrices ----------------------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8, and receives of matrix i in r[i] the
// elements (row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1).
__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], u32 row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row_address)
                 : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&r)[4], u32 row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row_address)
                 : "memory");
}

// Transposes an 8x8 matrix of 16-bit elements that lies in the registers of a warp, rows by lane / 4.
__device__ __forceinline__ u32 movmatrix_trans(u32 a) {
    u32 d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

// ---- warps, arithmetic, memory -----------------------------------------------------------------------------------

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Counts to `last` and wraps to 0; orders what this thread has seen and written before with what it reads after.
__device__ __forceinline__ u32 atomic_inc_acq_rel(u32* counter, u32 last) {
    u32 old;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(last) : "memory");
    return old;
}

// A page number, and its neighbours to L2: the next tiles ask for those.
__device__ __forceinline__ u32 load_page(const int* from) {
    u32 page;
    asm("ld.global.nc.L2::128B.u32 %0, [%1];" : "=r"(page) : "l"(from));
    return page;
}

// Reads past L1, which may hold a line from before another block wrote it.
__device__ __forceinline__ float4 load_cg_if(bool exists, const float4* from) {
    float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4]; }"
                 : "+f"(v.x), "+f"(v.y), "+f"(v.z), "+f"(v.w)
                 : "l"(from), "r"(static_cast<u32>(exists))
                 : "memory");
    return v;
}

__device__ __forceinline__ float2 load_cg(const float2* from) {
    float2 v;
    asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(from) : "memory");
    return v;
}

// Plain stores of vectors may compile to scalar ones, which ask for each sector several times.
__device__ __forceinline__ void store_global(uint2* to, uint2 v) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(v.x), "r"(v.y) : "memory");
}

__device__ __forceinline__ void store_global(float4* to, float4 v) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
}

__device__ __forceinline__ float4 load_shared(u32 address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ void store_shared(u32 address, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ void store_shared(u32 address, float4 v) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
}

// ---- thread-block clusters ---------------------------------------------------------------------------------------

// The address at which this block reaches `address` of the shared memory of another block of its cluster.
__device__ __forceinline__ u32 shared_of_block(u32 address, u32 rank) {
    u32 mapped;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
}

__device__ __forceinline__ void store_cluster(u32 address, float4 v) {
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
}

__device__ __forceinline__ void store_cluster(u32 address, float2 v) {
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(v.x), "f"(v.y) : "memory");
}

// A barrier of the cluster in two halves: what was written before the first is seen after the second.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
