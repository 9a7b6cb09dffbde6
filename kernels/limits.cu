/* What a kernel may have of shared memory, remembered: asking the runtime takes about as long as a launch. */
#include "cuda.cuh"

#include <pthread.h>

#define MOST_LIMITS 4096 /* kernels of this library times devices, a few times over; a power of two */

static struct limit {
    const void *kernel;
    int device;
    size_t bytes;
    bool prefers_shared;
} limits[MOST_LIMITS];

static pthread_mutex_t limits_in_use = PTHREAD_MUTEX_INITIALIZER;

/* The kernel's place, or a free one. */
static struct limit *
find_limit(const void *kernel, int device)
{
    size_t at = ((uintptr_t)kernel / 16 * 31 + (size_t)device) % MOST_LIMITS;
    while (limits[at].kernel != NULL && (limits[at].kernel != kernel || limits[at].device != device)) {
        at = (at + 1) % MOST_LIMITS;
    }
    return &limits[at];
}

cudaError_t
mil_allow_shared(const void *kernel, int device, size_t bytes)
{
    cudaError_t error = cudaSuccess;
    pthread_mutex_lock(&limits_in_use);
    struct limit *limit = find_limit(kernel, device);
    if (limit->bytes < bytes) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
        if (error == cudaSuccess) {
            *limit = {kernel, device, bytes, limit->prefers_shared};
        }
    }
    pthread_mutex_unlock(&limits_in_use);
    return error;
}

cudaError_t
mil_prefer_shared(const void *kernel, int device)
{
    cudaError_t error = cudaSuccess;
    pthread_mutex_lock(&limits_in_use);
    struct limit *limit = find_limit(kernel, device);
    if (!limit->prefers_shared) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     cudaSharedmemCarveoutMaxShared);
        if (error == cudaSuccess) {
            *limit = {kernel, device, limit->bytes, true};
        }
    }
    pthread_mutex_unlock(&limits_in_use);
    return error;
}
