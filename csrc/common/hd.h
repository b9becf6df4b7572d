// Marks for code shared by host and device. Shared functions have internal linkage: a weak copy built for a
// newer instruction set must never be picked by the linker for an older machine.
#pragma once

#if defined(__CUDACC__)
#define ESOKERN_HD static __host__ __device__ __forceinline__
#else
#define ESOKERN_HD static inline __attribute__((always_inline, unused))
#endif
