// The order of kernels in a stream. Each of these kernels may be launched while the one ahead of it still runs (programmatic
// dependent launch, sm_90 and later), so that its blocks are there when their turn comes.
#pragma once
#include "ptx/registers.cuh"

// Waits until all that comes before in the stream has finished and its writes are visible. No memory may be touched before: the
// simulator looks.
//
// The parameters may: they come to a multiprocessor by lines of 64 bytes, each of which takes as long as a read from L2 when it
// is first asked for. So all of them are asked for at once, here, where there is nothing else to do.
template <typename Params>
__device__ __forceinline__ void wait_for_turn(const Params& p) {
#if __CUDA_ARCH__ >= 900
    constexpr int kWords = sizeof(Params) / sizeof(u32), kLine = 16;
    const u32* const words = reinterpret_cast<const u32*>(&p);
    u32 any = words[kWords - 1];
#pragma unroll
    for (int i = 0; i < kWords; i += kLine) any |= words[i];
    asm volatile("{ .reg .pred p; setp.eq.u32 p, %0, 0; @p nanosleep.u32 0; }" ::"r"(any));  // or nobody would need them
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Allows the next kernel of the stream to be launched, where it waits for its turn, as soon as every block has called this or
// ended.
__device__ __forceinline__ void launch_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
