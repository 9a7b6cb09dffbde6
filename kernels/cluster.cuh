/* Clusters: blocks that run side by side, wait for each other and read each other's shared memory (sm_90
 * on).
 *
 * Before sm_90 a cluster is one block: code that asks for no other rank's memory works there as it is.
 */
#ifndef MIL_KERNELS_CLUSTER_CUH
#define MIL_KERNELS_CLUSTER_CUH

#include "cuda.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define MIL_HAS_CLUSTERS 0
#define MIL_CLUSTER(blocks)
#else
#define MIL_HAS_CLUSTERS 1
/* Of a kernel: so many neighbours along x are a cluster. */
#define MIL_CLUSTER(blocks) __cluster_dims__(blocks, 1, 1)
#endif

/* Whether the device of this context has them. */
static inline bool
mil_device_has_clusters(const mil_context *context)
{
    return mil_device_major(context) >= 9;
}

static __device__ __forceinline__ int
mil_cluster_rank()
{
    uint32_t rank = 0;
#if MIL_HAS_CLUSTERS
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return (int)rank;
}

/* All threads of all blocks meet; what they wrote before is visible to all of them after. */
static __device__ __forceinline__ void
mil_cluster_sync()
{
#if MIL_HAS_CLUSTERS
    asm volatile(
        "barrier.cluster.arrive.aligned;\n"
        "barrier.cluster.wait.aligned;" ::
            : "memory");
#else
    __syncthreads();
#endif
}

/* The same in two parts: what lies between runs while others are on their way. Only execution meets, not
 * memory. */
static __device__ __forceinline__ void
mil_cluster_arrive()
{
#if MIL_HAS_CLUSTERS
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

static __device__ __forceinline__ void
mil_cluster_wait()
{
#if MIL_HAS_CLUSTERS
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

/* After a thread has set up barriers that other blocks of the cluster are to arrive at: what it then does with
 * mil_cluster_arrive() tells them. */
static __device__ __forceinline__ void
mil_cluster_publish()
{
#if MIL_HAS_CLUSTERS
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

/* Where the block of that rank has what this one has at `here`, in shared memory, for mil_cluster_send(). */
static __device__ __forceinline__ uint32_t
mil_cluster_place(const void *here, int rank)
{
    uint32_t place = (uint32_t)__cvta_generic_to_shared(here);
#if MIL_HAS_CLUSTERS
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(place) : "r"(rank));
#else
    (void)rank;
#endif
    return place;
}

/* 8 bytes to such a place; the barrier at `told`, in the same block, counts them as they come, so that nobody needs a fence. */
static __device__ __forceinline__ void
mil_cluster_send(uint32_t place, uint64_t value, uint32_t told)
{
#if MIL_HAS_CLUSTERS
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(place),
                 "l"(value), "r"(told)
                 : "memory");
#else
    (void)told;
    asm volatile("st.shared.b64 [%0], %1;" ::"r"(place), "l"(value) : "memory");
#endif
}

/* The same of two numbers. */
static __device__ __forceinline__ void
mil_cluster_send(uint32_t place, float first, float second, uint32_t told)
{
    uint64_t pair;
    asm("mov.b64 %0, {%1, %2};" : "=l"(pair) : "f"(first), "f"(second));
    mil_cluster_send(place, pair, told);
}

/* Where the block of that rank has what this one has at `here`, in shared memory. */
template <typename T>
static __device__ __forceinline__ T *
mil_cluster_at(T *here, int rank)
{
#if MIL_HAS_CLUSTERS
    uint64_t there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(here), "r"(rank));
    return reinterpret_cast<T *>(there);
#else
    (void)rank;
    return here;
#endif
}

#endif
