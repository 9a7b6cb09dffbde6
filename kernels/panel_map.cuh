/* How the copy engine finds panels of an array (wgmma.cuh: copy_panel): the driver's description of it, made on the host.
 *
 * The driver's function is asked for by name, so that nothing is linked to the driver.
 */
#ifndef MIL_KERNELS_PANEL_MAP_CUH
#define MIL_KERNELS_PANEL_MAP_CUH

#include "cuda.cuh"

#include <cuda.h>

typedef decltype(&cuTensorMapEncodeTiled) mil_panel_encoder;

/* NULL where the driver has none. */
static inline mil_panel_encoder
mil_find_panel_encoder()
{
    static mil_panel_encoder encoder;
    if (encoder == NULL) {
        void *found = NULL;
        cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
        cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                             cudaEnableDefault, &result);
#else
        cudaError_t error =
            cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
        if (error == cudaSuccess && result == cudaDriverEntryPointSuccess) {
            encoder = (mil_panel_encoder)found;
        }
    }
    return encoder;
}

/* [rows, columns] of the context's 16-bit activations, `stride` apart, in panels of `panel_rows` rows and 64 columns. */
static inline mil_status
mil_map_panels(const mil_context *context, const void *from, int64_t rows, int64_t columns, int64_t stride,
               int panel_rows, CUtensorMapL2promotion promotion, CUtensorMap *map)
{
    const mil_panel_encoder encode = mil_find_panel_encoder();
    if (encode == NULL) {
        return mil_fail(MIL_ERR_DEVICE, "CUDA: this driver has no cuTensorMapEncodeTiled: it is too old");
    }
    const bool half = context->ops->activation_dtype == MIL_F16;
    const cuuint64_t sizes[2] = {(cuuint64_t)columns, (cuuint64_t)rows};
    const cuuint64_t strides[1] = {(cuuint64_t)stride * 2};
    const cuuint32_t box[2] = {64, (cuuint32_t)panel_rows}, steps[2] = {1, 1};
    const CUresult result =
        encode(map, half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
               (void *)from, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS
               ? MIL_OK
               : mil_fail(MIL_ERR_DEVICE, "CUDA: cuTensorMapEncodeTiled of %lld x %lld failed with %d",
                          (long long)rows, (long long)columns, (int)result);
}

#endif
