// Products of a warpgroup (wgmma, sm_90a): four warps, 64 rows; asynchronous, operands in registers and shared memory.
//
// A fragment's lanes hold of its rows 16 w .. 16 w + 15, w the warp's number in the warpgroup, what they hold of mma's 16.
#pragma once
#include "elements.cuh"
#include "ptx/registers.cuh"

// Ordinary accesses to accumulators and to A in registers come before the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all but the last kPending groups; pin() what they have written afterwards.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// What ordinary stores and copies have written to shared memory, and this thread has waited for, is seen by wgmma.
__device__ __forceinline__ void fence_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Keeps the compiler from reading a fragment before the wait.
template <int kCount>
__device__ __forceinline__ void pin(float (&c)[kCount][4]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(c[i][j])::"memory");
    }
}

// Registers of each thread of the warpgroup from here on.
template <int kCount>
__device__ __forceinline__ void keep_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// The descriptor of a matrix in shared memory in the 128-byte swizzle: lines of 128 bytes, 8 rows of them 1024 bytes. `leading`
// is the distance in bytes of two lines of a row, where the rows of the matrix are not contiguous in memory (MN-major). In a
// cluster, the upper bits of an address are the block's number.
__device__ __forceinline__ u64 wgmma_descriptor(u32 address, u32 leading = 16) {
    return u64((address & 0x3ffff) >> 4) | u64(leading >> 4) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

// The same matrix, `bytes` further on.
__device__ __forceinline__ u64 advanced(u64 descriptor, u32 bytes) {
    return descriptor & 0xffffffff00000000ull | (static_cast<u32>(descriptor) + (bytes >> 4));
}

#define C4(c, i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define C32(c, i) \
    C4(c, i), C4(c, i + 1), C4(c, i + 2), C4(c, i + 3), C4(c, i + 4), C4(c, i + 5), C4(c, i + 6), C4(c, i + 7)
#define REGISTERS_0_31 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_32_63 \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, " \
    "%55, %56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_64_127 \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, " \
    "%87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, " \
    "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
    "%127"

// S[64 x 8 kTiles] = (adds ? S : 0) + A B^T, 16 columns of A and B, B K-major in shared memory; C[64 x 8 kTiles] += A B, B
// [16 x 8 kTiles] in shared memory with contiguous rows (MN-major). A [64 x 16] lies in registers, or K-major in shared memory.
template <typename T, int kTiles>
struct Wgmma;

#define DEFINE_WGMMA(T, type, tiles, n, registers, accumulators, x, y, z, u, v, w) \
    template <> \
    struct Wgmma<T, tiles> { \
        static __device__ __forceinline__ void scores(float (&c)[tiles][4], u64 a, u64 b, bool adds) { \
            asm volatile("{ .reg .pred p; setp.ne.u32 p, %" z ", 0; " \
                         "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" registers "}, %" x ", %" y \
                         ", p, 1, 1, 0, 0; }" \
                         : accumulators \
                         : "l"(a), "l"(b), "r"(static_cast<u32>(adds)) \
                         : "memory"); \
        } \
        static __device__ __forceinline__ void scores(float (&c)[tiles][4], const u32 (&a)[4], u64 b, bool adds) { \
            asm volatile("{ .reg .pred p; setp.ne.u32 p, %" w ", 0; " \
                         "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" registers "}, {%" x ", %" y \
                         ", %" z ", %" u "}, %" v ", p, 1, 1, 0; }" \
                         : accumulators \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<u32>(adds)) \
                         : "memory"); \
        } \
        static __device__ __forceinline__ void add(float (&c)[tiles][4], const u32 (&a)[4], u64 b) { \
            asm volatile("{ .reg .pred p; setp.ne.u32 p, %" w ", 0; " \
                         "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" registers "}, {%" x ", %" y \
                         ", %" z ", %" u "}, %" v ", p, 1, 1, 1; }" \
                         : accumulators \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1) \
                         : "memory"); \
        } \
        static __device__ __forceinline__ void add(float (&c)[tiles][4], u64 a, u64 b) { \
            asm volatile("{ .reg .pred p; setp.ne.u32 p, %" z ", 0; " \
                         "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" registers "}, %" x ", %" y \
                         ", p, 1, 1, 0, 1; }" \
                         : accumulators \
                         : "l"(a), "l"(b), "r"(1) \
                         : "memory"); \
        } \
    };

#define C_32 C32(c, 0)
#define C_64 C32(c, 0), C32(c, 8)
DEFINE_WGMMA(Float16, "f16", 8, "64", REGISTERS_0_31, C_32, "32", "33", "34", "35", "36", "37")
DEFINE_WGMMA(BFloat16, "bf16", 8, "64", REGISTERS_0_31, C_32, "32", "33", "34", "35", "36", "37")
DEFINE_WGMMA(Float16, "f16", 16, "128", REGISTERS_0_31 ", " REGISTERS_32_63, C_64, "64", "65", "66", "67", "68", "69")
DEFINE_WGMMA(BFloat16, "bf16", 16, "128", REGISTERS_0_31 ", " REGISTERS_32_63, C_64, "64", "65", "66", "67", "68", "69")
#define C_128 C32(c, 0), C32(c, 8), C32(c, 16), C32(c, 24)
#define REGISTERS_128 REGISTERS_0_31 ", " REGISTERS_32_63 ", " REGISTERS_64_127
DEFINE_WGMMA(Float16, "f16", 32, "256", REGISTERS_128, C_128, "128", "129", "130", "131", "132", "133")
DEFINE_WGMMA(BFloat16, "bf16", 32, "256", REGISTERS_128, C_128, "128", "129", "130", "131", "132", "133")
