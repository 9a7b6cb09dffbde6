/* One output of the depthwise convolution, as conv1d.cu and the kernels that convolve for themselves compute it: the same
 * bits. */
#ifndef MIL_KERNELS_CONV1D_CUH
#define MIL_KERNELS_CONV1D_CUH

#include "cuda.cuh"

template <typename T>
static __device__ __forceinline__ float
mil_conv_activate(float y, bool silu)
{
    return !silu ? y : sizeof(T) == 4 ? y / (1.0f + expf(-y)) : __fdividef(y, 1.0f + __expf(-y));
}

/* Over MOST taps, of which the first `missing` do not exist; x[MOST - 1] is the newest input. */
template <typename T, int MOST>
static __device__ __forceinline__ float
mil_convolve(const float (&weight)[MOST], const float (&x)[MOST], float bias, int missing, bool silu)
{
    float y = bias;
#pragma unroll
    for (int j = 0; j < MOST; j++) {
        y = j < missing ? y : fmaf(weight[j], x[j], y);
    }
    return mil_conv_activate<T>(y, silu);
}

#endif
