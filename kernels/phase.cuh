/* Barriers in shared memory that count arrivals and bytes, and copies in the background that they count (sm_90 on).
 *
 * For what is filled and emptied in turns: the n-th completion of a barrier has parity n % 2, from 0.  Before sm_90 there is
 * nothing to wait for; kernels that need the copies are not launched there.
 */
#ifndef MIL_KERNELS_PHASE_CUH
#define MIL_KERNELS_PHASE_CUH

#include "cuda.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define MIL_HAS_BULK_COPIES 1
#else
#define MIL_HAS_BULK_COPIES 0
#endif

/* A policy of the second-level cache: what is read once leaves it first. */
#define FORGET_FIRST ((uint64_t)0x12f0000000000000u)

static __device__ __forceinline__ void
phase_init(uint64_t *barrier, int arrivals)
{
    uint32_t at = (uint32_t)__cvta_generic_to_shared(barrier);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}

/* Shows what this thread has written in shared memory to copies: barriers that it has set up, above all. */
static __device__ __forceinline__ void
phase_publish()
{
#if MIL_HAS_BULK_COPIES
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

static __device__ __forceinline__ void
phase_arrive(uint64_t *barrier)
{
    uint32_t at = (uint32_t)__cvta_generic_to_shared(barrier);
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}

static __device__ __forceinline__ bool
phase_done(uint64_t *barrier, int parity)
{
    uint32_t done = 1;
#if MIL_HAS_BULK_COPIES
    uint32_t at = (uint32_t)__cvta_generic_to_shared(barrier);
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(at), "r"(parity)
        : "memory");
#else
    (void)barrier, (void)parity;
#endif
    return done != 0;
}

/* Until the phase of this parity has ended; of a new barrier, that of parity 1 has. */
static __device__ __forceinline__ void
phase_wait(uint64_t *barrier, int parity)
{
    while (!phase_done(barrier, parity)) {
    }
}

/* An arrival that also announces `bytes` of copies. */
static __device__ __forceinline__ void
phase_expect(uint64_t *barrier, uint32_t bytes)
{
#if MIL_HAS_BULK_COPIES
    uint32_t at = (uint32_t)__cvta_generic_to_shared(barrier);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
#else
    (void)barrier, (void)bytes;
#endif
}

/* `bytes` (a multiple of 16, as are both addresses) of global memory into shared memory; the barrier has been told of them.
 * ONCE: nothing reads them again soon, so they leave the second-level cache first. */
template <bool ONCE = false>
static __device__ __forceinline__ void
copy_bulk(void *to, const void *from, uint32_t bytes, uint64_t *barrier)
{
#if MIL_HAS_BULK_COPIES
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(to);
    const uint32_t told = (uint32_t)__cvta_generic_to_shared(barrier);
    if constexpr (ONCE) {
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
            " [%0], [%1], %2, [%3], %4;" ::"r"(at),
            "l"(from), "r"(bytes), "r"(told), "l"(FORGET_FIRST)
            : "memory");
    }
    else {
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
            " [%0], [%1], %2, [%3];" ::"r"(at),
            "l"(from), "r"(bytes), "r"(told)
            : "memory");
    }
#else
    (void)to, (void)from, (void)bytes, (void)barrier;
#endif
}

#endif
