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

/* Over MOST taps, of which the first `missing` do not exist; x[MOST - 1] is the newest input.  First the older ones, which are
 * there before it. */
template <int MOST>
static __device__ __forceinline__ float
mil_convolve_older(const float (&weight)[MOST], const float (&x)[MOST], float bias, int missing)
{
    float y = bias;
#pragma unroll
    for (int j = 0; j + 1 < MOST; j++) {
        y = j < missing ? y : fmaf(weight[j], x[j], y);
    }
    return y;
}

template <typename T>
static __device__ __forceinline__ float
mil_convolve_newest(float weight, float x, float older, bool silu)
{
    return mil_conv_activate<T>(fmaf(weight, x, older), silu);
}

template <typename T, int MOST>
static __device__ __forceinline__ float
mil_convolve(const float (&weight)[MOST], const float (&x)[MOST], float bias, int missing, bool silu)
{
    return mil_convolve_newest<T>(weight[MOST - 1], x[MOST - 1], mil_convolve_older(weight, x, bias, missing),
                                  silu);
}

#endif
