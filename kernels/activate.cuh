/* The activations of gated MLPs (device.h: mil_activation). */
#ifndef MIL_KERNELS_ACTIVATE_CUH
#define MIL_KERNELS_ACTIVATE_CUH

#include "cuda.cuh"

static __device__ __forceinline__ float
mil_activate(mil_activation activation, float x)
{
    float positive = fmaxf(x, 0.0f);
    switch (activation) {
        case MIL_SILU:
            return mil_silu(x);
        case MIL_GELU:
            return x * normcdff(x);
        case MIL_GELU_TANH:
            return x * mil_sigmoid(2.0f * 0.79788456f * (x + 0.044715f * x * x * x));
        case MIL_RELU:
            return positive;
        case MIL_RELU2:
            break;
    }
    return positive * positive;
}

#endif
