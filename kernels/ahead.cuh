/* Weights that later kernels read, fetched into the second-level cache while these wait for something else. */
#ifndef MIL_KERNELS_AHEAD_CUH
#define MIL_KERNELS_AHEAD_CUH

#include "cuda.cuh"

#include <stdlib.h>

/* One warp of each block asks for the block's share of `bytes`, a multiple of 16. */
static __device__ __forceinline__ void
mil_fetch_ahead(const void *memory, int64_t bytes)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const int64_t piece = 8192, blocks = (int64_t)gridDim.x * gridDim.y * gridDim.z;
    const int64_t block = ((int64_t)blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    for (int64_t i = threadIdx.x % MIL_WARP * blocks + block; i * piece < bytes; i += MIL_WARP * blocks) {
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"((const char *)memory + i * piece),
                     "r"((unsigned)min(piece, bytes - i * piece))
                     : "memory");
    }
#endif
}

/* What of a hint's memory to ask for. */
static inline void
mil_set_ahead(const void *next, int64_t next_bytes, const void **memory, int64_t *bytes)
{
    static int ahead = -1;
    if (ahead < 0) {
        const char *word = getenv("MIL_MIXER_AHEAD");
        ahead = word == NULL ? 100 : atoi(word);
    }
    bool good = next != NULL && (uintptr_t)next % 16 == 0;
    *memory = next;
    *bytes = good ? next_bytes * ahead / 100 / 16 * 16 : 0;
}

#endif
