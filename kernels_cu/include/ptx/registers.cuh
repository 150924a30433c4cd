// Registers and addresses. The headers in ptx/ are thin names for PTX, one instruction a function; what each does is in
// the PTX ISA manual, what it means for the lanes of a warp stands beside it.
#pragma once

using u32 = unsigned int;
using u64 = unsigned long long;

constexpr u32 kFullWarp = 0xffffffffu;

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Keeps a value in its register: the compiler would rather compute it again in every iteration.
__device__ __forceinline__ void pin(u32& value) { asm volatile("" : "+r"(value)); }
__device__ __forceinline__ void pin(int& value) { asm volatile("" : "+r"(value)); }
template <typename T>
__device__ __forceinline__ void pin(T*& value) { asm volatile("" : "+l"(value)); }

// This thread's number in its block, read where it is asked for: no compiler keeps it in a register until then.
__device__ __forceinline__ u32 thread_number() {
    u32 number;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
    return number;
}

// A zero that the compiler can neither fold nor prove to be the same in all lanes: what it is added to stays in a register
// of each lane.
__device__ __forceinline__ u32 zero_of_each_lane() {
    u32 mine, before;
    asm volatile("mov.u32 %0, %%lanemask_eq;" : "=r"(mine));
    asm volatile("mov.u32 %0, %%lanemask_lt;" : "=r"(before));
    return mine & before;
}

// base + factor * index: the optimiser would re-associate a plain 64-bit sum.
template <int kFactor, typename T>
__device__ __forceinline__ const T* offset_by(const T* base, u32 index) {
    const T* result;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(result) : "r"(index), "n"(kFactor), "l"(base));
    return result;
}
