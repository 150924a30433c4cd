// The order of kernels in a stream. Each of these kernels may be launched while the one ahead of it still runs (programmatic
// dependent launch, sm_90 and later), so that its blocks are there when their turn comes.
#pragma once

// Waits until all that comes before in the stream has finished and its writes are visible. No memory may be touched before.
__device__ __forceinline__ void wait_for_turn() {
#if __CUDA_ARCH__ >= 900
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
